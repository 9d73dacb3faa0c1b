"""CLIPs of open_clip: architecture by name or from a folder, weights from a file.

open_clip takes seconds to import, so the functions that need it import it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from spo.data.token_lengths import readable
from spo.errors import UserError, in_one_line
from spo.hub import check_file, resolve_file
from spo.scorers import ImageScorer
from spo.scorers.clip import ImagePreparation
from spo.scorers.state_dicts import read_state_dict

if TYPE_CHECKING:
    import open_clip

_CONFIG = "open_clip_config.json"  # as open_clip names it in folders and on the Hub
_WEIGHTS = "open_clip_model.safetensors"
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
_OTHER_TEXT = {"hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs"}


class OpenClipScorer(ImageScorer):
    """cos(image, text) of one of open_clip's CLIPs, in fp32; base of HPSv2, CLIPScore and Aesthetic.

    `model`: an architecture that open_clip knows, or a folder with open_clip's open_clip_config.json.
    `checkpoint`: a path, hf://user/repo/file, or one of open_clip's tags for that architecture.
    Raises UserError that names the option of config `section`.
    """

    def __init__(self, device: torch.device, section: str, model: str, checkpoint: str) -> None:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        source = _find(model, checkpoint, section)
        self.device, self.architecture = device, source.architecture
        self._network = _load(source, model, section).to(device)
        self._tokenize = open_clip.SimpleTokenizer(context_length=self._network.context_length)
        known = {name: value for name, value in source.preprocess.items() if name in _PREPROCESS}
        size = self._network.visual.image_size
        preprocess = PreprocessCfg(**known | {"size": size if isinstance(size, int) else size[0]})
        self._transform = image_transform_v2(preprocess, is_train=False)
        self.preparation = ImagePreparation(preprocess.size, preprocess.mean, preprocess.std)

    def prepare(self, image: Image.Image) -> Tensor:
        """Returns the pixels (3, S, S) of an image, prepared as in open_clip's evaluation."""
        return self._transform(image)

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns unit-norm features (n, D)."""
        pixels = torch.stack([self.prepare(image) for image in images])
        return F.normalize(self._network.encode_image(pixels.to(self.device)), dim=-1)

    @torch.no_grad()
    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Returns cos(image, text), (n,), on the CPU."""
        tokens = self._tokenize(readable(prompts)).to(self.device)
        text = F.normalize(self._network.encode_text(tokens), dim=-1)
        return (self.image_features(images) * text).sum(dim=-1).cpu()


@dataclass(frozen=True)
class _Source:
    """The CLIP that `model` and `checkpoint` name, before any weights are loaded."""

    architecture: dict[str, Any]  # arguments of open_clip.CLIP
    preprocess: dict[str, Any]  # arguments of PreprocessCfg that are not the default, and others
    weights: str  # path or hf://user/repo/file


def check_open_clip(model: str, checkpoint: str, section: str) -> None:
    """Raises UserError for a wrong name; loads and downloads nothing."""
    check_file(_find(model, checkpoint, section).weights, f"{section}.checkpoint")


def _load(source: _Source, model: str, section: str) -> open_clip.CLIP:
    """Returns the CLIP of `source` with its weights, on the CPU."""
    import open_clip

    key = f"{section}.checkpoint"
    path = resolve_file(source.weights, key)
    weights = read_state_dict(path, key)
    try:
        network = open_clip.CLIP(**source.architecture)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f"{section}.model: {model!r} is no CLIP of open_clip: {error}") from error
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(f"{key}: {path} does not fit: {in_one_line(error)}") from error
    return network.requires_grad_(False).eval()


def _find(model: str, checkpoint: str, section: str) -> _Source:
    import open_clip

    architecture, preprocess = _architecture(model, f"{section}.model")
    if architecture.pop("custom_text", False) or _OTHER_TEXT & architecture["text_cfg"].keys():
        raise UserError(f"{section}.model: {model!r} has another text encoder than CLIP's.")
    tag = open_clip.get_pretrained_cfg(model, checkpoint)
    if not tag:
        return _Source(architecture, preprocess, checkpoint)
    if tag.get("quick_gelu", False) != architecture.get("quick_gelu", False):
        raise UserError(f"{section}.model: {checkpoint!r} belongs to {model}-quickgelu.")
    file = tag["hf_hub"]
    file = file + _WEIGHTS if file.endswith("/") else file
    return _Source(architecture, tag, f"hf://{file}")


def _architecture(model: str, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arguments of open_clip.CLIP, and those of its image preparation."""
    import open_clip

    if not Path(model).is_dir():
        if model not in open_clip.list_models():
            raise UserError(
                f"{key}: {model!r} is neither a folder nor an architecture of open_clip, such as "
                "ViT-H-14 (open_clip.list_models() has all)."
            )
        return open_clip.get_model_config(model), {}
    path = resolve_file(str(Path(model) / _CONFIG), key)
    try:
        config = json.loads(path.read_text())
        architecture = config["model_cfg"]
        architecture = architecture | {"text_cfg": dict(architecture["text_cfg"])}
        return architecture, dict(config.get("preprocess_cfg", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{key}: {path} is not a config of open_clip ({error!r}).") from error
