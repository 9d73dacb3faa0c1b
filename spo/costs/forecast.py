"""What the launcher says a run will cost: FLOPs, and the memory of each part."""

from collections.abc import Mapping

from spo.costs.count import BATCH_KEYS, CHECKPOINTED, SCORER, SPARE, Costs, count_costs
from spo.costs.load import META, load_models
from spo.costs.meter import DECODING, DENOISING, ROLLOUT, SCORING, TRAINING
from spo.errors import first_line
from spo.launch.batch_plan import BatchPlan
from spo.method.build import Recipe
from spo.models.gpu import device_memory

_UNITS = {DENOISING: "prompts", DECODING: "images", SCORING: "latents"}  # training: pairs
_IDLE = 2**29  # bytes of a GPU that the driver and a screen may hold


def print_estimate(recipe: Recipe, plan: BatchPlan, device: str, processes: int) -> None:
    """Prints the costs of a step, and a warning for each part that will not fit into memory.

    `processes` share this machine. Raises nothing: a model or library that cannot be counted is no
    reason not to train.
    """
    print("estimate: counting what a step costs, which takes seconds ...", flush=True)
    try:
        models, (memory, held) = load_models(recipe, META), device_memory(device, processes)
        training = CHECKPOINTED if recipe.run.gradient_checkpointing else TRAINING
        costs = count_costs(models, [training])
        sizes = batch_sizes(recipe, plan, costs, training)
        records = recipe.speed.cuda_graphs and device == "cuda"
        print(*describe(costs, sizes, memory, records), sep="\n", flush=True)
        if held > _IDLE:
            print(f"estimate: other processes hold {_gib(held)} GiB of a GPU's memory", flush=True)
    except Exception as error:
        print(f"estimate: none ({type(error).__name__}: {first_line(error)})", flush=True)


def batch_sizes(recipe: Recipe, plan: BatchPlan, costs: Costs, training: str) -> dict[str, int]:
    """Returns how many of what each part takes a run has in memory at once, `training` last."""
    images = plan.slice_size * recipe.collect.rollout.num_candidates
    sizes = {DENOISING: plan.slice_size}
    if DECODING in costs.peak_bytes:
        sizes[DECODING] = min(images, recipe.collect.decode_batch_size)
    else:
        sizes[SCORING] = min(images, recipe.collect.score_batch_size)
    return sizes | {training: plan.minibatch_size}


def bytes_beside(costs: Costs, sizes: Mapping[str, int], records: bool) -> dict[str, int]:
    """Returns the memory beside each part of `sizes`: CUDA graphs keep that of a minibatch."""
    *rollout, training = sizes
    graphs = costs.peak_bytes[training] * sizes[training] * records
    return dict.fromkeys(rollout, graphs) | {training: 0}


def describe(
    costs: Costs, sizes: Mapping[str, int], memory: float, records: bool = False
) -> list[str]:
    """Returns a line of FLOPs, and a line of memory for each part of `sizes`, a warning if too much.

    A warning names the key to change and to what; `memory` is the device's, in bytes. A run that
    `records` CUDA graphs keeps the memory of a minibatch while it does other things.
    """
    *_, training = sizes
    rollout, pair = (costs.flops[part] / 1e12 for part in (ROLLOUT, training))
    known = SCORER in costs.resident_bytes
    lines = [
        f"estimate: {rollout:.3g} TFLOP for the rollout of a prompt, {pair:.3g} for the training "
        f"of a pair{'' if known else ' (without the preference model, which is not known)'}"
    ]
    for part, beside in bytes_beside(costs, sizes, records).items():
        batch = sizes[part]
        size = _gib(costs.bytes_of(part, batch) + beside)
        need = f"{part} of {batch} {_UNITS.get(part, 'pairs')} will need {size} GiB of memory"
        fits, key = costs.largest_batch(part, memory, beside), BATCH_KEYS[part]
        if batch <= fits:
            lines.append(f"estimate: {need}, and there are {_gib(memory)}")
            continue
        advice = f"lower {key} to {fits}" if fits else f"{key} = 1 does not fit either"
        if part == TRAINING:
            advice += " (train.gradient_checkpointing=true needs less)"
        elif beside:
            advice += " (cuda_graphs=false needs less)"
        there = f"of {_gib(memory)} there are {_gib(memory * (1 - SPARE))} for it"
        lines.append(f"warning: {need}, and {there}; {advice}")
    return lines


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"
