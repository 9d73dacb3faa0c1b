"""The published layout of latent reward models: a folder of their parts, read, checked and loaded.

`unet` and `text_encoder`, and SDXL's `text_encoder_2`, are subfolders in the form of diffusers and
transformers; state_dict.pt holds the projections and the temperature. Of the UNet only the down path
and the middle are read. Tokenizers and noise schedule are those of the base model.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from spo.command_line.values import expand
from spo.errors import LOAD_ERRORS, UserError, first_line, in_one_line
from spo.hub import PREFETCH, is_hub_id, list_files, model_file
from spo.models.loading import read_json
from spo.models.weights import check_names, choose_weights, fetch, load_part
from spo.scorers.latent_reward import (
    UP_PATH,
    LatentRewardModel,
    down_path,
    feature_width,
)
from spo.scorers.state_dicts import check_packed, is_stored

HEADS = "state_dict.pt"
# What values that no config has make its readers raise.
_CONFIG_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError)
_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


@dataclass(frozen=True)
class Heads:
    """The linear parts of an LRM."""

    visual_projection: Tensor  # (F, sum of the widths of stages and middle)
    text_projection: Tensor | None  # (F, width of the text encoder); None for SDXL
    logit_scale: float

    def layer(self, name: str) -> nn.Linear | None:
        """Returns a projection as a layer, fp32."""
        weight = getattr(self, name)
        if weight is None:
            return None
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.float())
        return layer


@dataclass(frozen=True)
class LatentRewardFolder:
    """A local folder, or a folder of a Hub repo: user/name or hf://user/name/folder."""

    checkpoint: str
    key: str  # of the config, that errors name

    @property
    def _place(self) -> tuple[str, str]:
        """Returns a folder or Hub id, and the folder in it."""
        if not self.checkpoint.startswith("hf://"):
            return expand(self.checkpoint), ""
        user, *rest = self.checkpoint.removeprefix("hf://").strip("/").split("/")
        return "/".join([user, *rest[:1]]), "/".join(rest[1:])

    def path(self, name: str) -> Path:
        """Returns the local path of a file of the folder; UserError if it has none."""
        model, folder = self._place
        if Path(model).is_dir() and not Path(model, name).is_file():
            raise UserError(
                f"{self.key}: {self.checkpoint!r} lacks {name}; a latent reward model is a folder of "
                f"unet, text_encoder, for SDXL text_encoder_2, and {HEADS}."
            )
        return model_file(model, str(PurePosixPath(folder, name)), self.key)

    def configs(self) -> dict[str, dict[str, Any]]:
        """Returns the configs of the UNet and of the text encoders, by their folders."""
        found = {"unet": self._config("unet")}
        names = _ENCODERS if found["unet"].get("addition_embed_type") else ("text_encoder",)
        return found | {name: self._config(name) for name in names}

    def _config(self, name: str) -> dict[str, Any]:
        return read_json(self.path(f"{name}/config.json"), self.key)

    def heads(self) -> Heads:
        """Reads projections and temperature; raises UserError if one is missing or malformed."""
        path = self.path(HEADS)
        try:
            check_packed(path)
            saved = torch.load(path, map_location="cpu", weights_only=True)
            text = saved.get("text_projection")
            heads = Heads(
                saved["visual_projection"]["weight"],
                None if text is None else text["weight"],
                float(saved["logit_scale"]),
            )
            for weight in (heads.visual_projection, heads.text_projection):
                if weight is not None and (weight.ndim != 2 or not is_stored(weight)):
                    raise ValueError(f"a projection is {tuple(weight.shape)}, or not all there")
            for values in (heads.visual_projection, heads.text_projection, heads.logit_scale):
                if values is not None and not torch.as_tensor(values).isfinite().all():
                    raise ValueError("a number is not finite")
        except Exception as error:  # depends on where a file is damaged, or what else it holds
            reason = f"{type(error).__name__}: {in_one_line(error)}"
            raise UserError(
                f"{self.key}: {path} does not hold visual_projection, text_projection and logit_scale "
                f"of a latent reward model ({reason})."
            ) from error
        return heads

    def _check_weights(self, parts: Iterable[str]) -> None:
        """Raises ValueError if a network has no weights, or has the UNet's in a pickle alone."""
        model, folder = self._place
        files = list_files(model, self.key) if is_hub_id(model) else _files_below(Path(model))
        for part in parts:
            own = (PurePosixPath(f) for f in files if f.startswith(f"{folder}/{part}/".lstrip("/")))
            file = choose_weights((path.name for path in own), None, part)
            if part == "unet" and not file.is_safe:
                raise ValueError(f"UNet: {file.name} is not in safe format; save .safetensors")

    def check(self) -> dict[str, dict[str, Any]]:
        """Returns `configs`; UserError unless all parts are there and fit, as small files tell."""
        configs, heads = self.configs(), self.heads()
        try:
            self._check_weights(configs)
        except ValueError as error:
            raise UserError(f"{self.key}: {self.checkpoint!r}: {first_line(error)}.") from error
        self._check_heads(configs, heads)
        return configs

    def _check_heads(self, configs: Mapping[str, Mapping[str, Any]], heads: Heads) -> None:
        """Raises UserError unless the projections fit the networks, and these each other."""
        try:
            wanted = _projections(configs, len(heads.visual_projection))
        except (ValueError, *_CONFIG_ERRORS) as error:
            what = "a config of its networks has no " if isinstance(error, KeyError) else ""
            raise UserError(
                f"{self.key}: {self.checkpoint!r}: {what}{first_line(error)}."
            ) from error
        for name, shape in wanted.items():
            weight = getattr(heads, name)
            if weight is None or tuple(weight.shape) != shape:
                found = "missing" if weight is None else f"{tuple(weight.shape)}"
                raise UserError(
                    f"{self.key}: {self.checkpoint!r}: {name} in {HEADS} is {found}, but its networks "
                    f"need {shape}."
                )

    def check_family(self, family: str, unet: Mapping[str, Any]) -> None:
        """Raises UserError unless `check` passes, and the model is of a base model's family.

        `unet` is the config of the base model's UNet, with as many channels.
        """
        own = self.check()
        is_of = "sdxl" if "text_encoder_2" in own else "sd15"
        if is_of != family:
            raise UserError(
                f"{self.key}: {self.checkpoint!r} is of {is_of}, but family is {family!r}."
            )
        channels = (own["unet"].get("in_channels", 4), unet.get("in_channels", 4))
        if channels[0] != channels[1]:
            raise UserError(
                f"{self.key}: {self.checkpoint!r} reads latents of {channels[0]} channels, but the "
                f"base model's have {channels[1]}."
            )

    def whole_unet(self) -> UNet2DConditionModel:
        """Returns the UNet with its up path, on the CPU in fp32; UserError if it cannot load."""
        model, folder = self._place
        try:
            root = fetch(model, [str(PurePosixPath(folder, "unet"))], self.key)
            return load_part(UNet2DConditionModel, root, "unet", torch.float32)
        except LOAD_ERRORS as error:
            raise UserError(f"{self.key}: {self.checkpoint!r}: {first_line(error)}") from error

    def load(self, dtype: torch.dtype = torch.float32, **options: Any) -> LatentRewardModel:
        """Returns the model on the CPU, networks in `dtype`, heads in fp32; UserError if it cannot.

        `options` are the last arguments of LatentRewardModel.
        """
        configs, heads = self.configs(), self.heads()
        self._check_heads(configs, heads)
        model, folder = self._place
        try:
            folders = [str(PurePosixPath(folder, name)) for name in configs]
            root = fetch(model, folders, self.key)
            unet = _load_down_path(root / "unet", configs["unet"], dtype)
            encoders = [load_part(_ENCODERS[n], root, n, dtype) for n in configs if n in _ENCODERS]
        except (*LOAD_ERRORS, *_CONFIG_ERRORS) as error:
            raise UserError(
                f"{self.key}: {self.checkpoint!r} cannot be loaded ({first_line(error)}); to download "
                f"and check it: {PREFETCH}"
            ) from error
        projections = heads.layer("visual_projection"), heads.layer("text_projection")
        loaded = LatentRewardModel(unet, encoders, *projections, **options)
        loaded.logit_scale.data.fill_(heads.logit_scale)
        return loaded


