"""From scores to pairs, by hand: every latent carries a number that tells where it came from."""

from dataclasses import replace

import pytest
import torch
from helpers import COLLECT

from spo.errors import UserError
from spo.method.pairs import (
    Chosen,
    best_worst,
    choose,
    concatenate_pairs,
    differ_enough,
    make_pairs,
    no_pairs,
)
from spo.types import Candidates, Conditioning, Transition

SHAPE = (1, 2, 2)
PLAIN = replace(COLLECT.pairs, threshold=0.3, keep_predictions=False)
# As SPO's: every transition makes pairs, and after the first one win and lose have their own x_t.
INNER = {"shares_latents": False, "num_inner_steps": 1}
# Three candidates (rows) of four prompts (columns). Gaps of softmax([best, worst]) = tanh((b - w) / 2):
# 2 - 0 = 2: 0.76; a tie: 0; 0.5 - 0 = 0.5: 0.245; 3 - -1 = 4: 0.96.
SCORES = torch.tensor(
    [
        [0.0, 1.0, 0.5, 3.0],
        [2.0, 1.0, 0.0, 1.0],
        [1.0, 1.0, 0.2, -1.0],
    ]
)
PROMPT_IDS = torch.tensor([70, 71, 72, 73])
SIGMA = {  # LPO's, on SD1.5
    "threshold": None,
    "threshold_schedule": "sigma",
    "threshold_min": 0.35,
    "threshold_max": 0.5,
}
X, Z, NEXT, EPSILON = 1000, 2000, 3000, 4000  # what a number is of; plus 100 j + 10 k + b


def numbered(kind, j, k=3, b=4):
    values = kind + 100 * j + 10 * torch.arange(k)[:, None] + torch.arange(b)
    return values.float()[:, :, None, None, None].expand(k, b, *SHAPE)


def window(length, start=201):
    """The branching transition, whose x_t is shared, and inner steps at t = 201, 101, ..."""
    return tuple(
        Transition(
            start - 100 * j,
            start - 100 * (j + 1),
            numbered(X, j, k=3 if j else 1),
            numbered(Z, j),
            numbered(NEXT, j),
            numbered(EPSILON, j, k=3 if j else 1),
        )
        for j in range(length)
    )


def conditioning(pooled=False):
    return Conditioning(
        prompt_embeds=torch.arange(4.0).view(4, 1, 1).expand(4, 2, 3),
        negative_prompt_embeds=torch.full((1, 2, 3), -1.0),
        pooled_prompt_embeds=torch.arange(4.0).view(4, 1) + 50 if pooled else None,
        negative_pooled_prompt_embeds=torch.zeros(1, 1) if pooled else None,
        time_ids=torch.ones(1, 6) if pooled else None,
    )


