"""The training loop: prompts -> rollout -> scores -> pairs -> loss -> LoRA update -> EMA."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from spo.atomic import writing
from spo.data.prompts import epoch_order
from spo.data.token_lengths import describe_lengths
from spo.errors import RunError, Stopped
from spo.launch.signals import StopSignals
from spo.launch.workers import Workers
from spo.lora_io.diffusers_file import LORA_FILE
from spo.lora_io.find import find_lora, read_lora
from spo.method import build, metrics
from spo.method.checkpoint import (
    Progress,
    load_checkpoint,
    own_tensors,
    save_checkpoint,
    save_networks,
)
from spo.method.health import check_skipped, find_faults
from spo.method.learner import Step
from spo.method.position import Position
from spo.method.preflight import Preflight, preflight, run_facts
from spo.method.shared_rollout import SharedRollout
from spo.models.backbone import Backbone
from spo.models.device import set_up_device, speed_up
from spo.models.lora import Lora
from spo.models.optimizers import check_optimizer
from spo.publish.push import Publishing
from spo.run.folder import CHECKPOINTS, METRICS, drop_metrics_after, record_start
from spo.run.resume import stopped_at
from spo.run.session import open_run_dir
from spo.run.tracking import Tracking
from spo.run.validation import draw_cells, save_samples, validation_grid
from spo.scorers import load_scorer, tokenizers_of
from spo.seeding import derive_seed
from spo.types import PreferencePairs


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
                check_optimizer(config.train.optimizer, workers.device)
                open_run_dir(ready.run_dir, config, ready.resume.damaged)
        Trainer(config, workers.from_main(ready), workers).run()


class Trainer:
    """A run: its models, its position, and where its results go."""

    def __init__(self, config: ConfigDict, ready: Preflight, workers: Workers) -> None:
        self.config, self.ready, self.workers = config, ready, workers
        self.plan, self.run_dir = ready.plan, ready.run_dir
        self.prompts = ready.prompts.prompts
        self.say(ready.prompts.describe())
        self.say(ready.plan.describe())
        set_up_device(workers.device, config.allow_tf32)
        with workers.together():
            self.backbone = Backbone(
                build.rollout_source(config),
                config.family,
                config.mixed_precision,
                workers.device,
            )
            self.scorer = load_scorer(build.scorer_source(config), workers.device)
            lora = self._make_lora()
            speed_up(self.backbone, self.scorer, build.speed_settings(config))
        self.learner = build.build_learner(
            config,
            self.backbone,
            workers.wrap(self.backbone.unet),
            lora,
            self.plan.accumulation_steps,
        )
        self.signals = StopSignals()
        self.source = SharedRollout(
            self.backbone,
            self.scorer,
            self.learner,
            build.collect_settings(config),
            self.plan,
            self.prompts,
            config.seed,
            workers,
            before_step=self.signals.check,
        )
        self.position, self.rollout = Position(), None
        self.saved = ready.resume.checkpoint
        if self.saved is not None:
            with workers.together():
                progress = load_checkpoint(self.saved, self.learner, self.plan, workers.rank)
            self.position, self.rollout = progress.position, progress.rollout
            self.say("\n".join([*ready.resume.describe(), *ready.changes]))
        self.start = self.position
        with workers.together():
            self.tracking = self._start_tracking() if workers.is_main else None
        self.publishing = self._start_publishing() if workers.is_main else None

    def _make_lora(self) -> Lora:
        config, unet = self.config, self.backbone.unet
        if config.train.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        lora = build.build_lora(config, unet, seed=derive_seed(config.seed, "lora"))
        if config.lora.init_from:
            key = "lora.init_from"
            path = find_lora(config.lora.init_from, key)
            lora.assign(read_lora(path, lora, key))
        return lora

    def _start_tracking(self) -> Tracking:
        tokenizers = self.backbone.tokenizers | tokenizers_of(self.scorer)
        self.say(lengths := describe_lengths(self.prompts, tokenizers))
        facts = {
            "plan": asdict(self.plan),
            "prompts": self.ready.prompts.describe(),
            "prompt_lengths": lengths,
            "resumed_from": str(self.saved or ""),
            "device": self.workers.device.type,
        }
        drop_metrics_after(self.run_dir, self.position.rollouts)
        record_start(self.run_dir, facts)
        tracker = self.config.tracker
        return Tracking(self.run_dir, tracker.name, tracker.project, self.config.to_dict())

    def _start_publishing(self) -> Publishing | None:
        target, every = build.destination(self.config), self.config.hub.push_every
        return Publishing(self.run_dir, target, every, self.say) if target.repo_id else None

    def run(self) -> None:
        """Train what is left, then write the final LoRA.

        Raises Stopped, with everything saved, after SIGTERM or SIGINT.
        """
        with self.signals:
            try:
                self.train_epochs()
            except Stopped as stopped:
                self.save_and_stop(stopped)
        with self.workers.together():
            if self.tracking is not None:
                self.save_networks()
                self.tracking.close()
                self.say_where()
        if self.publishing is not None:
            self.publishing.finish()

    def train_epochs(self) -> None:
        """Train the epochs that are left; before, between and after them, draw validation images."""
        for _ in self.progress(range(self.position.epochs, self.config.num_epochs), "epochs"):
            self.draw_validation_images()
            with self.workers.together():
                self.publish()
            self.train_epoch()
        self.draw_validation_images()

    def train_epoch(self) -> None:
        """Roll out every prompt that is left, and after each rollout train on its pairs."""
        epoch, start = self.position.epochs, self.position.prompts
        order = epoch_order(len(self.prompts), self.config.seed, epoch)
        size = self.plan.prompts_per_rollout
        first = start + (self.rollout.prompts if self.rollout else size)
        starts = [start, *range(first, len(order), size)]
        chunks = [order[a:b] for a, b in pairwise([*starts, len(order)])]
        for chunk in self.progress(chunks, f"epoch {epoch + 1}: rollouts"):
            if self.rollout is None:
                self.rollout = self.source.draw(chunk, self.position)
            self.train_on_pairs()
            line = self.metrics_line()
            if self.position == self.start:
                self.say(metrics.time_left(self.rollout, self.prompts_left() - len(chunk)))
            self.position, self.rollout = self.position.after(len(chunk), len(order)), None
            self.log(line)
            config = self.config
            if self.position.is_checkpoint_due(
                config.save_every_rollouts, config.save_interval, config.num_epochs
            ):
                self.save_checkpoint()

    def prompts_left(self) -> int:
        """Prompts that were not trained on yet, over all epochs."""
        epochs = self.config.num_epochs - self.position.epochs
        return epochs * len(self.prompts) - self.position.prompts

    def metrics_line(self) -> dict:
        """Metrics of the rollout whose pairs are used up."""
        rollout, device = self.rollout, self.workers.device
        sums = rollout.sums | self.workers.sum(metrics.training_sums(rollout.steps, device))
        return {
            "epoch": self.position.epochs + 1,
            "rollout": self.position.rollouts + 1,
            "step": self.learner.updates,
            **metrics.training_metrics(sums, self.workers.count),
            **metrics.rollout_metrics(sums),
            "pairs_left_over": rollout.left_over,
            **metrics.state_metrics(self.learner),
            **metrics.speed_metrics(rollout),
            "peak_memory_gib": metrics.peak_memory_gib(device),
        }

    def train_on_pairs(self) -> None:
        """Use every pair that is left of the rollout once, minibatch by minibatch.

        RunError on every process where a number is not finite, or too many updates were skipped;
        Stopped between minibatches.
        """
        size, done = self.plan.minibatch_size, []
        started, before = time.perf_counter(), self.rollout.seconds_train
        stopped = False
        for _ in self.progress(range(0, len(self.rollout.pairs), size), "minibatches"):
            stopped = self.workers.any(self.signals.requested)
            if stopped:
                break
            batch = self.rollout.pairs.select(slice(size))
            index = self.rollout.used // (size * self.workers.count)
            step = self.learner.train_minibatch(batch, index)
            done.append((batch, step))
            self.rollout = replace(
                self.rollout,
                pairs=self.rollout.pairs.select(slice(size, None)),
                steps=(*self.rollout.steps, metrics.step_row(step)),
                used=self.rollout.used + len(batch) * self.workers.count,
            )
        # Not after each minibatch: to look at a number waits for the GPU.
        self.check_finite(done)
        if stopped:
            raise Stopped("by a signal.")
        self.rollout = replace(self.rollout, seconds_train=before + time.perf_counter() - started)

    def check_finite(self, done: Sequence[tuple[PreferencePairs, Step]]) -> None:
        """RunError on every process unless all numbers of these minibatches are finite."""
        found = self.workers.gather(find_faults(done, self.prompts))
        with self.workers.together():
            if found:
                raise RunError(
                    f"{min(found).text}, in rollout {self.position.rollouts + 1}, about step "
                    f"{self.learner.updates}; the last checkpoint is good: resume from it with a "
                    "lower train.learning_rate or mixed_precision=bf16."
                )
            limit = self.config.train.max_skipped_updates
            check_skipped(self.learner.skipped_in_a_row, limit)

    def draw_validation_images(self) -> None:
        """Draw the validation prompts as one grid, where these are due and no epoch has begun.

        A run that was interrupted here draws them again.
        """
        prompts, which = self.ready.validation_prompts, self.config.eval.weights
        epochs, has_begun = self.position.epochs, self.position.prompts or self.rollout
        if not prompts or has_begun or epochs % self.config.eval_interval:
            return
        mine = range(self.workers.rank, len(prompts), self.workers.count)
        with self.workers.together(), self.learner.network(which):
            cells = draw_cells(
                self.backbone,
                prompts,
                self.signals.watch(self.progress(mine, "validation images")),
                build.image_settings(self.config),
            )
        cells = self.workers.gather_to_main(cells)
        with self.workers.together():
            if self.tracking is not None:
                name, title = f"validation/epoch_{epochs:04d}_{which}", f"{which} LoRA after epoch "
                picture = validation_grid(cells, title + str(epochs))
                self.tracking.picture(name, picture, step=self.position.rollouts)
                save_samples(self.run_dir, cells, which, epochs)

    def publish(self) -> None:
        """Push the LoRAs as they are to the Hub, in the background, where that is due."""
        epochs, has_begun = self.position.epochs, self.position.prompts or self.rollout
        if self.publishing is not None and not has_begun and self.publishing.due(epochs):
            self.save_networks()
            self.publishing.push()

    def save_networks(self) -> None:
        """Write the LoRAs as they are into the run directory."""
        with writing(self.run_dir):
            save_networks(self.run_dir, self.learner, build.lora_metadata(self.config))

    def save_checkpoint(self) -> Path:
        """Save, on the main process, everything that a resumed run needs, unless that is done."""
        progress = Progress(self.position, self.rollout)
        folder = self.run_dir / CHECKPOINTS / progress.name()
        if folder == self.saved:
            return folder
        ema = {f"ema.{name}": tensor for name, tensor in (self.learner.ema or {}).items()}
        self.workers.check_equal("LoRA or EMA", self.learner.lora.parameters | ema)
        mine = own_tensors(self.learner, progress)
        with self.workers.together(), self.workers.to_main(mine) as shares:
            if self.workers.is_main:
                save_checkpoint(
                    self.run_dir,
                    self.learner,
                    progress,
                    shares,
                    run_facts(self.config, self.plan, self.prompts),
                    build.lora_metadata(self.config),
                    self.config.checkpoint_limit,
                )
        self.saved = folder
        return folder

    def save_and_stop(self, stopped: Stopped) -> None:
        """Save everything, and raise a Stopped that says how to go on."""
        folder = self.save_checkpoint()
        if self.tracking is not None:
            self.tracking.close()
        raise stopped_at(folder) from stopped

    def log(self, line: dict) -> None:
        """Write a line of metrics, on the main process."""
        with self.workers.together():
            if self.tracking is not None:
                self.tracking.log(line, step=self.position.rollouts)

    def say_where(self) -> None:
        """Print where the results are."""
        self.say(f"LoRA:     {self.run_dir / LORA_FILE}")
        self.say(f"metrics:  {self.run_dir / METRICS}")
        if self.ready.validation_prompts:
            self.say(f"pictures: {self.run_dir / 'validation'}")

    def say(self, text: str) -> None:
        """Print a line, on the main process, without breaking the progress bars."""
        if self.workers.is_main:
            tqdm.write(text)

    def progress(self, items: Sequence, name: str) -> tqdm:
        """`items` with a progress bar on the main process."""
        return tqdm(items, desc=name, disable=not self.workers.is_main, leave=False)
