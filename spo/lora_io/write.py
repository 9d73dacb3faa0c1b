"""A LoRA in memory, and its file formats: diffusers', kohya's, peft's.

read_lora_file (spo/lora_io/read.py) -> LoraWeights -> WRITERS[format]. Weights are copied bit for bit,
and each module keeps its own rank and alpha, which all formats can state.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from spo.atomic import write_file
from spo.errors import UserError
from spo.lora_io.names import family_of_names, network_of, to_kohya
from spo.models.families import FAMILIES
from spo.models.lora import Lora

LORA_FILE = "pytorch_lora_weights.safetensors"
# The same LoRA for other programs. diffusers, which takes a file that ends in LORA_FILE first, and our
# own finder pass it over.
KOHYA_FILE = "kohya_lora.safetensors"
_SD2_WIDTH = 1024  # per token of Stable Diffusion 2.x, otherwise of the layers of SD1.5
_ADAPTER = ".default."  # peft puts the adapter's name into the name of each parameter
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = "target_modules"  # header entry of our kohya files, and key of an adapter's config


@dataclass(frozen=True)
class LoraModule:
    """The change of one layer's weight: alpha / rank times `up` `down`."""

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
    header: Mapping[str, str]  # its origin, as its file states it
    targets: tuple[str, ...]  # endings of the names of the UNet's modules; (): not known
    family: str | None = None  # as its file states it; None: not known

    def shape_family(self) -> str | None:
        """Returns the family by shapes and names; "" if it is neither's, None if they do not tell."""
        if widths := self.text_widths():
            return next((n for n, f in FAMILIES.items() if widths == {f.prompt_embeds_width}), "")
        return family_of_names(self.modules)

    def text_widths(self) -> set[int]:
        """Returns the numbers per token that the layers of its cross-attention read."""
        return {
            module.down.shape[1]
            for name, module in self.modules.items()
            if name.endswith((".attn2.to_k", ".attn2.to_v"))
        }

    def tensors(self) -> dict[str, Tensor]:
        """Returns A and B of each module under peft's names."""
        down = {f"{name}.lora_A.weight": module.down for name, module in self.modules.items()}
        return down | {f"{name}.lora_B.weight": module.up for name, module in self.modules.items()}

    def cast(self, dtype: torch.dtype) -> "LoraWeights":
        """Returns the LoRA in `dtype`."""
        modules = {
            name: replace(module, down=module.down.to(dtype), up=module.up.to(dtype))
            for name, module in self.modules.items()
        }
        return replace(self, modules=modules)

    def folded(self) -> "LoraWeights":
        """Returns the LoRA with alpha / rank in B, for readers that take the rank for alpha."""
        modules = {
            name: module
            if module.alpha == module.rank
            else LoraModule(
                module.down, module.up * (module.alpha / module.rank), float(module.rank)
            )
            for name, module in self.modules.items()
        }
        header = dict(self.header)
        if {"rank", "alpha"} <= header.keys():
            header["alpha"] = header["rank"]
        return replace(self, modules=modules, header=header)


