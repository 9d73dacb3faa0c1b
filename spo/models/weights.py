"""Loads one network of diffusers or transformers, every tensor of it from its file."""

import logging
from typing import Any

import diffusers
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from torch import nn

from spo.errors import LOAD_ERRORS, first_line

# What stands in files of some versions of a library alone, or belongs to another tower of a CLIP.
_CONSTANT = "position_ids"
_OF_ANOTHER_TOWER = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
# `load_network` tells in one line what the libraries tell in tables.
for _name, _text in {
    "diffusers.models.modeling_utils": "Some weights of ",
    "transformers.modeling_utils": " LOAD REPORT",
}.items():
    logging.getLogger(_name).addFilter(lambda record, text=_text: text not in record.getMessage())


def hide_loading_bars() -> None:
    """Turns off the bars of models that load, seconds each, and leaves those of downloads."""
    diffusers.utils.logging.disable_progress_bar()
    downloads = not are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()  # which transformers has turned off, too


hide_loading_bars()


def load_network(kind: type, name: str, part: str, **options: Any) -> nn.Module:
    """Returns the network of class `kind` of a folder or Hub id, by its `from_pretrained(**options)`.

    Raises ValueError that names `part` and what is wrong with its files, above all a tensor that is
    missing, unknown or of another shape.
    """
    if issubclass(kind, transformers.PreTrainedModel):
        options |= {"ignore_mismatched_sizes": True, "trust_remote_code": False}
    try:
        network, info = kind.from_pretrained(name, output_loading_info=True, **options)
    except LOAD_ERRORS as error:
        raise ValueError(f"{part}: {first_line(error).partition('. If you want')[0]}") from error
    extra = {key for key in info["unexpected_keys"] if not key.startswith(_OF_ANOTHER_TOWER)}
    if any(".base_layer." in key for key in extra):
        raise ValueError(
            f"{part}: saved with a LoRA of peft beside its weights; merge it (pipe.fuse_lora(), then "
            "pipe.unload_lora_weights()) and save it again"
        )
    faults = {
        "lack": set(info["missing_keys"]),
        "have another shape of": {key for key, *_ in info["mismatched_keys"]},
        "do not belong to its config: they have": extra,
    }
    for fault, keys in faults.items():
        if keys := sorted(key for key in keys if not key.endswith(_CONSTANT)):
            more = f" and {len(keys) - 1} more" if keys[1:] else ""
            raise ValueError(f"{part}: its weights {fault} {keys[0]}{more}")
    return network
