"""From prompts to pairs on the tiny models: rules that pick pairs, and scorers of noisy latents."""

from dataclasses import replace

import pytest
import torch
from helpers import COLLECT, PROMPTS

from spo.method.collect import collect_rollout
from spo.method.pairs import Chosen, best_worst
from spo.scorers import Scorer

IDS = torch.tensor([70, 71])


def top_two_against_bottom_two(scores, generator):
    """Two pairs of each prompt: best against worst, then second against third."""
    order = scores.argsort(dim=0, descending=True)
    prompts = torch.arange(scores.shape[1]).repeat(2)
    return Chosen(order[:2].flatten(), order[[3, 2]].flatten(), prompts)


def drawn(scores, generator):
    """Two candidates of each prompt at random, better or not."""
    k, b = scores.shape
    order = torch.stack([torch.randperm(k, generator=generator) for _ in range(b)])
    return Chosen(order[:, 0], order[:, 1], torch.arange(b))


def none_of_the_first(scores, generator):
    """Best against worst of all prompts but the first."""
    chosen = best_worst(scores, generator)
    return Chosen(chosen.win[1:], chosen.lose[1:], chosen.prompts[1:])


class Means(Scorer):
    """Scores what it is shown by its mean, and keeps it."""

    def __init__(self, looks_at=None):
        self.seen = []
        if looks_at:
            self.looks_at = looks_at

    def encode_prompts(self, prompts):
        return torch.zeros(len(prompts), 1)

    def score(self, seen, prompt_features, timestep):
        self.seen.append((timestep, seen))
        return 100 * seen.mean(dim=(1, 2, 3))


def collect(backbone, scorer=None, seed=0, **changes):
    scorer = scorer or Means()
    settings = replace(
        COLLECT,
        rollout=replace(COLLECT.rollout, looks_at=scorer.looks_at),
        pairs=replace(COLLECT.pairs, **changes),
    )
    return collect_rollout(
        backbone,
        scorer,
        backbone.sampler(4, eta=1.0),
        settings,
        PROMPTS[:2],
        IDS,
        torch.Generator().manual_seed(seed),
    )


def own(name):
    return f"{__name__}:{name}"


def test_threshold_minus_one_keeps_every_pair_and_others_those_that_differ(sd15):
    every = collect(sd15)
    assert every.pairs.timesteps.tolist() == [251, 251, 1, 1]
    assert every.pairs.prompt_ids.tolist() == [70, 71, 70, 71]
    gaps = torch.cat([comparison.gaps for comparison in every.comparisons])
    middle = gaps.sort().values[1:3].mean().item()
    some = collect(sd15, threshold=middle)
    assert len(some.pairs) == 2
    expected = every.pairs.select((gaps > middle).nonzero().flatten())
    for name, tensor in expected.tensors().items():
        assert torch.equal(some.pairs.tensors()[name], tensor)


def test_two_pairs_of_each_prompt(sd15):
    plain, both = collect(sd15), collect(sd15, pairing=own("top_two_against_bottom_two"))
    for mine, his in zip(both.comparisons, plain.comparisons, strict=True):
        assert torch.equal(mine.scores, his.scores)  # the same candidates
        assert torch.equal(mine.gaps[:2], his.gaps)
        ranked = mine.scores.sort(dim=0, descending=True).values
        expected = ((ranked[[0, 1]] - ranked[[3, 2]]) / 2).tanh().flatten()
        torch.testing.assert_close(mine.gaps, expected)
    assert both.pairs.prompt_ids.tolist() == [70, 71, 70, 71] * 2
    # Comparison by comparison, the first two pairs are those of best_worst.
    of_plain = both.pairs.select(torch.tensor([0, 1, 4, 5]))
    for name, tensor in plain.pairs.tensors().items():
        assert torch.equal(of_plain.tensors()[name], tensor)
    second = both.pairs.select(torch.tensor([2, 3, 6, 7]))
    assert torch.equal(second.latents, plain.pairs.latents)
    assert not torch.equal(second.noises, plain.pairs.noises)


