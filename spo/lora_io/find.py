"""LoRA files of any format, found by a path or on the Hub, as the parameters that are trained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from spo.command_line.values import expand
from spo.errors import UserError
from spo.hub import list_files, resolve_file
from spo.lora_io.names import network_of
from spo.lora_io.read import read_lora_file
from spo.lora_io.write import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LORA_FILE,
    LoraModule,
    parameter_names,
)
from spo.models.backbone import Backbone
from spo.models.lora import Lora


def find_lora(spec: str, key: str) -> Path:
    """Returns the LoRA file that `spec` names: a file, a folder, or user/repo[/folder][/file].

    In a folder, of a run, a checkpoint or peft, it is pytorch_lora_weights.safetensors, or the only
    .safetensors file. Raises UserError that names `spec` and the config `key` or flag it came from.
    """
    path = Path(expand(spec))
    if path.is_dir():
        names = [each.name for each in path.iterdir()]
        return resolve_file(str(path / _choose(names, spec, key)), key)
    name = spec.removeprefix("hf://").rstrip("/")
    if path.is_file() or spec.startswith((".", "/", "~")) or "/" not in name:
        return resolve_file(spec, key)
    if name.endswith(".safetensors"):
        return resolve_file(f"hf://{name}", key)
    user, repo, *folders = name.split("/")
    prefix = "".join(f"{folder}/" for folder in folders)
    files = list_files(f"{user}/{repo}", key)
    chosen = _choose([f.removeprefix(prefix) for f in files if f.startswith(prefix)], spec, key)
    if chosen == ADAPTER_WEIGHTS:  # means nothing without its config
        resolve_file(f"hf://{name}/{ADAPTER_CONFIG}", key)
    return resolve_file(f"hf://{name}/{chosen}", key)


def _choose(names: Sequence[str], spec: str, key: str) -> str:
    """Returns the LoRA among the files of a folder; raises UserError if several could be it."""
    files = sorted(name for name in names if name.endswith(".safetensors"))
    here = [name for name in files if "/" not in name]
    if LORA_FILE in here or not files:
        return LORA_FILE  # if missing, `resolve_file` reports it
    if len(here) == 1:
        return here[0]
    found = ", ".join(here or files)
    raise UserError(f"{key}: which LoRA of {spec}? Add one of these to its name: /{found}")


def read_lora(path: Path, lora: Lora, key: str) -> dict[str, Tensor]:
    """Returns the weights in `path` by the names of `lora`'s parameters, fp32, scaled to its alpha.

    Raises UserError if the file is damaged, or of another base model, rank or set of modules.
    """
    modules = read_lora_file(path, key).modules
    if any(network_of(name) != "unet" for name in modules):
        raise UserError(f"{key}: {path} also changes the text encoder, which is not trained here.")
    found = parameter_names(_scaled(modules, lora.alpha))
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wanted = {name: tuple(parameter.shape) for name, parameter in lora.parameters.items()}
    if unlike := dict(shapes.items() ^ wanted.items()):
        name = min(unlike)
        raise UserError(
            f"{key}: {path} does not fit lora.rank={lora.rank}, lora.target_modules and this base "
            f"model: {name} is {shapes.get(name, 'missing')}, not {wanted.get(name, 'there')}."
        )
    return {name: found[name].to(p.device) for name, p in lora.parameters.items()}


def read_folded(path: Path, backbone: Backbone, key: str) -> dict[str, Tensor]:
    """Returns the LoRA in `path` for `Backbone.use_loras`: fp32, with alpha / rank in B.

    Raises UserError if a tensor has no place in the UNet.
    """
    modules = dict(read_lora_file(path, key).modules)
    for name, module in modules.items():
        if network_of(name) == "unet":
            weight = layer_of(backbone.unet, name, module, f"{key}: {path}").weight
            down = module.down.view(-1, *weight.shape[1:])
            up = module.up.view(*module.up.shape[:2], *(1 for _ in weight.shape[2:]))
            modules[name] = replace(module, down=down, up=up)
    return _scaled(modules)


def _scaled(modules: Mapping[str, LoraModule], alpha: float | None = None) -> dict[str, Tensor]:
    """Returns A and B under peft's names, fp32, B scaled to another alpha; None: to its rank."""
    weights = {}
    for name, module in modules.items():
        weights[f"{name}.lora_A.weight"] = module.down.float()
        scale = module.alpha / (module.rank if alpha is None else alpha)
        weights[f"{name}.lora_B.weight"] = module.up.float() * scale
    return weights


def layer_of(network: nn.Module, name: str, module: LoraModule, where: str) -> nn.Module:
    """Returns the layer of `network` that `module` changes.

    Raises UserError, beginning with `where`, if there is no such layer.
    """
    path = name.removeprefix(f"{network_of(name)}.")
    if not hasattr(network, "text_model"):  # newer versions of transformers do without it
        path = path.removeprefix("text_model.")
    wanted = (module.up.shape[0], *module.down.shape[1:])
    try:
        layer = network.get_submodule(path)
        shape = tuple(layer.weight.shape)
    except AttributeError:
        shape = "missing"
    if _as_matrix(shape) != _as_matrix(wanted):
        what = f"the LoRA is of another model: {name} is {shape} here, but {wanted} there"
        raise UserError(f"{where}: {what}.")
    return layer


def _as_matrix(shape: Sequence) -> Sequence:
    """Returns the shape of a weight, that of a matrix for a kernel of 1 x 1."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)
