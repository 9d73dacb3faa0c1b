"""Exceptions of the Hub's client, explained to the user.

The client changes its network library, and with it the exceptions of a broken connection: they are
told apart by the HTTP status in the exception or one of its causes, or by the lack of one.
"""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from spo.errors import RunError, UserError, in_one_line

_TOKENS = "https://huggingface.co/settings/tokens"


def may_pass(error: Exception) -> bool:
    """Returns whether the same request may succeed a little later."""
    status = _status(error)
    if status is None:
        return not isinstance(error, OfflineModeIsEnabled)
    # 409, 412: somebody else has committed meanwhile.
    return status in (408, 409, 412, 429) or status >= 500


def is_refusal(error: Exception) -> bool:
    """Returns whether the Hub refuses the token."""
    return _status(error) in (401, 403)


def explain(error: Exception, repo_id: str, key: str) -> UserError:
    """Returns an error of one line for `error`, met at pushing to `repo_id`; `key` gave the repo."""
    status, namespace = _status(error), repo_id.partition("/")[0]
    if status == 401:
        return UserError(
            f"{key}: the Hub does not accept the token (401); `hf auth login`, or set HF_TOKEN to a "
            f"valid one of {_TOKENS}."
        )
    if status == 403:
        return UserError(
            f"{key}: the token may not write to {repo_id} (403); it needs the write scope for "
            f"{namespace}, see {_TOKENS}."
        )
    if status == 404:
        return UserError(
            f"{key}: the Hub has no {repo_id}, and no {namespace} to make it for (404); check the name."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return RunError(f"{key}: HF_HUB_OFFLINE is set; unset it to push to {repo_id}.")
    if status is not None and not may_pass(error):
        return UserError(f"{key}: the Hub refuses the push to {repo_id} ({in_one_line(error)}).")
    return RunError(f"{key}: cannot push to {repo_id} ({in_one_line(error)}); try again later.")


def _status(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        error = error.__cause__
    return None
