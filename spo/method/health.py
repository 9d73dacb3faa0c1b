"""Numbers that are not finite stop a run with one line that says where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo.errors import RunError, named
from spo.types import Comparison, PreferencePairs

if TYPE_CHECKING:
    from spo.method.learner import Step


def check_scores(comparisons: Sequence[Comparison], prompts: Sequence[str]) -> None:
    """Raises RunError that names timestep and prompts if a score is not finite."""
    for comparison in comparisons:
        bad = ~comparison.scores.isfinite().all(dim=0)
        if bad.any():
            where = named([prompts[i] for i in bad.nonzero().flatten().tolist()])
            raise RunError(
                f"scores are not finite at t = {comparison.score_timestep} for the prompts {where}; "
                "the scorer or the sampler overflowed: try mixed_precision=bf16 or "
                "preference.dtype=float32 (of latent_reward: preference.kwargs.dtype), or lower "
                "train.learning_rate."
            )


def check_images(images: Tensor, prompts: Sequence[str], model: str) -> None:
    """Raises RunError that names the prompts if an image (n, 3, H, W) of `model` is not finite."""
    sound = images.isfinite().flatten(1).all(dim=1).tolist()
    bad = [prompt for prompt, is_sound in zip(prompts, sound, strict=True) if not is_sound]
    if bad:
        raise RunError(
            f"images of {model} are not finite for the prompts {named(bad)}; its UNet or VAE "
            "overflowed: try mixed_precision=bf16 or no."
        )


@dataclass(frozen=True, order=True)
class Fault:
    """A number that is not finite; of all processes' faults the smallest is the origin."""

    minibatch: int  # its place among the minibatches that were checked
    in_gradient: bool  # all processes share the gradient, so that one spoils it for all
    text: str  # the number, with timesteps and prompts


def find_faults(
    done: Sequence[tuple[PreferencePairs, Step]], prompts: Sequence[str]
) -> list[Fault]:
    """Returns the numbers that are not finite in these minibatches; `prompts` are the run's."""
    faults = []
    for number, (batch, step) in enumerate(done):
        output, update = step.output, step.update
        # The clips of a loss hide a prediction that is infinite; its terms do not.
        bad = torch.zeros(len(batch), dtype=torch.bool, device=output.loss.device)
        for values in output.terms.values():
            bad |= ~values.isfinite()
        # A gradient that the fp16 scaler skipped did no harm: see `check_skipped`.
        if bad.any():
            faults.append(
                Fault(number, False, _describe("predictions are", batch.select(bad), prompts))
            )
        elif not output.loss.isfinite():
            faults.append(Fault(number, False, _describe("the loss is", batch, prompts)))
        elif step.is_update and not update.grad_norm.isfinite():
            faults.append(Fault(number, True, _describe("the gradient is", batch, prompts)))
    return faults


def _describe(what: str, batch: PreferencePairs, prompts: Sequence[str]) -> str:
    own = named([prompts[i] for i in batch.prompt_ids.unique().tolist()])
    return f"{what} not finite at t = {batch.timesteps.unique().tolist()} for the prompts {own}"


def check_faults(faults: Sequence[Fault], rollout: int, step: int) -> None:
    """Raises RunError that names the origin of `faults`, if there are any."""
    if faults:
        raise RunError(
            f"{min(faults).text}, in rollout {rollout}, about step {step}; the last checkpoint is "
            "good: resume from it with a lower train.learning_rate or mixed_precision=bf16."
        )


def check_skipped(in_a_row: int, limit: int) -> None:
    """Raises RunError if the fp16 gradients of `limit` updates in a row overflowed."""
    if in_a_row >= limit:
        raise RunError(
            f"train.max_skipped_updates: the fp16 gradients of {in_a_row} updates in a row overflowed "
            "and were skipped, however small their scale; the last checkpoint is good: resume from it "
            "with mixed_precision=bf16, or with a lower train.learning_rate."
        )
