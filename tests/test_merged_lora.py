"""A LoRA merged into the weights: the same network, and the base model comes back bit for bit."""

from pathlib import Path

import pytest
import torch
from helpers import add_tiny_lora, load_backbone, random_weights, unet_output
from torch.autograd import _unsafe_preserve_version_counter as unsafe_preserve_version_counter

from spo.command_line.config_files import load_config
from spo.method.build import read_recipe
from spo.method.collect import roll_out
from spo.models.lora import MergedLora


@pytest.mark.parametrize(
    ("family", "rank", "alpha"), [("sd15", 4, 4), ("sd15", 4, 2), ("sdxl", 3, 6)]
)
def test_the_same_network(own_backbone, family, rank, alpha):
    backbone = own_backbone(family)
    lora = add_tiny_lora(backbone, rank, alpha)
    weights = {name: w / 3 for name, w in random_weights(lora, seed=1).items()}
    lora.assign(random_weights(lora, seed=2))
    policy = unet_output(backbone)
    with lora.using(None):
        base = unet_output(backbone)
    with lora.using(weights):
        expected = unet_output(backbone)
    assert (expected - base).abs().max() > 1e-2
    merged = MergedLora(lora)
    for _ in range(2):  # made, then kept
        with merged.using(weights):
            torch.testing.assert_close(unet_output(backbone), expected, rtol=1e-4, atol=1e-4)
            assert all(p.requires_grad for p in lora.parameters.values())
        assert torch.equal(unet_output(backbone), policy)
        with lora.using(None):
            assert torch.equal(unet_output(backbone), base)


def test_made_anew_when_the_lora_has_changed_and_only_then(own_backbone, monkeypatch):
    backbone = own_backbone("sd15")
    lora = add_tiny_lora(backbone)
    merged, ema, calls = MergedLora(lora), random_weights(lora, seed=1), []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: calls.append(0) or addmm(*a, **k))

    def number_merged(weights):
        calls.clear()
        with merged.using(weights):
            used = unet_output(backbone)
        made = len(calls)
        with lora.using(weights):
            torch.testing.assert_close(used, unet_output(backbone), rtol=1e-4, atol=1e-4)
        return made

    every = len(lora.layers)
    assert every > 0
    assert number_merged(ema) == every
    assert number_merged(ema) == 0
    with unsafe_preserve_version_counter(tuple(ema.values())):  # as kernels of other libraries
        next(iter(ema.values())).mul_(2)
    merged.forget(ema)
    assert number_merged(ema) == every
    merged.forget(lora.parameters)  # which are not what is merged
    assert number_merged(ema) == 0
    assert number_merged(lora.parameters) == every
    assert number_merged(ema) == every


def test_an_exception_leaves_the_base_as_it_was(own_backbone):
    backbone = own_backbone("sd15")
    lora = add_tiny_lora(backbone)
    before = unet_output(backbone)
    pointers = [layer.base_layer.weight.data_ptr() for layer in lora.layers.values()]
    with (
        pytest.raises(ZeroDivisionError),
        MergedLora(lora).using(random_weights(lora, seed=1)),
    ):
        raise ZeroDivisionError
    assert [layer.base_layer.weight.data_ptr() for layer in lora.layers.values()] == pointers
    assert torch.equal(unet_output(backbone), before)


@pytest.mark.parametrize("mixed_precision", ["fp16", "bf16"])
def test_rounded_once_in_the_dtype_of_the_weights(mixed_precision):
    backbone = load_backbone("sd15", mixed_precision)
    lora = add_tiny_lora(backbone)
    weights = random_weights(lora, seed=1)
    name, layer = next(iter(lora.layers.items()))
    base = layer.base_layer.weight.clone()
    with MergedLora(lora).using(weights):
        found = layer.base_layer.weight
        assert found.dtype == base.dtype == backbone.dtype
        change = weights[f"{name}.lora_B.default.weight"] @ weights[f"{name}.lora_A.default.weight"]
        expected = (base.float() + change).to(base.dtype)
        # Products are summed in another order, which may move a value to the next number.
        torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-3)
        assert (found == expected).float().mean() > 0.99
        unet_output(backbone)  # works without autocast, too
        latents = torch.zeros(1, *backbone.latent_shape)
        conditioning = backbone.encode_prompts(["a fox"])
        backbone.predict(backbone.unet, latents, 501, conditioning, 5.0, autocast=False)


@pytest.mark.parametrize("mixed_precision", ["fp16", "bf16"])
def test_a_rollout_is_under_autocast_where_a_lora_is_in_use(mixed_precision):
    """A LoRA in fp32 beside weights in 16 bits needs it, whoever put it there."""
    backbone, seen = load_backbone("sd15", mixed_precision), []
    backbone.unet.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    config = load_config(str(Path(__file__).parent / "data" / "random_models.py"))
    config.update_from_flattened_dict({"sample.num_steps": 2, "sample.branch_from": 0})
    collect = read_recipe(config).collect

    def is_under_autocast():
        drawn = roll_out(
            backbone,
            backbone.sampler(2, eta=1.0),
            collect,
            backbone.encode_prompts(["a fox"]),
            torch.Generator().manual_seed(0),
        )
        seen.clear()
        assert len(list(drawn)) == len(seen) == 2
        (found,) = set(seen)
        return found

    assert not is_under_autocast()  # no LoRA yet
    lora = add_tiny_lora(backbone)
    lora.assign(random_weights(lora, seed=1))
    assert is_under_autocast()
    with lora.using(None):
        assert not is_under_autocast()
    with MergedLora(lora).using(lora.parameters):
        assert not is_under_autocast()
