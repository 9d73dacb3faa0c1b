"""Writes a diffusers pipeline as one file of all weights, under the names of the original code."""

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

_UNET = {
    r"^conv_in\.": "input_blocks.0.0.",
    r"^time_embedding\.linear_1\.": "time_embed.0.",
    r"^time_embedding\.linear_2\.": "time_embed.2.",
    r"^add_embedding\.linear_1\.": "label_emb.0.0.",
    r"^add_embedding\.linear_2\.": "label_emb.0.2.",
    r"^conv_norm_out\.": "out.0.",
    r"^conv_out\.": "out.2.",
    r"^mid_block\.resnets\.0\.": "middle_block.0.",
    r"^mid_block\.attentions\.0\.": "middle_block.1.",
    r"^mid_block\.resnets\.1\.": "middle_block.2.",
}
_RESNET = {
    r"\.norm1\.": ".in_layers.0.",
    r"\.conv1\.": ".in_layers.2.",
    r"\.time_emb_proj\.": ".emb_layers.1.",
    r"\.norm2\.": ".out_layers.0.",
    r"\.conv2\.": ".out_layers.3.",
    r"\.conv_shortcut\.": ".skip_connection.",
}
_VAE = {
    r"mid_block\.resnets\.0\.": "mid.block_1.",
    r"mid_block\.resnets\.1\.": "mid.block_2.",
    r"mid_block\.attentions\.0\.": "mid.attn_1.",
    r"attn_1\.group_norm\.": "attn_1.norm.",
    r"attn_1\.to_([qkv])\.": r"attn_1.\1.",
    r"attn_1\.to_out\.0\.": "attn_1.proj_out.",
    r"conv_norm_out\.": "norm_out.",
    r"conv_shortcut\.": "nin_shortcut.",
    r"encoder\.down_blocks\.(\d)\.resnets\.": r"encoder.down.\1.block.",
    r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.": r"encoder.down.\1.downsample.",
}
_OPEN_CLIP = {
    r"^text_model\.embeddings\.token_embedding\.weight": "token_embedding.weight",
    r"^text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"^text_model\.final_layer_norm\.": "ln_final.",
    r"^text_model\.encoder\.layers\.": "transformer.resblocks.",
    r"\.layer_norm1\.": ".ln_1.",
    r"\.layer_norm2\.": ".ln_2.",
    r"\.mlp\.fc1\.": ".mlp.c_fc.",
    r"\.mlp\.fc2\.": ".mlp.c_proj.",
    r"\.self_attn\.out_proj\.": ".attn.out_proj.",
}


def _renamed(name, table):
    for pattern, new in table.items():
        name = re.sub(pattern, new, name)
    return name


def _unet(unet):
    each = unet.config.layers_per_block + 1
    for name, value in unet.state_dict().items():
        if match := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name):
            side, block, kind, i, rest = match.groups()
            start = int(block) * each + (side == "down")
            last = hasattr(getattr(unet, f"{side}_blocks")[int(block)], "attentions")
            name = {
                "resnets": f"{start + int(i)}.0.{rest}",
                "attentions": f"{start + int(i)}.1.{rest}",
                "downsamplers": f"{start + each - 1}.0.{rest.replace('conv', 'op')}",
                "upsamplers": f"{start + each - 1}.{1 + last}.{rest}",
            }[kind]
            name = f"{'input' if side == 'down' else 'output'}_blocks.{name}"
        table = _UNET if "transformer_blocks" in name else _UNET | _RESNET
        yield f"model.diffusion_model.{_renamed(name, table)}", value


def _vae(vae):
    last = len(vae.config.block_out_channels) - 1
    for name, value in vae.state_dict().items():
        new = _renamed(name, _VAE)
        if match := re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers\.0)\.(.*)", new):
            kind = {"resnets": "block", "upsamplers.0": "upsample"}[match[2]]
            new = f"decoder.up.{last - int(match[1])}.{kind}.{match[3]}"
        attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", new)
        yield f"first_stage_model.{new}", value[..., None, None] if attention else value


def _text(encoder):
    for name, value in encoder.state_dict().items():
        yield ("" if name.startswith("text_") else "text_model.") + name, value


def _open_clip(encoder):
    weights = dict(_text(encoder))
    projection = weights.pop("text_projection.weight")
    yield "text_projection", projection.T.contiguous()
    for name in [name for name in weights if ".self_attn.q_proj." in name]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        new = _renamed(name, _OPEN_CLIP).replace("self_attn.q_proj.", "attn.in_proj_")
        yield new, torch.cat(parts)
    for name, value in weights.items():
        yield _renamed(name, _OPEN_CLIP), value


def write_single_file(pipe: DiffusionPipeline, path: Path, header=None, **more) -> str:
    """Writes the checkpoint of an SD1.5 or SDXL pipeline, with `more` tensors; returns its path."""
    weights = dict(_unet(pipe.unet)) | dict(_vae(pipe.vae))
    if "text_encoder_2" in pipe.components:
        first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
        weights |= {second + name: value for name, value in _open_clip(pipe.text_encoder_2)}
    else:
        first = "cond_stage_model.transformer."
    weights |= {first + name: value for name, value in _text(pipe.text_encoder)}
    tensors = {name: value.contiguous() for name, value in (weights | more).items()}
    save_file(tensors, path, metadata={"format": "pt"} | (header or {}))
    return str(path)
