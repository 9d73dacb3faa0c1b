"""The best model of a run so far, kept on the disk beside the run's newest."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo.atomic import replacing, writing
from spo.preference.pair_learner import PreferenceLearner
from spo.run.folder import BEST
from spo.run.session import Session


class BestModel:
    """What learns of `learner` at the step with the best accuracy, in a file of the run."""

    def __init__(self, session: Session, learner: PreferenceLearner) -> None:
        self.session, self.learner = session, learner
        self.path = session.run_dir / BEST
        self.found: dict[str, Any] = {}  # "step" and mean "accuracy"; empty: none yet, or all ties

    def offer(self, accuracy: Mapping[str, float | None]) -> dict:
        """Saves the model unless an earlier one is as good; returns metrics of the best one."""
        mean = sum(value or 0.0 for value in accuracy.values()) / len(accuracy)  # None: all ties
        if mean > self.found.get("accuracy", 0.0):
            self.found = {"step": self.learner.step, "accuracy": mean}
            self.session.on_main(lambda: self.learner.save_weights(self.path))
        return {"best_step": self.found.get("step")}

    def copy_into(self, checkpoint: Path) -> None:
        """Adds the best model to a checkpoint."""
        if self.found:
            shutil.copyfile(self.path, checkpoint / BEST)

    def restore(self, found: dict[str, Any], checkpoint: Path) -> None:
        """Goes on from a checkpoint, whose state holds `found`."""
        self.found = found

        def copy() -> None:
            with writing(self.path), replacing(self.path) as partial:
                shutil.copyfile(checkpoint / BEST, partial)

        if found:
            self.session.on_main(copy)

    def take(self) -> None:
        """Loads the best model, if there is one, and deletes its file, which a checkpoint has, too."""
        if self.found:
            self.learner.load_weights(self.path)
            self.path.unlink()
