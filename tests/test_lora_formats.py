"""LoRA files of every format: names, bits, and the networks that other readers make of them."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from helpers import add_tiny_lora, load_backbone, model_folder, random_weights, unet_output
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from spo.errors import UserError
from spo.lora_io.convert import convert_lora, merged_pipeline
from spo.lora_io.find import read_folded, read_lora
from spo.lora_io.names import from_kohya, is_module, to_kohya
from spo.lora_io.read import read_lora_file
from spo.lora_io.write import WRITERS, LoraModule, LoraWeights, save_lora

PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
KEYS = json.loads((Path(__file__).parent / "data" / "lora_keys.json").read_text())
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
HEADER = {"base_model": "user/model", "algorithm": "gradspo", "step": "7", "config_sha256": "0a"}


def projections(family):
    """{module: (its kohya name, its SGM name, (out, in))}, all of the full-size UNet's attention."""
    found = {}
    for place in KEYS[family]:
        for block in range(place["transformer_blocks"]):
            for attention in ("attn1", "attn2"):
                for layer in ATTENTION:
                    path = f"transformer_blocks.{block}.{attention}.{layer}"
                    reads_prompt = attention == "attn2" and layer in ("to_k", "to_v")
                    sizes = place["width"], place["prompt_width" if reads_prompt else "width"]
                    names = [f"lora_unet_{place[k]}_{path}" for k in ("attention", "sgm")]
                    kohya, sgm = (name.replace(".", "_") for name in names)
                    found[f"{place['attention']}.{path}"] = kohya, sgm, sizes
    return found


def random_lora(shapes, rank, alpha, dtype=torch.float32):
    """A LoRA of modules with weights of the given (out, in, ...) shapes."""
    noise = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    draw = random.Random(1)

    def tensor(*shape):
        count = torch.Size(shape).numel()
        start = draw.randrange(len(noise) - count)
        return noise[start : start + count].view(shape).clone()

    modules = {
        f"unet.{name}": LoraModule(
            tensor(rank, *shape[1:]), tensor(shape[0], rank, *(1 for _ in shape[2:])), float(alpha)
        )
        for name, shape in sorted(shapes.items())
    }
    header = HEADER | {"rank": str(rank), "alpha": str(alpha)}
    return LoraWeights(modules, header, tuple(sorted(ATTENTION)))


def full_size(family, rank, alpha):
    return random_lora({n: row[2] for n, row in projections(family).items()}, rank, alpha)


def written(lora, form, tmp_path, name="x"):
    """What a reader opens after writing: a file, or the file of a peft folder."""
    path = tmp_path / (name if form == "peft" else f"{name}.safetensors")
    WRITERS[form](lora, path)
    return path / "adapter_model.safetensors" if form == "peft" else path


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize(("family", "count"), [("sd15", 128), ("sdxl", 560)])
def test_the_name_of_every_attention_projection(family, count):
    rows = projections(family)
    assert len(rows) == count
    for module, (kohya, sgm, _) in rows.items():
        name = f"unet.{module}"
        assert is_module(name)
        assert (to_kohya(name, sdxl=False), to_kohya(name, sdxl=True)) == (kohya, sgm)
        assert from_kohya(kohya) == from_kohya(sgm) == name


