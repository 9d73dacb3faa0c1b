"""Downloads small files by their address, checks them, and keeps them in the Hub's cache."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from filelock import FileLock
from huggingface_hub import constants

from spo.atomic import write_file
from spo.errors import Unavailable, UserError, in_one_line

_CHECKSUM = "#sha256="
_LARGEST = 64 * 2**20  # bytes; lists of prompts have less than one percent of it


@dataclass(frozen=True)
class WebFile:
    """A file of the web on this disk."""

    path: Path
    moved_to: str = ""  # the address that a redirect led to in this download


def is_address(source: str) -> bool:
    """Returns whether `source` is the address of a file on the web."""
    return source.startswith(("https://", "http://"))


def assets(kind: str) -> Path:
    """Returns the folder, in the Hub's cache of assets, of files that spo keeps; it may not exist."""
    return Path(constants.HF_ASSETS_CACHE, "spo", "prompts", kind)


def fetch(address: str) -> WebFile:
    """Returns the file at `address`, https://...[#sha256=...], downloaded at the first call only.

    One process downloads while others wait. Raises Unavailable if the address does not answer or
    answers with other content, UserError if `address` is malformed or the disk cannot be written.
    """
    url, _, wanted = address.partition(_CHECKSUM)
    if "#" in address and not re.fullmatch("[0-9a-f]{64}", wanted):
        raise UserError(f"{address}: after # stands sha256= with 64 digits of 0-9 and a-f")
    file = _kept_as(url, wanted)
    if _is_kept(file, wanted):
        return WebFile(file)
    if constants.HF_HUB_OFFLINE:
        raise Unavailable(f"{url}: not in the cache, and HF_HUB_OFFLINE is set")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if _is_kept(file, wanted):
                return WebFile(file)
            with open_address(url) as response:
                content, final = response.read(_LARGEST + 1), response.url
            if len(content) > _LARGEST:
                raise Unavailable(f"{url}: more than {_LARGEST >> 20} MiB, no list of prompts")
            found = hashlib.sha256(content).hexdigest()
            if wanted and found != wanted:
                raise Unavailable(
                    f"{url}: changed content (its sha256 is {found}, it should be {wanted})"
                )
            write_file(file, content)
    except OSError as error:  # not of the network
        raise UserError(
            f"cannot keep {url} as {file} ({error.strerror or error}); set HF_HOME to another folder"
        ) from error
    return WebFile(file, moved_to="" if final == url else final)


def kept(address: str) -> Path | None:
    """Returns the file at `address` if it was downloaded before."""
    url, _, wanted = address.partition(_CHECKSUM)
    file = _kept_as(url, wanted)
    return file if _is_kept(file, wanted) else None


def _kept_as(url: str, wanted: str) -> Path:
    # By its content where that is known, so that every mirror's is the same file.
    digest = wanted or hashlib.sha256(url.encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "_", url.partition("?")[0].rpartition("/")[2])
    return assets("files") / f"{digest[:16]}-{name[-100:]}"


def _is_kept(file: Path, wanted: str) -> bool:
    if not file.is_file():
        return False
    return not wanted or hashlib.sha256(file.read_bytes()).hexdigest() == wanted


@contextmanager
def open_address(request: str | Request) -> Iterator[HTTPResponse]:
    """Yields the answer of a web server, after redirects; raises Unavailable that says why not."""
    url = request if isinstance(request, str) else request.full_url
    try:
        # Proxies and certificates are those of the environment.
        with urlopen(request, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            yield response
    except HTTPError as error:
        raise Unavailable(f"{url}: {_meaning(error.code)}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = in_one_line(getattr(error, "reason", error))
        raise Unavailable(f"{url}: no answer ({reason}); is there a network?") from error


def _meaning(status: int) -> str:
    if status in (404, 410):
        return f"not found ({status})"
    if status in (401, 403):
        return f"refused ({status}); open it in a browser to see what it asks for"
    return f"answers with status {status}"
