"""The training loop: prompts -> rollout -> scores -> pairs -> loss -> LoRA update -> EMA."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from ml_collections import ConfigDict
from tqdm import tqdm

from spo import metrics, settings
from spo.backbone import Backbone
from spo.checkpoint import Position, load_checkpoint, save_checkpoint, save_networks
from spo.collect import Collected, check_scores, collect_rollout
from spo.distributed import Workers
from spo.errors import RunError
from spo.learner import Step
from spo.lora import FILE_NAME, Lora
from spo.lora_files import find_lora, read_lora
from spo.pairs import concatenate_pairs, no_pairs
from spo.preflight import Preflight, preflight
from spo.prompts import epoch_order
from spo.publish import Publishing
from spo.run_dir import drop_metrics_after, open_run_dir, record_start
from spo.scorers import load_scorer
from spo.seeding import derive_seed
from spo.tracking import METRICS, Tracking
from spo.types import PreferencePairs
from spo.validation import draw_cells, save_samples, validation_grid


def train(config: ConfigDict) -> None:
    """Train as `config` says, in one process or as one of several that accelerate started.

    Raises UserError for bad input before any model loads, and RunError where a run cannot go on.
    """
    workers = Workers()
    try:
        ready = None
        with workers.together():
            if workers.is_main:
                ready = preflight(config, workers.count)
                open_run_dir(ready.run_dir, config)
        Trainer(config, workers.from_main(ready), workers).run()
    finally:
        workers.close()


class Trainer:
    """A run: its models, its position, and where its results go."""

    def __init__(self, config: ConfigDict, ready: Preflight, workers: Workers) -> None:
        self.config, self.ready, self.workers = config, ready, workers
        self.plan, self.run_dir = ready.plan, ready.run_dir
        self.prompts = ready.prompts.prompts
        self.say(ready.prompts.describe())
        self.say(ready.plan.describe())
        with workers.together():
            self.backbone = Backbone(
                settings.model_source(config), config.family, config.mixed_precision, workers.device
            )
            self.scorer = load_scorer(settings.scorer_source(config), workers.device)
            lora = self._make_lora()
        self.learner = settings.build_learner(
            config,
            self.backbone,
            workers.wrap(self.backbone.unet),
            lora,
            self.plan.accumulation_steps,
        )
        self.position = Position(epochs=0, rollouts=0)
        if ready.checkpoint is not None:
            with workers.together():
                self.position = load_checkpoint(ready.checkpoint, self.learner)
            self.say(f"resumed from {ready.checkpoint}")
        self.tracking = self._start_tracking() if workers.is_main else None
        self.publishing = self._start_publishing() if workers.is_main else None

    def _make_lora(self) -> Lora:
        config, unet = self.config, self.backbone.unet
        if config.train.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        lora = settings.build_lora(config, unet, seed=derive_seed(config.seed, "lora"))
        if config.lora.init_from:
            key = "lora.init_from"
            path = find_lora(config.lora.init_from, key)
            lora.assign(read_lora(path, self.backbone, lora, key))
        return lora

    def _start_tracking(self) -> Tracking:
        drop_metrics_after(self.run_dir, self.position.rollouts)
        record_start(
            self.run_dir,
            {
                "plan": asdict(self.plan),
                "prompts": self.ready.prompts.describe(),
                "resumed_from": str(self.ready.checkpoint or ""),
                "device": self.workers.device.type,
            },
        )
        tracker = self.config.tracker
        return Tracking(self.run_dir, tracker.name, tracker.project, self.config.to_dict())

    def _start_publishing(self) -> Publishing | None:
        target, every = settings.destination(self.config), self.config.hub.push_every
        return Publishing(self.run_dir, target, every, self.say) if target.repo_id else None

    def run(self) -> None:
        """Train the epochs that are left, then write the final LoRA."""
        config = self.config
        if self.position.epochs == 0:
            self.draw_validation_images()
        for epoch in self.progress(range(self.position.epochs, config.num_epochs), "epochs"):
            self.train_epoch(epoch)
            done = epoch + 1
            if done % config.save_interval == 0 or done == config.num_epochs:
                self.save_checkpoint()
            if config.eval_interval and done % config.eval_interval == 0:
                self.draw_validation_images()
            if self.publishing is not None and self.publishing.due(done, config.num_epochs):
                self.save_networks()
                self.publishing.push()
        if self.tracking is not None:
            self.save_networks()
            self.tracking.close()
            self.say_where()
        if self.publishing is not None:
            self.publishing.finish()

    def train_epoch(self, epoch: int) -> None:
        """Roll out every prompt once, and after each rollout train on its pairs."""
        order = epoch_order(len(self.prompts), self.config.seed, epoch)
        size = self.plan.prompts_per_rollout
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        for index, chunk in enumerate(self.progress(chunks, f"epoch {epoch + 1}: rollouts")):
            self.iterate(epoch, index, chunk)
        self.position = Position(epoch + 1, self.position.rollouts)

    def iterate(self, epoch: int, index: int, chunk: Sequence[int]) -> None:
        """One rollout of the prompts `chunk` on all processes, and the training on its pairs."""
        started = time.perf_counter()
        collected, generator = self.roll_out(epoch, index, chunk)
        timesteps = self.learner.schedule.timesteps[self.config.sample.branch_from :]
        rollout_sums = metrics.rollout_sums(
            collected.comparisons, collected.pairs.timesteps, timesteps
        )
        pairs, left_over = self.workers.deal(collected.pairs, generator)
        rolled_out = time.perf_counter()
        steps = self.train_on(pairs)
        sums = self.workers.sum(rollout_sums | metrics.training_sums(steps, self.workers.device))
        trained = time.perf_counter()
        self.position = Position(epoch, self.position.rollouts + 1)
        rollout = metrics.rollout_metrics(sums, timesteps)
        images = rollout["comparisons"] * self.config.sample.num_candidates
        self.log(
            {
                "epoch": epoch + 1,
                "rollout": self.position.rollouts,
                "step": self.learner.updates,
                **metrics.training_metrics(sums, self.workers.count),
                **rollout,
                "pairs_left_over": left_over,
                "ema_distance": self.learner.ema_distance(),
                "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
                "seconds_rollout": rolled_out - started,
                "seconds_train": trained - rolled_out,
                "images_per_second": images / (rolled_out - started),
                "peak_memory_gib": metrics.peak_memory_gib(self.workers.device),
            }
        )

    def roll_out(
        self, epoch: int, index: int, chunk: Sequence[int]
    ) -> tuple[Collected, torch.Generator]:
        """This process's share of a rollout, and the generator that shuffles the pairs of all.

        The chunk is split into slices, process by process. A slice is seeded by its place in the
        chunk, so that one process with four slices draws what four processes with one slice draw.
        """
        count = self.plan.slices
        slices = np.array_split(np.asarray(chunk), count * self.workers.count)
        first = self.workers.rank * count
        seeds = [
            derive_seed(self.config.seed, "rollout", epoch, index, place)
            for place in range(first, first + count)
        ]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        mine = zip(slices[first : first + count], generators, strict=True)
        with self.workers.together():
            collected = [self.collect(ids.tolist(), g) for ids, g in mine if len(ids)]
        if collected:
            pairs = concatenate_pairs([part.pairs for part in collected])
        else:
            pairs = no_pairs(
                self.backbone.encode_prompts([""]),
                self.backbone.latent_shape,
                settings.pair_settings(self.config),
            )
        comparisons = tuple(c for part in collected for c in part.comparisons)
        return Collected(pairs, comparisons), generators[0]

    def collect(self, prompt_ids: list[int], generator: torch.Generator) -> Collected:
        """Roll out one slice with the sampler; RunError where a score is not finite."""
        prompts = [self.prompts[i] for i in prompt_ids]
        with self.learner.sampler():
            collected = collect_rollout(
                self.backbone,
                self.scorer,
                self.learner.schedule,
                settings.collect_settings(self.config),
                prompts,
                torch.tensor(prompt_ids, device=self.workers.device),
                generator,
            )
        check_scores(collected.comparisons, prompts)
        return collected

    def train_on(self, pairs: PreferencePairs) -> list[Step]:
        """Use every pair once; RunError on every process where a loss or gradient is not finite."""
        size = self.plan.minibatch_size
        starts = range(0, len(pairs), size)
        batches = [pairs.select(slice(start, start + size)) for start in starts]
        steps = [
            self.learner.train_minibatch(batch, index)
            for index, batch in enumerate(self.progress(batches, "minibatches"))
        ]
        with self.workers.together():
            for batch, step in zip(batches, steps, strict=True):
                self.check_finite(batch, step)
        return steps

    def check_finite(self, batch: PreferencePairs, step: Step) -> None:
        """RunError that says where, unless loss and gradient of a minibatch are finite."""
        if not step.is_finite():
            prompts = [self.prompts[i] for i in batch.prompt_ids.tolist()]
            raise RunError(
                f"loss or gradient is not finite in rollout {self.position.rollouts + 1}, about "
                f"step {self.learner.updates}, at t = {batch.timesteps.tolist()} for the prompts "
                f"{prompts}; the last checkpoint is good: resume from it with a lower "
                "train.learning_rate or mixed_precision=bf16."
            )

    def draw_validation_images(self) -> None:
        """Draw the validation prompts, shared out over the processes, as one grid."""
        prompts, which = self.ready.validation_prompts, self.config.eval.weights
        if not prompts:
            return
        mine = range(self.workers.rank, len(prompts), self.workers.count)
        with self.learner.network(which):
            cells = draw_cells(
                self.backbone,
                prompts,
                self.progress(mine, "validation images"),
                settings.image_settings(self.config),
            )
        cells = self.workers.gather(cells)
        if self.tracking is not None:
            epochs = self.position.epochs
            self.tracking.picture(
                f"validation/epoch_{epochs:04d}_{which}",
                validation_grid(cells, f"{which} LoRA after epoch {epochs}"),
                step=self.position.rollouts,
            )
            save_samples(self.run_dir, cells, which, epochs)

    def save_networks(self) -> None:
        """Write the LoRAs as they are into the run directory."""
        save_networks(self.run_dir, self.learner, settings.lora_metadata(self.config))

    def save_checkpoint(self) -> None:
        """Save, on the main process, everything that a resumed run needs."""
        gradients = self.workers.mean(self.learner.gradients())
        if self.workers.is_main:
            save_checkpoint(
                self.run_dir,
                self.learner,
                gradients,
                self.position,
                settings.lora_metadata(self.config),
                self.config.checkpoint_limit,
            )

    def log(self, line: dict) -> None:
        """Write a line of metrics, on the main process."""
        if self.tracking is not None:
            self.tracking.log(line, step=self.position.rollouts)

    def say_where(self) -> None:
        """Print where the results are."""
        self.say(f"LoRA:     {self.run_dir / FILE_NAME}")
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