# Our name and its SGM name, of what is no attention projection.
OTHERS = {
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.2.resnets.0.conv_shortcut": "input_blocks_7_0_skip_connection",
    "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "up_blocks.1.resnets.2.conv2": "output_blocks_5_0_out_layers_3",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.0.attentions.2.proj_out": "output_blocks_2_1_proj_out",
    "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj": (
        "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj"
    ),
    "up_blocks.1.attentions.0.transformer_blocks.1.ff.net.2": (
        "output_blocks_3_1_transformer_blocks_1_ff_net_2"
    ),
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
_LAYER = "text_model.encoder.layers.11"
TEXT = {
    f"text_encoder.{_LAYER}.self_attn.out_proj": f"lora_te1_{_LAYER}_self_attn_out_proj",
    f"text_encoder.{_LAYER}.mlp.fc1": f"lora_te1_{_LAYER}_mlp_fc1",
    f"text_encoder_2.{_LAYER}.self_attn.q_proj": f"lora_te2_{_LAYER}_self_attn_q_proj",
    "text_encoder_2.text_projection": "lora_te2_text_projection",
}


def test_the_names_of_other_modules():
    names = {f"unet.{ours}": f"lora_unet_{sgm}" for ours, sgm in OTHERS.items()}
    names |= {ours: kohya.replace(".", "_") for ours, kohya in TEXT.items()}
    for ours, theirs in names.items():
        assert is_module(ours), ours
        assert to_kohya(ours, sdxl=True) == theirs
        assert from_kohya(theirs) == from_kohya(to_kohya(ours, sdxl=False)) == ours


def diffusers_reading(flat_names, layers_per_block=2):
    """{name in diffusers' network: kohya name}, by diffusers' own converter."""
    weights = {}
    for i, name in enumerate(flat_names):
        weights[f"{name}.lora_down.weight"] = torch.full((1, 1), i)
        weights[f"{name}.lora_up.weight"] = torch.full((1, 1), i)
    config = SimpleNamespace(layers_per_block=layers_per_block)
    state, _ = StableDiffusionXLPipeline.lora_state_dict(weights, unet_config=config)
    names = list(flat_names)
    return {
        key.removesuffix(".lora_A.weight"): names[int(value)]
        for key, value in convert_unet_state_dict_to_peft(state).items()
        if key.endswith(".lora_A.weight")
    }


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_reads_and_writes_the_same_kohya_names(family):
    rows = projections(family)
    for which in (0, 1):
        ours = {f"unet.{module}": row[which] for module, row in rows.items()}
        assert diffusers_reading(ours.values()) == ours
    peft = {f"unet.{module}.lora_A.weight": torch.zeros(1) for module in rows}
    theirs = {name.partition(".")[0] for name in convert_state_dict_to_kohya(peft)}
    assert theirs == {row[0] for row in rows.values()}


SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("family", "config"), [("sd15", {"cross_attention_dim": 768}), ("sdxl", SDXL_UNET)]
)
def test_every_layer_of_the_full_size_unet(family, config):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    layers = {
        f"unet.{name}": tuple(layer.weight.shape)
        for name, layer in unet.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }
    assert all(map(is_module, layers))
    for sdxl in (False, True):
        names = {name: to_kohya(name, sdxl) for name in layers}
        assert len(set(names.values())) == len(layers)
        assert all(from_kohya(flat) == name for name, flat in names.items())
    if family == "sdxl":
        assert diffusers_reading(names.values()) == names
    attention = {n: shape for n, shape in layers.items() if n.endswith(ATTENTION)}
    assert attention == {f"unet.{n}": row[2] for n, row in projections(family).items()}


@pytest.mark.parametrize(
    ("family", "rank", "alpha", "dtype"),
    [
        ("sd15", 4, 4, torch.float32),
        ("sd15", 64, 32, torch.float16),
        ("sdxl", 4, 6.5, torch.float32),
        ("sdxl", 64, 64, torch.float16),
    ],
)
def test_there_and_back_is_the_same_file(tmp_path, family, rank, alpha, dtype):
    rows = projections(family)
    if rank == 64:  # every shape, but fewer bytes
        rows = {name: row for name, row in rows.items() if ".transformer_blocks.0." in name}
    lora = random_lora({name: row[2] for name, row in rows.items()}, rank, alpha, dtype)
    start = written(lora, "diffusers", tmp_path, "start")
    suffixes = (".lora_down.weight", ".lora_up.weight", ".alpha")
    names = {row[1 if family == "sdxl" else 0] for row in rows.values()}
    expected = {
        "kohya": {name + suffix for name in names for suffix in suffixes},
        "peft": {f"base_model.model.{m}.lora_{x}.weight" for m in rows for x in "AB"},
    }
    for form, keys in expected.items():
        there = written(read_lora_file(start, "SOURCE"), form, tmp_path, form)
        with safe_open(there, framework="pt") as file:
            assert set(file.keys()) == keys
        back = written(read_lora_file(there, "SOURCE"), "diffusers", tmp_path, f"from_{form}")
        assert back.read_bytes() == start.read_bytes()
    names = {f"unet.{m}.lora_{x}.weight" for m in rows for x in "AB"}
    tensors = load_file(start)
    assert tensors.keys() == names
    for name, module in lora.modules.items():
        assert torch.equal(tensors[f"{name}.lora_A.weight"], module.down)
        assert torch.equal(tensors[f"{name}.lora_B.weight"], module.up)


