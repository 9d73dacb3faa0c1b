"""CLIPs of open_clip as scorers: CLIPScore, HPSv2 and v2.1, LAION's aesthetic predictor.

open_clip takes seconds to import, so the functions that need it import it.
"""

import json
from collections.abc import Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from spo.data.token_lengths import readable
from spo.errors import UserError, in_one_line
from spo.hub import check_file, resolve_file
from spo.scorers import ImageScorer
from spo.scorers.clip import ImagePreparation
from spo.scorers.pixels import unit_pixels
from spo.scorers.state_dicts import linear_head, read_state_dict

_OTHER_TEXT = {"hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs"}


class OpenClipScorer(ImageScorer):
    """cos(image, text) of one of open_clip's CLIPs, in fp32, by default OpenAI's ViT-L/14.

    `model`: an architecture that open_clip knows, or a folder with open_clip's open_clip_config.json.
    `checkpoint`: a path, hf://user/repo/file, or one of open_clip's tags for that architecture.
    Raises UserError that names the option of config `section`.
    """

    def __init__(
        self,
        device: torch.device,
        section: str,
        *,
        model: str = "ViT-L-14-quickgelu",
        checkpoint: str = "openai",
    ) -> None:
        from open_clip import SimpleTokenizer
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

        self.architecture, preprocess, file = find_open_clip(model, checkpoint, section)
        self.device = device
        self._network = _load(self.architecture, file, model, section).to(device)
        self._tokenize = SimpleTokenizer(context_length=self._network.context_length)
        size = self._network.visual.image_size
        size = {"size": size if isinstance(size, int) else size[0]}
        to = PreprocessCfg(**merge_preprocess_dict(preprocess, size))
        self._transform = image_transform_v2(to, is_train=False)
        self.preparation = ImagePreparation(to.size, tuple(to.mean), tuple(to.std))

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
        tokens = self._tokenize(readable(prompts)).to(self.device)
        text = F.normalize(self._network.encode_text(tokens), dim=-1)
        return (self.image_features(images) * text).sum(dim=-1).cpu()


class CLIPScore(OpenClipScorer):
    """max(cos(image, text), 0) of a CLIP: Hessel et al., EMNLP 2021, arXiv 2104.08718.

    Printed times 100, without a prefix to the prompt, as papers on image generation do; Hessel et al.
    multiply by 2.5 and put "A photo depicts" before each text.
    """

    title, scale = "CLIPScore", 100.0

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return super().score_images(images, prompts).clamp(min=0)


class HPSv2(OpenClipScorer):
    """cos(image, text) of a CLIP that was trained on human preferences: Wu et al., arXiv 2306.09341.

    Images are prepared as in the package hpsv2 1.2.0: scaled to [0, 1], resized (bicubic) so that the
    longer side fits, and padded with black on both sides to a square; open_clip's own evaluation crops
    instead. The package computes in mixed precision, this class in fp32. Resized with antialiasing, as
    by torchvision 0.17 or newer; older versions, current in the paper's time, resize without.
    """

    title, scale = "HPSv2", 100.0
    __init__ = partialmethod(
        OpenClipScorer.__init__, model="ViT-H-14", checkpoint="hf://xswu/HPSv2/HPS_v2_compressed.pt"
    )

    def prepare(self, image: Image.Image) -> Tensor:
        return self.preparation.normalise(fit_square(unit_pixels(image), self.preparation.size))


class HPSv2_1(HPSv2):
    """HPSv2 with newer weights."""

    title = "HPSv2.1"
    __init__ = partialmethod(HPSv2.__init__, checkpoint="hf://xswu/HPSv2/HPS_v2.1_compressed.pt")


def fit_square(pixels: Tensor, size: int) -> Tensor:
    """(3, H, W) -> (3, size, size): the longer side resized to `size`, the shorter padded with 0."""
    height, width = pixels.shape[1:]
    ratio = size / max(height, width)
    shape = (round(height * ratio), round(width * ratio))
    pixels = F.interpolate(pixels[None], shape, mode="bicubic", antialias=True)[0]
    top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
    return F.pad(pixels, (left, size - shape[1] - left, top, size - shape[0] - top))


class Aesthetic(OpenClipScorer):
    """A rating of about 1 to 10 from a CLIP's unit-norm image features; prompts play no part.

    LAION's aesthetic predictor v2, github.com/christophschuhmann/improved-aesthetic-predictor. `head`:
    its MLP, or its single linear layer. Raises UserError for files that cannot be loaded, and for a
    CLIP without QuickGELU: the heads belong to OpenAI's CLIP, which has it.
    """

    title = "Aesthetic"

    def __init__(
        self,
        device: torch.device,
        section: str,
        *,
        model: str = "ViT-L-14-quickgelu",
        checkpoint: str = "openai",
        # sac+logos+ava1-l14-linearMSE of the project above, in TRL's copy on the Hub.
        head: str = "hf://trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
    ) -> None:
        super().__init__(device, section, model=model, checkpoint=checkpoint)
        if not self.architecture.get("quick_gelu", False):
            raise UserError(f"{section}.model: {model!r} has no QuickGELU, as OpenAI's CLIPs have.")
        key = f"{section}.head"
        weights = read_state_dict(head, key)
        try:
            self._head = linear_head(weights, self.architecture["embed_dim"]).to(device)
        except ValueError as error:
            raise UserError(f"{key}: {head} is no head for this CLIP: {error}.") from error

    @torch.no_grad()
    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self._head(self.image_features(images))[:, 0].cpu()


def find_open_clip(
    model: str, checkpoint: str, section: str
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Returns arguments of open_clip.CLIP and PreprocessCfg, and the weights' file, not downloaded."""
    import open_clip

    architecture, preprocess = _read_config(model, f"{section}.model")
    if architecture.pop("custom_text", False) or _OTHER_TEXT & architecture["text_cfg"].keys():
        raise UserError(f"{section}.model: {model!r} has another text encoder than CLIP's.")
    if tag := open_clip.get_pretrained_cfg(model, checkpoint):
        if tag.get("quick_gelu", False) != architecture.get("quick_gelu", False):
            raise UserError(f"{section}.model: {checkpoint!r} belongs to {model}-quickgelu.")
        file = tag["hf_hub"]
        file = f"{file}open_clip_model.safetensors" if file.endswith("/") else file
        preprocess, checkpoint = tag, f"hf://{file}"
    check_file(checkpoint, f"{section}.checkpoint")
    return architecture, preprocess, checkpoint


def _read_config(model: str, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arguments of open_clip.CLIP, and those of its image preparation."""
    import open_clip

    if not Path(model).is_dir():
        if architecture := open_clip.get_model_config(model):
            return architecture, {}
        raise UserError(
            f"{key}: {model!r} is neither a folder nor an architecture of open_clip, such as "
            "ViT-H-14 (open_clip.list_models() has all)."
        )
    path = resolve_file(f"{model}/open_clip_config.json", key)
    try:
        config = json.loads(path.read_text())
        architecture = config["model_cfg"]
        architecture = architecture | {"text_cfg": dict(architecture["text_cfg"])}
        return architecture, dict(config.get("preprocess_cfg", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{key}: {path} is not a config of open_clip ({error!r}).") from error


def _load(architecture: dict[str, Any], file: str, model: str, section: str) -> nn.Module:
    import open_clip

    key = f"{section}.checkpoint"
    weights = read_state_dict(file, key)
    try:
        network = open_clip.CLIP(**architecture)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f"{section}.model: {model!r} is no CLIP of open_clip: {error}") from error
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(f"{key}: {file} does not fit: {in_one_line(error)}") from error
    return network.requires_grad_(False).eval()
