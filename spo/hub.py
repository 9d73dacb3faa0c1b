"""Reads files by a path or hf://user/repo/file, and names repos of the Hugging Face Hub."""

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from huggingface_hub import (
    DatasetInfo,
    HfApi,
    ModelInfo,
    constants,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from spo.command_line.values import expand
from spo.errors import Unavailable, UserError, in_one_line

_SCHEME = "hf://"
# A path of this machine, alone or in a flag, in NAME=LORA:0.5+LORA, or in a sentence: up to the next.
_START = r"(?:/|~[\w.-]*/|\.\./)(?=\S)"
_BEFORE = r"[=+,\s\"'(\[{]"
_PRIVATE = re.compile(rf"(?:^|(?<={_BEFORE})){_START}.+?(?=$|{_BEFORE}{_START})", re.DOTALL)
PREFETCH = "python scripts/prefetch.py --config=..."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Destination:
    """The repo that a run is pushed to, and the weights that are pushed; the keys of config.hub."""

    repo_id: str
    subfolder: str = ""
    weights: str = "policy"
    private: bool = False
    branch: str = ""
    license: str = ""
    checkpoint: str = ""

    def path(self, name: str) -> str:
        """Returns the path in the repo of a file of the run."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


def resolve_file(spec: str, key: str, revision: str | None = None) -> Path:
    """Returns the local path of `spec`, a path or hf://user/repo/file, downloaded if necessary.

    Raises UserError that names the config `key` and, for the Hub, the repo, the file and the reason.
    """
    check_file(spec, key)
    if not spec.startswith(_SCHEME):
        return Path(expand(spec))
    user, model, name = spec.removeprefix(_SCHEME).split("/", 2)
    repo = f"{user}/{model}"
    try:
        if try_to_load_from_cache(repo, name, revision=revision) is None:
            tell_if_moved(repo)
        return Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:
        # The Hub's client changes its network library, and so the errors of a broken connection.
        raise UserError(f"{key}: {name} of {repo}: {why(error, repo)}") from error


def why(error: Exception, repo: str) -> str:
    """Returns why the Hub did not give a file of `repo` ("datasets/user/name"), and what to do."""
    page, chain = f"{constants.ENDPOINT}/{repo}", list(_causes(error))
    gated = any(isinstance(cause, GatedRepoError) or "is a gated" in str(cause) for cause in chain)
    if gated:
        return f"gated: accept the terms at {page}, then log in by `hf auth login`"
    for cause in chain:
        if isinstance(cause, RevisionNotFoundError):
            return f"no such revision; {page} lists them"
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            return f"no such file; {page}/tree/main lists them"
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, RepositoryNotFoundError) or status == 404:
            return (
                f"not found ({status or 404}): there is no such public repo at {page}; check the "
                "name, or log in by `hf auth login` if it is private"
            )
        if status in (401, 403):
            return f"refused ({status}): {page} says who may read it; log in by `hf auth login`"
        if isinstance(cause, HfHubHTTPError) and status:
            return f"the Hub answers with status {status}; try again later"
        if "Consistency check failed" in str(cause):
            return f"cut off or changed on its way ({in_one_line(cause, 120)}); try again"
        if type(cause).__name__ == "DatasetNotFoundError":
            return f"not found: there is no such public dataset at {page}, or it needs a login"
    if not any(map(_is_of_network, chain)):
        return in_one_line(error)
    if constants.HF_HUB_OFFLINE:
        return (
            f"not in the local cache, and HF_HUB_OFFLINE is set; fetch it while online: {PREFETCH}"
        )
    reason = in_one_line(chain[-1])
    return f"not in the local cache, and no answer from the Hub ({reason}); fetch it: {PREFETCH}"


def _is_of_network(error: BaseException) -> bool:
    """Returns whether the connection is at fault; the Hub's client changes its network library."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, LocalEntryNotFoundError | ConnectionError | TimeoutError) or (
        library in ("aiohttp", "httpcore", "httpx", "httpx2", "requests", "urllib3")
    )