@pytest.mark.parametrize(
    ("family", "version"),
    [("sd15", "sd_v1"), ("sdxl", "sdxl_base_v1-0"), ("tiny", None), ("sd21", "sd_v2")],
)
def test_the_header_of_a_kohya_file(tmp_path, family, version):
    if family == "tiny":
        lora = random_lora({"mid_block.attentions.0.proj_in": (8, 8)}, 2, 1)
    elif family == "sd21":  # which training takes for one of SD1.5
        layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
        lora = replace(random_lora({layer: (320, 1024)}, 2, 1), family="sd15")
    else:
        lora = full_size(family, 2, 1)
    header = metadata(written(lora, "kohya", tmp_path))
    assert header.items() >= lora.header.items()
    assert header.get("ss_base_model_version") == version
    assert ("modelspec.architecture" in header) == (family in ("sd15", "sdxl"))
    assert ("ss_v2" in header) == (family == "sd21")
    read = read_lora_file(tmp_path / "x.safetensors", "SOURCE")
    assert read.header == lora.header  # and none of what belongs to the format
    assert "lora_adapter_metadata" not in header  # which diffusers refuses beside alphas


def test_sgm_and_plain_kohya_names_are_the_same_lora(tmp_path):
    lora = full_size("sdxl", 2, 1)
    tensors = load_file(written(lora, "kohya", tmp_path))
    plain = {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        plain[f"{to_kohya(from_kohya(name), sdxl=False)}.{rest}"] = tensor
    assert plain.keys().isdisjoint(tensors)
    save_file(plain, tmp_path / "plain.safetensors")
    found = read_lora_file(tmp_path / "plain.safetensors", "SOURCE")
    assert found.modules.keys() == lora.modules.keys()
    for name, module in found.modules.items():
        assert torch.equal(module.up, lora.modules[name].up)
        assert module.alpha == 1


def test_older_diffusers_names(tmp_path):
    """Processors that hold the LoRA, with and without the network's name; text encoders."""
    block, layer = "mid_block.attentions.0.transformer_blocks.0", "text_model.encoder.layers.0"
    old = {
        f"unet.{block}.attn1.processor.to_q_lora": f"unet.{block}.attn1.to_q",
        f"{block}.attn1.processor.to_out_lora": f"unet.{block}.attn1.to_out.0",
        f"unet.{block}.attn2.to_out.0.lora": f"unet.{block}.attn2.to_out.0",
        f"unet.{block}.ff.net.2.lora": f"unet.{block}.ff.net.2",
        f"text_encoder.{layer}.self_attn.to_out_lora": f"text_encoder.{layer}.self_attn.out_proj",
        f"text_encoder.{layer}.mlp.fc1.lora_linear_layer": f"text_encoder.{layer}.mlp.fc1",
        "text_encoder_2.encoder.layers.0.mlp.fc2": f"text_encoder_2.{layer}.mlp.fc2",
    }
    tensors = {}
    for i, name in enumerate(old):
        down, up = ("down", "up") if "lora" in name else ("lora_A", "lora_B")
        tensors[f"{name}.{down}.weight"] = torch.full((3, 4), float(i))
        tensors[f"{name}.{up}.weight"] = torch.full((5, 3), -float(i))
    save_file(tensors, tmp_path / "old.safetensors")
    found = read_lora_file(tmp_path / "old.safetensors", "SOURCE").modules
    assert found.keys() == set(old.values())
    for i, name in enumerate(old.values()):
        assert found[name].down[0, 0] == i == -found[name].up[0, 0]
        assert found[name].alpha == 3  # the rank, as the file does not say


def modules_of(pipe, networks):
    """Weight shapes of everything in `networks` that a LoRA can change."""
    shapes = {}
    for network in networks:
        for name, layer in getattr(pipe, network).named_modules():
            if network != "unet" and name.startswith("encoder."):
                name = f"text_model.{name}"
            if is_module(f"{network}.{name}"):
                shapes[f"{network}.{name}"] = layer.weight.shape
    return shapes


def uneven_lora(pipe, networks=("unet",), alphas=(1, 2, 8)):
    """A LoRA of everything, whose ranks and alphas differ from module to module."""
    generator, modules = torch.Generator().manual_seed(3), {}
    for i, (name, shape) in enumerate(sorted(modules_of(pipe, networks).items())):
        rank, ones = 2 + i % 2, [1] * len(shape[2:])
        down = 0.2 * torch.randn(rank, *shape[1:], generator=generator)
        up = 0.2 * torch.randn(shape[0], rank, *ones, generator=generator)
        modules[name] = LoraModule(down, up, float(alphas[i % len(alphas)]))
    return LoraWeights(modules, {}, ())


def load_pipe(family):
    return PIPELINES[family].from_pretrained(model_folder(family))


def output_of(pipe, family):
    """The UNet's output on the pipeline's own prompt embeddings."""
    backbone = load_backbone(family)
    backbone._pipe, backbone.unet = pipe, pipe.unet
    return unet_output(backbone)


def added_by_hand(lora, family):
    """The output where each weight is W + alpha / rank B A: no reader of files takes part."""
    pipe = load_pipe(family)
    for name, module in lora.modules.items():
        network, _, path = name.partition(".")
        layers = dict(getattr(pipe, network).named_modules())
        weight = layers[path if path in layers else path.removeprefix("text_model.")].weight
        change = torch.einsum("or,ri->oi", module.up.flatten(1), module.down.flatten(1))
        weight.data += module.alpha / len(module.down) * change.reshape(weight.shape)
    return output_of(pipe, family)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_makes_the_same_network(tmp_path, family):
    pipe = load_pipe(family)
    networks = [name for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, name)]
    lora = uneven_lora(pipe, networks)
    expected = added_by_hand(lora, family)
    assert (expected - output_of(pipe, family)).abs().max() > 0.1
    back = read_lora_file(written(lora, "kohya", tmp_path), "SOURCE")
    path = written(back, "diffusers", tmp_path, "back")
    pipe.load_lora_weights(str(path))
    torch.testing.assert_close(output_of(pipe, family), expected, rtol=0, atol=1e-4)
    # diffusers' own reader of kohya files gives every attention the most frequent alpha, and knows
    # add_embedding by its SGM name alone.
    even = uneven_lora(pipe := load_pipe(family), networks, alphas=[5])
    modules = {name: m for name, m in even.modules.items() if "add_embedding" not in name}
    even = replace(even, modules=modules)
    pipe.load_lora_weights(str(written(even, "kohya", tmp_path, "even")))
    expected = added_by_hand(even, family)
    torch.testing.assert_close(output_of(pipe, family), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_peft_makes_the_same_network(tmp_path, family):
    pipe = load_pipe(family)
    lora = uneven_lora(pipe)
    file = written(lora, "peft", tmp_path)
    pipe.unet = PeftModel.from_pretrained(pipe.unet, file.parent)
    expected = added_by_hand(lora, family)
    torch.testing.assert_close(output_of(pipe, family), expected, rtol=0, atol=1e-4)
    found = read_lora_file(file, "SOURCE").modules
    assert {n: m.alpha for n, m in found.items()} == {n: m.alpha for n, m in lora.modules.items()}
    with pytest.raises(UserError, match=r"--to: .* UNet alone, but .* text_encoder\."):
        WRITERS["peft"](uneven_lora(load_pipe(family), ["text_encoder"]), tmp_path / "text")


def test_targets_that_do_not_name_every_module_are_not_kept(tmp_path):
    """A file whose modules were changed by another program."""
    lora = replace(random_lora({"conv_in": (8, 4, 3, 3)}, 2, 2), targets=("to_q",))
    found = read_lora_file(written(lora, "kohya", tmp_path), "SOURCE")
    assert found.targets == ()
    header = metadata(written(found, "diffusers", tmp_path))
    assert json.loads(header["lora_adapter_metadata"])["unet.target_modules"] == ["conv_in"]


def test_cast():
    lora = full_size("sd15", 4, 4)
    name, module = next(iter(lora.modules.items()))
    half = lora.cast(torch.float16).modules[name]
    assert torch.equal(half.up, module.up.half()) and torch.equal(half.down, module.down.half())
    assert half.alpha == 4


Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = to_kohya(Q, sdxl=False)
A, B = torch.zeros(2, 8), torch.zeros(8, 2)
PAIR = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}
BAD = {
    "full checkpoint": (
        {"model.diffusion_model.out.2.weight": A},
        {},
        "1 of its 1 keys .* the first model.diffusion_model.out.2.weight",
    ),
    "something else": (
        {"a.weight": A},
        {},
        "1 of its 1 keys name no LoRA weight .* the first a.weight",
    ),
    "empty": ({}, {}, "0 of its 0 keys name no LoRA weight"),
    "unknown key": (
        PAIR | {f"{FLAT}.dora_scale": A, f"{FLAT}.zz": A},
        {},
        f"2 of its 4 keys .* the first {FLAT}.dora_scale",
    ),
    "other network": (PAIR | {"transformer.x.lora_A.weight": A}, {}, "first transformer.x.lora_A"),
    "block that SDXL has not": (
        PAIR | {f"lora_unet_input_blocks_3_1_proj_in.lora_{x}.weight": A for x in ("up", "down")},
        {},
        "first lora_unet_input_blocks_3_1_proj_in.lora_down.weight",
    ),
    "up without down": ({f"{Q}.lora_B.weight": B}, {}, f"has up for {Q}, but no down"),
    "alpha alone": (PAIR | {"lora_unet_conv_in.alpha": A[0, 0]}, {}, "has alpha for unet.conv_in"),
    "twice": (
        PAIR | {f"{FLAT}.lora_up.weight": B},
        {},
        "1 of its 3 keys",
    ),
    "ranks": (PAIR | {f"{Q}.lora_B.weight": A}, {}, r"\(2, 8\) and \(2, 8\) for .*not of one rank"),
    "alphas": (PAIR | {f"{FLAT}.alpha": A}, {}, "16 elements"),
    "rslora": (PAIR, {"unet.use_rslora": True}, "use_rslora"),
    "text for alpha": (PAIR, {"unet.lora_alpha": "x"}, "could not convert string to float: 'x'"),
    "no rank": (
        {f"{Q}.lora_A.weight": A[:0], f"{Q}.lora_B.weight": B[:, :0]},
        {},
        "not of one rank",
    ),
    "not finite": (
        PAIR | {f"{Q}.lora_B.weight": torch.full((8, 2), torch.nan)},
        {},
        f"{Q}.lora_B.weight has numbers that are not finite",
    ),
    "too large for fp32": (
        PAIR | {f"{Q}.lora_B.weight": torch.full((8, 2), 1e39, dtype=torch.float64)},
        {},
        f"{Q}.lora_B.weight has numbers that are not finite",
    ),
    "kohya's alpha": (
        {f"{FLAT}.lora_down.weight": A, f"{FLAT}.lora_up.weight": B, f"{FLAT}.alpha": A[0, 0] / 0},
        {},
        f"{FLAT}.alpha has numbers that are not finite",
    ),
    "infinite alpha": (PAIR, {"unet.lora_alpha": 1e999}, f"alpha inf for {Q}, no number above 0"),
    "alpha that is no number": (PAIR, {"unet.lora_alpha": float("nan")}, f"alpha nan for {Q}, no"),
    "alpha below 0": (PAIR, {"unet.lora_alpha": -4}, f"alpha -4 for {Q}, no number above 0"),
    "alpha beyond every float": (PAIR, {"unet.lora_alpha": 10**400}, "int too large"),
    "alpha that overflows": (
        PAIR | {f"{Q}.lora_B.weight": B + 100},
        {"unet.lora_alpha": 1e38},
        "that fp32 can use",
    ),
    "alpha of a pattern": (PAIR, {"unet.alpha_pattern": {"to_q": float("inf")}}, "alpha inf for"),
    "list for patterns": (PAIR, {"unet.alpha_pattern": ["to_q"]}, "does not give alphas by names"),
    "broken pattern": (PAIR, {"unet.alpha_pattern": {"(": 1}}, r"'\(', which is no name"),
    "pattern without end": (
        PAIR,
        {"unet.alpha_pattern": {"([a-z_.0-9]+)+!": 1}},
        "which is no name of a module",
    ),
    "deep nest": (PAIR, {"unet.x": "NEST"}, "maximum recursion depth"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_lora(tmp_path, case):
    tensors, adapter, message = BAD[case]
    path = tmp_path / "x.safetensors"
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    header = json.dumps(adapter).replace('"NEST"', "[" * 100_000)
    save_file(tensors, path, metadata={"lora_adapter_metadata": header})
    with pytest.raises(UserError, match=f"^SOURCE: {path} .*{message}"):
        read_lora_file(path, "SOURCE")


@pytest.mark.parametrize(
    ("patterns", "alpha"),
    [
        ({"attn1.to_q": 3, "to_q": 5}, 3),  # the first that fits
        ({"n1.to_q": 3, "attn1.to_k": 5}, 8),
        ({"^mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 3}, 3),  # the whole name
        ({"^attn1.to_q": 3}, 8),
        ({r"attn1\.to_q": 3}, 3),
    ],
)
def test_alphas_by_the_names_of_modules(tmp_path, patterns, alpha):
    path = tmp_path / "x.safetensors"
    adapter = {"unet.lora_alpha": 8, "unet.alpha_pattern": patterns}
    save_file(PAIR, path, metadata={"lora_adapter_metadata": json.dumps(adapter)})
    assert read_lora_file(path, "SOURCE").modules[Q].alpha == alpha


@pytest.mark.parametrize("targets", ["[" * 100_000, '["to_q", 1]', "no JSON"])
def test_targets_that_are_no_names_are_not_kept(tmp_path, targets):
    save_file(PAIR, tmp_path / "x.safetensors", metadata={"target_modules": targets})
    assert read_lora_file(tmp_path / "x.safetensors", "SOURCE").targets == ()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_kernels_of_1_x_1_are_matrices_and_matrices_such_kernels(tmp_path, family):
    lora = uneven_lora(load_pipe(family))

    def turned(tensor, is_kernel):
        return tensor.flatten(1) if is_kernel else tensor[..., None, None]

    modules = {
        name: replace(m, down=turned(m.down, m.down.ndim == 4), up=turned(m.up, m.down.ndim == 4))
        for name, m in lora.modules.items()
        if m.down.shape[2:] in ((), (1, 1))
    }
    assert {m.down.ndim for m in modules.values()} == {2, 4}
    path = written(replace(lora, modules=lora.modules | modules), "kohya", tmp_path)
    expected = added_by_hand(lora, family)
    backbone = load_backbone(family)
    backbone.use_loras([(read_folded(path, backbone, "models"), 1.0)])
    torch.testing.assert_close(unet_output(backbone), expected, rtol=0, atol=1e-4)
    pipe = merged_pipeline(read_lora_file(path, "SOURCE"), model_folder(family))
    torch.testing.assert_close(output_of(pipe, family), expected, rtol=0, atol=1e-4)


def test_training_goes_on_from_kernels_of_1_x_1(tmp_path):
    lora = add_tiny_lora(load_backbone("sdxl"))
    weights = random_weights(lora, seed=1)
    save_lora(tmp_path / "x.safetensors", lora, weights, {})
    kernels = {n: t[..., None, None] for n, t in load_file(tmp_path / "x.safetensors").items()}
    save_file({n: t.contiguous() for n, t in kernels.items()}, tmp_path / "y.safetensors")
    found = read_lora(tmp_path / "y.safetensors", lora, "lora.init_from")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


DEEP = "down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q"
TOLD = {  # the LoRA's modules, its header, and the family
    "depth": ({f"unet.{DEEP}"}, {}, "sdxl"),
    "second text encoder": ({f"text_encoder_2.{_LAYER}.mlp.fc1"}, {}, "sdxl"),
    "block of SDXL": ({"unet.up_blocks.0.attentions.0.proj_in"}, {}, "sdxl"),
    "block of SD1.5": ({"unet.down_blocks.0.attentions.0.proj_in"}, {}, "sd15"),
    "another block of SD1.5": ({"unet.up_blocks.3.resnets.0.conv1"}, {}, "sd15"),
    "header of kohya": ({Q}, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
    "architecture": ({Q}, {"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd15"),
    "base model": ({Q}, {"base_model": "stabilityai/stable-diffusion-xl-base-1.0"}, "sdxl"),
    "base model in a folder": ({Q}, {"base_model": model_folder("sdxl")}, "sdxl"),
    "names, not the header": ({f"unet.{DEEP}"}, {"ss_base_model_version": "sd_v1"}, "sdxl"),
    "nothing": ({Q}, {}, None),
    "no model": ({Q}, {"base_model": "./nowhere"}, None),
    "both families": ({f"unet.{DEEP}", "unet.up_blocks.3.resnets.0.conv1"}, {}, None),
}


@pytest.mark.parametrize("case", TOLD)
def test_the_family_by_all_that_tells(tmp_path, case):
    modules, header, family = TOLD[case]
    source, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    tensors = {f"{n}.lora_{x}.weight": t.clone() for n in modules for x, t in (("A", A), ("B", B))}
    save_file(tensors, source, metadata=header)
    if family is None:
        with pytest.raises(
            UserError, match="^--base: name the base model, as the LoRA does not tell"
        ):
            convert_lora(str(source), "kohya", None, None, out)
        for base, family in ((model_folder("sdxl"), "sdxl"), (model_folder("sd15"), "sd15")):
            convert_lora(str(source), "kohya", base, None, out)
            assert names_in(out) == {to_kohya(name, family == "sdxl") for name in modules}
        return
    convert_lora(str(source), "kohya", None, None, out)
    assert names_in(out) == {to_kohya(name, family == "sdxl") for name in modules}
    version = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}[family]
    assert metadata(out)["ss_base_model_version"] == version
    convert_lora(str(out), "kohya", None, None, tmp_path / "again.safetensors")  # by its own header
    assert names_in(tmp_path / "again.safetensors") == names_in(out)


def names_in(path):
    """Kohya's names of the modules in a file."""
    return {name.partition(".")[0] for name in load_file(path)}


def test_the_family_by_the_names_of_kohya(tmp_path):
    encoder = f"lora_te1_{_LAYER}_mlp_fc1".replace(".", "_")
    for name in (encoder, encoder.replace("te1", "te"), "lora_unet_input_blocks_4_1_proj_in"):
        pair = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
        save_file(pair, tmp_path / "x.safetensors")
        out = tmp_path / f"{name}.safetensors"
        convert_lora(str(tmp_path / "x.safetensors"), "kohya", None, None, out)
        assert names_in(out) == {name}


def test_folded():
    lora = full_size("sd15", 4, 3)
    folded = lora.folded()
    for name, module in folded.modules.items():
        assert module.alpha == module.rank == 4 and torch.equal(
            module.down, lora.modules[name].down
        )
        assert torch.equal(module.up, 0.75 * lora.modules[name].up)
    assert folded.header == lora.header | {"alpha": "4"}


def test_files_that_cannot_be_read(tmp_path):
    good = written(full_size("sd15", 2, 2), "peft", tmp_path)
    (good.parent / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="SOURCE: .* cannot be read"):
        read_lora_file(good, "SOURCE")
    (good.parent / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="SOURCE: .* cannot be read.*adapter_config.json"):
        read_lora_file(good, "SOURCE")
    good.write_bytes(good.read_bytes()[:-1])
    with pytest.raises(UserError, match="SOURCE: .* cannot be read"):
        read_lora_file(good, "SOURCE")
    (tmp_path / "x.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"SOURCE: .*x\.bin is no \.safetensors file"):
        read_lora_file(tmp_path / "x.bin", "SOURCE")
