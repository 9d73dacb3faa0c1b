"""The baseline: the official code's arithmetic draws our pairs and learns what ours learns."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import MODELS, random_weights

from spo.command_line.config_files import load_config
from spo.costs.load import load_models
from spo.costs.meter import Meter, draw_pairs, train_on_pairs
from spo.gpu_check.official import official_arithmetic
from spo.method.build import read_recipe

CPU = torch.device("cpu")
CONFIG = str(Path(__file__).parent / "data" / "random_models.py")
CHANGES = {"sample.num_steps": 4, "sample.branch_from": 2, "sample.num_candidates": 3}
# So wide that most pairs of a policy far from the base model have gradients.
CHANGES |= {"train.clip_eps": 0.9, "train.learning_rate": 1e-3}


def load(family, **changes):
    config = load_config(CONFIG)
    own = {"family": family, "pretrained.model": str(MODELS / f"tiny-{family}")}
    config.update_from_flattened_dict(own | CHANGES | changes)
    models = load_models(read_recipe(config), CPU)
    models.learner.lora.assign(random_weights(models.learner.lora, seed=1))
    models.learner.ema = models.learner.lora.snapshot()
    return models


def trained(models, pairs):
    """The losses of all minibatches of `pairs`."""
    parts = [pairs.select(slice(start, start + 2)) for start in range(0, len(pairs), 2)]
    steps = [models.learner.train_minibatch(part, index) for index, part in enumerate(parts)]
    return [step.output.loss.item() for step in steps]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_it_draws_the_same_pairs_and_learns_the_same(family):
    ours, theirs = load(family), official_arithmetic(load(family))
    before = ours.learner.lora.snapshot()
    own = draw_pairs(ours, 2, Meter(CPU), apart=False)
    rows, decoded = [], []
    text, vae = theirs.scorer.scorer.clip.text_model, theirs.backbone.decoder.decoder
    text.register_forward_hook(lambda module, args, out: rows.append(len(out.pooler_output)))
    vae.register_forward_hook(lambda module, args, out: decoded.append(len(out)))
    pairs = draw_pairs(theirs, 2, Meter(CPU), apart=True)
    # Steps 2 and 3 of 4 are compared: 6 candidates each, and the last ones again.
    assert sum(rows) == sum(decoded) == 3 * 6
    assert theirs.backbone.unet is theirs.learner.unet
    assert len(pairs) == 4 and torch.equal(pairs.timesteps, own.timesteps)
    for name in ("latents", "noises", "next_latents"):
        torch.testing.assert_close(getattr(pairs, name), getattr(own, name), atol=2e-4, rtol=0)
    assert trained(theirs, own) == pytest.approx(trained(ours, own), abs=1e-6)
    policy, ema = ours.learner.lora.parameters, theirs.learner.ema_unet.state_dict()
    for name, parameter in theirs.learner.lora.parameters.items():
        torch.testing.assert_close(parameter, policy[name], atol=2e-5, rtol=0)
        torch.testing.assert_close(ema[name], ours.learner.ema[name], atol=2e-5, rtol=0)
        assert (parameter - before[name]).abs().max() > 5e-4, name


def test_all_weights_are_averaged():
    models = load("sd15")
    learner = official_arithmetic(models).learner
    learner.settings = replace(learner.settings, accumulation_steps=2)
    policy, ema = learner.unet.conv_in.weight, learner.ema_unet.conv_in.weight
    pairs, before = draw_pairs(models, 1, Meter(CPU), apart=False), ema.clone()
    policy.data.add_(1)
    learner.train_minibatch(pairs, 0)
    assert torch.equal(ema, before)
    learner.train_minibatch(pairs, 1)
    torch.testing.assert_close(ema, before + 1 - learner.settings.ema_decay)
    assert torch.equal(learner.reference_unet.conv_in.weight, before)
    assert not any("lora" in name for name in learner.reference_unet.state_dict())


def test_in_bf16():
    models = official_arithmetic(load("sd15", mixed_precision="bf16"))
    before = models.learner.lora.snapshot()
    train_on_pairs(models, draw_pairs(models, 2, Meter(CPU), apart=True), 2, Meter(CPU))
    assert models.learner.updates == 2 and models.learner.ema_unet.dtype == torch.bfloat16
    assert any(not torch.equal(p, before[n]) for n, p in models.learner.lora.parameters.items())
