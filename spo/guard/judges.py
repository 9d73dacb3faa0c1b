"""Judges: scorers of finished images that a run does not train on."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from spo.errors import UserError, in_one_line
from spo.scorers import (
    SCORERS,
    Scorer,
    ScorerSource,
    check_scorer,
    load_scorer,
    looks_at,
    options_of,
)

_WEIGHTS = ("checkpoint", "backbone")  # the options of scorers that name trained weights


def find_judges(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]], trained_on: ScorerSource
) -> tuple[tuple[ScorerSource, ...], tuple[str, ...]]:
    """Returns the judges that `eval.judges` names, not loaded, and lines on some of them.

    Left out, with a line, are the training scorer, as what is pushed up judges nothing, and judges
    whose files are not there, as far as small ones tell. A judge with the training scorer's backbone
    stays, and a line says so. Raises UserError for a name or option that no scorer has.
    """
    # Options of a scorer that judges in other runs are no mistake.
    if unknown := options.keys() - set(names) - set(SCORERS):
        raise UserError(
            f"eval.judge_options.{min(unknown)}: there is no such judge in eval.judges."
        )
    own, found, lines = options_of(trained_on), [], []
    for name in dict.fromkeys(names):
        given = dict(options.get(name, {}))
        source = ScorerSource(name, given, f"eval.judge_options.{name}", "eval.judges")
        if looks_at(source) == "latents":
            raise UserError(f"eval.judges: {name} looks at latents, not at finished images.")
        values = options_of(source)
        shared = {str(values[key]) for key in _WEIGHTS if values.get(key)}
        shared &= {str(own[key]) for key in _WEIGHTS if own.get(key)}
        if name == trained_on.name and (shared or not own.keys() & set(_WEIGHTS)):
            lines.append(f"eval.judges: {name} is what the run trains on, and is left out")
            continue
        try:
            check_scorer(source)
        except (UserError, ImportError) as error:
            lines.append(without(name, error))
            continue
        found.append(source)
        if shared:
            what = f"{', '.join(sorted(shared))} with {trained_on.name}, which the run trains on"
            lines.append(f"eval.judges: {name} shares {what}: not independent of it")
    return tuple(found), tuple(lines)


def without(judge: str, why: object) -> str:
    """Returns a line that warns that a judge is missing."""
    return f"warning: the run goes on without the judge {judge}: {in_one_line(why)}"


class Judges:
    """The judges of a run, loaded once; on a GPU only while they judge."""

    def __init__(self, sources: Sequence[ScorerSource], device: torch.device) -> None:
        self.device, self.failed = device, {}  # by judge: why it could not be loaded
        self.scorers: dict[str, Scorer] = {}
        for source in sources:
            try:
                self.scorers[source.name] = load_scorer(source, device)
            except Exception as error:  # whatever is wrong with a judge, the run goes on
                self.failed[source.name] = without(source.name, error)
        self._move(torch.device("cpu"))

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Within the context the judges are on the device, whose memory is training's otherwise."""
        self._move(self.device)
        try:
            yield
        finally:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        if self.device.type == "cpu":
            return
        for scorer in self.scorers.values():
            for part in vars(scorer).values():
                if isinstance(part, nn.Module):
                    part.to(device)
