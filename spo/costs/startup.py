"""Prints, before a run starts, what a step will cost and what will not fit into memory."""

from __future__ import annotations

from collections.abc import Mapping

import psutil
import torch
from ml_collections import ConfigDict

from spo.costs.count import BATCH_KEYS, CHECKPOINTED, SPARE, Costs, count_costs, training_part
from spo.costs.load import load_models
from spo.costs.meter import DECODING, DENOISING, ROLLOUT, TRAINING
from spo.costs.weightless_models import META
from spo.errors import first_line
from spo.launch.batch_plan import BatchPlan

_UNITS = {DENOISING: "prompts", DECODING: "images", TRAINING: "pairs", CHECKPOINTED: "pairs"}


def print_estimate(
    config: ConfigDict, plan: BatchPlan, device: torch.device, processes: int
) -> None:
    """Prints the costs of a step, and a warning for each part that will not fit into memory.

    `processes` share this machine. Raises nothing: a model or library that cannot be counted is no
    reason not to train.
    """
    if not config.estimate_costs:
        return
    print("estimate: counting what a step costs, which takes seconds ...", flush=True)
    try:
        models, memory = load_models(config, META), device_memory(device, processes)
        training = training_part(models)
        costs = count_costs(models, [training])
        images = plan.slice_size * config.sample.num_candidates
        sizes = {
            DENOISING: plan.slice_size,
            DECODING: min(images, config.sample.decode_batch_size),
            training: plan.minibatch_size,
        }
        print(describe(costs, sizes, memory))
        checkpointed = None
        for part, batch in sizes.items():
            if batch > costs.largest_batch(part, memory):
                if part == TRAINING:
                    checkpointed = count_costs(models, [CHECKPOINTED])
                print(warning(costs, part, batch, memory, checkpointed), flush=True)
    except Exception as error:
        print(f"estimate: none ({type(error).__name__}: {first_line(error)})", flush=True)


def describe(costs: Costs, sizes: Mapping[str, int], memory: float) -> str:
    """Returns two lines: FLOPs, and the memory of `sizes` beside that of the device (bytes)."""
    training = list(sizes)[-1]
    unknown = "" if costs.has_scorer else " (without the preference model, which is not known)"
    most = ", ".join(
        f"{_gib(costs.bytes_of(part, batch))} in {part} of {batch} {_UNITS[part]}"
        for part, batch in sizes.items()
    )
    return (
        f"estimate: {costs.flops[ROLLOUT] / 1e12:.3g} TFLOP for the rollout of a prompt, "
        f"{costs.flops[training] / 1e12:.3g} for the training of a pair{unknown}\n"
        f"estimate: GiB of memory: {_gib(costs.bytes_of(training, 0))} all the time, {most}; there are "
        f"{_gib(memory)}"
    )


def warning(
    costs: Costs, part: str, batch: int, memory: float, checkpointed: Costs | None = None
) -> str:
    """Returns one line: the part that does not fit, and the key to change and to what.

    `checkpointed` are the costs with gradient checkpointing, as a way out for training.
    """
    fits, key = costs.largest_batch(part, memory), BATCH_KEYS[part]
    if fits:
        advice = f"lower {key} to {fits}"
    elif checkpointed and (fits := checkpointed.largest_batch(CHECKPOINTED, memory)):
        advice = f"set train.gradient_checkpointing=true, with {key} up to {fits}"
    else:
        advice = f"{key} = 1 does not fit either"
    return (
        f"warning: {part} of {batch} {_UNITS[part]} will need {_gib(costs.bytes_of(part, batch))} GiB "
        f"of memory, and of {_gib(memory)} there are {_gib(memory * (1 - SPARE))} for it; {advice}"
    )


def device_memory(device: torch.device, processes: int) -> float:
    """Returns the bytes of a GPU, or of a CPU's free memory the share of each of its processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available / processes


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"