def dataset_error(error: Exception, source: str, split: str, keys: str) -> UserError:
    """Returns what to raise for an error of `datasets`: Unavailable if the Hub is at fault.

    `source` is a folder or user/name[@revision], `keys` the config keys to check.
    """
    repo = source if Path(source).exists() else source.partition("@")[0]
    if is_hub_id(repo) and not isinstance(
        error, ValueError
    ):  # which is of the split, or the content
        return Unavailable(f"{source}: {why(error, f'datasets/{repo}')}")
    reason = f"{type(error).__name__}: {in_one_line(error)}"
    return UserError(f"cannot read dataset {source!r}, split {split!r} ({reason}); check {keys}")


@cache
def repo_info(
    repo: str, kind: str = "model", revision: str | None = None
) -> ModelInfo | DatasetInfo:
    """Returns what the Hub says of a repo, asked once; raises whatever its client raises."""
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    return HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=timeout)


@cache
def tell_if_moved(repo: str, kind: str = "model") -> None:
    """Warns if `repo` has another name on the Hub by now, to which the Hub redirects for a while."""
    try:
        found = repo_info(repo, kind).id
    except Exception:  # whoever needs the repo learns why it does not answer
        return
    if found != repo:
        logger.warning("%s has moved to %s on the Hub; name that instead", repo, found)


def check_repo(name: str, key: str) -> None:
    """Raises UserError that names the config `key` if a repo is neither cached nor on the Hub.

    Downloads nothing. `name` is user/name or hf://user/name/file; any other text passes.
    """
    repo = repo_of(name)
    if not is_hub_id(repo) or cached_snapshot(repo) is not None:
        return
    try:
        repo_info(repo)
    except Exception as error:  # of whatever network library, as above
        raise UserError(f"{key}: {repo}: {why(error, repo)}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def check_file(spec: str, key: str) -> None:
    """Raises UserError for a path without a file or a malformed hf://, without downloading."""
    if not spec.startswith(_SCHEME):
        if not Path(expand(spec)).is_file():
            raise UserError(f"{key}: no file {spec!r}; name a file, or hf://user/repo/file.")
        return
    parts = spec.removeprefix(_SCHEME).split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise UserError(f"{key}: {spec!r} is not of the form hf://user/repo/file.")


def list_files(repo: str, key: str, revision: str | None = None) -> list[str]:
    """Returns the files of a Hub repo, or of its local cache if the Hub cannot be reached.

    Raises UserError that names the config `key` or flag.
    """
    try:
        return HfApi().list_repo_files(repo, revision=revision)
    except Exception as error:  # of whatever network library, as above
        folder = cached_snapshot(repo, revision)
        if folder is None:
            raise UserError(f"{key}: {repo}: {why(error, repo)}") from error
        files = (path for path in folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(folder).as_posix() for path in files)


def cached_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """Returns the folder of the cached files of a repo, called by its commit; None if there is none.

    `snapshot_download` would not do: it refuses a cache that does not hold all files of the repo.
    """
    revision = revision or "main"
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
    ref = folder / "refs" / revision
    snapshot = folder / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    return snapshot if snapshot.is_dir() else None


def repo_of(name: str) -> str:
    """Returns the repo of user/name or hf://user/name/file; the name itself if it is none."""
    return "/".join(name.removeprefix(_SCHEME).split("/")[:2]) if name.startswith(_SCHEME) else name


def commits(names: Iterable[str | None], revision: str | None = None) -> dict[str, str]:
    """Returns the cached commit of each Hub repo among `names`, user/name or hf://user/name/file."""
    repos = map(repo_of, filter(None, names))
    found = {r: cached_snapshot(r, revision) or cached_snapshot(r) for r in repos if is_hub_id(r)}
    return {repo: folder.name for repo, folder in found.items() if folder is not None}


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
    """Returns whether `name` is a Hub id, user/name, and not a local folder or file."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(expand(name)).exists()


def public_name(spec: str) -> str:
    """Returns `spec` safe to publish: absolute and home paths in it lose all but the last component."""
    return _PRIVATE.sub(lambda path: Path(path[0]).name, spec)
