"""Pushing a run to the Hugging Face Hub: once, or in the background of its training."""

from __future__ import annotations

import logging
import re
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelInfo, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from huggingface_hub.utils import logging as hub_logging

from spo.command_line.values import fill
from spo.errors import UserError, first_line, in_one_line
from spo.hub import Destination
from spo.publish.card import merge_cards
from spo.publish.hub_errors import explain, is_refusal, may_pass
from spo.publish.layout import CARD, Layout, lay_out
from spo.publish.record import read_config

_KEYS = "hub."  # of a training's destination in its config
_WAITS = (1, 4, 16)  # seconds between tries
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
    layout = lay_out(run_dir, to, evaluation)
    if dry_run:
        card = (layout.folder / CARD).read_text(encoding="utf-8")
        return f"{card}\nwritten, and not pushed: {layout.folder}"
    return push(layout, to, "--", message)


def check_destination(to: Destination, keys: str) -> None:
    """Raises UserError for a malformed repo id or subfolder.

    `keys` is "hub." or "--": the start of the key that gave each.
    """
    try:
        validate_repo_id(to.repo_id)
    except HFValidationError as error:
        raise UserError(f"{keys}repo_id: {first_line(error)}") from error
    if "/" not in to.repo_id:
        raise UserError(f"{keys}repo_id: {to.repo_id!r} must be user/name.")
    if to.subfolder and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", to.subfolder):
        raise UserError(
            f"{keys}subfolder: {to.subfolder!r} must be a folder in the repo, as sd1_5."
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
    except Exception as error:  # see spo.publish.hub_errors
        if is_refusal(error):
            raise explain(error, to.repo_id, f"{_KEYS}repo_id") from error
        print(f"warning: {_KEYS}repo_id: the Hub cannot be asked now ({in_one_line(error)})")
        return
    if access.get("role") == "read":
        raise UserError(
            f"{_KEYS}repo_id: the token may only read; make one that may write at "
            "https://huggingface.co/settings/tokens."
        )


def push(layout: Layout, to: Destination, keys: str, message: str = "") -> str:
    """Commits a laid-out folder to the repo, made if missing; returns a line that says so.

    Tries again a few times if that may help. Raises UserError, or RunError if the Hub is to blame.
    """
    card = (layout.folder / CARD).read_text(encoding="utf-8")
    waits = iter(_WAITS)
    while True:
        try:
            return _commit(HfApi(), layout, card, to, message or layout.summary)
        except UserError:
            raise
        except Exception as error:  # see spo.publish.hub_errors
            wait = next(waits, None) if may_pass(error) else None
            if wait is None:
                raise explain(error, to.repo_id, f"{keys}repo_id") from error
        time.sleep(wait)


def _commit(api: HfApi, layout: Layout, card: str, to: Destination, message: str) -> str:
    api.create_repo(to.repo_id, private=to.private or None, exist_ok=True)
    if to.branch:
        api.create_branch(to.repo_id, branch=to.branch, exist_ok=True)
    info = _model_info(api, to)
    if to.private and not info.private:
        raise UserError(
            f"private: {to.repo_id} is there already, and public; choose another repo_id, or make it "
            "private on the Hub."
        )
    if any(file.rfilename == CARD for file in info.siblings):
        card = _merged(Path(api.hf_hub_download(to.repo_id, CARD, revision=info.sha)), card, to)
    (layout.folder / CARD).write_text(card, encoding="utf-8")
    # parent_commit: if another run was pushed meanwhile, the Hub refuses rather than lose its section
    # of the card, and the next try starts from that card.
    commit = api.upload_folder(
        repo_id=to.repo_id,
        folder_path=layout.folder,
        commit_message=message,
        revision=to.branch or None,
        parent_commit=info.sha,
    )
    if commit.oid == info.sha:
        return f"nothing new for {commit.repo_url}"
    return f"pushed to {commit.repo_url} ({commit.oid[:8]})"


def _model_info(api: HfApi, to: Destination) -> ModelInfo:
    try:
        return api.model_info(to.repo_id, revision=to.branch or None)
    except RepositoryNotFoundError:
        for kind in ("dataset", "space"):
            if api.repo_exists(to.repo_id, repo_type=kind):
                raise UserError(f"{to.repo_id} is a {kind}; choose another repo_id.") from None
        raise


def _merged(published: Path, own: str, to: Destination) -> str:
    try:
        return str(merge_cards(published.read_text(encoding="utf-8"), own))
    except (ValueError, KeyError, yaml.YAMLError) as error:
        raise UserError(
            f"{CARD} of {to.repo_id} cannot be read as a model card ({in_one_line(error)}); mend it on "
            "the Hub, or delete it there."
        ) from error


class Publishing:
    """The pushes of a training, on its main process; a failing push does not stop the training."""

    def __init__(
        self, run_dir: Path, to: Destination, push_every: int, say: Callable[[str], None]
    ) -> None:
        self._run_dir, self._to, self._every, self._say = run_dir, to, push_every, say
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
        try:
            layout = lay_out(self._run_dir, self._to)
        except (UserError, OSError, ValueError) as error:
            self._warn(error)
            return
        self._thread = threading.Thread(target=self._push, args=(layout,), daemon=True)
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

    def _push(self, layout: Layout) -> None:
        try:
            self._say(f"hub: {push(layout, self._to, _KEYS)}")
        except UserError as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        again = f"python scripts/push_to_hub.py {shlex.quote(str(self._run_dir))}"
        self._say(f"warning: not pushed: {in_one_line(error)} To push it: {again}")
