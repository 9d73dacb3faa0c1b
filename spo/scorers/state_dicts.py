"""State dicts, read from files without running their pickles, and the linear heads in some."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spo.errors import UserError, in_one_line
from spo.hub import resolve_file


def read_state_dict(file: Path | str, key: str) -> dict[str, Tensor]:
    """Returns the tensors by name in a .safetensors file, or a torch.save with or without "state_dict".

    `file` is a path or hf://user/repo/file. Raises UserError that names the config `key` and the file.
    """
    path = resolve_file(str(file), key)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        check_packed(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # The exception depends on where a file is damaged or malicious.
        reason = f"{path} cannot be read as a state dict: {in_one_line(error)}"
        raise UserError(f"{key}: {reason}") from error
    if isinstance(weights, dict):
        weights = weights.get("state_dict", weights)
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f"{key}: {path} is not a state dict of tensors.")
    for name, tensor in weights.items():
        if not is_stored(tensor):
            shape = tuple(tensor.shape)
            raise UserError(f"{key}: {path} has fewer numbers than its {name} {shape} needs.")
    return weights


def is_stored(tensor: Tensor) -> bool:
    """Returns whether each number of a tensor stands in its file, which may be a small one."""
    return tensor.layout == torch.strided and tensor.nbytes <= tensor.untyped_storage().nbytes()


def check_packed(path: Path) -> None:
    """Raises ValueError for a compressed torch.save: a few megabytes of it may fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            unpacked, packed = sum(e.file_size for e in file.infolist()), path.stat().st_size
        if unpacked > 2 * packed:
            grows = f"{packed:,} bytes would grow to {unpacked:,}"
            raise ValueError(f"{path.name} is compressed, as torch.save never does ({grows})")


def linear_head(weights: Mapping[str, Tensor], width: int) -> nn.Sequential:
    """Returns linear layers from features (n, width) to (n, 1), in eval mode.

    Nothing stands between the layers: LAION's aesthetic predictor and ImageReward were published with
    their activations commented out. `weights`: "layers.0.weight", "layers.0.bias", "layers.2.weight",
    ..., or only "weight" and "bias". Raises ValueError for other names, and for shapes that do not fit.
    """
    ends = ("weight", "bias")
    names = sorted({name.removesuffix(e) for e in ends for name in weights if name.endswith(e)})
    wanted = {f"{name}{part}" for name in names for part in ends}
    if weights.keys() != wanted:
        odd = min(weights.keys() ^ wanted)
        what = "unknown" if odd in weights else "missing"
        raise ValueError(f"its weights are not those of linear layers: {odd} is {what}")
    layers = nn.Sequential()
    for name in names:
        weight, bias = weights[f"{name}weight"].float(), weights[f"{name}bias"].float()
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}weight is {tuple(weight.shape)} after features of {width}")
        layers.append(nn.Linear(width, len(weight)))
        layers[-1].load_state_dict({"weight": weight, "bias": bias})
        width = len(weight)
    if not names or width != 1:
        raise ValueError("it does not end in one number")
    return layers.requires_grad_(False).eval()
