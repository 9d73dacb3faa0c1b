"""The training loop of the SPM: rows -> noised predictions -> scores -> loss -> update."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

import torch
from ml_collections import ConfigDict
from torch import Tensor
from tqdm import tqdm

from spo.distributed import Workers
from spo.errors import RunError
from spo.evaluation.curves import draw_accuracy
from spo.metrics import peak_memory_gib
from spo.preference import settings
from spo.preference.batches import PairBatch, decoded
from spo.preference.checkpoint import FILE_NAME, load_checkpoint, save_checkpoint, save_spm
from spo.preference.metrics import Seen, minibatch_sums, step_metrics
from spo.preference.preflight import Preflight, describe_faults, preflight
from spo.preference.rows import FAULTS, Share, stream_batches, table_batches, validation_batches
from spo.preference.source import open_split
from spo.preference.validation import accuracy, count_correct
from spo.run_dir import drop_metrics_after, open_run_dir, record_start
from spo.tracking import METRICS, Tracking

_NAMED = 4  # pairs that an error names


def train(config: ConfigDict) -> None:
    """Train as `config` says, in one process or as one of several that accelerate started.

    Raises UserError for bad input before any model loads, and RunError where a run cannot go on.
    """
    with Workers(config.rank_timeout) as workers:
        ready = None
        with workers.together():
            if workers.is_main:
                ready = preflight(config, workers.count)
                open_run_dir(ready.run_dir, config)
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
            source = settings.data_source(config)
            self.rows = open_split(source, config.data.train_split)
            if ready.validation is not None:
                self.validation_rows = open_split(source, config.data.validation_split)
            self.preparation = settings.build_preparation(config, workers.device)
            spm = settings.load_spm(config)
        self.learner = settings.build_learner(config, spm, workers)
        if ready.checkpoint is not None:
            with workers.together():
                load_checkpoint(ready.checkpoint, self.learner)
            self.say(f"resumed from {ready.checkpoint}")
        self.totals, self.left_out = Counter(), Counter(ready.train.faults)
        self.tracking = self._start_tracking() if workers.is_main else None

    def _start_tracking(self) -> Tracking:
        # A run that starts anew writes the line of step 0 itself.
        drop_metrics_after(self.run_dir, self.learner.step or -1, counter="step")
        splits = {"train": self.ready.train, "validation": self.ready.validation}
        record_start(
            self.run_dir,
            {
                "plan": asdict(self.plan),
                "data": {name: rows and rows.description for name, rows in splits.items()},
                "resumed_from": str(self.ready.checkpoint or ""),
            },
        )
        tracker = self.config.tracker
        return Tracking(self.run_dir, tracker.name, tracker.project, self.config.to_dict())

    def run(self) -> None:
        """Make the optimizer steps that are left, then write the SPM."""
        config, first = self.config, self.learner.step
        if first == 0 and self.ready.validation is not None:
            self.log({"step": 0, **self.evaluate()})
        self.started = time.perf_counter()
        with contextlib.closing(self.training_batches()) as batches:
            for _ in self.progress(range(first, config.max_train_steps), "steps"):
                with self.workers.together():  # a stream may fail in one process alone
                    update = [next(batches) for _ in range(self.plan.accumulation_steps)]
                self.train_step(update)
                self.after_step()
        if self.tracking is not None:
            save_spm(self.run_dir, self.learner.spm, as_bin=config.export.bin)
            self.tracking.close()
        self.say(f"preference model: {self.run_dir / FILE_NAME}")
        self.say(f"metrics:          {self.run_dir / METRICS}")
        self.say(f"rows left out:    {describe_faults(self.left_out) or 'none'}")

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
        self.totals.update(summed, steps=total > 0)
        if total == 0:
            self.learner.skip_update()
            return
        update = self.learner.update()
        if not (math.isfinite(summed["loss"]) and update.is_finite()):
            self.stop(seen)
        norm = 0.0 if update.skipped else update.grad_norm.item()
        counts = {"skipped_updates": update.skipped, "updates": not update.skipped}
        self.totals.update(counts, grad_norm=norm)

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
        config, step = self.config, self.learner.step
        last = step == config.max_train_steps
        saves = last or step % config.save_steps == 0
        evaluates = bool(config.eval_steps) and (last or step % config.eval_steps == 0)
        # A line ends where a checkpoint is saved: a resumed run writes the same lines.
        if saves or evaluates or step % config.log_steps == 0:
            line = self.metrics_line()
            if evaluates and self.ready.validation is not None:
                line |= self.evaluate()
            self.log(line)
            self.started = time.perf_counter()
        if saves and self.workers.is_main:
            save_checkpoint(self.run_dir, self.learner, config.checkpoint_limit)

    def metrics_line(self) -> dict:
        """Metrics of the steps since the last line."""
        totals, self.totals = self.totals, Counter()
        seconds = time.perf_counter() - self.started
        self.left_out.update({name: int(totals[name]) for name in FAULTS if totals[name]})
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
                self.progress(batches, "validation: minibatches"),
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
        if self.tracking is not None:
            self.tracking.log(line, step=line["step"])
            if "accuracy" in line:
                draw_accuracy(self.run_dir)

    def say(self, text: str) -> None:
        """Print a line, on the main process, without breaking the progress bar."""
        if self.workers.is_main:
            tqdm.write(text)

    def progress(self, items: Iterable, name: str) -> tqdm:
        """`items` with a progress bar on the main process."""
        return tqdm(items, desc=name, disable=not self.workers.is_main, leave=False)
