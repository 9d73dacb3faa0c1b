"""PickScore: Kirstain et al., "Pick-a-Pic", NeurIPS 2023, arXiv 2305.01569."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from spo.scorers import Scorer
from spo.scorers.clip import CLIPInputs, load_clip, text_features, weight_dtype


class CLIPScorer(Scorer):
    """Base of the scorers that are a CLIP of transformers: prompts, compilation."""

    def __init__(self, clip: CLIPModel, inputs: CLIPInputs, device: torch.device) -> None:
        self.clip = clip.requires_grad_(False).eval().to(device)
        self.inputs, self.device = inputs, device
        self.tokenizers = {"preference model": inputs.tokenizer}

    def compile(self) -> None:
        """Compiles the vision tower, layer by layer: all layers share the code of the first."""
        for layer in self.clip.vision_model.encoder.layers:
            layer.compile()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return text_features(self.clip, self.inputs.tokenize(prompts).to(self.device))


class PickScore(CLIPScorer):
    """exp(logit_scale) cos(image, text) of a CLIP; the timestep plays no part."""

    title = "PickScore"

    def score(self, images: Tensor, prompt_features: Tensor, timestep: int) -> Tensor:
        return self._score_pixels(self.inputs.prepare(images), prompt_features)

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Returns scores (n,) of images that the CLIP's own image processor prepares."""
        features = self.encode_prompts(prompts)
        return self._score_pixels(self._processed(images), features).cpu()

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        return F.normalize(self._features(self._processed(images)), dim=-1)

    def _processed(self, images: Sequence[Image.Image]) -> Tensor:
        prepared = self.inputs.image_processor(images=list(images), return_tensors="pt")
        return prepared.pixel_values.to(self.device)

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> Tensor:
        projection = self.clip.visual_projection
        pooled = self.clip.vision_model(pixels.to(projection.weight.dtype)).pooler_output
        return projection(pooled).float()

    def _score_pixels(self, pixels: Tensor, prompt_features: Tensor) -> Tensor:
        # In fp32: 16 bits are too few for the small differences between candidates.
        cosine = F.cosine_similarity(self._features(pixels), prompt_features, dim=-1)
        return self.clip.logit_scale.float().exp() * cosine


def load_pickscore(
    device: torch.device,
    section: str,
    *,
    backbone: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    dtype: str = "float32",
) -> PickScore:
    """Returns PickScore of two Hub ids or folders; raises UserError if one cannot be loaded."""
    clip = load_clip(backbone, section).to(weight_dtype(dtype, section))
    return PickScore(clip, CLIPInputs(processor, section), device)
