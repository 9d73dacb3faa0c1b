"""A LoRA apart from any file format, and its forms: diffusers', kohya's, peft's.

read_lora_file (spo/lora_io/read.py) -> LoraWeights -> WRITERS[format]. Weights are copied bit for bit,
and each module keeps its own rank and alpha, which all of the formats can say.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spo.errors import UserError
from spo.lora_io.diffusers_file import safetensors_bytes
from spo.lora_io.names import network_of, to_kohya

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = "target_modules"  # header entry of our kohya files, and key of an adapter's config
# Width of the prompt embeddings, which the attention attn2 reads.
_FAMILIES = {768: "sd15", 2048: "sdxl"}
# What sd-scripts calls the families, and https://github.com/Stability-AI/ModelSpec.
_KOHYA_FAMILY = {
    "sd15": {
        "ss_base_model_version": "sd_v1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    },
    "sdxl": {
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    },
    None: {},
}


@dataclass(frozen=True)
class LoraModule:
    """What a LoRA adds to the weight of one layer: alpha / rank times `up` `down`."""

    down: Tensor  # A: (rank, in), of a convolution (rank, in, k, k)
    up: Tensor  # B: (out, rank), of a convolution (out, rank, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA of a pipeline."""

    modules: Mapping[str, LoraModule]  # by diffusers' names: "unet.mid_block...", sorted
    header: Mapping[str, str]  # what its file says of its origin
    targets: tuple[str, ...]  # endings that the names of the UNet's modules have; (): not known

    def family(self) -> str | None:
        """The family of the full-size model that it fits, by its prompt embeddings; None: neither."""
        widths = {
            module.down.shape[1]
            for name, module in self.modules.items()
            if name.endswith((".attn2.to_k", ".attn2.to_v"))
        }
        return _FAMILIES.get(widths.pop()) if len(widths) == 1 else None

    def cast(self, dtype: torch.dtype) -> LoraWeights:
        """The same LoRA in `dtype`; UserError where a finite weight would become infinite."""
        return replace(self, modules={name: _cast(m, dtype) for name, m in self.modules.items()})


def _cast(module: LoraModule, dtype: torch.dtype) -> LoraModule:
    down, up = module.down.to(dtype), module.up.to(dtype)
    for before, after in ((module.down, down), (module.up, up)):
        if not torch.equal(before.isfinite(), after.isfinite()):
            raise UserError(
                f"--dtype: the LoRA has weights too large for {dtype}; use bf16 or fp32."
            )
    return LoraModule(down, up, module.alpha)


def write_diffusers(lora: LoraWeights, path: Path) -> None:
    """Write a file for diffusers' `load_lora_weights`, as spo.models.lora.save_lora writes it."""
    tensors, adapter = {}, {}
    for network in dict.fromkeys(map(network_of, lora.modules)):
        adapter |= {f"{network}.{k}": v for k, v in _adapter(lora, network).items()}
    for name, module in lora.modules.items():
        tensors[f"{name}.lora_A.weight"] = module.down
        tensors[f"{name}.lora_B.weight"] = module.up
    entry = {"lora_adapter_metadata": json.dumps(adapter, sort_keys=True)}
    path.write_bytes(safetensors_bytes(tensors, lora.header | entry | {"format": "pt"}))


def write_kohya(lora: LoraWeights, path: Path) -> None:
    """Write a file for ComfyUI, A1111 and sd-scripts.

    sd-scripts knows SDXL by SGM names alone, so those are written where the LoRA is SDXL's by its
    shapes, else diffusers' names with underscores.
    """
    family = lora.family()
    tensors = {}
    for name, module in lora.modules.items():
        flat = to_kohya(name, sdxl=family == "sdxl")
        tensors[f"{flat}.lora_down.weight"] = module.down
        tensors[f"{flat}.lora_up.weight"] = module.up
        tensors[f"{flat}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
    header = _KOHYA_FAMILY[family] | {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": _common([m.rank for m in lora.modules.values()]),
        "ss_network_alpha": _common([m.alpha for m in lora.modules.values()]),
    }
    if lora.targets:
        header[TARGETS] = json.dumps(lora.targets)
    path.write_bytes(safetensors_bytes(tensors, lora.header | header))


def write_peft(lora: LoraWeights, folder: Path) -> None:
    """Write a folder for `peft.PeftModel.from_pretrained(unet, folder)`.

    Raises UserError where the LoRA changes a text encoder, as such a folder holds one network.
    """
    tensors = {}
    for name, module in lora.modules.items():
        if network_of(name) != "unet":
            raise UserError(f"--to: a peft folder holds a UNet alone, but the LoRA changes {name}.")
        key = f"base_model.model.{name.removeprefix('unet.')}"
        tensors[f"{key}.lora_A.weight"] = module.down
        tensors[f"{key}.lora_B.weight"] = module.up
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": lora.header.get("base_model"),
        "inference_mode": True,
        **_adapter(lora, "unet"),
    }
    folder.mkdir()
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    file = safetensors_bytes(tensors, lora.header | {"format": "pt"})
    (folder / ADAPTER_WEIGHTS).write_bytes(file)


WRITERS = {"diffusers": write_diffusers, "kohya": write_kohya, "peft": write_peft}


def _adapter(lora: LoraWeights, network: str) -> dict:
    """The part of peft's LoraConfig that says which modules of `network` have which rank and alpha."""
    # transformers moved CLIP's layers out of text_model: an ending of the name fits either.
    modules = {
        name.removeprefix(f"{network}.").removeprefix("text_model.encoder."): module
        for name, module in lora.modules.items()
        if network_of(name) == network
    }
    ranks = {name: module.rank for name, module in modules.items()}
    alphas = {name: _plain(module.alpha) for name, module in modules.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    targets = lora.targets if network == "unet" else ()
    adapter = {"r": rank, "lora_alpha": alpha, TARGETS: sorted(targets or modules)}
    patterns = {
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }
    return adapter | {key: pattern for key, pattern in patterns.items() if pattern}


def _plain(alpha: float) -> int | float:
    """4 for 4.0, as it stands in configs."""
    return int(alpha) if alpha == int(alpha) else alpha


def _common(values: list[float]) -> str:
    """The one value of all, or what sd-scripts writes where they differ."""
    return str(_plain(values[0])) if len(set(values)) == 1 else "Dynamic"
