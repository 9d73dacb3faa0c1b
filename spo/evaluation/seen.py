"""Tells which prompts of an evaluation the compared models were trained on.

The config.json of a LoRA's run names its training prompts. Prompts are compared exactly, apart from
blanks at both ends.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spo.atomic import whole_lines
from spo.data.prompts import read_prompts
from spo.errors import UserError, in_one_line
from spo.hub import public_name, resolve_file
from spo.lora_io.find import find_lora
from spo.lora_io.model_spec import ModelSpec
from spo.lora_io.write import LORA_FILE
from spo.models.loading import ModelSource
from spo.run.checkpoint_folder import checkpoints, read_state
from spo.run.folder import CHECKPOINTS, CONFIG, STARTS

# Raised by the files of a run that are missing, damaged or of something else.
_ERRORS = (UserError, OSError, ValueError, KeyError, TypeError, AttributeError)
_IN_CACHE = re.compile(r"/models--([^/]+)/snapshots/([^/]+)/(.*)")  # of the Hub


@dataclass(frozen=True)
class Training:
    """The prompts that a model was trained on, as far as its run tells."""

    sources: tuple[str, ...] = ()  # of the lists that were read, without private paths
    seen: frozenset[str] = frozenset()  # the evaluation's prompts in them
    fault: str = ""  # why there is no list, or not every list


def training_of(spec: ModelSpec, base: ModelSource, prompts: Sequence[str]) -> Training:
    """Returns what is known of the training of `spec`; the base model, and it alone, has none."""
    if not spec.loras:
        return Training(fault="" if spec.source == base else "it is no LoRA of a run")
    wanted, sources, seen, fault = {p.strip() for p in prompts}, [], set(), ""
    for path, _ in spec.loras:
        try:
            for source, trained in _lists(path, set()):
                sources.append(public_name(source))
                seen |= wanted & {prompt.strip() for prompt in trained}
        except _ERRORS as error:
            fault = in_one_line(error)
    return Training(tuple(dict.fromkeys(sources)), frozenset(seen), fault)


def _lists(lora: Path, met: set[Path]) -> Iterator[tuple[str, Sequence[str]]]:
    """Yields source and prompts of the run of `lora`, and of each run that it went on from.

    Raises one of `_ERRORS` if a list cannot be read, or may not be the one that was trained on.
    """
    # runs/NAME/best is a link to a checkpoint.
    folder = (lora.parent.parent if lora.parent.name == "ema" else lora.parent).resolve()
    if folder.parent.name == CHECKPOINTS:
        folder = folder.parent.parent
    if folder in met:
        return
    met.add(folder)
    file, published = folder / CONFIG, _IN_CACHE.search(f"{lora.parent.as_posix()}/")
    if published:
        repo, commit, inner = published.groups()
        file = resolve_file(f"hf://{repo.replace('--', '/')}/{inner}{CONFIG}", "models", commit)
    if lora.name != LORA_FILE or not file.is_file():
        raise UserError("its file is not the LoRA of a run")
    config, starts = json.loads(file.read_bytes()), whole_lines(folder / STARTS)
    if "scorers" in config:
        raise UserError(f"{file} is of an evaluation")
    source, starts = config["prompts"]["source"], [json.loads(line) for line in starts]
    if published and Path(source).expanduser().exists():
        raise UserError(f"its prompts, {source}, are a file of another machine")
    found = read_prompts(**config["prompts"])
    states = [read_state(checkpoint) for checkpoint in checkpoints(folder)]
    # "4,000 prompts from SOURCE", then what differs when they are read again.
    told = {re.split(r" \(|, ", start.get("prompts", ""))[0] for start in starts}
    digests = {state.get("prompts_sha256") for state in states}
    if digests - {found.digest(), None} or len(told) > 1:
        raise UserError(f"its prompts, {source}, are not those, or not all, that it was trained on")
    yield source, found.prompts
    if before := config.get("lora", {}).get("init_from"):
        yield from _lists(find_lora(before, "lora.init_from"), met)
    for before in (Path(start.get("resumed_from") or "") for start in starts):
        if before.name and before.parent.parent.name != folder.name:  # of another run
            yield from _lists(before / LORA_FILE, met)
