"""How far a run is: positions, checkpoints that are due, and prompts that are left, by hand."""

import pytest
import torch
from helpers import make_pairs

from spo.method.metrics import Metrics
from spo.method.position import Position, RolloutInProgress, TrainingState, chunks_left

ORDER = [7, 3, 5, 1, 6, 0, 2]


def in_progress(prompts, used=0):
    nothing = torch.zeros(0, 1, 1, 1, 1)
    pairs = make_pairs(nothing, nothing, nothing, timesteps=[])
    metrics = Metrics(torch.device("cpu"))
    return RolloutInProgress(pairs, metrics, prompts, left_over=0, seconds_rollout=1.0, used=used)


@pytest.mark.parametrize(
    ("position", "prompts", "size", "expected"),
    [
        (Position(), None, 3, [[7, 3, 5], [1, 6, 0], [2]]),
        (Position(), None, 7, [ORDER]),
        (Position(), None, 40, [ORDER]),
        (Position(epochs=4, rollouts=9), None, 4, [[7, 3, 5, 1], [6, 0, 2]]),
        (Position(0, 1, 1, prompts=3), None, 3, [[1, 6, 0], [2]]),
        # Another size than before: from the prompts that were used.
        (Position(0, 1, 1, prompts=3), None, 2, [[1, 6], [0, 2]]),
        (Position(0, 2, 2, prompts=6), None, 3, [[2]]),
        # A rollout in progress is the first, with its own size.
        (Position(), 3, 3, [[7, 3, 5], [1, 6, 0], [2]]),
        (Position(), 2, 3, [[7, 3], [5, 1, 6], [0, 2]]),
        (Position(0, 1, 1, prompts=3), 1, 2, [[1], [6, 0], [2]]),
        (Position(0, 1, 1, prompts=3), 4, 2, [[1, 6, 0, 2]]),
        (Position(0, 1, 1, prompts=6), 1, 3, [[2]]),
        (Position(), 7, 2, [ORDER]),
    ],
)
def test_prompts_that_an_epoch_has_left(position, prompts, size, expected):
    rollout = None if prompts is None else in_progress(prompts)
    assert chunks_left(ORDER, TrainingState(position, rollout), size) == expected


def test_positions_of_a_run():
    position, seen = Position(), []
    for prompts in (3, 3, 1, 3, 3, 1):
        position = position.after(prompts, prompts_per_epoch=7)
        seen.append((position.epochs, position.rollouts, position.rollouts_in_epoch))
        seen[-1] += (position.prompts,)
    assert seen == [
        (0, 1, 1, 3),
        (0, 2, 2, 6),
        (1, 3, 0, 0),
        (1, 4, 1, 3),
        (1, 5, 2, 6),
        (2, 6, 0, 0),
    ]


@pytest.mark.parametrize(
    ("position", "name"),
    [
        (TrainingState(Position(3, 12)), "epoch_0003"),
        (TrainingState(Position(3, 13, 1, prompts=2)), "epoch_0003_rollout_000013"),
        (
            TrainingState(Position(3, 13, 1, prompts=2), in_progress(2, used=40)),
            "epoch_0003_rollout_000013_pair_000040",
        ),
        # Before the first rollout of an epoch is done, its pairs are all that tells of it.
        (
            TrainingState(Position(), in_progress(2, used=4)),
            "epoch_0000_rollout_000000_pair_000004",
        ),
    ],
)
def test_names_of_checkpoints(position, name):
    assert position.name() == name


@pytest.mark.parametrize(
    ("position", "every_rollouts", "every_epochs", "due"),
    [
        (Position(1, 3), 0, 1, True),
        (Position(1, 3), 0, 2, False),
        (Position(2, 6), 0, 2, True),
        (Position(3, 9), 0, 2, True),  # the last
        (Position(1, 4, 1, prompts=3), 0, 1, False),  # inside an epoch
        (Position(1, 4, 1, prompts=3), 2, 1, True),
        (Position(1, 5, 2, prompts=6), 2, 1, False),
    ],
)
def test_when_a_checkpoint_is_due(position, every_rollouts, every_epochs, due):
    assert position.is_checkpoint_due(every_rollouts, every_epochs, num_epochs=3) == due
