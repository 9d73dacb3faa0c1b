"""State dicts in files, read without running anything that is in them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from spo.errors import UserError, first_line, in_one_line


def read_state_dict(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors by name in a .safetensors file or a torch.save, there maybe under "state_dict".

    Raises UserError that names the config `key` and the file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Which exception a damaged or malicious file raises depends on where the damage is.
        raise UserError(
            f"{key}: {path} cannot be read as a state dict: {first_line(error)}"
        ) from error
    if isinstance(weights, dict):
        weights = weights.get("state_dict", weights)
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f"{key}: {path} is not a state dict of tensors.")
    return weights


def load_strictly(
    module: torch.nn.Module, weights: dict[str, Tensor], key: str, path: Path
) -> None:
    """Copy all `weights` into all of `module`; UserError naming `key` and `path` if they differ."""
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(f"{key}: {path} does not fit: {in_one_line(error)}") from error
