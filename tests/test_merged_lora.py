"""A LoRA merged into the weights: the same network, and the base model comes back bit for bit."""

import pytest
import torch
from helpers import add_tiny_lora, load_backbone, random_weights, unet_output

from spo.merged_lora import MergedLora


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
    assert number_merged(ema) == number_merged(dict(ema)) == 0
    next(iter(ema.values())).mul_(2)  # as an EMA update changes it
    assert number_merged(ema) == every
    assert number_merged({name: w.clone() for name, w in ema.items()}) == every
    assert number_merged(ema) == every
    assert number_merged(lora.parameters) == every
    assert number_merged(lora.parameters) == 0
    optimizer = torch.optim.AdamW(lora.parameters.values(), lr=0.1)
    for parameter in lora.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert number_merged(lora.parameters) == every


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
