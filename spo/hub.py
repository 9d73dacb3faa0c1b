"""Files named by a path or by hf://user/repo/file."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from spo.errors import UserError

_SCHEME = "hf://"
PREFETCH = "python scripts/prefetch.py --config=..."


def resolve_file(spec: str, key: str, revision: str | None = None) -> Path:
    """The local path of `spec`, a path or hf://user/repo/file, downloaded where need be.

    Raises UserError that names the config `key`, and for the Hub the repo, the file and the command
    that downloads it.
    """
    if not spec.startswith(_SCHEME):
        path = Path(spec).expanduser()
        if not path.is_file():
            raise UserError(f"{key}: no file {spec!r}; name a file, or hf://user/repo/file.")
        return path
    parts = spec.removeprefix(_SCHEME).split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise UserError(f"{key}: {spec!r} is not of the form hf://user/repo/file.")
    repo, name = "/".join(parts[:2]), parts[2]
    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{key}: {name} of {repo} is not in the local cache and the Hub cannot be reached; "
            f"download it first: {PREFETCH}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{key}: cannot download {name} of {repo} ({reason}); check the name and your access, "
            f"then: {PREFETCH}"
        ) from error
