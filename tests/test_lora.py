"""One UNet as policy, EMA and base model, and the LoRA files it leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import Attention
from helpers import ATTENTION, add_tiny_lora, model_folder, randn, random_weights, unet_output
from safetensors.torch import load_file, save_file

from spo.errors import UserError
from spo.lora_io.find import find_lora, read_lora
from spo.lora_io.write import LORA_FILE, save_lora
from spo.models.lora import add_lora

PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture
def model(own_backbone):
    """A tiny SD1.5 whose LoRA differs from zero everywhere, and that LoRA."""
    backbone = own_backbone("sd15")
    lora = add_tiny_lora(backbone)
    lora.assign(random_weights(lora, seed=1))
    return backbone, lora


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_without_lora_the_base_model_bit_for_bit(request, own_backbone, family):
    base = unet_output(request.getfixturevalue(family))  # peft never touched this one
    backbone = own_backbone(family)
    lora = add_tiny_lora(backbone)
    assert torch.equal(unet_output(backbone), base)  # B starts at zero
    lora.assign(random_weights(lora, seed=1))
    policy = unet_output(backbone)
    assert (policy - base).abs().max() > 1e-2
    with lora.using(None):
        assert torch.equal(unet_output(backbone), base)
    assert torch.equal(unet_output(backbone), policy)


def test_using_equals_assigning_and_is_undone(model):
    backbone, lora = model
    own, ema = lora.snapshot(), random_weights(lora, seed=2)
    before = unet_output(backbone)
    with lora.using(ema):
        used = unet_output(backbone)
        assert all(p.data_ptr() == ema[name].data_ptr() for name, p in lora.parameters.items())
    assert torch.equal(unet_output(backbone), before)
    assert all(torch.equal(p, own[name]) for name, p in lora.parameters.items())
    lora.assign(ema)
    assert torch.equal(unet_output(backbone), used)
    assert not torch.equal(used, before)
    # Assigning copied: the policy may now change without the EMA.
    with torch.no_grad():
        next(iter(lora.parameters.values())).add_(1)
    assert all(torch.equal(v, random_weights(lora, seed=2)[k]) for k, v in ema.items())


@pytest.mark.parametrize("weights", ["base", "ema", "incomplete"])
def test_identity_gradients_and_exceptions(model, weights):
    backbone, lora = model
    ema = random_weights(lora, seed=2)
    if weights == "incomplete":
        ema.popitem()
    inside = {name: p for name, p in backbone.unet.named_parameters() if "lora_" in name}
    before = unet_output(backbone)
    with (
        pytest.raises(KeyError if weights == "incomplete" else ZeroDivisionError),
        lora.using(None if weights == "base" else ema),
    ):
        assert all(p.requires_grad for p in lora.parameters.values())
        raise ZeroDivisionError
    now = dict(backbone.unet.named_parameters())
    assert inside and all(now[name] is p is lora.parameters[name] for name, p in inside.items())
    trainable = {name for name, p in now.items() if p.requires_grad}
    assert trainable == set(lora.parameters)
    assert torch.equal(unet_output(backbone), before)


def test_the_autocast_cache_keeps_no_stale_weights(model, own_backbone):
    backbone, lora = model
    ema = random_weights(lora, seed=2)
    apart = own_backbone("sd15")
    add_tiny_lora(apart).assign(ema)

    def output(of):  # with gradients on: only then does autocast cache
        conditioning = of.encode_prompts(["a fox"])
        latents = randn(1, *of.latent_shape, seed=0)
        with torch.enable_grad():
            return of.predict(of.unet, latents, 501, conditioning, 1.0).detach()

    with torch.autocast("cpu", torch.bfloat16):
        expected = output(apart)
    with torch.autocast("cpu", torch.bfloat16):
        first = output(backbone)
        with lora.using(ema):
            swapped = output(backbone)
        again = output(backbone)
    assert torch.equal(first, again)
    assert torch.equal(swapped, expected)
    assert not torch.equal(first, swapped)


@pytest.mark.parametrize("rank", [4, 16])
def test_initial_weights(own_backbone, rank):
    backbone = own_backbone("sd15")
    torch.manual_seed(1)
    lora = add_tiny_lora(backbone, rank, seed=7)
    torch.manual_seed(2)
    same = add_tiny_lora(own_backbone("sd15"), rank, seed=7)
    other = add_tiny_lora(own_backbone("sd15"), rank, seed=8)
    down = [name for name in lora.parameters if "lora_A" in name]
    assert all(torch.equal(same.parameters[k], p) for k, p in lora.parameters.items())
    assert not any(torch.equal(other.parameters[k], lora.parameters[k]) for k in down)
    drawn = torch.cat([lora.parameters[name].flatten() for name in down]).detach()
    assert drawn.mean().abs() < 0.1 / rank
    assert drawn.std().item() == pytest.approx(1 / rank, rel=0.05)
    assert not any(p.any() for name, p in lora.parameters.items() if "lora_B" in name)
    assert {p.dtype for p in lora.parameters.values()} == {torch.float32}
    attentions = sum(isinstance(module, Attention) for module in backbone.unet.modules())
    assert len(lora.parameters) == len(ATTENTION) * 2 * attentions > 0


def test_the_norm_is_that_of_the_dense_change(own_backbone, sd15):
    lora = add_tiny_lora(own_backbone("sd15"), rank=4, alpha=6)
    assert lora.norm() == 0
    weights = random_weights(lora, seed=1)
    lora.assign(weights)
    base = sd15.unet.state_dict()
    names = [name.removesuffix(".lora_A.default.weight") for name in weights if "lora_A" in name]
    changes = [
        1.5 * weights[f"{name}.lora_B.default.weight"] @ weights[f"{name}.lora_A.default.weight"]
        for name in names
    ]
    change, of_base = (
        torch.cat([each.flatten() for each in tensors]).double().norm().item()
        for tensors in (changes, [base[f"{name}.weight"] for name in names])
    )
    assert lora.norm().item() == pytest.approx(change / of_base, rel=1e-5)


def test_alpha_scales(own_backbone, sd15):
    """alpha / rank multiplies B A: half the alpha is half of B."""
    full, half = own_backbone("sd15"), own_backbone("sd15")
    lora, of_half = add_tiny_lora(full, rank=4, alpha=4), add_tiny_lora(half, rank=4, alpha=2)
    weights = random_weights(lora, seed=1)
    of_half.assign(weights)
    lora.assign({k: v / 2 if "lora_B" in k else v for k, v in weights.items()})
    torch.testing.assert_close(unet_output(half), unet_output(full))
    assert not torch.allclose(unet_output(half), unet_output(sd15))


# to_out is a list of layers; o_q ends like to_q but names no layer.
@pytest.mark.parametrize("wrong", ["no_such_layer", "to_out", "o_q"])
def test_a_target_that_is_no_layer_is_an_error(own_backbone, wrong):
    with pytest.raises(UserError, match=f"lora.target_modules: .* no linear layer '{wrong}'"):
        add_lora(own_backbone("sd15").unet, 4, 4, ["to_q", wrong], seed=0)


@pytest.mark.parametrize(
    ("family", "rank", "alpha"), [("sd15", 4, 4), ("sd15", 4, 2), ("sdxl", 3, 6)]
)
def test_a_saved_lora_works_in_diffusers(own_backbone, tmp_path, family, rank, alpha):
    backbone = own_backbone(family)
    lora = add_tiny_lora(backbone, rank, alpha)
    weights = random_weights(lora, seed=1)
    save_lora(tmp_path / LORA_FILE, lora, weights, {"base_model": "tiny"})
    lora.assign(weights)
    expected = unet_output(backbone)
    pipe = PIPELINES[family].from_pretrained(model_folder(family), safety_checker=None)
    pipe.load_lora_weights(tmp_path)
    backbone.unet = pipe.unet
    assert torch.equal(unet_output(backbone), expected)


_SAVE = """
import sys, torch
from pathlib import Path
from spo.models.lora import Lora
from spo.lora_io.write import save_lora
names = [f"{layer}.lora_{factor}.default.weight" for layer in "qkvo" for factor in "AB"]
weights = {name: torch.arange(6.0).view(2, 3) for name in names}
lora = Lora({}, {}, 4, 2, ("to_q", "to_k", "to_v"))
metadata = {name: name * 3 for name in ("base_model", "algorithm", "config_sha256", "run")}
save_lora(Path(sys.argv[1]), lora, weights, metadata)
"""


def test_equal_weights_give_equal_bytes_in_every_process(tmp_path, monkeypatch):
    root = str(Path(__file__).parent.parent)
    there, here = str(tmp_path / "there.safetensors"), str(tmp_path / "here.safetensors")
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", _SAVE, there], env=environment, check=True)
    monkeypatch.setattr(sys, "argv", ["", here])
    exec(_SAVE, {})
    assert Path(there).read_bytes() == Path(here).read_bytes()
    assert len(load_file(here)) == 8


def _kohya(weights, alpha):
    """A file of kohya's scripts: module names with underscores, and an alpha each."""
    result = {}
    for name, tensor in weights.items():
        module, _, factor = name.partition(".lora_")
        flat = "lora_unet_" + module.replace(".", "_")
        result[f"{flat}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = tensor
        result[f"{flat}.alpha"] = torch.tensor(float(alpha))
    return result


def _old_diffusers(weights):
    """diffusers before 0.22: attention processors that hold the LoRA."""
    result = {}
    for name, tensor in weights.items():
        module, _, factor = name.partition(".lora_")
        attention, _, layer = module.removesuffix(".0").rpartition(".")
        direction = "down" if factor.startswith("A") else "up"
        result[f"unet.{attention}.processor.{layer}_lora.{direction}.weight"] = tensor
    return result


@pytest.mark.parametrize("form", ["ours", "kohya", "old_diffusers"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_reading_a_file_gives_the_network_that_diffusers_makes_of_it(
    own_backbone, tmp_path, family, form
):
    backbone = own_backbone(family)
    lora = add_tiny_lora(backbone, rank=4, alpha=8)
    weights, path = random_weights(lora, seed=1), tmp_path / LORA_FILE
    if form == "ours":
        writer = add_tiny_lora(own_backbone(family), rank=4, alpha=2)
        save_lora(path, writer, weights, {})
    else:
        save_file(_kohya(weights, alpha=2) if form == "kohya" else _old_diffusers(weights), path)
    found = read_lora(path, lora, "lora.init_from")
    # Files without an alpha have the rank for it; ours is 8, which B makes up for.
    factor = (4 if form == "old_diffusers" else 2) / 8
    for name, tensor in weights.items():
        expected = tensor * factor if "lora_B" in name else tensor
        torch.testing.assert_close(found[name], expected)
    lora.assign(found)
    read = unet_output(backbone)
    pipe = PIPELINES[family].from_pretrained(model_folder(family), safety_checker=None)
    pipe.load_lora_weights(tmp_path)
    backbone.unet = pipe.unet
    torch.testing.assert_close(read, unet_output(backbone), rtol=1e-5, atol=1e-5)


def test_files_that_do_not_fit(own_backbone, tmp_path):
    backbone, xl = own_backbone("sd15"), own_backbone("sdxl")
    lora, of_xl = add_tiny_lora(backbone, rank=4), add_tiny_lora(xl, rank=4)
    wider = add_tiny_lora(own_backbone("sd15"), rank=8)
    path = tmp_path / LORA_FILE

    save_lora(path, wider, wider.parameters, {})
    with pytest.raises(UserError, match=r"lora\.init_from: .*lora\.rank=4.* not \(4, "):
        read_lora(path, lora, "lora.init_from")
    save_lora(path, of_xl, of_xl.parameters, {})
    with pytest.raises(UserError, match=r"lora\.init_from: .*lora\.target_modules"):
        read_lora(path, lora, "lora.init_from")
    text = {f"text_encoder.text_projection.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(load_file(path) | text, path)
    with pytest.raises(UserError, match=r"lora\.init_from: .*also changes the text encoder"):
        read_lora(path, of_xl, "lora.init_from")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"lora\.init_from: .*cannot be read"):
        read_lora(path, of_xl, "lora.init_from")


def test_finding_a_file(tmp_path):
    for missing in (tmp_path, tmp_path / "other.safetensors", "no_such_name"):
        with pytest.raises(UserError, match=r"lora\.init_from: no file"):
            find_lora(str(missing), "lora.init_from")
    (tmp_path / LORA_FILE).write_bytes(b"")
    assert (
        find_lora(str(tmp_path), "lora.init_from")
        == find_lora(str(tmp_path / LORA_FILE), "lora.init_from")
        == tmp_path / LORA_FILE
    )
