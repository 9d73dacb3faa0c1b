"""Reads files by a path or hf://user/repo/file, and names repos of the Hugging Face Hub."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from spo.command_line.values import expand
from spo.errors import UserError, first_line

_SCHEME = "hf://"
# A path of this machine, alone or in a flag, in NAME=LORA:0.5+LORA, or in a sentence: up to the next.
_START = r"(?:/|~[\w.-]*/|\.\./)(?=\S)"
_BEFORE = r"[=+,\s\"'(\[{]"
_PRIVATE = re.compile(rf"(?:^|(?<={_BEFORE})){_START}.+?(?=$|{_BEFORE}{_START})", re.DOTALL)
PREFETCH = "python scripts/prefetch.py --config=..."


@dataclass(frozen=True)
class Destination:
    """The repo that a run is pushed to, and the weights that are pushed; the keys of config.hub."""

    repo_id: str
    subfolder: str = ""
    weights: str = "policy"
    private: bool = False
    branch: str = ""
    license: str = ""

    def path(self, name: str) -> str:
        """Returns the path in the repo of a file of the run."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


def resolve_file(spec: str, key: str, revision: str | None = None) -> Path:
    """Returns the local path of `spec`, a path or hf://user/repo/file, downloaded if necessary.

    Raises UserError that names the config `key` and, for the Hub, the repo, the file and the command
    that downloads it.
    """
    check_file(spec, key)
    if not spec.startswith(_SCHEME):
        return Path(expand(spec))
    user, model, name = spec.removeprefix(_SCHEME).split("/", 2)
    repo = f"{user}/{model}"
    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:
        # The Hub's client changes its network library, and so the errors of a broken connection.
        reason = "is not in the local cache and the Hub cannot be reached"
        if not isinstance(error, LocalEntryNotFoundError):
            reason = f"cannot be downloaded ({first_line(error)}; check the name and your access)"
        raise UserError(f"{key}: {name} of {repo} {reason}; fetch it first: {PREFETCH}") from error


def check_file(spec: str, key: str) -> None:
    """Raises UserError for a path without a file or a malformed hf://, without downloading."""
    if not spec.startswith(_SCHEME):
        if not Path(expand(spec)).is_file():
            raise UserError(f"{key}: no file {spec!r}; name a file, or hf://user/repo/file.")
        return
    parts = spec.removeprefix(_SCHEME).split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise UserError(f"{key}: {spec!r} is not of the form hf://user/repo/file.")


def list_files(repo: str, key: str) -> list[str]:
    """Returns the files of a Hub repo, or of its local cache if the Hub cannot be reached.

    Raises UserError that names the config `key` or flag.
    """
    try:
        return HfApi().list_repo_files(repo)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{key}: no repo {repo} on the Hub ({first_line(error)}).") from error
    except Exception as error:  # of whatever network library, as above
        try:
            folder = Path(snapshot_download(repo, local_files_only=True))
        except LocalEntryNotFoundError:
            raise UserError(
                f"{key}: {repo} is not in the local cache and the Hub cannot be reached "
                f"({first_line(error)}); download it first: {PREFETCH}"
            ) from error
        files = (path for path in folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(folder).as_posix() for path in files)


def model_file(model: str, name: str, key: str, revision: str | None = None) -> Path:
    """Returns the local path of the file `name` of a model, a folder or the Hub id user/name.

    Raises UserError that names the config `key`.
    """
    if Path(model).is_dir():
        return resolve_file(str(Path(model) / name), key)
    if is_hub_id(model):
        return resolve_file(f"hf://{model}/{name}", key, revision)
    raise UserError(f"{key}: {model!r} is neither a folder nor a Hub id user/name.")


def is_hub_id(name: str) -> bool:
    """Returns whether `name` is a Hub id, user/name, and not a local folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(expand(name)).is_dir()


def public_name(spec: str) -> str:
    """Returns `spec` safe to publish: absolute and home paths in it lose all but the last component."""
    return _PRIVATE.sub(lambda path: Path(path[0]).name, spec)
