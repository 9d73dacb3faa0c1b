"""The stepwise rollout against a second account of it, window by window and row by row."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import COLLECT, randn
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from spo.errors import UserError
from spo.method.ddim import make_sampler
from spo.method.rollout import RolloutSettings, stepwise_rollout
from spo.types import Conditioning

SHAPE = (2, 3, 3)
PLAIN = replace(COLLECT.rollout, num_steps=20, num_candidates=3)
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}


def predict(latents, timestep, conditioning):
    """A network that tells prompts, timesteps and latents apart; row by row."""
    assert len(conditioning) == len(latents)
    prompt = conditioning.prompt_embeds.mean(dim=(1, 2)).view(-1, 1, 1, 1)
    return 0.6 * latents + 0.3 * prompt * torch.tanh(latents.flip(-1)) + timestep / 5000


def roll_out(settings, prompts=2, seed=0, eta=1.0, predict=predict):
    conditioning = Conditioning(randn(prompts, 4, 5, seed=9), torch.zeros(1, 4, 5))
    generator = torch.Generator().manual_seed(seed)
    sampler = make_sampler(SCHEDULER, settings.num_steps, eta)
    given = (predict, sampler, settings, conditioning, SHAPE, generator)
    return list(stepwise_rollout(*given)), conditioning, generator


def account(settings, conditioning, seed, eta):
    """The same rollout once more: what is drawn when, then one latent at a time in numpy.

    Returns per window its transitions (timestep, x_t, noise, x_t'), all (K, B, C, h, w), and what is
    scored, None for a scorer of latents; and the generator.
    """
    num_steps, k, b = settings.num_steps, settings.num_candidates, len(conditioning)
    generator = torch.Generator().manual_seed(seed)
    abar = np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2)
    stride = 1000 // num_steps
    times = [stride * i + 1 for i in reversed(range(num_steps))]
    prompt = conditioning.prompt_embeds.double().mean(dim=(1, 2)).numpy()

    def draw(*rows):
        return torch.randn(*rows, *SHAPE, generator=generator).double().numpy()

    def network(x, t, i):
        epsilon = 0.6 * x + 0.3 * prompt[i] * np.tanh(x[..., ::-1]) + t / 5000
        return epsilon, (x - math.sqrt(1 - abar[t]) * epsilon) / math.sqrt(abar[t])

    def move(x, t, i, z):
        a, a_next = abar[t], abar[max(t - stride, 0)]
        sigma = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        epsilon, x0 = network(x, t, i)
        return math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - sigma**2) * epsilon + sigma * z

    def each(function, *arrays):
        return np.stack(
            [
                np.stack([function(i, *(a[c, i] for a in arrays)) for i in range(b)])
                for c in range(k)
            ]
        )

    x = draw(b)
    step = 0
    while step < settings.branch_from:
        noise = draw(b)
        x = np.stack([move(x[i], times[step], i, noise[i]) for i in range(b)])
        step += 1
    current, windows = np.stack([x] * k), []
    of_latents, end = settings.looks_at == "latents", settings.stop_at or num_steps
    while step < end:
        if windows:
            index = torch.randint(0, k, (b,), generator=generator).numpy()
            x = np.stack([current[index[i], i] for i in range(b)])
            current = np.stack([x] * k)
        transitions = []
        length = 1 + settings.num_inner_steps
        if settings.final_step == "extend" and step + length == num_steps - 1:
            length += 1
        for j in range(min(length, num_steps - step)):
            t = times[step]
            noise = draw(k, b) if j == 0 else draw(k * b).reshape(k, b, *SHAPE)
            after = each(lambda i, x, z, t=t: move(x, t, i, z), current, noise)
            transitions.append((t, current, noise, after))
            current, step = after, step + 1
        if of_latents:
            windows.append((transitions, None, max(t - stride, 0)))
        elif step < num_steps:
            t = times[step]
            windows.append((transitions, each(lambda i, x, t=t: network(x, t, i)[1], current), t))
        else:
            last = 1 if settings.final_score_timestep == "t" else 0
            windows.append((transitions, current, last))
    if of_latents:  # whose candidate to continue is drawn after the last comparison, too
        torch.randint(0, k, (b,), generator=generator)
    return windows, generator


def check_against_account(settings, eta, prompts, seed):
    found, conditioning, generator = roll_out(settings, prompts, seed, eta)
    expected, drawn = account(settings, conditioning, seed, eta)
    assert len(found) == len(expected)
    for candidates, (transitions, scored, timestep) in zip(found, expected, strict=True):
        assert len(candidates.window) == len(transitions)
        for mine, (t, x, noise, after) in zip(candidates.window, transitions, strict=True):
            assert mine.timestep == t
            assert mine.next_timestep == max(t - 1000 // settings.num_steps, 0)
            shared = np.broadcast_to(mine.latents.numpy(), x.shape)
            np.testing.assert_allclose(shared, x, rtol=1e-3, atol=1e-3)
            np.testing.assert_array_equal(mine.noise.numpy(), noise.astype(np.float32))
            np.testing.assert_allclose(mine.next_latents.numpy(), after, rtol=1e-3, atol=1e-3)
        assert candidates.window[0].latents.shape[0] == 1  # x_t of the branch is kept once
        assert candidates.score_timestep == timestep
        assert (candidates.latents is None) == (scored is None)
        if scored is not None:
            np.testing.assert_allclose(candidates.latents.numpy(), scored, rtol=1e-3, atol=2e-3)
    assert [c.is_final for c in found] == [False] * (len(found) - 1) + [True]
    # Nothing else was drawn: both generators go on alike.
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=drawn))
    return found


@st.composite
def shapes(draw):
    num_steps = draw(st.integers(2, 9))
    of_latents, extend = draw(st.sampled_from([(False, False), (False, True), (True, False)]))
    branch_from = draw(st.integers(0, num_steps - (2 if extend else 1)))
    stops = st.sampled_from([0, *range(branch_from + 1, num_steps + 1)])
    return RolloutSettings(
        looks_at="latents" if of_latents else "images",
        stop_at=draw(stops) if of_latents else 0,
        num_steps=num_steps,
        num_candidates=draw(st.integers(2, 3)),
        branch_from=branch_from,
        num_inner_steps=0 if of_latents else draw(st.integers(0, num_steps - branch_from - 1)),
        final_step="extend" if extend else "branch",
        final_score_timestep=draw(st.sampled_from(["zero", "t"])),
    )


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes(), st.sampled_from([0.5, 1.0]), st.integers(1, 3), st.integers(0, 1000))
def test_any_shape_is_as_accounted(settings, eta, prompts, seed):
    found = check_against_account(settings, eta, prompts, seed)
    # After branching, steps fill windows of 1 + inner transitions; extended, the last is one more.
    branching = (settings.stop_at or settings.num_steps) - settings.branch_from
    steps = branching - (settings.final_step == "extend")
    assert len(found) == math.ceil(steps / (1 + settings.num_inner_steps))
    used = sum(len(candidates.window) for candidates in found)
    assert used == branching


@pytest.mark.parametrize(
    ("changes", "windows", "scored_at"),
    [
        # GradSPO, SD1.5: each of 16 steps is compared at the next; the last at 0.
        ({}, [[t] for t in range(751, 0, -50)], [*range(701, 0, -50), 0]),
        (
            {"final_score_timestep": "t"},
            [[t] for t in range(751, 0, -50)],
            [*range(701, 0, -50), 1],
        ),
        (
            {"final_step": "extend"},
            [[t] for t in range(751, 100, -50)] + [[51, 1]],
            [*range(701, 50, -50), 0],
        ),
        (
            {"num_inner_steps": 3},
            [list(range(t, t - 200, -50)) for t in (751, 551, 351, 151)],
            [551, 351, 151, 0],
        ),
        # 16 = 7 + 7 + 2: the last step closes its window early.
        (
            {"num_inner_steps": 6},
            [list(range(751, 450, -50)), list(range(401, 100, -50)), [51, 1]],
            [401, 51, 0],
        ),
        # 16 = 5 + 5 + 5 + 1: extended, the last step joins the window before it.
        (
            {"num_inner_steps": 4, "final_step": "extend"},
            [list(range(t, t - 250, -50)) for t in (751, 501)] + [[251, 201, 151, 101, 51, 1]],
            [501, 251, 0],
        ),
    ],
)
def test_windows_of_twenty_steps(changes, windows, scored_at):
    settings = replace(PLAIN, branch_from=4, **changes)
    found, _, _ = roll_out(settings, prompts=1)
    assert [[t.timestep for t in candidates.window] for candidates in found] == windows
    assert [candidates.score_timestep for candidates in found] == scored_at


def test_every_candidate_may_carry_on():
    """The one that goes on is drawn per prompt, and none is out of reach."""
    carried = set()
    for seed in range(10):
        found, _, _ = roll_out(replace(PLAIN, num_steps=6), prompts=2, seed=seed)
        for before, after in zip(found, found[1:], strict=False):
            start = after.window[0].latents[0]
            same = (before.window[-1].next_latents == start).all(dim=(2, 3, 4))  # (K, B)
            assert (same.sum(dim=0) == 1).all()
            carried |= {(prompt, int(same[:, prompt].int().argmax())) for prompt in range(2)}
    assert carried == {(prompt, k) for prompt in range(2) for k in range(3)}


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        # Design: 130 rows per two halves of guidance, 65 = 5 + 15 * 4 per prompt.
        ({"branch_from": 4}, [2] * 5 + [8] * 15),
        # LPO: 40 rows, one pass of each prompt and step.
        ({"looks_at": "latents", "branch_from": 0}, [2] * 20),
        ({"looks_at": "latents", "branch_from": 4, "stop_at": 13}, [2] * 13),
    ],
)
def test_the_network_runs_once_per_row(changes, rows):
    seen = []

    def counted(latents, timestep, conditioning):
        seen.append((timestep, len(latents)))
        return predict(latents, timestep, conditioning)

    roll_out(replace(PLAIN, num_candidates=4, **changes), prompts=2, predict=counted)
    assert seen == list(zip(range(951, 0, -50), rows, strict=False))


@pytest.mark.parametrize("branch_from", [0, 4])
def test_scorers_of_images_and_of_latents_judge_the_same_candidates(branch_from):
    images, latents = (
        roll_out(replace(PLAIN, branch_from=branch_from, looks_at=looks_at), seed=3)[0]
        for looks_at in ("images", "latents")
    )
    assert len(images) == len(latents) == 20 - branch_from
    for theirs, mine in zip(images, latents, strict=True):
        (theirs,), (mine,) = theirs.window, mine.window
        assert mine.timestep == theirs.timestep and torch.equal(mine.noise, theirs.noise)
        torch.testing.assert_close(mine.latents, theirs.latents)
        torch.testing.assert_close(mine.next_latents, theirs.next_latents)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_candidates": 1}, "num_candidates"),
        ({"branch_from": -1}, "branch_from"),
        ({"branch_from": 20}, "branch_from"),
        ({"branch_from": 19, "final_step": "extend"}, "branch_from"),
        ({"branch_from": 4, "num_inner_steps": 16}, "num_inner_steps"),
        ({"num_inner_steps": -1}, "num_inner_steps"),
        ({"branch_from": 4, "stop_at": 4}, "stop_at"),
        ({"stop_at": 21}, "stop_at"),
        ({"stop_at": -1}, "stop_at"),
    ],
)
def test_what_does_not_fit_is_named(changes, key):
    with pytest.raises(UserError, match=rf"sample\.{key}: {changes[key]} "):
        replace(PLAIN, **changes)


@pytest.mark.parametrize("key", ["final_step", "final_score_timestep"])
def test_a_choice_that_is_none_is_named(key):
    with pytest.raises(UserError, match=rf"sample\.{key}: 'other' is none of "):
        replace(PLAIN, **{key: "other"})


def test_the_limits_fit():
    replace(PLAIN, branch_from=19)
    replace(PLAIN, branch_from=18, final_step="extend")
    replace(PLAIN, branch_from=4, num_inner_steps=15)
    replace(PLAIN, branch_from=4, stop_at=5)
    replace(PLAIN, branch_from=4, stop_at=20)


def test_branching_makes_no_gradients():
    weight = torch.ones((), requires_grad=True)

    def with_weight(latents, timestep, conditioning):
        return weight * predict(latents, timestep, conditioning)

    found, _, _ = roll_out(replace(PLAIN, num_steps=4), predict=with_weight)
    assert not any(candidates.latents.requires_grad for candidates in found)
