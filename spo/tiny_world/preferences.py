"""Labelled image pairs of the tiny world, in Pick-a-Pic's columns, and a control without labels."""

import hashlib
import io
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from spo.scorers import Scorer
from spo.scorers.pixels import to_pil
from spo.scorers.step_aware_clip import load_step_aware_scorer
from spo.tiny_world.quality import hidden_quality
from spo.tiny_world.scenes import HUES, SHAPES, SIZES, Caption, all_captions, draw_flaws, render

HELD_OUT = 200  # captions that appear in no preference pair and in no training prompt
WRONG_CAPTION = 0.3  # share of pairs in which one image does not show the caption
WRONG_LABEL = 0.05  # share of labels that are exchanged: people err
_DARKNESS = 10.0  # score of the step from white to grey: candidates differ as by a CLIP
_TIE = 0.8  # quality points; smaller differences are labelled as ties
_VALUES = {"size": SIZES, "colour": HUES, "shape": SHAPES, "background": HUES}


def split_captions() -> tuple[list[Caption], list[Caption]]:
    """Returns all captions, shuffled and split into training captions and held-out captions."""
    captions = all_captions()
    random.Random(0).shuffle(captions)
    return captions[HELD_OUT:], captions[:HELD_OUT]


@dataclass(frozen=True)
class LabelledPairs:
    """n labelled pairs of images."""

    captions: list[Caption]
    images: Tensor  # (2, n, 3, SIDE, SIDE) in [-1, 1]
    labels: Tensor  # (n,) 1 if the first is better, 0 if the second, 0.5 for a tie


def draw_labelled_pairs(captions: Sequence[Caption], n: int, seed: int) -> LabelledPairs:
    """Returns n pairs, labelled as people would.

    An image that shows its caption beats an image that does not; else the higher quality wins.
    """
    picker, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    asked = [picker.choice(captions) for _ in range(n)]
    shown = [list(asked), list(asked)]
    wrong = torch.full((n,), -1)  # the image that shows another caption; -1: neither
    for i, caption in enumerate(asked):
        if picker.random() < WRONG_CAPTION:
            wrong[i] = picker.randrange(2)
            shown[wrong[i]][i] = _other(caption, picker)
    images = torch.stack([render(side, draw_flaws(n, generator), generator) for side in shown])
    gap = hidden_quality(images[0]) - hidden_quality(images[1])
    labels = torch.where(gap.abs() < _TIE, 0.5, (gap > 0).float())
    labels = torch.where(wrong >= 0, (wrong == 1).float(), labels)
    flipped = torch.rand(n, generator=generator) < WRONG_LABEL
    return LabelledPairs(asked, images, torch.where(flipped, 1 - labels, labels))


def _other(caption: Caption, picker: random.Random) -> Caption:
    """Returns a caption that differs from `caption` in one word."""
    part = picker.choice(tuple(_VALUES))
    taken = {caption.colour, caption.background} | {getattr(caption, part)}
    return replace(caption, **{part: picker.choice([v for v in _VALUES[part] if v not in taken])})


def write_parquet(pairs: LabelledPairs, file: Path) -> None:
    """Writes pairs as one parquet file, with the images as JPEG like Pick-a-Pic's."""
    texts = [str(caption) for caption in pairs.captions]
    of_prompt = Counter(texts)
    labels = pairs.labels.tolist()
    table = pa.table(
        {
            "caption": texts,
            "jpg_0": [_jpeg(image) for image in to_pil(pairs.images[0])],
            "jpg_1": [_jpeg(image) for image in to_pil(pairs.images[1])],
            "label_0": labels,
            "label_1": [1 - label for label in labels],
            "has_label": [label != 0.5 for label in labels],
            "num_example_per_prompt": [of_prompt[text] for text in texts],
        }
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def _jpeg(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


class FlippedPreferences(Scorer):
    """A preference model that teaches nothing: half of its comparisons are reversed."""

    def __init__(self, device: torch.device, checkpoint: str, backbone: str, seed: int) -> None:
        paths = {"checkpoint": checkpoint, "backbone": backbone, "processor": backbone}
        self._scorer = load_step_aware_scorer(device, "preference.kwargs", **paths)
        self._seed = seed
        self.encode_prompts = self._scorer.encode_prompts

    def score(self, images: Tensor, prompt_features: Tensor, timestep: int) -> Tensor:
        scores = self._scorer.score(images, prompt_features, timestep)
        # One sign for all candidates of a prompt at a timestep, however they are sliced.
        key = f"{self._seed} {timestep} ".encode()
        rows = prompt_features.expand(len(images), -1).cpu().numpy()
        signs = [hashlib.sha256(key + row.tobytes()).digest()[0] % 2 * 2 - 1 for row in rows]
        return scores * torch.tensor(signs, device=scores.device)


class Darkness(Scorer):
    """A wrong preference model: it prefers dark images, whatever the prompt."""

    title = "Darkness"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 1, device=self._device)

    def score(self, images: Tensor, prompt_features: Tensor, timestep: int) -> Tensor:
        return -_DARKNESS * images.clamp(-1, 1).mean(dim=(1, 2, 3))
