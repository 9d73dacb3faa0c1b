"""The evaluations of a run in its directory: a JSON file beside each grid of validation images."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spo.atomic import write_json
from spo.guard.verdict import Evaluation
from spo.run.validation import ValidationSettings, file_name


def write_evaluation(
    run_dir: Path, made: Evaluation, settings: ValidationSettings, prompts: Sequence[str]
) -> None:
    """Writes the numbers of every prompt, and how its images were drawn."""
    path = run_dir / f"{file_name(made.epochs, settings.weights)}.json"
    content = {"epochs": made.epochs, "drawn": _drawn(settings, prompts), "scores": made.scores}
    write_json(path, content)


def read_evaluations(
    run_dir: Path, settings: ValidationSettings, prompts: Sequence[str], until: int
) -> list[Evaluation]:
    """Returns the run's evaluations of images drawn in this way, up to epoch `until`, in order.

    Those of other prompts, seeds or sampler settings compare with nothing, and are left out.
    """
    found, drawn = [], _drawn(settings, prompts)
    for path in (run_dir / "validation").glob(f"epoch_*_{settings.weights}.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged one is made again
            content = json.loads(path.read_text())
            if content["epochs"] <= until and content["drawn"] == drawn:
                found.append(Evaluation(content["epochs"], content["scores"]))
    return sorted(found, key=lambda each: each.epochs)


def forget_evaluations(run_dir: Path, after: int) -> None:
    """Deletes the evaluations later than epoch `after`, which a resumed run makes again."""
    for path in (run_dir / "validation").glob("epoch_*.json"):
        if int(path.name.split("_")[1]) > after:
            path.unlink()


def _drawn(settings: ValidationSettings, prompts: Sequence[str]) -> dict[str, Any]:
    names = ("seed", "seeds_per_prompt", "num_steps", "guidance_scale")
    judged = list(prompts[: settings.num_judged])
    return {"prompts": judged} | {name: getattr(settings, name) for name in names}
