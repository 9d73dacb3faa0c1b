"""Pushing a run to the Hugging Face Hub: once, or in the background of its training."""

import logging
import re
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from huggingface_hub.utils import logging as hub_logging

from spo.atomic import naming
from spo.command_line.values import fill, require_choice
from spo.errors import RunError, UserError, first_line, in_one_line
from spo.hub import Destination
from spo.publish.card import merge_cards
from spo.publish.layout import CARD, lay_out
from spo.publish.record import read_config
from spo.run.checkpoint_folder import CHOSEN

_KEYS = "hub."  # of a training's destination in its config
_WAITS = (1, 4, 16)  # seconds between tries
_TOKENS = "https://huggingface.co/settings/tokens"
_LAST_PUSH = 600  # seconds that the end of a training waits


def publish_run(
    run_dir: Path, given: Mapping[str, Any], evaluation: Path | None, message: str, dry_run: bool
) -> str:
    """Writes RUN_DIR/hub, and pushes it unless it is a dry run; returns what to tell the user.

    `given` are fields of the destination that replace those of the run's `config.hub`.
    """
    to = fill(Destination, read_config(run_dir).hub, **given)
    check_destination(to, "--")
    if not dry_run:
        check_token("--")
    with naming(run_dir / "hub"):
        folder, summary = lay_out(run_dir, to, evaluation)
    if dry_run:
        card = (folder / CARD).read_text(encoding="utf-8")
        return f"{card}\nwritten, and not pushed: {folder}"
    return push(folder, to, "--", message or summary)


def check_destination(to: Destination, keys: str) -> None:
    """Raises UserError for a malformed destination; `keys`, "hub." or "--", begins its key."""
    try:
        validate_repo_id(to.repo_id)
    except HFValidationError as error:
        raise UserError(f"{keys}repo_id: {first_line(error)}") from error
    if "/" not in to.repo_id:
        raise UserError(f"{keys}repo_id: {to.repo_id!r} must be user/name.")
    require_choice(f"{keys}weights", to.weights, ("policy", "ema"))
    if to.subfolder and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", to.subfolder):
        raise UserError(f"{keys}subfolder: {to.subfolder!r} must be a folder, as sd1_5.")
    if to.checkpoint and not re.fullmatch(r"\w[\w.-]*", to.checkpoint):
        raise UserError(
            f"{keys}checkpoint: {to.checkpoint!r} must be best, or the name of a folder of "
            "checkpoints/, as epoch_0003."
        )


def check_token(keys: str) -> None:
    """Raises UserError if there is no token to push with."""
    if get_token() is None:
        raise UserError(f"{keys}repo_id: pushing needs a token: `hf auth login`, or set HF_TOKEN.")


def check_access(to: Destination) -> None:
    """Raises UserError if pushes will be refused, as far as can be seen; warns without the Hub."""
    check_destination(to, _KEYS)
    check_token(_KEYS)
    try:
        access = HfApi().whoami()["auth"].get("accessToken", {})
    except Exception as error:  # see _status
        if _status(error) in (401, 403):
            raise _explain(error, to.repo_id, f"{_KEYS}repo_id") from error
        print(f"warning: {_KEYS}repo_id: the Hub cannot be asked now ({in_one_line(error)})")
        return
    if access.get("role") == "read":
        reason = f"the token may only read; make one that may write at {_TOKENS}."
        raise UserError(f"{_KEYS}repo_id: {reason}")


def push(folder: Path, to: Destination, keys: str, message: str) -> str:
    """Commits a laid-out folder to the repo, made if missing; returns a line that says so.

    Tries again a few times if that may help. Raises UserError, or RunError if the Hub is to blame.
    """
    card = (folder / CARD).read_text(encoding="utf-8")
    waits = iter(_WAITS)
    while True:
        try:
            return _commit(folder, card, to, message)
        except UserError:
            raise
        except Exception as error:  # see _status
            wait = next(waits, None) if _may_pass(error) else None
            if wait is None:
                raise _explain(error, to.repo_id, f"{keys}repo_id") from error
        time.sleep(wait)


