"""How the paper's global batch is shared out on other numbers of processes."""

import pytest
from ml_collections import ConfigDict

from spo.errors import UserError
from spo.launch.batch_plan import plan_batches, plan_updates

SD15 = {
    "sample.batch_size": 10,
    "sample.global_batch_size": 40,
    "train.batch_size": 10,
    "train.global_batch_size": 40,
    "train.gradient_accumulation_steps": None,
}
SDXL = SD15 | {
    "sample.batch_size": 2,
    "sample.global_batch_size": 8,
    "train.batch_size": 1,
    "train.global_batch_size": 16,
}


def config_of(sizes):
    """The config whose keys, with dots, are those of `sizes`."""
    config = ConfigDict({"sample": {}, "train": {}})
    for key, size in sizes.items():
        section, name = key.split(".")
        config[section][name] = size
    return config


def plan_of(processes, sizes):
    return plan_batches(config_of(sizes), processes)


@pytest.mark.parametrize(
    ("sizes", "processes", "slices", "slice_size", "minibatch", "accumulation"),
    [
        (SD15, 1, 4, 10, 10, 4),
        (SD15, 2, 2, 10, 10, 2),
        (SD15, 4, 1, 10, 10, 1),
        (SD15, 5, 1, 8, 8, 1),
        (SD15, 8, 1, 5, 5, 1),
        (SD15, 40, 1, 1, 1, 1),
        (SDXL, 1, 4, 2, 1, 16),
        (SDXL, 2, 2, 2, 1, 8),
        (SDXL, 4, 1, 2, 1, 4),
        (SDXL, 8, 1, 1, 1, 2),
        # 40 does not divide by 7: 5 is the largest size below that does.
        (SD15 | {"sample.batch_size": 7, "train.batch_size": 7}, 1, 8, 5, 5, 8),
    ],
)
def test_global_numbers_stay(sizes, processes, slices, slice_size, minibatch, accumulation):
    plan = plan_of(processes, sizes)
    assert (plan.slices, plan.slice_size) == (slices, slice_size)
    assert (plan.minibatch_size, plan.accumulation_steps) == (minibatch, accumulation)
    assert plan.prompts_per_rollout == sizes["sample.global_batch_size"]
    assert plan.pairs_per_update == sizes["train.global_batch_size"]


def test_none_takes_the_sizes_as_they_are():
    sizes = {"sample.global_batch_size": None, "train.global_batch_size": None}
    plan = plan_of(3, SD15 | sizes | {"train.gradient_accumulation_steps": 2})
    assert (plan.slices, plan.slice_size, plan.prompts_per_rollout) == (1, 10, 30)
    assert (plan.minibatch_size, plan.accumulation_steps, plan.pairs_per_update) == (10, 2, 60)


def test_an_impossible_count_names_those_that_work_and_both_keys():
    with pytest.raises(UserError) as error:
        plan_of(3, SD15)
    assert ": 1, 2, 4, 5, 8, 10, 20, 40;" in str(error.value)
    assert "--config.sample.global_batch_size=None" in str(error.value)
    assert "--config.train.global_batch_size=None" in str(error.value)


def test_the_error_names_only_the_constraint_that_breaks():
    with pytest.raises(UserError) as error:
        plan_of(16, SDXL)  # 16 pairs do, 8 prompts do not
    assert "sample.global_batch_size = 8" in str(error.value)
    assert ": 1, 2, 4, 8;" in str(error.value)
    assert "train.global_batch_size" not in str(error.value)
    assert plan_of(16, SDXL | {"sample.global_batch_size": None}).pairs_per_update == 16


@pytest.mark.parametrize("key", list(SD15))
def test_sizes_below_one_are_named(key):
    with pytest.raises(UserError, match=f"^{key} = 0: must be at least 1"):
        plan_of(1, SD15 | {key: 0})


def test_describe():
    assert plan_of(4, SDXL).describe() == (
        "8 prompts per rollout = slice 2 x processes 4 x slices 1; "
        "16 pairs per update = minibatch 1 x processes 4 x accumulation 4"
    )


def test_accumulation_is_not_set_twice():
    with pytest.raises(UserError, match="^train.gradient_accumulation_steps: it follows from"):
        plan_of(4, SD15 | {"train.gradient_accumulation_steps": 2})


@pytest.mark.parametrize(
    ("processes", "batch_size", "total", "minibatch", "accumulation"),
    [
        (4, 16, 64, 16, 1),
        (1, 16, 64, 16, 4),
        (8, 16, 64, 8, 1),
        (2, 12, 64, 8, 4),
        (3, 5, None, 5, 1),
    ],
)
def test_updates_without_a_rollout(processes, batch_size, total, minibatch, accumulation):
    sizes = {"train.batch_size": batch_size, "train.global_batch_size": total}
    plan = plan_updates(config_of(sizes), processes)
    assert (plan.minibatch_size, plan.accumulation_steps) == (minibatch, accumulation)
    assert plan.pairs_per_update == (total or processes * batch_size)


def test_updates_that_do_not_divide_name_the_counts_that_work():
    sizes = {"train.batch_size": 16, "train.global_batch_size": 64}
    with pytest.raises(UserError, match="process counts that work: 1, 2, 4, 8, 16, 32, 64; with"):
        plan_updates(config_of(sizes), 3)
    with pytest.raises(UserError, match="train.batch_size = 0"):
        plan_updates(config_of(sizes | {"train.batch_size": 0}), 1)
