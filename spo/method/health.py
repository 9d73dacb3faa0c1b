"""Numbers that went wrong: a run stops with one line that says where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.errors import RunError, named
from spo.method.collect import Comparison
from spo.method.learner import Step
from spo.types import PreferencePairs


def check_scores(comparisons: Sequence[Comparison], prompts: Sequence[str]) -> None:
    """Raise RunError that names timestep and prompts where a score is not finite."""
    for comparison in comparisons:
        bad = ~comparison.scores.isfinite().all(dim=0)
        if bad.any():
            where = named([prompts[i] for i in bad.nonzero().flatten().tolist()])
            raise RunError(
                f"scores are not finite at t = {comparison.score_timestep} for the prompts {where}; "
                "the scorer or the sampler overflowed: try mixed_precision=bf16 or "
                "preference.dtype=float32, or lower train.learning_rate."
            )


def check_images(images: Tensor, prompts: Sequence[str], model: str) -> None:
    """Raise RunError that names prompts where an image (n, 3, H, W) of `model` is not finite."""
    sound = images.isfinite().flatten(1).all(dim=1).tolist()
    bad = [prompt for prompt, is_sound in zip(prompts, sound, strict=True) if not is_sound]
    if bad:
        raise RunError(
            f"images of {model} are not finite for the prompts {named(bad)}; its UNet or VAE "
            "overflowed: try mixed_precision=bf16 or no."
        )


@dataclass(frozen=True, order=True)
class Fault:
    """A number of a minibatch that is not finite; the smallest of all processes' is the cause."""

    minibatch: int  # of those looked at
    in_gradient: bool  # which all processes share, so that one ruins it for all
    text: str  # what it is, with timesteps and prompts


def find_faults(
    done: Sequence[tuple[PreferencePairs, Step]], prompts: Sequence[str]
) -> list[Fault]:
    """What is not finite in minibatches of this process; `prompts` are all of the run's."""
    faults = []
    for number, (batch, step) in enumerate(done):
        output = step.output
        terms = (output.win_policy, output.win_reference, output.lose_policy, output.lose_reference)
        # The clips of the loss hide a prediction that is infinite.
        bad = ~torch.stack(terms).isfinite().all(dim=0)
        # A gradient that the fp16 scaler skipped did no harm: see `check_skipped`.
        updated = step.grad_norm is not None and not step.skipped
        if bad.any():
            faults.append(
                Fault(number, False, _describe("predictions are", batch.select(bad), prompts))
            )
        elif not output.loss.isfinite():
            faults.append(Fault(number, False, _describe("the loss is", batch, prompts)))
        elif updated and not step.grad_norm.isfinite():
            faults.append(Fault(number, True, _describe("the gradient is", batch, prompts)))
    return faults


def _describe(what: str, batch: PreferencePairs, prompts: Sequence[str]) -> str:
    own = named([prompts[i] for i in batch.prompt_ids.unique().tolist()])
    return f"{what} not finite at t = {batch.timesteps.unique().tolist()} for the prompts {own}"


def check_skipped(in_a_row: int, limit: int) -> None:
    """Raise RunError where the fp16 gradients of `limit` updates in a row overflowed."""
    if in_a_row >= limit:
        raise RunError(
            f"train.max_skipped_updates: the fp16 gradients of {in_a_row} updates in a row overflowed "
            "and were skipped, however small their scale; the last checkpoint is good: resume from it "
            "with mixed_precision=bf16, or with a lower train.learning_rate."
        )
