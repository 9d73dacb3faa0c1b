"""Names of the modules that a LoRA changes: diffusers' own, and kohya's flat ones.

diffusers and peft name a module by its path, `down_blocks.1.attentions.0.proj_in`. The files of
kohya's sd-scripts join the path by underscores, and for SDXL first rename it to the blocks of the
original U-Net (`input_blocks_4_1_proj_in`, called SGM names here). As words hold underscores too, the
way back looks for the words of the U-Net; it needs no model.
"""

import re
from collections.abc import Iterable, Mapping

_IN_ATTENTION = (
    r"proj_in|proj_out|transformer_blocks\.\d+\."
    r"(?:attn[12]\.(?:to_[qkv]|to_out\.0)|ff\.net\.(?:0\.proj|2))"
)
_IN_RESNET = {  # diffusers' name, SGM name
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_UNET = re.compile(
    r"(?:(?:down|up)_blocks\.\d+|mid_block)\."
    rf"(?:attentions\.\d+\.(?:{_IN_ATTENTION})|resnets\.\d+\.(?:{'|'.join(_IN_RESNET)})|"
    r"(?:down|up)samplers\.0\.conv)"
    r"|conv_in|conv_out|(?:time|add)_embedding\.linear_[12]"
)
_TEXT_ENCODER = re.compile(
    r"text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])"
    r"|text_projection"
)
_NETWORKS = {"unet": _UNET, "text_encoder": _TEXT_ENCODER, "text_encoder_2": _TEXT_ENCODER}
# Modules that one family has and the other lacks.
_OF_ONE_FAMILY = {
    "sd15": re.compile(
        r"unet\.(?:down_blocks\.0\.attentions|up_blocks\.[23]\.attentions|(?:down|up)_blocks\.3)\..+"
    ),
    "sdxl": re.compile(
        r"text_encoder_2\..+"
        r"|unet\.(?:add_embedding|up_blocks\.0\.attentions|.+\.transformer_blocks\.[1-9]\d*)\..+"
    ),
}
# Words whose underscores do not stand for dots.
_WORD = re.compile(
    "("
    "down_blocks|up_blocks|mid_block|transformer_blocks|to_[qkv]|to_out|proj_in|proj_out|"
    "conv_shortcut|conv_in|conv_out|time_emb_proj|time_embedding|add_embedding|linear_[12]|"
    "text_model|self_attn|(?:q|k|v|out)_proj|text_projection"
    ")|_"
)


def network_of(name: str) -> str:
    """Returns the part of the pipeline that has module `name`: unet, text_encoder, text_encoder_2."""
    return name.partition(".")[0]


def is_module(name: str) -> bool:
    """Returns whether `name`, as "unet.mid_block....", is a module of an SD1.5 or SDXL pipeline."""
    network, _, module = name.partition(".")
    return network in _NETWORKS and _NETWORKS[network].fullmatch(module) is not None


def family_of_names(modules: Iterable[str]) -> str | None:
    """Returns the family whose pipeline alone has some of these modules; None if that is not one."""
    names = list(modules)
    found = [f for f, own in _OF_ONE_FAMILY.items() if any(map(own.fullmatch, names))]
    return found[0] if len(found) == 1 else None


def to_kohya(name: str, sdxl: bool) -> str:
    """Returns kohya's name of a module, with SGM blocks and lora_te1_ if `sdxl`."""
    network, _, module = name.partition(".")
    flat = module.replace(".", "_")
    if network == "unet":
        return f"lora_unet_{_swap_head(flat, _TO_SGM) if sdxl else flat}"
    encoder = "te2" if network == "text_encoder_2" else "te1" if sdxl else "te"
    return f"lora_{encoder}_{flat}"


def from_kohya(name: str) -> str:
    """Returns the inverse of `to_kohya`, for both kinds of names.

    A name of no module of an SD1.5 or SDXL pipeline gives another name of no module.
    """
    found = re.fullmatch(r"lora_(unet|te[12]?)_(.+)", name)
    if found is None:
        return name
    network = {"unet": "unet", "te2": "text_encoder_2"}.get(found[1], "text_encoder")
    flat = _swap_head(found[2], _FROM_SGM) if network == "unet" else found[2]
    dotted = _WORD.sub(lambda match: match[1] or ".", flat)
    return f"{network}.{dotted}"


def _swap_head(flat: str, heads: Mapping[str, str]) -> str:
    for head, other in heads.items():
        if flat == head or flat.startswith(f"{head}_"):
            return other + flat.removeprefix(head)
    return flat


def _sgm_heads() -> dict[str, str]:
    """Returns SGM names of everything before `transformer_blocks`, with 2 layers in each block.

    The original U-Net numbers the convolutions, layers and resamplings of a side in one sequence.
    """
    heads = {
        "conv_in": "input_blocks_0_0",
        "conv_out": "out_2",
        "time_embedding_linear_1": "time_embed_0",
        "time_embedding_linear_2": "time_embed_2",
        "add_embedding_linear_1": "label_emb_0_0",
        "add_embedding_linear_2": "label_emb_0_2",
        "mid_block_attentions_0": "middle_block_1",
    }
    resnets = {f"mid_block_resnets_{n}": f"middle_block_{2 * n}" for n in (0, 1)}
    for b in range(4):
        heads[f"down_blocks_{b}_downsamplers_0_conv"] = f"input_blocks_{3 * b + 3}_0_op"
        heads[f"up_blocks_{b}_upsamplers_0_conv"] = f"output_blocks_{3 * b + 2}_2_conv"
        layers = [(f"down_blocks_{b}", n, f"input_blocks_{3 * b + n + 1}") for n in range(2)]
        layers += [(f"up_blocks_{b}", n, f"output_blocks_{3 * b + n}") for n in range(3)]
        for block, n, sgm in layers:
            heads[f"{block}_attentions_{n}"] = f"{sgm}_1"
            resnets[f"{block}_resnets_{n}"] = f"{sgm}_0"
    for resnet, sgm in resnets.items():
        heads |= {f"{resnet}_{ours}": f"{sgm}_{theirs}" for ours, theirs in _IN_RESNET.items()}
    return heads


_TO_SGM = _sgm_heads()
_FROM_SGM = {sgm: ours for ours, sgm in _TO_SGM.items()}
