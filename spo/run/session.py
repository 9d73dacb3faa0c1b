"""The life of a long job: what it says, logs and draws, and how it stops without losing anything."""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spo.command_line.config_files import save_config
from spo.command_line.flags import is_orphan
from spo.errors import Stopped, UserError
from spo.hub import Destination
from spo.launch.processes import StopSignals
from spo.launch.workers import Workers
from spo.run.checkpoint_folder import checkpoints
from spo.run.folder import CHECKPOINTS, CONFIG, drop_metrics_after, locked, record_start, writable
from spo.run.resume import NEW_RUN, Resume
from spo.run.tracking import TrackerSettings, Tracking


def open_run_dir(
    run_dir: Path, config: Mapping[str, Any], resume: Resume = NEW_RUN
) -> contextlib.ExitStack:
    """Locks the directory, saves the config in it, renames damaged checkpoints; closing it unlocks.

    Raises UserError if that cannot be, or if another run was there since `resume` was found.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(locked(run_dir))
        if not resume.is_newest(checkpoints(run_dir)):
            raise UserError(f"run_name: another run has just used {run_dir}; start this again.")
        with writable(run_dir):
            save_config(config, run_dir / CONFIG)
            for folder in resume.damaged:  # the run can save another in its place
                aside = folder.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
        return held.pop_all()


class Session:
    """A long job on one of its processes; lines, files and pictures are the main process's.

    `saved` is the newest checkpoint, at first the one that the job resumes from.
    """

    def __init__(self, run_dir: Path, workers: Workers, saved: Path | None = None) -> None:
        self.run_dir, self.workers, self.saved = run_dir, workers, saved
        self.signals = StopSignals()
        self.tracking: Tracking | None = None  # on the main process, after the start
        self._publishing = None  # a spo.publish.push.Publishing on the main process

    def say(self, text: str) -> None:
        """Prints a line without breaking the progress bars."""
        if self.workers.is_main:
            tqdm.write(text)

    def bar(self, items: Iterable, name: str) -> tqdm:
        """Returns `items` with a progress bar."""
        return tqdm(items, desc=name, disable=not self.workers.is_main, leave=False)

    def on_main(self, work: Callable[[], object]) -> None:
        """Runs `work` on the main process; every process raises its UserError."""
        with self.workers.together():
            if self.workers.is_main:
                work()

    def start(
        self,
        tracker: TrackerSettings,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        counter: str,
        last: int,
    ) -> None:
        """Records the start, and drops metrics with `counter` past `last`: they are written again."""

        def begin() -> None:
            drop_metrics_after(self.run_dir, last, counter)
            record_start(self.run_dir, {**facts, "resumed_from": str(self.saved or "")})
            self.tracking = Tracking(self.run_dir, tracker.name, tracker.project, config)

        self.on_main(begin)

    def log(self, line: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl and sends it to the tracker, at its "step"."""
        self.on_main(lambda: self.tracking.log(line, step=line["step"]))

    def close(self) -> None:
        """Ends the tracker's run."""
        if self.tracking is not None:
            self.tracking.close()

    def start_publishing(self, to: Destination, every: int) -> None:
        """Lets `publish` push the run to the Hub after each `every` epochs, if `to` names a repo."""
        if to.repo_id and self.workers.is_main:
            from spo.publish.push import Publishing

            self._publishing = Publishing(self.run_dir, to, every, self.say)

    def publish(self, epochs: int, save: Callable[[], None]) -> None:
        """Pushes to the Hub in the background what `save` writes, if that is due."""

        def push() -> None:
            if self._publishing is not None and self._publishing.due(epochs):
                save()
                self._publishing.push()

        self.on_main(push)

    def finish_publishing(self) -> None:
        """Pushes the final state of the run to the Hub, and waits for the push."""
        if self._publishing is not None:
            self._publishing.finish()

    def is_stopping(self) -> bool:
        """Tells every process alike if any of them was asked to stop."""
        return any(self.workers.gather([self.signals.requested]))

    def run(self, work: Callable[[], None], save_checkpoint: Callable[[], Path]) -> None:
        """Runs `work`; after a signal saves a checkpoint and raises a Stopped that names it."""
        with self.signals:
            try:
                work()
            except Stopped as stopped:
                folder = save_checkpoint()
                self.close()
                why = "as the launcher was killed" if is_orphan() else "by a signal"
                raise Stopped(
                    f"{why}; everything is in {folder}: the same command with "
                    f"--config.run_name={self.run_dir.name} --config.resume_from=auto goes on."
                ) from stopped

    def save_once(self, name: str, save: Callable[[], None]) -> Path:
        """Runs `save`, unless the checkpoint `name` is the newest one already; returns its folder."""
        folder = self.run_dir / CHECKPOINTS / name
        if folder != self.saved:
            save()
            self.saved = folder
        return folder
