"""A small CLIP that knows the world's captions, and a small PickScore that starts from it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from spo.preference.loss import pair_losses
from spo.scorers.clip import CLIPInputs, text_features
from spo.tiny_world.base_model import draw_images, make_tokenizer, text_config, token_ids
from spo.tiny_world.fitting import Fit, fit
from spo.tiny_world.preferences import draw_pairs, split_captions
from spo.tiny_world.scenes import SIDE

_FEATURES = 64  # width of the common space
_LOGIT_SCALE = 3.4  # e^3.4 = 30 at the start of training; OpenAI's CLIP starts at 14, ends at 100


def train_clip(folder: Path, rounds: Sequence[Fit], state_file: Path) -> None:
    """Train image against text, contrastively, and save model, tokenizer and image processor.

    The loss is CLIP's (Radford et al., arXiv 2103.00020), with the images that share a caption
    counted as equally right.
    """
    tokenizer = make_tokenizer(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder)
    torch.manual_seed(0)
    clip = CLIPModel(
        CLIPConfig(
            text_config=text_config(tokenizer, projection_dim=_FEATURES).to_dict(),
            vision_config=CLIPVisionConfig(
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=SIDE,
                patch_size=8,
                hidden_act="gelu",
                projection_dim=_FEATURES,
            ).to_dict(),
            projection_dim=_FEATURES,
            logit_scale_init_value=_LOGIT_SCALE,
        )
    )
    prepare = CLIPInputs(str(folder)).prepare

    def loss(generator: torch.Generator) -> Tensor:
        captions, images = draw_images(256, generator)
        ids = token_ids(tokenizer, [str(caption) for caption in captions])
        image = _image_features(clip, prepare(images))
        logits = clip.logit_scale.exp() * image @ text_features(clip, ids).T
        same = (ids[:, None] == ids[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        by_image = -(target * logits.log_softmax(1)).sum(1).mean()
        by_text = -(target * logits.log_softmax(0)).sum(0).mean()
        return (by_image + by_text) / 2

    fit("CLIP", clip, loss, rounds, state_file)
    clip.save_pretrained(folder)


def train_pickscore(
    folder: Path, clip_folder: Path, rounds: Sequence[Fit], state_file: Path
) -> None:
    """Train the CLIP of `clip_folder` further to prefer what people prefer, on clean images.

    What PickScore is to CLIP (Kirstain et al., arXiv 2305.01569).
    """
    inputs = CLIPInputs(str(clip_folder))
    clip = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32)
    training, _ = split_captions()

    def loss(generator: torch.Generator) -> Tensor:
        pairs = draw_pairs(training, 96, seed=int(torch.randint(2**31, (), generator=generator)))
        ids = inputs.tokenize([str(caption) for caption in pairs.captions])
        images = inputs.prepare(pairs.images.flatten(0, 1))
        image = _image_features(clip, images)
        text = text_features(clip, ids)
        scores = clip.logit_scale.exp() * (image.unflatten(0, (2, -1)) * text).sum(-1).T
        return pair_losses(scores, pairs.labels).mean()

    fit("PickScore", clip, loss, rounds, state_file)
    shutil.copytree(clip_folder, folder)  # tokenizer and image processor
    clip.save_pretrained(folder)


def _image_features(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """Unit-norm features (n, D) of normalised pixels (n, 3, S, S)."""
    pooled = clip.vision_model(pixels).pooler_output
    return torch.nn.functional.normalize(clip.visual_projection(pooled), dim=-1)
