"""Tells which prompts of an evaluation the compared models were trained on.

The config.json of a LoRA's run names its training prompts. Prompts are compared exactly, apart from
blanks at both ends.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from spo.atomic import whole_lines
from spo.command_line.config_files import REPO_ROOT
from spo.data.prompts import PromptSet, read_prompts
from spo.errors import UserError, in_one_line
from spo.hub import public_name, resolve_file
from spo.lora_io.find import find_lora
from spo.lora_io.model_spec import ModelSpec
from spo.lora_io.write import LORA_FILE
from spo.models.loading import ModelSource
from spo.run.checkpoint_folder import checkpoints, read_state
from spo.run.folder import CHECKPOINTS, CONFIG, STARTS

# Raised by the files of a run that are missing, damaged or of something else.
_ERRORS = (UserError, OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Training:
    """The prompts that a model was trained on, as far as its run tells."""

    sources: tuple[str, ...] = ()  # of the lists that were read, without private paths
    seen: frozenset[str] = frozenset()  # the evaluation's prompts in them
    fault: str = ""  # why there is no list, or not every list


def training_of(spec: ModelSpec, base: ModelSource, prompts: Sequence[str]) -> Training:
    """Returns what is known of the training of `spec`; the base model, and it alone, has none."""
    is_base = spec.source is not None and (spec.source.model, spec.source.unet) == (
        base.model,
        None,
    )
    if not spec.loras:
        return Training() if is_base else Training(fault="there is no run beside it")
    wanted, sources, seen, fault = {p.strip() for p in prompts}, [], set(), ""
    for path, _ in spec.loras:
        try:
            for source, found in _lists(path, set()):
                sources.append(public_name(source))
                seen |= wanted & {prompt.strip() for prompt in found.prompts}
        except _ERRORS as error:
            fault = in_one_line(error)
    return Training(tuple(dict.fromkeys(sources)), frozenset(seen), fault)


def _lists(lora: Path, met: set[Path]) -> Iterator[tuple[str, PromptSet]]:
    """Yields the source and the prompts of the run of `lora`, and of the runs that it went on from."""
    folder = lora.parent.parent if lora.parent.name == "ema" else lora.parent
    if folder.parent.name == CHECKPOINTS:
        folder = folder.parent.parent
    if folder in met:
        return
    met.add(folder)
    if lora.name != LORA_FILE:
        own = _made_by(lora)
        if own is None or own != _made_by(lora.with_name(LORA_FILE)):
            raise UserError("it is a file that does not tell its run")
    config = json.loads(_config_file(lora.parent, folder).read_bytes())
    if "scorers" in config:
        raise UserError(f"the {CONFIG} beside it is that of an evaluation")
    starts = [json.loads(line) for line in whole_lines(folder / STARTS)]
    yield _read_list(folder, config["prompts"], starts)
    if before := config.get("lora", {}).get("init_from"):
        yield from _lists(find_lora(before, "lora.init_from"), met)
    for start in starts:
        before = start.get("resumed_from") or ""
        if before and Path(before).parent.parent.name != folder.name:  # a checkpoint of another run
            yield from _lists(Path(before) / LORA_FILE, met)


def _made_by(lora: Path) -> str | None:
    """Returns the digest of the config that a LoRA file of ours was trained with, by its header."""
    if not lora.is_file():
        return None
    with safe_open(lora, framework="pt") as file:
        return (file.metadata() or {}).get("config_sha256")


def _config_file(beside: Path, folder: Path) -> Path:
    """Returns the config.json of a LoRA's run; of a LoRA from the Hub, the one published with it."""
    repo, commit, inner = _in_cache(beside)
    if repo:
        return resolve_file(f"hf://{repo}/{inner}{CONFIG}", "models", commit)
    if not (folder / CONFIG).is_file():
        raise UserError(f"there is no {CONFIG} of a run beside it")
    return folder / CONFIG


def _in_cache(folder: Path) -> tuple[str, str, str]:
    """Returns repo, commit and inner folder of a folder in the Hub's cache; else empty texts."""
    head, _, tail = folder.as_posix().partition("/snapshots/")
    cached = head.rpartition("/")[2]
    if not tail or not cached.startswith("models--"):
        return "", "", ""
    commit, _, inner = tail.partition("/")
    return cached.removeprefix("models--").replace("--", "/"), commit, inner and f"{inner}/"


def _read_list(
    folder: Path, section: dict[str, Any], starts: Sequence[dict[str, Any]]
) -> tuple[str, PromptSet]:
    """Returns the source and the prompts of a config; UserError if they may not be those of the run."""
    source, own = section["source"], Path(section["source"]).expanduser()
    assets = REPO_ROOT / "assets"
    if _in_cache(folder)[0] and own.exists() and not own.resolve().is_relative_to(assets):
        raise UserError(f"its prompts, {source}, are a file of another machine")
    keys = ("source", "split", "column", "num", "seed")
    found = read_prompts(**{key: section[key] for key in keys if key in section})
    trained = set()
    for checkpoint in checkpoints(folder):
        with contextlib.suppress(UserError):  # damaged
            trained.add(read_state(checkpoint).get("prompts_sha256", found.digest()))
    # "4,000 prompts from SOURCE", then what differs when they are read again.
    told = {
        start.get("prompts", "").partition(" (")[0].partition(", as drawn")[0] for start in starts
    }
    if trained - {found.digest()} or len(told) > 1:
        raise UserError(f"its prompts, {source}, are not those, or not all, that it was trained on")
    return source, found