def test_a_threshold_on_two_pairs_of_each_prompt(sd15):
    rule = {"pairing": own("top_two_against_bottom_two")}
    every = collect(sd15, **rule)
    gaps = torch.cat([comparison.gaps for comparison in every.comparisons])
    middle = gaps.sort().values[3:5].mean().item()
    some = collect(sd15, threshold=middle, **rule)
    kept = (gaps > middle).nonzero().flatten()
    assert len(kept) == 4
    for name, tensor in every.pairs.select(kept).tensors().items():
        assert torch.equal(some.pairs.tensors()[name], tensor)


def test_a_rule_that_draws_leaves_the_noise_of_the_rollout_alone(sd15):
    plain, random = collect(sd15), collect(sd15, pairing=own("drawn"))
    for mine, his in zip(random.comparisons, plain.comparisons, strict=True):
        assert torch.equal(mine.scores, his.scores)
    assert torch.equal(random.pairs.latents, plain.pairs.latents)
    assert torch.equal(random.pairs.sampler_epsilon, plain.pairs.sampler_epsilon)
    assert not torch.equal(random.pairs.noises, plain.pairs.noises)
    assert any((comparison.gaps < 0).any() for comparison in random.comparisons)
    # The same seed draws the same pairs, another seed others.
    again, other = (collect(sd15, seed=seed, pairing=own("drawn")) for seed in (0, 1))
    assert torch.equal(again.pairs.noises, random.pairs.noises)
    assert not torch.equal(other.pairs.latents, random.pairs.latents)


def test_a_rule_may_leave_prompts_out(sd15):
    found = collect(sd15, pairing=own("none_of_the_first"))
    assert found.pairs.prompt_ids.tolist() == [71, 71]
    assert torch.equal(found.pairs.latents, collect(sd15).pairs.latents[[1, 3]])


@pytest.mark.parametrize("looks_at", [None, "images"])
def test_a_scorer_sees_the_decoded_images(sd15, looks_at):
    scorer = Means(looks_at)
    collect(sd15, scorer)
    assert [len(seen) for _, seen in scorer.seen] == [3, 3, 2, 3, 3, 2]
    assert {seen.shape[1:] for _, seen in scorer.seen} == {(3, 16, 16)}


def test_a_scorer_of_latents_sees_the_noisy_latents_and_nothing_is_decoded(sd15, monkeypatch):
    scorer = Means("latents")

    def refuse(latents):
        raise AssertionError("decoded")

    monkeypatch.setattr(sd15, "decode_candidates", refuse)
    found = collect(sd15, scorer)
    assert [len(seen) for _, seen in scorer.seen] == [4, 4, 4, 4]
    # Told, and recorded with, the timestep that they were drawn from.
    assert [t for t, _ in scorer.seen] == [251, 251, 1, 1]
    assert [c.score_timestep for c in found.comparisons] == [251, 1]
    for number, comparison in enumerate(found.comparisons):
        latents = torch.cat([seen for _, seen in scorer.seen[2 * number : 2 * number + 2]])
        by_candidate = latents.unflatten(0, (4, 2))
        torch.testing.assert_close(
            comparison.scores, 100 * by_candidate.mean(dim=(2, 3, 4)), rtol=1e-5, atol=1e-4
        )
        best, worst = comparison.scores.argmax(dim=0), comparison.scores.argmin(dim=0)
        rows = slice(2 * number, 2 * number + 2)
        expected = torch.stack([by_candidate[best, [0, 1]], by_candidate[worst, [0, 1]]], dim=1)
        assert torch.equal(found.pairs.next_latents[rows], expected)


def test_noisy_latents_that_are_not_finite_have_no_score(sd15):
    class Blind(Means):
        looks_at = "latents"

        def score(self, seen, prompt_features, timestep):
            seen.view(-1)[0] = torch.inf
            return torch.ones(len(seen))

    scores = collect(sd15, Blind()).comparisons[0].scores
    assert scores.isnan().sum() == 2  # the first of each part
