"""Tells the files of a model or a scorer by their content, as a name may mean others tomorrow."""

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path

from spo.command_line.values import expand
from spo.hub import cached_snapshot, is_hub_id, repo_info, repo_of
from spo.lora_io.write import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from spo.models.loading import ModelSource
from spo.run.folder import file_digest

_LOADED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".txt", ".model")
_DIGESTED = 2**30  # bytes; to read more takes seconds


def contents(names: Mapping[str, str | None], revision: str | None = None) -> dict[str, str]:
    """Returns the content of each of `names` that is a file, a folder or of the Hub."""
    found = {}
    for key, name in names.items():
        with contextlib.suppress(OSError):  # a text that is no path, or a file for nobody to read
            found[f"content of {key}"] = name and _content(name, revision)
    return {key: each for key, each in found.items() if each}


def source_contents(source: ModelSource) -> dict[str, str]:
    """Returns the content of a base model and of each part that replaces its own."""
    parts = {"vae": source.vae, "unet": source.unet}
    return contents({"model": source.model}, source.revision) | contents(parts)


def lora_content(path: Path) -> str:
    """Returns the content of a LoRA file, with that of peft's config beside it."""
    config = path.with_name(ADAPTER_CONFIG)
    is_peft = path.name == ADAPTER_WEIGHTS and config.exists()
    return file_digest(path) + (file_digest(config) if is_peft else "")


def _content(name: str, revision: str | None) -> str | None:
    if (repo := repo_of(name)) != name:  # hf://...
        return _commit(repo, revision)
    path = Path(expand(name))
    if path.is_dir():
        # Two levels hold every file of a pipeline, and none of what else may lie in its folder.
        inside = sorted(p for pattern in ("*", "*/*") for p in path.glob(pattern))
        files = [p for p in inside if p.suffix in _LOADED and p.is_file()]
        lines = [f"{p.relative_to(path).as_posix()} {_of_file(p)}" for p in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if path.is_file():
        return _of_file(path)
    return _commit(name, revision) if is_hub_id(name) else None


def _of_file(path: Path) -> str:
    stat = path.stat()
    if stat.st_size > _DIGESTED:
        return f"{stat.st_size} bytes of {stat.st_mtime_ns}"
    return file_digest(path)


def _commit(repo: str, revision: str | None) -> str | None:
    """Returns the commit that a Hub repo is loaded at; None for what is no repo."""
    try:
        return repo_info(repo, revision=revision).sha
    except Exception:  # of whatever network library: what is loaded then is the local copy
        folder = cached_snapshot(repo, revision)
        return folder and folder.name