def _files_below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


def _projections(configs: Mapping[str, Mapping[str, Any]], out: int) -> dict[str, tuple[int, int]]:
    """Returns the shapes of the projections; `out` numbers are the features of an SD1.5's LRM.

    Raises ValueError for configs that do not fit, and _CONFIG_ERRORS.
    """
    unet, *encoders = configs.values()
    made, read = sum(each["hidden_size"] for each in encoders), unet["cross_attention_dim"]
    if made != read:
        raise ValueError(f"its UNet reads text of width {read}, but its text encoders make {made}")
    if len(encoders) == 1:
        shapes = {"text_projection": (out, made)}
    else:
        shapes, out = {}, encoders[1]["projection_dim"]
        added = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        if added != out:
            raise ValueError(f"its UNet reads {added} numbers of pooled text, but gets {out}")
    return shapes | {"visual_projection": (out, feature_width(unet))}


def _load_down_path(
    folder: Path, config: Mapping[str, Any], dtype: torch.dtype
) -> UNet2DConditionModel:
    """Returns a UNet's down path and middle; the tensors of its up path are not read."""
    file = choose_weights((path.name for path in folder.glob("*")), None, "unet")
    names = [file.name]
    if file.name.endswith(".json"):
        names = sorted(set(json.loads((folder / file.name).read_text())["weight_map"].values()))
    with init_empty_weights():
        unet = down_path(config)
    wanted, found = unet.state_dict(), {}
    unknown, misshaped = set(), set()
    for name in names:
        with safe_open(folder / name, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118, the file is no dict
                if key not in wanted:
                    unknown |= set() if key.startswith(UP_PATH) else {key}
                elif tuple(tensors.get_slice(key).get_shape()) != wanted[key].shape:
                    misshaped.add(key)
                else:
                    # Copied: kernels may round differently on mapped files.
                    found[key] = tensors.get_tensor(key).to(dtype, copy=True)
    check_names("UNet", wanted.keys() - found.keys() - misshaped, misshaped, unknown)
    unet.load_state_dict(found, strict=True, assign=True)
    return unet
