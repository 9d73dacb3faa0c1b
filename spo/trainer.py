"""The training loop: prompts -> rollout -> scores -> pairs -> loss -> LoRA update -> EMA."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import numpy as np
import torch
from ml_collections import ConfigDict
from tqdm import tqdm

from spo import metrics, settings
from spo.backbone import Backbone
from spo.checkpoint import Position, load_checkpoint, save_checkpoint, save_networks
from spo.collect import Collected, check_scores, collect_rollout
from spo.distributed import Workers
from spo.ema import distance
from spo.errors import RunError, UserError
from spo.learner import Learner, Step
from spo.lora import add_lora
from spo.lora_files import find_lora, read_lora
from spo.pairs import concatenate_pairs, no_pairs
from spo.pictures import Cell, grid, to_pil
from spo.preflight import Preflight, preflight
from spo.prompts import epoch_order
from spo.run_dir import drop_metrics_after
from spo.sampling import sample_images
from spo.scorers import load_scorer
from spo.seeding import derive_seed
from spo.tracking import Tracking
from spo.types import PreferencePairs


def train(config: ConfigDict) -> None:
    """Train as `config` says, in one process or as one of several that accelerate started.

    Raises UserError for bad input before any model loads, and RunError where a run cannot go on.
    """
    workers = Workers()
    try:
        ready, error = None, None
        if workers.is_main:
            try:
                ready = preflight(config, workers.count)
            except UserError as caught:
                error = caught
        workers.all_or_none(error)
        ready = workers.from_main(ready)
        Trainer(config, ready, workers).run()
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
        self.backbone = Backbone(
            settings.model_source(config), config.family, config.mixed_precision, workers.device
        )
        if config.train.gradient_checkpointing:
            self.backbone.unet.enable_gradient_checkpointing()
        self.scorer = load_scorer(settings.scorer_source(config), workers.device)
        self.learner = self._make_learner()
        self.position = Position(epochs=0, rollouts=0)
        if ready.checkpoint is not None:
            self.position = load_checkpoint(ready.checkpoint, self.learner)
            self.say(f"resumed from {ready.checkpoint}")
        self.tracking: Tracking | None = None
        if workers.is_main:
            drop_metrics_after(self.run_dir, self.position.rollouts)
            tracker = config.tracker
            self.tracking = Tracking(self.run_dir, tracker.name, tracker.project, config.to_dict())

    def _make_learner(self) -> Learner:
        config = self.config
        lora = add_lora(
            self.backbone.unet,
            config.lora.rank,
            settings.lora_alpha(config),
            config.lora.target_modules,
            seed=derive_seed(config.seed, "lora"),
        )
        if config.lora.init_from:
            lora.assign(read_lora(find_lora(config.lora.init_from), self.backbone, lora))
        return Learner(
            backbone=self.backbone,
            unet=self.workers.wrap(self.backbone.unet),
            lora=lora,
            optimizer=torch.optim.AdamW(
                lora.parameters.values(), **settings.optimizer_options(config)
            ),
            objective=settings.objective(config),
            schedule=self.backbone.schedule(config.sample.num_steps),
            loss_settings=settings.loss_settings(config),
            settings=settings.update_settings(config, self.plan.accumulation_steps),
            guidance_scale=config.sample.guidance_scale,
            reference=lora.snapshot() if config.lora.reference == "init" else None,
        )

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
        if self.workers.is_main:
            save_networks(self.run_dir, self.learner, settings.lora_metadata(config))
            self.tracking.close()
            self.say_where()

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
        sums = self.workers.sum(
            metrics.rollout_sums(
                collected.comparisons, collected.pairs.timesteps, self.learner.schedule.timesteps
            )
        )
        pairs, left_over = self.workers.deal(collected.pairs, generator)
        rolled_out = time.perf_counter()
        steps = self.train_on(pairs)
        training = self.workers.sum(metrics.training_sums(steps, self.workers.device))
        trained = time.perf_counter()
        self.position = Position(epoch, self.position.rollouts + 1)
        if not self.workers.is_main:
            return
        timesteps = self.learner.schedule.timesteps[self.config.sample.branch_from :]
        rollout = metrics.rollout_metrics(sums, timesteps)
        images = rollout["comparisons"] * self.config.sample.num_candidates
        line = {
            "epoch": epoch + 1,
            "rollout": self.position.rollouts,
            "step": self.learner.updates,
            **metrics.training_metrics(training, self.workers.count),
            **rollout,
            "pairs_left_over": left_over,
            "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
            "ema_distance": self.ema_distance(),
            "seconds_rollout": rolled_out - started,
            "seconds_train": trained - rolled_out,
            "images_per_second": images / (rolled_out - started),
            "peak_memory_gib": metrics.peak_memory_gib(self.workers.device),
        }
        self.tracking.log(line, step=self.position.rollouts)

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
        collected, generators, error = [], [], None
        for place in range(first, first + count):
            seed = derive_seed(self.config.seed, "rollout", epoch, index, place)
            generators.append(torch.Generator().manual_seed(seed))
            if error is None and len(slices[place]):
                try:
                    collected.append(self.collect(slices[place].tolist(), generators[-1]))
                except RunError as caught:
                    error = caught
        self.workers.all_or_none(error)
        if not collected:
            pairs = settings.pair_settings(self.config)
            conditioning = self.backbone.encode_prompts([""])
            none = no_pairs(conditioning, self.backbone.latent_shape, pairs)
            return Collected(none, comparisons=()), generators[0]
        return (
            Collected(
                concatenate_pairs([part.pairs for part in collected]),
                tuple(c for part in collected for c in part.comparisons),
            ),
            generators[0],
        )

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
        """Use every pair once; RunError, on every process, where a loss or gradient is not finite."""
        size = self.plan.minibatch_size
        starts = range(0, len(pairs), size)
        steps = []
        for index, start in enumerate(self.progress(starts, "minibatches")):
            batch = pairs.select(slice(start, start + size))
            steps.append(self.learner.train_minibatch(batch, index))
        error = None
        for index, step in enumerate(steps):
            norm = step.grad_norm if step.grad_norm is not None and not step.skipped else None
            if step.output.loss.isfinite() and (norm is None or norm.isfinite()):
                continue
            batch = pairs.select(slice(index * size, (index + 1) * size))
            error = RunError(
                f"loss or gradient is not finite at step {self.learner.updates}, t = "
                f"{batch.timesteps.tolist()}, for the prompts "
                f"{[self.prompts[i] for i in batch.prompt_ids.tolist()]}; the last checkpoint is "
                "good: resume from it with a lower train.learning_rate or mixed_precision=bf16."
            )
            break
        self.workers.all_or_none(error)
        return steps

    def draw_validation_images(self) -> None:
        """Draw the validation prompts, shared out over the processes, as one grid."""
        prompts = self.ready.validation_prompts
        if not prompts:
            return
        use_ema = self.config.eval.weights == "ema"
        image_settings = settings.image_settings(self.config)
        mine = list(range(self.workers.rank, len(prompts), self.workers.count))
        cells = []
        with self.learner.lora.using(self.learner.ema) if use_ema else contextlib.nullcontext():
            for i in self.progress(mine, "validation images"):
                images = sample_images(self.backbone, [prompts[i]], [i], image_settings)
                cells.append((i, Cell(to_pil(images)[0], prompts[i])))
        cells = sorted(self.workers.gather(cells), key=lambda numbered: numbered[0])
        if self.workers.is_main:
            row = [cell for _, cell in cells]
            epochs = self.position.epochs
            name = self.config.eval.weights
            self.tracking.picture(
                f"validation/epoch_{epochs:04d}_{name}",
                grid(
                    [row[i : i + 4] for i in range(0, len(row), 4)], f"{name} LoRA, epoch {epochs}"
                ),
                step=self.position.rollouts,
            )

    def save_checkpoint(self) -> None:
        """Save, on the main process, everything that a resumed run needs."""
        if self.workers.is_main:
            save_checkpoint(
                self.run_dir,
                self.learner,
                self.position,
                settings.lora_metadata(self.config),
                self.config.checkpoint_limit,
            )

    def ema_distance(self) -> float | None:
        """How far the EMA lags behind the policy; None without EMA."""
        if self.learner.ema is None:
            return None
        return distance(self.learner.ema, self.learner.lora.parameters).item()

    def say_where(self) -> None:
        """Print where the results are."""
        self.say(f"LoRA:     {self.run_dir / 'pytorch_lora_weights.safetensors'}")
        self.say(f"metrics:  {self.run_dir / 'metrics.jsonl'}")
        if self.ready.validation_prompts:
            self.say(f"pictures: {self.run_dir / 'validation'}")

    def say(self, text: str) -> None:
        """Print a line, on the main process, without breaking the progress bars."""
        if self.workers.is_main:
            tqdm.write(text)

    def progress(self, items: Sequence, name: str) -> tqdm:
        """`items` with a progress bar on the main process."""
        return tqdm(items, desc=name, disable=not self.workers.is_main, leave=False)
