"""The training loop of the SPM: rows -> noised predictions -> scores -> loss -> update."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from ml_collections import ConfigDict
from torch import Tensor
from tqdm import tqdm

from spo.atomic import writing
from spo.errors import RunError, Stopped
from spo.evaluation.curves import draw_accuracy
from spo.launch.signals import StopSignals
from spo.launch.workers import Workers
from spo.method.health import check_skipped
from spo.method.metrics import peak_memory_gib
from spo.preference import spm_build
from spo.preference.accuracy import accuracy, count_correct
from spo.preference.batches import PairBatch, decoded
from spo.preference.rows import FAULTS, Share, stream_batches, table_batches, validation_batches
from spo.preference.source import open_split
from spo.preference.spm_checkpoint import (
    Tally,
    checkpoint_name,
    load_checkpoint,
    save_checkpoint,
    save_spm,
)
from spo.preference.spm_metrics import Seen, minibatch_sums, step_metrics
from spo.preference.spm_preflight import Preflight, describe_faults, preflight
from spo.run.folder import CHECKPOINTS, METRICS, SPM_FILE, drop_metrics_after, record_start
from spo.run.resume import facts, stopped_at
from spo.run.session import open_run_dir
from spo.run.tracking import Tracking

_NAMED = 4  # pairs that an error names


def train(config: ConfigDict) -> None:
    """Train as `config` says, in one process or as one of several that accelerate started.

    Raises UserError for bad input before any model loads, RunError where a run cannot go on, and
    Stopped after a signal.
    """
    with Workers(config.rank_timeout) as workers:
        ready = None
        with workers.together():
            if workers.is_main:
                ready = preflight(config, workers.count)
                open_run_dir(ready.run_dir, config, ready.resume.damaged)
        PreferenceTrainer(config, workers.from_main(ready), workers).run()


class PreferenceTrainer:
    """A run: its models, its rows, and where its results go."""

    def __init__(self, config: ConfigDict, ready: Preflight, workers: Workers) -> None:
        self.config, self.ready, self.workers = config, ready, workers
        self.plan, self.run_dir = ready.plan, ready.run_dir
        self.share = Share(workers.rank, workers.count, ready.plan.minibatch_size)
        for rows in (ready.train, ready.validation):
            if rows is not None:
                self.say(rows.description)
        self.say(ready.plan.describe())
        with workers.together():
            source = spm_build.data_source(config)
            self.rows = open_split(source, config.data.train_split)
            if ready.validation is not None:
                self.validation_rows = open_split(source, config.data.validation_split)
            self.preparation = spm_build.build_preparation(config, workers.device)
            spm = spm_build.load_spm(config)
        self.learner = spm_build.build_learner(config, spm, workers)
        self.signals = StopSignals()
        self.tally = Tally(left_out=Counter(ready.train.faults))
        self.saved = ready.resume.checkpoint
        if self.saved is not None:
            with workers.together():
                self.tally = load_checkpoint(self.saved, self.learner)
            self.say("\n".join([*ready.resume.describe(), *ready.changes]))
        with workers.together():
            self.tracking = self._start_tracking() if workers.is_main else None

    def _start_tracking(self) -> Tracking:
        step = self.learner.step
        # A run that starts anew writes the line of step 0 itself.
        last = step - self.tally.line_is_due if step else -1
        drop_metrics_after(self.run_dir, last, counter="step")
        splits = {"train": self.ready.train, "validation": self.ready.validation}
        record_start(
            self.run_dir,
            {
                "plan": asdict(self.plan),
                "data": {name: rows and rows.description for name, rows in splits.items()},
                "resumed_from": str(self.saved or ""),
            },
        )
        tracker = self.config.tracker
        return Tracking(self.run_dir, tracker.name, tracker.project, self.config.to_dict())

    def run(self) -> None:
        """Make the optimizer steps that are left, then write the SPM.

        Raises Stopped, with everything saved, after SIGTERM or SIGINT.
        """
        with self.signals:
            try:
                self.train_steps()
            except Stopped as stopped:
                self.save_and_stop(stopped)
        with self.workers.together():
            if self.tracking is not None:
                with writing(self.run_dir):
                    save_spm(self.run_dir, self.learner.spm, as_bin=self.config.export.bin)
                self.tracking.close()
        self.say(f"preference model: {self.run_dir / SPM_FILE}")
        self.say(f"metrics:          {self.run_dir / METRICS}")
        self.say(f"rows left out:    {describe_faults(self.tally.left_out) or 'none'}")

    def train_steps(self) -> None:
        """Make the optimizer steps that are left."""
        config, first = self.config, self.learner.step
        self.started = time.perf_counter()
        if self.tally.line_is_due:
            self.after_step()
        if first == 0 and self.ready.validation is not None:
            self.log({"step": 0, **self.evaluate()})
            self.started = time.perf_counter()
        with contextlib.closing(self.training_batches()) as batches:
            for _ in self.progress(range(first, config.max_train_steps), "steps"):
                if self.workers.any(self.signals.requested):
                    raise Stopped("by a signal.")
                with self.workers.together():  # a stream may fail in one process alone
                    update = [next(batches) for _ in range(self.plan.accumulation_steps)]
                self.train_step(update)
                self.after_step()

    def training_batches(self) -> Iterator[PairBatch]:
        """This process's minibatches, from the position of the run on."""
        config, data = self.config, self.config.data
        start = self.learner.step * self.plan.accumulation_steps
        if data.streaming:
            raw = stream_batches(self.rows, config.seed, data.shuffle_buffer, self.share, start)
        else:
            usable = self.ready.train.usable
            raw = table_batches(self.rows, usable, config.seed, self.share, start)
        return decoded(raw, data.image_size, data.num_workers)

    def train_step(self, batches: Sequence[PairBatch]) -> None:
        """One optimizer step on the minibatches that make it up; RunError if it is not finite."""
        weight = torch.stack([batch.weights.sum() for batch in batches]).sum()
        total = self.workers.sum({"weight": weight.to(self.workers.device)})["weight"]
        sums, seen = [], []
        for number, batch in enumerate(batches, start=1):
            # Where no pair of an update is sound, its weights are 0 whatever they are divided by.
            pairs = self.preparation.training_pairs(batch, total or 1.0)
            judged = self.learner.backward(pairs, last=number == len(batches))
            sums.append(minibatch_sums(batch, pairs, judged, self.preparation.num_timesteps))
            seen.append(Seen(batch.captions, pairs.timesteps, pairs.weights, judged.losses))
        summed = self.workers.sum({name: sum(part[name] for part in sums) for name in sums[0]})
        self.tally.totals.update(summed, steps=total > 0)
        if total == 0:
            self.learner.skip_update()
            return
        update = self.learner.update()
        if not (math.isfinite(summed["loss"]) and update.is_finite()):
            self.stop(seen)
        if update.skipped:  # on every process, or on none
            with self.workers.together():
                limit = self.config.train.max_skipped_updates
                check_skipped(self.learner.skipped_in_a_row, limit)
        norm = 0.0 if update.skipped else update.grad_norm.item()
        counts = {"skipped_updates": update.skipped, "updates": not update.skipped}
        self.tally.totals.update(counts, grad_norm=norm)

    def stop(self, seen: Sequence[Seen]) -> None:
        """Raise the RunError of a loss or gradient that is not finite."""
        found = self.workers.gather([where for minibatch in seen for where in minibatch.broken()])
        places = "; ".join(found[:_NAMED]) or "no pair by itself"
        if len(found) > _NAMED:
            places += f"; and {len(found) - _NAMED} more"
        with self.workers.together():
            raise RunError(
                f"loss or gradient is not finite at step {self.learner.step} ({places}); the last "
                "checkpoint is good: resume from it with a lower train.learning_rate or "
                "mixed_precision=bf16."
            )

    def after_step(self) -> None:
        """Evaluate, log and save where these are due."""
        config, step, self.tally.line_is_due = self.config, self.learner.step, True
        last = step == config.max_train_steps
        saves = last or step % config.save_steps == 0
        evaluates = bool(config.eval_steps) and (last or step % config.eval_steps == 0)
        measured = {}
        if evaluates and self.ready.validation is not None:
            measured = self.evaluate()
        # A line ends where a checkpoint is saved.
        if saves or evaluates or step % config.log_steps == 0:
            self.log(self.metrics_line() | measured)
            self.started = time.perf_counter()
        self.tally.line_is_due = False
        if saves:
            self.save_checkpoint()

    def save_checkpoint(self) -> Path:
        """Save, on the main process, everything that a resumed run needs, unless that is done."""
        folder = self.run_dir / CHECKPOINTS / checkpoint_name(self.learner)
        if folder == self.saved:
            return folder
        with self.workers.together():
            if self.workers.is_main:
                facts_of_run = facts(self.config, self.plan)
                limit = self.config.checkpoint_limit
                save_checkpoint(self.run_dir, self.learner, self.tally, facts_of_run, limit)
        self.saved = folder
        return folder

    def save_and_stop(self, stopped: Stopped) -> None:
        """Save everything, and raise a Stopped that says how to go on."""
        folder = self.save_checkpoint()
        if self.tracking is not None:
            self.tracking.close()
        raise stopped_at(folder) from stopped

    def metrics_line(self) -> dict:
        """Metrics of the steps since the last line."""
        totals, self.tally.totals = self.tally.totals, Counter()
        seconds = time.perf_counter() - self.started
        left_out = {name: int(totals[name]) for name in FAULTS if totals[name]}
        self.tally.left_out.update(left_out)
        return {
            "step": self.learner.step,
            **step_metrics(totals, self.preparation.num_timesteps),
            "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
            "pairs_per_second": totals["pairs"] / seconds,
            "peak_memory_gib": peak_memory_gib(self.workers.device),
        }

    def evaluate(self) -> dict:
        """Accuracy on the validation rows, shared out over the processes."""
        data, preparation = self.config.data, self.preparation
        usable = self.ready.validation.usable
        raw = validation_batches(self.validation_rows, usable, data.max_validation, self.share)
        batches = decoded(raw, data.image_size, data.num_workers)
        with self.workers.together():  # a stream may fail in one process alone
            sums = count_correct(
                self.signals.watch(self.progress(batches, "validation: minibatches")),
                self.scores_at,
                preparation.labels,
                self.workers.device,
            )
        return accuracy(self.workers.sum(sums))

    def scores_at(self, batch: PairBatch, timestep: int) -> Tensor:
        """Scores (n, 2) of a validation minibatch."""
        pixels = self.preparation.validation_pixels(batch, timestep)
        timesteps = torch.full((len(batch),), timestep, device=pixels.device)
        return self.learner.features(pixels, timesteps, self.preparation.input_ids(batch)).scores

    def log(self, line: dict) -> None:
        """Write a line of metrics, on the main process, and where it tells accuracy, draw that."""
        with self.workers.together():
            if self.tracking is not None:
                self.tracking.log(line, step=line["step"])
                if "accuracy" in line:
                    with writing(self.run_dir):
                        draw_accuracy(self.run_dir)

    def say(self, text: str) -> None:
        """Print a line, on the main process, without breaking the progress bar."""
        if self.workers.is_main:
            tqdm.write(text)

    def progress(self, items: Iterable, name: str) -> tqdm:
        """`items` with a progress bar on the main process."""
        return tqdm(items, desc=name, disable=not self.workers.is_main, leave=False)
