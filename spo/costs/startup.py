"""What a run will cost, said before it begins, and how long it takes once its rate is known."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from ml_collections import ConfigDict

from spo.costs.count import BATCH, CHECKPOINTED, SPARE, Costs, count_costs, training_part
from spo.costs.meter import DECODING, DENOISING, ROLLOUT, TRAINING
from spo.errors import first_line
from spo.launch.batch_plan import BatchPlan
from spo.method.position import RolloutInProgress

_UNITS = {DENOISING: "prompts", DECODING: "images", TRAINING: "pairs", CHECKPOINTED: "pairs"}
_CGROUPS = ("memory.max", "memory/memory.limit_in_bytes")  # versions 2 and 1


@dataclass(frozen=True)
class Forecast:
    """What the steps of a run cost; None where that is not known."""

    costs: Costs | None = None
    training: str = TRAINING  # the part that training is

    def tflops(self, rollout: RolloutInProgress) -> float | None:
        """TFLOP/s of all processes together, over a rollout and its training so far."""
        if self.costs is None:
            return None
        flops = self.costs.run_flops(rollout.prompts, rollout.used, self.training)
        return flops / seconds(rollout) / 1e12

    def rest(self, rollout: RolloutInProgress, prompts_left: int) -> str:
        """How long the rest of a run takes that goes on like this rollout; a line."""
        each = seconds(rollout) / rollout.prompts
        rate = self.tflops(rollout)
        so_fast = "" if rate is None else f", {rate:.3g} TFLOP/s in all"
        hours = each * prompts_left / 3600
        time = f"{hours:.3g} hours" if hours >= 1 else f"{hours * 60:.3g} minutes"
        return (
            f"rate: {each:.3g} s for a prompt and its pairs{so_fast}; at this rate the {prompts_left} "
            f"prompts that are left take {time}"
        )


def seconds(rollout: RolloutInProgress) -> float:
    """What a rollout and its training took so far."""
    return rollout.seconds_rollout + rollout.seconds_train


def make_forecast(
    config: ConfigDict, plan: BatchPlan, device: torch.device, say: Callable[[str], None]
) -> Forecast:
    """Counts what the steps of a run cost, says so, and warns of what will not fit into memory."""
    if not config.estimate_costs:
        return Forecast()
    training, memory = training_part(config), device_memory(device)
    say(
        "estimate: counting what a step costs, which takes seconds, at full size up to a minute ..."
    )
    try:
        costs, sizes = count_costs(config, [training]), batches(config, plan, training)
        say(describe(costs, sizes, memory))
        for part, batch in sizes.items():
            if batch > costs.largest_batch(part, memory):
                say(warning(config, costs, part, batch, memory))
    # Models or libraries that it does not foresee are no reason not to train.
    except Exception as error:
        say(f"estimate: none ({type(error).__name__}: {first_line(error)})")
        return Forecast()
    return Forecast(costs, training)


def batches(config: ConfigDict, plan: BatchPlan, training: str) -> dict[str, int]:
    """Prompts, images and pairs that the parts of a step have in memory at once."""
    images = plan.slice_size * config.sample.num_candidates
    return {
        DENOISING: plan.slice_size,
        DECODING: min(images, config.sample.decode_batch_size),
        training: plan.minibatch_size,
    }


def describe(costs: Costs, batches: Mapping[str, int], memory: float) -> str:
    """FLOPs, and memory beside that of the device (bytes); two lines."""
    training = list(batches)[-1]
    unknown = "" if costs.has_scorer else " (without the preference model, which is not known)"
    most = ", ".join(
        f"{_gib(costs.bytes_of(part, batch))} in {part} of {batch} {_UNITS[part]}"
        for part, batch in batches.items()
    )
    return (
        f"estimate: {costs.flops[ROLLOUT] / 1e12:.3g} TFLOP for the rollout of a prompt, "
        f"{costs.flops[training] / 1e12:.3g} for the training of a pair{unknown}\n"
        f"estimate: GiB of memory: {_gib(costs.bytes_of(training, 0))} all the time, {most}; there are "
        f"{_gib(memory)}"
    )


def warning(config: ConfigDict, costs: Costs, part: str, batch: int, memory: float) -> str:
    """What does not fit, and the key to change; a line."""
    fits, key = costs.largest_batch(part, memory), BATCH[part].partition(",")[0]
    if fits:
        advice = f"lower {key} to {fits}"
    elif part == TRAINING and (
        fits := count_costs(config, [CHECKPOINTED]).largest_batch(CHECKPOINTED, memory)
    ):
        advice = f"set train.gradient_checkpointing=true, with {key} up to {fits}"
    else:
        advice = f"{key} = 1 does not fit either"
    return (
        f"warning: {part} of {batch} {_UNITS[part]} will need {_gib(costs.bytes_of(part, batch))} GiB "
        f"of memory, and of {_gib(memory)} there are {_gib(memory * (1 - SPARE))} for it; {advice}"
    )


def device_memory(device: torch.device) -> float:
    """Bytes of a GPU, or this process's share of what is free to the processes of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    free = [psutil.virtual_memory().available]
    for name in _CGROUPS:
        file = Path("/sys/fs/cgroup", name)
        limit = file.read_text().strip() if file.is_file() else ""
        free += [int(limit)] if limit.isdecimal() else []  # or "max"
    return min(free) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"