def select(length=1, scores=SCORES, is_final=False, pooled=False, start=201, **changes):
    candidates = Candidates(window(length, start), numbered(0, 0), 0, is_final)
    settings = replace(PLAIN, **changes)
    chosen = choose(scores, settings, torch.Generator().manual_seed(0))
    differ = differ_enough(candidates, chosen.gap(scores), settings)
    pairs = make_pairs(candidates, chosen, conditioning(pooled), PROMPT_IDS, settings)
    return pairs.select(differ.repeat(len(pairs) // len(differ)))


def numbers(latents):
    """The number of each latent, after a check that it is the same all over."""
    flat = latents.flatten(2)
    assert (flat == flat[..., :1]).all()
    return flat[..., 0].int().tolist()


def test_gap():
    chosen = best_worst(SCORES, torch.Generator())
    torch.testing.assert_close(
        chosen.gap(SCORES), torch.tensor([0.76159416, 0.0, 0.24491866, 0.96402758])
    )
    swapped = Chosen(chosen.lose, chosen.win, chosen.prompts)
    torch.testing.assert_close(swapped.gap(SCORES), -chosen.gap(SCORES))


def test_best_against_worst():
    pairs = select()
    # Prompt 0: best 1, worst 0; prompt 1 ties; prompt 2's gap is too small; prompt 3: 0 over 2.
    assert numbers(pairs.latents) == [[1000], [1003]]
    assert numbers(pairs.noises) == [[2010, 2000], [2003, 2023]]
    assert numbers(pairs.next_latents) == [[3010, 3000], [3003, 3023]]
    assert pairs.timesteps.tolist() == [201, 201]
    assert pairs.prompt_ids.tolist() == [70, 73]
    assert pairs.conditioning.prompt_embeds[:, 0, 0].tolist() == [0, 3]


@pytest.mark.parametrize(
    ("threshold", "prompts"),
    [
        (0.0, [70, 72, 73]),  # a tie is no pair even at threshold 0
        (0.2449, [70, 72, 73]),
        (0.245, [70, 73]),
        (0.97, []),
        (-1, [70, 71, 72, 73]),
    ],
)
def test_threshold(threshold, prompts):
    pairs = select(threshold=threshold)
    assert pairs.prompt_ids.tolist() == prompts
    assert len(pairs) == len(pairs.latents) == len(prompts)


def test_keeping_all_final_pairs():
    assert select(is_final=True).prompt_ids.tolist() == [70, 73]
    assert select(keep_all_final=True).prompt_ids.tolist() == [70, 73]  # not final
    kept = select(is_final=True, keep_all_final=True)
    assert kept.prompt_ids.tolist() == [70, 71, 72, 73]
    assert numbers(kept.noises)[2] == [2002, 2012]  # best 0, worst 1, little as it is


def test_a_step_with_sigma_0_makes_no_pairs():
    assert len(select(start=0, is_final=True, keep_all_final=True)) == 0
    assert len(select(start=0, threshold=-1)) == 0
    # Of an extended window that ends there, the first transition's noises tell the candidates apart.
    extended = {"length": 2, "start": 100, "is_final": True, "final_step": "extend"}
    assert len(select(**extended, final_direction="window")) == 2
    assert len(select(**extended, final_direction="last")) == 0


def test_windows_go_transition_by_transition_then_prompt_by_prompt():
    pairs = select(length=2, **INNER)
    assert pairs.timesteps.tolist() == [201, 201, 101, 101]
    assert pairs.prompt_ids.tolist() == [70, 73, 70, 73]
    assert pairs.conditioning.prompt_embeds[:, 0, 0].tolist() == [0, 3, 0, 3]
    # The first x_t is shared, then win and lose each have their own.
    assert numbers(pairs.latents) == [[1000, 1000], [1003, 1003], [1110, 1100], [1103, 1123]]
    assert numbers(pairs.noises) == [[2010, 2000], [2003, 2023], [2110, 2100], [2103, 2123]]
    assert numbers(pairs.next_latents) == [[3010, 3000], [3003, 3023], [3110, 3100], [3103, 3123]]


@pytest.mark.parametrize(("direction", "noise"), [("window", 2000), ("last", 2100)])
def test_direction_of_an_extended_window(direction, noise):
    """GradSPO keeps the first x_t; the official SDXL code takes the last transition's noise."""
    pairs = select(length=2, final_step="extend", final_direction=direction)
    assert pairs.timesteps.tolist() == [201, 201]
    assert numbers(pairs.latents) == [[1000], [1003]]
    assert numbers(pairs.noises) == [[noise + 10, noise], [noise + 3, noise + 23]]
    assert numbers(pairs.next_latents) == [[3010, 3000], [3003, 3023]]


@pytest.mark.parametrize("direction", ["window", "last"])
def test_predictions_are_those_at_x_t(direction):
    assert select().sampler_epsilon is None
    kept = select(length=2, keep_predictions=True, final_direction=direction)
    assert numbers(kept.latents) == [[1000], [1003]]
    assert numbers(kept.sampler_epsilon) == [[4000], [4003]]
    own = select(length=2, **INNER, keep_predictions=True)
    assert numbers(own.sampler_epsilon) == [[4000, 4000], [4003, 4003], [4110, 4100], [4103, 4123]]


@pytest.mark.parametrize("keep_predictions", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("one_x_t", [False, True])
def test_joining_choosing_and_none(pooled, one_x_t, keep_predictions):
    layout = {"keep_predictions": keep_predictions, **({} if one_x_t else INNER)}
    settings = replace(PLAIN, **layout)
    parts = [
        no_pairs(conditioning(pooled), SHAPE, settings),
        select(pooled=pooled, **layout),
        select(pooled=pooled, threshold=0.99, **layout),  # none, by another way
        select(length=2, pooled=pooled, **layout),
    ]
    joined = concatenate_pairs(parts)
    assert [len(part) for part in parts] == [0, 2, 0, 2 if one_x_t else 4]
    assert len(joined) == sum(len(part) for part in parts)
    rows = torch.tensor([len(joined) - 1, 0])
    chosen = joined.select(rows)
    for pairs in (*parts, joined, chosen):
        n = len(pairs)
        assert pairs.latents.shape == (n, 1 if one_x_t else 2, *SHAPE)
        assert pairs.noises.shape == pairs.next_latents.shape == (n, 2, *SHAPE)
        assert ("sampler_epsilon" in pairs.tensors()) == keep_predictions
        if keep_predictions:
            assert pairs.sampler_epsilon.shape == pairs.latents.shape
        assert (pairs.timesteps.dtype, pairs.prompt_ids.dtype) == (torch.int64, torch.int64)
        assert pairs.conditioning.prompt_embeds.shape == (n, 2, 3)
        assert pairs.conditioning.negative_prompt_embeds.shape == (1, 2, 3)
        if pooled:
            assert pairs.conditioning.pooled_prompt_embeds.shape == (n, 1)
            assert pairs.conditioning.time_ids.shape == (1, 6)
        else:
            assert pairs.conditioning.pooled_prompt_embeds is None
    assert chosen.prompt_ids.tolist() == [73, 70]
    assert numbers(chosen.noises) == [numbers(joined.noises)[-1], [2010, 2000]]
    if pooled:
        assert chosen.conditioning.pooled_prompt_embeds.flatten().tolist() == [53, 50]


@pytest.mark.parametrize(
    ("changes", "one_x_t"),
    [
        ({}, True),
        ({"final_step": "extend"}, True),  # GradSPO keeps the branching transition only
        ({"shares_latents": False}, True),  # windows of one transition
        ({"shares_latents": False, "final_step": "extend"}, False),
        (INNER, False),
    ],
)
def test_when_x_t_is_kept_once(changes, one_x_t):
    assert replace(PLAIN, **changes).one_x_t == one_x_t


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairing": "worst_best"}, "sample.pairing: 'worst_best' is none of best_worst"),
        ({"pairing": "no.module:rule"}, "sample.pairing: cannot import"),
        ({"threshold": 1.5}, "sample.threshold: 1.5 must be from 0 to 1, or -1"),
        ({"threshold": -0.5}, "sample.threshold: -0.5 must be"),
        ({"final_direction": "first"}, "sample.final_direction: 'first' is none of window, last"),
        ({"threshold_schedule": "cosine"}, "threshold_schedule: 'cosine' is none of sigma, var"),
        ({"threshold_schedule": "sigma"}, "sample.threshold: the sigma schedule goes from"),
        (SIGMA | {"threshold": 0.3}, "sample.threshold: the sigma schedule goes from"),
        (SIGMA | {"threshold_max": None}, "sample.threshold: the sigma schedule goes from"),
        (SIGMA | {"threshold_min": -0.1}, "sample.threshold_min: -0.1 must be from 0 to 1"),
        (SIGMA | {"threshold_max": 1.1}, "sample.threshold_max: 1.1 must be from 0 to 1"),
        (SIGMA | {"threshold_max": float("nan")}, "sample.threshold_max: nan must be"),
        ({"threshold": None}, "sample.threshold_schedule: without one, sample.threshold is a num"),
        ({"threshold_min": 0.1}, "sample.threshold_schedule: without one, .* are None"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        replace(PLAIN, **changes)


@pytest.mark.parametrize(
    ("schedule", "ends", "expected"),
    [
        ("sigma", (0.35, 0.5), [0.35, 0.385276, 0.448277, 0.5, 0.5]),
        ("sigma", (0.45, 0.6), [0.45, 0.485276, 0.548277, 0.6, 0.6]),
        ("sigma", (0.5, 0.35), [0.5, 0.464724, 0.401723, 0.35, 0.35]),  # falls with the noise
        ("variance", (0.35, 0.5), [0.35, 0.359978, 0.416486, 0.5, 0.5]),
        # Not held at its end, as the tables are: 998 / 950 of the way at t = 999.
        ("linear", (0.35, 0.5), [0.35, 0.365789, 0.428947, 0.5, 0.507579]),
    ],
)
def test_thresholds_follow_the_noise(schedule, ends, expected):
    """By hand from the tables of LPO's code: (s_k - s_0) / (s_19 - s_0), k = t // 50."""
    low, high = ends
    changes = SIGMA | {"threshold_schedule": schedule, "threshold_min": low, "threshold_max": high}
    settings = replace(PLAIN, **changes)
    found = [settings.threshold_at(t) for t in (1, 101, 501, 951, 999)]
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[0] == low and found[3] == pytest.approx(high, abs=1e-12)


def test_the_threshold_is_that_of_the_timestep_drawn_from_and_strict():
    # Gaps 0.76, 0, 0.245 and 0.96: above 0.2 are three at t = 1, above 0.8 one at t = 951.
    rising = SIGMA | {"threshold_min": 0.2, "threshold_max": 0.8}
    for start, prompts in ((1, [70, 72, 73]), (951, [73])):
        assert select(start=start, **rising).prompt_ids.tolist() == prompts
    settings = replace(PLAIN, **SIGMA | {"threshold_min": 0.25, "threshold_max": 0.5})
    candidates = Candidates(window(1, 1), None, 0, is_final=False)
    gaps = torch.tensor([0.25, 0.25 + 2**-24])
    assert differ_enough(candidates, gaps, settings).tolist() == [False, True]


def winner_against_all(scores, generator):
    """The best candidate of each prompt against each of the two others, prompt by prompt."""
    order = scores.argsort(dim=0, descending=True)
    prompts = torch.arange(scores.shape[1]).repeat_interleave(2)
    return Chosen(order[0].repeat_interleave(2), order[1:].T.flatten(), prompts)


def test_a_rule_of_ones_own():
    """Prompts 0 and 2 have 0.46 and 0.76, 0.15 and 0.24; prompt 1 ties; prompt 3 has 0.76 and 0.96."""
    pairs = select(pairing=f"{__name__}:winner_against_all")
    assert pairs.prompt_ids.tolist() == [70, 70, 73, 73]
    assert numbers(pairs.latents) == [[1000], [1000], [1003], [1003]]
    assert numbers(pairs.noises) == [[2010, 2020], [2010, 2000], [2003, 2013], [2003, 2023]]
    assert pairs.conditioning.prompt_embeds[:, 0, 0].tolist() == [0, 0, 3, 3]
    own = select(length=2, pairing=f"{__name__}:winner_against_all", threshold=0.9, **INNER)
    assert own.timesteps.tolist() == [201, 101] and own.prompt_ids.tolist() == [73, 73]
    assert numbers(own.noises) == [[2003, 2023], [2103, 2123]]
