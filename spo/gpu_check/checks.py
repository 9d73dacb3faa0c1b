"""The checks, most valuable first; each runs in a process of its own and returns figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo.plugins import find

TRACES, MODELS = Path("tests/data/golden"), Path("tests/data/golden/models")


@dataclass(frozen=True)
class Place:
    """Where a check runs: on "cuda", or on "cpu" at tiny size, which finds its own faults."""

    device: str
    out: Path  # folder of all checks' files
    name: str = ""  # of the check that runs

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    @property
    def runs(self) -> Path:
        """The folder of the runs that checks make."""
        return self.out / "check_runs"

    def file(self, name: str) -> Path:
        """Returns where the figures of the check `name` are."""
        return self.out / f"{name.replace(' ', '_').replace('/', '_')}.json"


@dataclass(frozen=True)
class Check:
    """A function `(place, *arguments) -> figures`; figures["failures"] says what is wrong.

    `seconds` is its limit on a GPU. Checks of one group run side by side, groups one after another.
    """

    name: str
    function: str  # "module:name"
    group: str
    seconds: int
    arguments: tuple[str, ...] = ()

    def run(self, place: Place) -> dict[str, Any]:
        """Runs the check in this process."""
        function: Callable[..., dict[str, Any]] = find(self.function, {}, "check")
        return function(place, *self.arguments)


def all_checks() -> list[Check]:
    """Returns the checks in their order."""
    here = "spo.gpu_check"
    sd15, sdxl = "config/sd15.py", "config/sdxl.py"
    recorded = sorted(path.parent.name for path in TRACES.glob("*/meta.json"))
    return [
        Check("card", f"{here}.card:card", "card", 60),
        *(Check(f"trace {n}", f"{here}.checks:trace", "correct", 120, (n,)) for n in recorded),
        Check("tiny fp16", f"{here}.runs:tiny_world", "correct", 240, ("fp16",)),
        Check("tiny bf16", f"{here}.runs:tiny_world", "correct", 240, ("bf16",)),
        Check("resume", f"{here}.runs:killed_and_resumed", "correct", 150),
        Check("repeat", f"{here}.runs:repeated", "correct", 150, ("false",)),
        Check("repeat deterministic", f"{here}.runs:repeated", "correct", 150, ("true",)),
        Check("graphs", f"{here}.runs:recorded", "correct", 150),
        Check("nccl", f"{here}.runs:world_of_one", "correct", 150),
        Check("sdxl spo", f"{here}.runs:small_sdxl", "correct", 120),
        Check("overflow", f"{here}.overflow:overflow", "correct", 90),
        Check("sd15", f"{here}.speed:full_size", "sd15", 180, (sd15,)),
        Check("sdxl", f"{here}.speed:full_size", "sdxl", 300, (sdxl,)),
        Check("sd15 compiled", f"{here}.speed:compiled", "sd15 compiled", 300, (sd15,)),
        Check("sdxl compiled", f"{here}.speed:compiled", "sdxl compiled", 400, (sdxl,)),
    ]


def trace(place: Place, name: str) -> dict[str, Any]:
    """Replays a recorded run of the official code in fp32, TF32 off, to the CPU's tolerances."""
    import torch

    from spo.method.replay import replay_trace
    from spo.preference.replay import replay_latent_reward

    folder = TRACES / name
    recorded = json.loads((folder / "meta.json").read_text())
    replay = replay_trace if "rollouts" in recorded else replay_latent_reward
    report = replay(folder, MODELS, torch.device(place.device))
    parts = report.get("cases") or dict(enumerate(report["rollouts"]))
    worst: dict[str, float] = {}
    for part in parts.values():
        for quantity, value in part.items():
            worst[quantity] = max(worst.get(quantity, 0.0), value if value is not None else 1e9)
    text = ", ".join(f"{quantity} {value:.0e}" for quantity, value in worst.items() if value)
    return {"summary": text, "worst": worst, "failures": report["failures"]}
