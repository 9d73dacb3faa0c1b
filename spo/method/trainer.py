"""The training loop: prompts -> rollout -> scores -> pairs -> loss -> LoRA update -> EMA."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spo.atomic import writing
from spo.errors import Stopped
from spo.lora_io.write import LORA_FILE
from spo.method.checkpoint import own_tensors, save_checkpoint, save_networks
from spo.method.collect import Collected, Slice, collect_rollout, join, slices_of
from spo.method.health import check_faults, check_scores, check_skipped, find_faults
from spo.method.metrics import Metrics, note_rollout, peak_memory_gib, time_left
from spo.method.position import Position, RolloutInProgress, TrainingState, chunks_left, epoch_order
from spo.models.gpu import TRAINING_KEYS, memory_hint
from spo.run.checkpoint_folder import link_best
from spo.run.folder import METRICS
from spo.types import PreferencePairs

if TYPE_CHECKING:
    from spo.guard.watch import Watch
    from spo.launch.workers import Workers
    from spo.method.learner import Learner, Step
    from spo.method.preflight import Preflight
    from spo.models.backbone import Backbone
    from spo.run.session import Session
    from spo.scorers import Scorer


class Trainer:
    """A training run on one of its processes, from `state` on."""

    def __init__(
        self,
        ready: Preflight,
        workers: Workers,
        session: Session,
        backbone: Backbone,
        scorer: Scorer,
        learner: Learner,
        watch: Watch | None,
        state: TrainingState,
    ) -> None:
        self.ready, self.recipe, self.plan = ready, ready.recipe, ready.plan
        self.workers, self.session, self.prompts = workers, session, ready.prompts.prompts
        self.backbone, self.scorer, self.learner, self.watch = backbone, scorer, learner, watch
        self.position: Position = state.position
        self.rollout: RolloutInProgress | None = state.rollout
        self.start = state.position

    def run(self) -> None:
        """Trains the epochs that are left, then writes the final LoRA.

        Raises Stopped, with everything saved, after SIGTERM or SIGINT.
        """
        self.session.run(self.train_epochs, self.save_checkpoint)
        self.session.on_main(self.save_networks)
        self.session.close()
        self.session.say(f"LoRA:     {self.ready.run_dir / LORA_FILE}")
        self.session.say(f"metrics:  {self.ready.run_dir / METRICS}")
        if self.watch is not None:
            self.session.say(f"pictures: {self.ready.run_dir / 'validation'}")
        self.session.finish_publishing()

    def train_epochs(self) -> None:
        """Trains the epochs that are left; looks at the images before, between and after them."""
        epochs = range(self.position.epochs, self.recipe.run.num_epochs)
        is_over = self.evaluate()
        for _ in self.session.bar(epochs, "epochs"):
            if is_over:
                break
            if not self.state.inside_epoch:
                self.session.publish(self.position.epochs, self.save_networks)
            self.train_epoch()
            is_over = self.evaluate()

    def train_epoch(self) -> None:
        """Trains on every prompt that the epoch has left: the method, from prompts to the EMA."""
        order = epoch_order(len(self.prompts), self.recipe.run.seed, self.position.epochs)
        chunks = chunks_left(order, self.state, self.plan.prompts_per_rollout)
        for chunk in self.session.bar(chunks, f"epoch {self.position.epochs + 1}: rollouts"):
            if self.rollout is None:
                # Candidates at every denoising step, drawn by the EMA -> scores -> pairs.
                self.rollout = self.collect(chunk)
            for pairs in self.minibatches():
                # Predictions of policy, reference and EMA -> loss -> update of the policy -> EMA.
                index = self.rollout.used // (self.plan.minibatch_size * self.workers.count)
                with memory_hint("a minibatch", TRAINING_KEYS):
                    step = self.learner.train_minibatch(pairs, index)
                self.trained.append((pairs, step))
                self.rollout = self.rollout.after(pairs, step, self.workers.count)
            self.complete_rollout(chunk, prompts_per_epoch=len(order))

    @property
    def state(self) -> TrainingState:
        """The progress of this process."""
        return TrainingState(self.position, self.rollout)

    def collect(self, chunk: Sequence[int]) -> RolloutInProgress:
        """Rolls out the prompts `chunk` on all processes, shuffles their pairs and deals them out.

        Raises RunError on every process if a score is not finite, and Stopped between two steps.
        """
        started = time.perf_counter()
        mine = slices_of(chunk, self.plan, self.recipe.run.seed, self.position, self.workers.rank)
        with self.workers.together():
            parts = [self._collect_slice(part) for part in mine if part.prompt_ids]
        own = join(parts, self.backbone, self.recipe.collect.pairs)
        metrics = Metrics(self.workers.device)
        branching = self.learner.sampler.timesteps[self.recipe.collect.rollout.branch_from :]
        note_rollout(metrics, own.comparisons, own.pairs.timesteps, branching)
        dealt, left_over = self.workers.deal(own.pairs, mine[0].generator)
        seconds = time.perf_counter() - started
        return RolloutInProgress(dealt, metrics, len(chunk), left_over, seconds_rollout=seconds)

    def _collect_slice(self, part: Slice) -> Collected:
        prompts = [self.prompts[i] for i in part.prompt_ids]
        keys = "lower sample.batch_size, or set cuda_graphs=false"
        with memory_hint("a rollout", keys), self.learner.drawing_network():
            collected = collect_rollout(
                self.backbone,
                self.scorer,
                self.learner.sampler,
                self.recipe.collect,
                prompts,
                torch.tensor(part.prompt_ids, device=self.workers.device),
                part.generator,
                before_step=self.session.signals.check,
            )
        check_scores(collected.comparisons, prompts)
        return collected

    def minibatches(self) -> Iterator[PreferencePairs]:
        """Yields the pairs that the rollout has left, minibatch by minibatch.

        At its end raises RunError on every process if a number is not finite, or if too many updates
        were skipped; after a signal, Stopped.
        """
        size, stopped = self.plan.minibatch_size, False
        self.trained: list[tuple[PreferencePairs, Step]] = []
        started, before = time.perf_counter(), self.rollout.seconds_train
        for _ in self.session.bar(range(0, len(self.rollout.pairs), size), "minibatches"):
            stopped = self.session.is_stopping()
            if stopped:
                break
            yield self.rollout.pairs.select(slice(size))
        # Not after each minibatch: looking at a number waits for the GPU.
        faults = self.workers.gather(find_faults(self.trained, self.prompts))
        with self.workers.together():
            check_faults(faults, self.position.rollouts + 1, self.learner.updates)
            limit = self.recipe.update.max_skipped_updates
            check_skipped(self.learner.skipped_in_a_row, limit)
        if stopped:
            raise Stopped("by a signal.")
        seconds = before + time.perf_counter() - started
        self.rollout = replace(self.rollout, seconds_train=seconds)

    def complete_rollout(self, chunk: Sequence[int], prompts_per_epoch: int) -> None:
        """Logs the rollout whose pairs are used up, and saves a checkpoint if one is due."""
        rollout, run = self.rollout, self.recipe.run
        line = {
            "epoch": self.position.epochs + 1,
            "rollout": self.position.rollouts + 1,
            "step": self.learner.updates,
            **rollout.summary(self.workers.sum(rollout.metrics.sums)),
            "ema_distance": self.learner.ema_distance(),
            "lora_norm": self.learner.lora.norm().item(),
            "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
            "peak_memory_gib": peak_memory_gib(self.workers.device),
        }
        if self.position == self.start:
            left = (run.num_epochs - self.position.epochs) * prompts_per_epoch
            left -= self.position.prompts + len(chunk)
            seconds = rollout.seconds_rollout + rollout.seconds_train
            self.session.say(time_left(seconds, rollout.prompts, left))
        self.position, self.rollout = self.position.after(len(chunk), prompts_per_epoch), None
        self.session.log(line)
        if self.position.is_checkpoint_due(
            run.save_every_rollouts, run.save_interval, run.num_epochs
        ):
            self.save_checkpoint()

    def evaluate(self) -> bool:
        """Draws and judges validation images if that is due; tells whether the run should end.

        Only between epochs. The best epoch's checkpoint is kept, as RUN_DIR/best.
        """
        position, settings = self.position, self.recipe.validation
        due = self.watch is not None and not self.state.inside_epoch
        if not due or position.epochs % self.recipe.run.eval_interval:
            return False
        with self.learner.network(settings.weights):
            verdict = self.watch.look(position.epochs, position.rollouts, self.learner.updates)
        if verdict is None:
            return False
        is_over = settings.stop_when_overoptimised and verdict.is_overoptimised
        if is_over or verdict.ship == position.epochs:
            folder = self.save_checkpoint()
        if verdict.ship == position.epochs:
            self.session.on_main(lambda: link_best(self.ready.run_dir, folder))
        if is_over:
            self.session.say(f"ended after epoch {position.epochs} by eval.stop_when_overoptimised")
        return is_over

    def save_networks(self) -> None:
        """Writes the current LoRAs into the run directory, for diffusers and for other programs."""
        from spo.lora_io.convert import write_kohya_beside

        with writing(self.ready.run_dir):
            save_networks(self.ready.run_dir, self.learner, self.recipe.lora_metadata())
            ema = self.ready.run_dir.glob(f"ema/{LORA_FILE}")
            for lora in (self.ready.run_dir / LORA_FILE, *ema):
                write_kohya_beside(lora, self.backbone.family)

    def save_checkpoint(self) -> Path:
        """Saves everything that a resumed run needs, unless that is done; returns the folder."""
        return self.session.save_once(self.state.name(), self._save_checkpoint)

    def _save_checkpoint(self) -> None:
        workers, state = self.workers, self.state
        ema = {f"ema.{name}": tensor for name, tensor in (self.learner.ema or {}).items()}
        workers.check_equal("LoRA or EMA", self.learner.lora.parameters | ema)
        mine = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in own_tensors(self.learner, state).items()
        }
        shares = workers.gather([mine], only_to_main=True)
        self.session.on_main(
            lambda: save_checkpoint(
                self.ready.run_dir,
                self.learner,
                state,
                shares,
                self.ready.facts(),
                self.recipe.lora_metadata(),
                self.recipe.run.checkpoint_limit,
            )
        )