def _commit(folder: Path, card: str, to: Destination, message: str) -> str:
    api = HfApi()
    api.create_repo(to.repo_id, private=to.private or None, exist_ok=True)
    if to.branch:
        api.create_branch(to.repo_id, branch=to.branch, exist_ok=True)
    info = api.model_info(to.repo_id, revision=to.branch or None)
    if to.private and not info.private:
        raise UserError(
            f"private: {to.repo_id} exists and is public; choose another repo_id, or make it "
            "private on the Hub."
        )
    if any(file.rfilename == CARD for file in info.siblings):
        published = Path(api.hf_hub_download(to.repo_id, CARD, revision=info.sha))
        try:
            card = str(merge_cards(published.read_text(encoding="utf-8"), card))
        except (ValueError, KeyError, yaml.YAMLError) as error:
            reason = f"{CARD} on the Hub cannot be read as a model card ({in_one_line(error)})"
            raise UserError(f"{reason}; mend it, or delete it there.") from error
    (folder / CARD).write_text(card, encoding="utf-8")
    # parent_commit: if another run was pushed meanwhile, the Hub refuses rather than lose its section
    # of the card, and the next try starts from that card.
    commit = api.upload_folder(
        repo_id=to.repo_id,
        folder_path=folder,
        commit_message=message,
        revision=to.branch or None,
        parent_commit=info.sha,
    )
    if commit.oid == info.sha:
        return f"nothing new for {commit.repo_url}"
    return f"pushed to {commit.repo_url} ({commit.oid[:8]})"


def _may_pass(error: Exception) -> bool:
    """Returns whether the same request may succeed a little later."""
    status = _status(error)
    if status is None:
        return not isinstance(error, OfflineModeIsEnabled)
    # 409, 412: somebody else has committed meanwhile.
    return status in (408, 409, 412, 429) or status >= 500


def _explain(error: Exception, repo_id: str, key: str) -> UserError:
    """Returns an error of one line for `error`, met at pushing to `repo_id`; `key` gave the repo."""
    status, namespace = _status(error), repo_id.partition("/")[0]
    known = {
        401: f"the Hub does not accept the token (401); set HF_TOKEN to a valid one of {_TOKENS}.",
        403: f"the token may not write to {repo_id} (403); see {_TOKENS}.",
        404: f"the Hub has no {repo_id}, and no {namespace} to make it for (404); check the name.",
    }
    if status in known:
        return UserError(f"{key}: {known[status]}")
    if status is not None and not _may_pass(error):
        return UserError(f"{key}: the Hub refuses the push to {repo_id} ({in_one_line(error)}).")
    return RunError(f"{key}: cannot push to {repo_id} ({in_one_line(error)}); try again later.")


def _status(error: BaseException | None) -> int | None:
    """Returns the HTTP status in the exception or one of its causes; None for a broken connection.

    The Hub's client changes its network library, and with it the exceptions: only the status tells.
    """
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        error = error.__cause__
    return None


class Publishing:
    """The pushes of a training, on its main process; a failing push does not stop the training."""

    def __init__(
        self, run_dir: Path, to: Destination, push_every: int, say: Callable[[str], None]
    ) -> None:
        self._run_dir, self._to, self._every, self._say = run_dir, to, push_every, say
        self._command = f"python scripts/push_to_hub.py {shlex.quote(str(run_dir))}"
        # Not the client's own futures: Python waits for their threads before it exits.
        self._thread: threading.Thread | None = None
        # A failure is told in one line, and progress bars are the training's.
        disable_progress_bars()
        hub_logging.set_verbosity_error()
        for network_library in ("httpx", "httpx2"):
            logging.getLogger(network_library).setLevel(logging.WARNING)

    def due(self, epochs: int) -> bool:
        """Returns whether to push after `epochs` epochs; `finish` pushes after the last."""
        return epochs > 0 and self._every > 0 and epochs % self._every == 0

    def push(self) -> None:
        """Pushes the run directory in the background, unless the last push is still running."""
        if self._thread is not None and self._thread.is_alive():
            self._say("hub: the last push still goes on; this epoch is not pushed")
            return
        if self._to.checkpoint == CHOSEN and not (self._run_dir / CHOSEN).exists():
            newest = f"{self._command} --checkpoint=''"
            self._say(
                f"hub: not pushed: there is no best checkpoint. For the newest weights: {newest}"
            )
            return
        try:
            laid_out = lay_out(self._run_dir, self._to)
        except (UserError, OSError, ValueError) as error:
            self._warn(error)
            return
        self._thread = threading.Thread(target=self._push, args=laid_out, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Pushes the run directory at the end, and waits for at most `_LAST_PUSH` seconds."""
        deadline = time.monotonic() + _LAST_PUSH
        self._say(f"hub: pushing to {self._to.repo_id}, for at most {_LAST_PUSH} s")
        self._wait(deadline)
        self.push()
        self._wait(deadline)
        if self._thread is not None and self._thread.is_alive():
            self._warn(TimeoutError(f"still not done after {_LAST_PUSH} s"))

    def _wait(self, deadline: float) -> None:
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def _push(self, folder: Path, summary: str) -> None:
        try:
            self._say(f"hub: {push(folder, self._to, _KEYS, summary)}")
        except UserError as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        self._say(f"warning: not pushed: {in_one_line(error)} To push it: {self._command}")
