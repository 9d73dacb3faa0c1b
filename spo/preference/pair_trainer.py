"""The training loop of preference models: rows -> noised pairs -> scores -> loss -> update."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from ml_collections import ConfigDict

from spo.atomic import writing
from spo.errors import RunError, Stopped
from spo.evaluation.run_report import draw_curves
from spo.launch.workers import Workers
from spo.method.health import check_skipped
from spo.method.metrics import peak_memory_gib
from spo.models.backbone import DTYPES
from spo.models.device import set_up_device
from spo.models.gpu import TRAINING_KEYS, memory_hint
from spo.preference import pair_metrics
from spo.preference.batches import DAMAGED_IMAGE, PairBatch, decoded
from spo.preference.best import BestModel
from spo.preference.pair_learner import PreferenceLearner
from spo.preference.pair_recipe import (
    CheckedTraining,
    build_preparation,
    build_scorer,
    check_training,
)
from spo.preference.rows import (
    Share,
    describe_faults,
    stream_batches,
    table_batches,
    validation_batches,
)
from spo.preference.source import open_split
from spo.run.checkpoint_folder import new_checkpoint
from spo.run.folder import METRICS
from spo.run.resume import checkpoint_facts
from spo.run.session import Session, open_run_dir


def train_preference_model(config: ConfigDict) -> None:
    """Trains an SPM or LRM, in one process or as one of several that the launcher started.

    Raises UserError for bad input before any model loads, RunError if a run cannot continue, and
    Stopped after a signal.
    """
    with Workers(config.rank_timeout) as workers, contextlib.ExitStack() as held:
        checked = None
        with workers.together():
            if workers.is_main:
                checked = check_training(config, workers.count)
                run = open_run_dir(checked.run_dir, checked.recipe.config, checked.resume)
                held.enter_context(run)
        PreferenceTrainer(workers.from_main(checked), workers).run()


class PreferenceTrainer:
    """A run: its models, its rows, and the session that reports on it."""

    def __init__(self, checked: CheckedTraining, workers: Workers) -> None:
        self.checked, self.workers = checked, workers
        self.recipe, self.plan = recipe, plan = checked.recipe, checked.plan
        self.session = Session(checked.run_dir, workers, checked.resume.checkpoint)
        self.share = Share(workers.rank, workers.count, plan.minibatch_size)
        rows = {"train": checked.train, "validation": checked.validation}
        described = [found.description for found in rows.values() if found is not None]
        self.session.say("\n".join([*checked.train.unavailable, *described]))
        self.session.say(plan.describe())
        set_up_device(workers.device)
        with workers.together():
            self.rows = open_split(recipe.data, recipe.data.train_split)
            if checked.validation is not None:
                self.validation_rows = open_split(recipe.data, recipe.data.validation_split)
            self.preparation = build_preparation(recipe, workers.device)
            scorer = build_scorer(recipe, self.preparation.backbone)
        parallel, dtype = workers.wrap(scorer), DTYPES[recipe.mixed_precision]
        settings = (recipe.train, workers.device, dtype, workers.count)
        self.learner = PreferenceLearner(scorer, parallel, *settings)
        self.totals = Counter()  # metrics since the last line
        self.left_out = Counter(checked.train.faults)  # rows, by their faults
        self.line_is_due = False  # True between an optimizer step and its line of metrics
        self.best = BestModel(self.session, self.learner)
        if self.session.saved is not None:
            with workers.together():
                state = self.learner.load(self.session.saved)
            self.totals, self.left_out = Counter(state["totals"]), Counter(state["left_out"])
            self.line_is_due = state["line_is_due"]
            if recipe.keep_best:
                self.best.restore(state.get("best", {}), self.session.saved)
            self.session.say("\n".join([*checked.resume.describe(), *checked.changes]))
        data = {split: found and found.description for split, found in rows.items()}
        start = {"plan": asdict(plan), "data": data | {"unavailable": checked.train.unavailable}}
        step = self.learner.step
        # A run that starts from the beginning writes the line of step 0 itself.
        last = step - self.line_is_due if step else -1
        self.session.start(recipe.tracker, recipe.config, start, counter="step", last=last)

    def run(self) -> None:
        """Makes the remaining optimizer steps, then writes the model.

        Raises Stopped, with everything saved, after SIGTERM or SIGINT.
        """
        self.session.run(self.train_steps, self.save_checkpoint)
        run_dir = self.session.run_dir

        def finish() -> None:
            with writing(run_dir):
                self.best.take()
                self.learner.scorer.export(run_dir)
            self.session.close()

        self.session.on_main(finish)
        self.session.say(f"preference model: {run_dir / self.learner.scorer.exported}")
        if self.best.found:
            best = "step {step}, mean accuracy {accuracy:.4f}".format(**self.best.found)
            self.session.say(f"of the best:      {best}")
        self.session.say(f"metrics:          {run_dir / METRICS}")
        self.session.say(f"rows left out:    {describe_faults(self.left_out) or 'none'}")

    def train_steps(self) -> None:
        """Makes the remaining optimizer steps."""
        first, last = self.learner.step, self.recipe.train.max_train_steps
        self.started = time.perf_counter()
        if self.line_is_due:
            self.after_step()
        if first == 0 and self.checked.validation is not None:
            self.log({"step": 0, **self.measure_accuracy()})
            self.started = time.perf_counter()
        with contextlib.closing(self.training_batches()) as batches:
            for _ in self.session.bar(range(first, last), "steps"):
                if self.session.is_stopping():
                    raise Stopped("by a signal.")
                with self.workers.together():  # a stream may fail in only one process
                    minibatches = [next(batches) for _ in range(self.plan.accumulation_steps)]
                self.train_step(minibatches)
                self.after_step()

    def training_batches(self) -> Iterator[PairBatch]:
        """Returns this process's minibatches, from the position of the run on."""
        seed, data = self.recipe.seed, self.recipe.data
        start = self.learner.step * self.plan.accumulation_steps
        if data.streaming:
            raw = stream_batches(self.rows, seed, data.shuffle_buffer, self.share, start)
        else:
            raw = table_batches(self.rows, self.checked.train.indices, seed, self.share, start)
        return decoded(raw, data.image_size, data.num_workers, data.resize == "stretch")

    def train_step(self, minibatches: Sequence[PairBatch]) -> None:
        """Makes an optimizer step on its minibatches; raises RunError if it is not finite."""
        weight = torch.stack([batch.weights.sum() for batch in minibatches]).sum()
        total = self.workers.sum({"weight": weight.to(self.workers.device)})["weight"]
        sums = []
        for number, batch in enumerate(minibatches, start=1):
            # If no pair of an update is sound, its weights are 0 whatever they are divided by.
            with memory_hint("the base model's prediction", "lower train.predict_batch_size"):
                pairs = self.preparation.training_pairs(batch, total or 1.0)
            with memory_hint("a minibatch", TRAINING_KEYS):
                scored = self.learner.backward(pairs, last=number == len(minibatches))
            sums.append(pair_metrics.minibatch_sums(pairs, *scored))
        summed = self.workers.sum({name: sum(part[name] for part in sums) for name in sums[0]})
        self.totals.update(summed, steps=1)
        update = self.learner.update()
        norm = 0.0 if update.skipped else update.grad_norm.item()
        if not (math.isfinite(summed["loss"]) and math.isfinite(norm)):
            raise RunError(
                f"loss or gradient is not finite at step {self.learner.step}; the last checkpoint is "
                "good: resume from it with a lower train.learning_rate or mixed_precision=bf16."
            )
        if update.skipped:  # on every process, or on none
            with self.workers.together():
                limit = self.recipe.train.max_skipped_updates
                check_skipped(self.learner.skipped_in_a_row, limit)
        counts = {"skipped_updates": update.skipped, "updates": not update.skipped}
        self.totals.update(counts, grad_norm=norm)

    def after_step(self) -> None:
        """Evaluates, logs and saves if it is due."""
        recipe, step, self.line_is_due = self.recipe, self.learner.step, True
        last = step == recipe.train.max_train_steps
        saves = last or step % recipe.save_steps == 0
        evaluates = bool(recipe.eval_steps) and (last or step % recipe.eval_steps == 0)
        measured = {}
        if evaluates and self.checked.validation is not None:
            measured = self.measure_accuracy()
        # A checkpoint ends a line, so that a resumed run writes the same lines.
        if saves or evaluates or step % recipe.log_steps == 0:
            self.log(self.metrics_line() | measured)
            self.started = time.perf_counter()
        self.line_is_due = False
        if saves:
            self.save_checkpoint()

    def save_checkpoint(self) -> Path:
        """Saves everything that a resumed run needs, unless that is done; returns the folder."""
        run_dir, limit = self.session.run_dir, self.recipe.checkpoint_limit
        name = f"step_{self.learner.step:07d}"

        def save() -> None:
            state = {
                "totals": self.totals,
                "left_out": self.left_out,
                "line_is_due": self.line_is_due,
                "best": self.best.found,
                **checkpoint_facts(self.recipe.config, self.plan),
            }
            with new_checkpoint(run_dir, name, limit) as folder:
                self.learner.save(folder, state)
                self.best.copy_into(folder)

        return self.session.save_once(name, lambda: self.session.on_main(save))

    def metrics_line(self) -> dict:
        """Returns metrics of the steps since the last line."""
        totals, self.totals = self.totals, Counter()
        seconds = time.perf_counter() - self.started
        self.left_out += Counter({DAMAGED_IMAGE: int(totals[DAMAGED_IMAGE])})
        return {
            "step": self.learner.step,
            **pair_metrics.step_metrics(totals),
            "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
            "pairs_per_second": totals["pairs"] / seconds,
            "peak_memory_gib": peak_memory_gib(self.workers.device),
        }

    def measure_accuracy(self) -> dict:
        """Returns the accuracy on the validation rows, which all processes share."""
        data, usable = self.recipe.data, self.checked.validation.indices
        raw = validation_batches(self.validation_rows, usable, data.max_validation, self.share)
        batches = decoded(raw, data.image_size, data.num_workers, data.resize == "stretch")
        batches = self.session.bar(batches, "validation: minibatches")
        hint = memory_hint("the validation", "lower train.predict_batch_size or train.batch_size")
        with self.workers.together(), hint:  # a stream may fail in only one process
            batches = self.session.signals.watch(batches)
            sums = pair_metrics.validation_sums(batches, self.preparation, self.learner)
        measured = pair_metrics.validation_metrics(self.workers.sum(sums))
        best = self.best.offer(measured["accuracy"]) if self.recipe.keep_best else {}
        return measured | best

    def log(self, line: dict) -> None:
        """Writes a line of metrics, and draws the accuracy if the line has it."""

        def draw() -> None:
            with writing(self.session.run_dir):
                draw_curves(self.session.run_dir)

        self.session.log(line)
        if "accuracy" in line:
            self.session.on_main(draw)