def save_lora(
    path: Path, lora: Lora, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes `weights` as a file for diffusers' `load_lora_weights`.

    Equal weights and metadata give equal bytes: the header holds neither time nor place.
    """
    # diffusers reads alpha from this entry, and takes the rank for alpha without the entry.
    adapter = {
        "unet.r": lora.rank,
        "unet.lora_alpha": lora.alpha,
        "unet.target_modules": sorted(lora.target_modules),
    }
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapter, sort_keys=True),
        "rank": str(lora.rank),
        "alpha": str(lora.alpha),
        **metadata,
    }
    tensors = {
        "unet." + name.replace(_ADAPTER, "."): tensor.detach().cpu().contiguous()
        for name, tensor in weights.items()
    }
    write_file(path, safetensors_bytes(tensors, header))


def write_diffusers(lora: LoraWeights, path: Path) -> None:
    """Writes a file for diffusers' `load_lora_weights`, as `save_lora` of a run does."""
    adapter = {}
    for network in dict.fromkeys(map(network_of, lora.modules)):
        adapter |= {f"{network}.{k}": v for k, v in _adapter(lora, network).items()}
    entry = {"lora_adapter_metadata": json.dumps(adapter, sort_keys=True)}
    path.write_bytes(safetensors_bytes(lora.tensors(), lora.header | entry | {"format": "pt"}))


def write_kohya(lora: LoraWeights, path: Path) -> None:
    """Writes a file for ComfyUI, A1111, InvokeAI and sd-scripts.

    sd-scripts knows SDXL only by SGM names, so these are written if the LoRA is SDXL's; otherwise
    diffusers' names with underscores.
    """
    family = lora.shape_family()
    family = lora.family if family is None else family
    tensors = {}
    for name, module in lora.modules.items():
        flat = to_kohya(name, sdxl=family == "sdxl")
        tensors[f"{flat}.lora_down.weight"] = module.down
        tensors[f"{flat}.lora_up.weight"] = module.up
        tensors[f"{flat}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
    header = {"format": "pt"}
    if family:
        header["ss_base_model_version"] = FAMILIES[family].kohya_version
        header["modelspec.architecture"] = FAMILIES[family].architecture
    elif lora.text_widths() == {_SD2_WIDTH}:
        header |= {"ss_base_model_version": "sd_v2", "ss_v2": "True"}
    if lora.targets:
        header[TARGETS] = json.dumps(lora.targets)
    path.write_bytes(safetensors_bytes(tensors, lora.header | header))


def write_peft(lora: LoraWeights, folder: Path) -> None:
    """Writes a folder for `peft.PeftModel.from_pretrained(unet, folder)`.

    Raises UserError if the LoRA changes a text encoder, as a peft folder holds one network.
    """
    for name in lora.modules:
        if network_of(name) != "unet":
            raise UserError(f"--to: a peft folder holds a UNet alone, but the LoRA changes {name}.")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": lora.header.get("base_model"),
        "inference_mode": True,
        **_adapter(lora, "unet"),
    }
    folder.mkdir()
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {f"base_model.model.{n.removeprefix('unet.')}": t for n, t in lora.tensors().items()}
    file = safetensors_bytes(tensors, lora.header | {"format": "pt"})
    (folder / ADAPTER_WEIGHTS).write_bytes(file)


WRITERS = {"diffusers": write_diffusers, "kohya": write_kohya, "peft": write_peft}


def _adapter(lora: LoraWeights, network: str) -> dict:
    """Returns the part of peft's LoraConfig that states rank and alpha of the modules of `network`."""
    # transformers moved CLIP's layers out of text_model: an ending of the name fits both.
    modules = {
        name.removeprefix(f"{network}.").removeprefix("text_model.encoder."): module
        for name, module in lora.modules.items()
        if network_of(name) == network
    }
    ranks = {name: module.rank for name, module in modules.items()}
    alphas = {name: module.alpha for name, module in modules.items()}
    # 4 for 4.0, as configs have it.
    alphas = {name: int(a) if a.is_integer() else a for name, a in alphas.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    targets = lora.targets if network == "unet" else ()
    adapter = {"r": rank, "lora_alpha": alpha, TARGETS: sorted(targets or modules)}
    patterns = {
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }
    return adapter | {key: pattern for key, pattern in patterns.items() if pattern}


def parameter_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a diffusers LoRA file under the names of a UNet's parameters."""
    return {
        name.removeprefix("unet.").replace(".weight", _ADAPTER + "weight"): tensor
        for name, tensor in weights.items()
    }


def safetensors_bytes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file; equal tensors and metadata give equal bytes.

    The library writes the metadata in a random order: here they are sorted.
    """
    file = save(tensors, metadata=dict(metadata))
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text + file[8 + length :]
