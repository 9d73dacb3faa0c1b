"""The paper, in the order of the data.

    ddim.py         the sampler: predictions, transitions x_t -> x_t', densities, timesteps
    rollout.py      K candidates per denoising step
    pairs.py        scores -> which candidates make a pair
    collect.py      prompts -> rollout -> scores -> pairs
    losses.py       GradSPO, SPO (LPO's, too)
    learner.py      pairs -> three predictions -> loss -> update -> EMA
    metrics.py      named numbers
    health.py       numbers that are not finite stop a run
    position.py     how far a run is
    checkpoint.py   how far a run is, on disk
    build.py        config -> values, once
    preflight.py    every check before a model loads
    start.py        config -> processes, models, session -> the loop
    trainer.py      the loop
    replay.py       the official code's traces, through the same functions

`from spo.method import stepwise_rollout, best_worst, GradSPO, Learner, Trainer` loads what it names.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "ddim": ("DDIM", "TIMESTEPS"),
    "rollout": ("RolloutSettings", "stepwise_rollout"),
    "pairs": ("PAIRINGS", "Chosen", "best_worst"),
    "collect": ("collect_rollout",),
    "losses": ("LOSSES", "GradSPO", "SPO"),
    "learner": ("Learner", "update_ema"),
    "start": ("train",),
    "trainer": ("Trainer",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
