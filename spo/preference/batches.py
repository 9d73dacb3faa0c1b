"""From rows to tensors: decoding images, in background threads if configured."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spo.errors import RunError, UserError, first_line
from spo.preference.source import IMAGE_COLUMNS
from spo.run.pictures import read_picture

DAMAGED_IMAGE = "damaged image"
_AHEAD = 3  # minibatches that are decoded while the device is busy

Row = dict[str, Any]  # of the columns of Pick-a-Pic, as the user's files have them


@dataclass(frozen=True)
class RawBatch:
    """The rows of a minibatch of one process, images still encoded."""

    rows: Sequence[Row]
    # Of each row: its number among all rows that the run draws, or in the validation split.
    places: Sequence[int]


@dataclass(frozen=True)
class PairBatch:
    """A minibatch of n labelled pairs on the CPU; damaged pairs stay in it, grey and with weight 0."""

    captions: tuple[str, ...]
    images: Tensor  # (n, 2, 3, S, S) uint8
    labels: Tensor  # (n,) probability that image 0 wins: 1, 0, or 0.5 for a tie
    weights: Tensor  # (n,) 1 / number of examples of the prompt, not normalised
    places: tuple[int, ...]  # see RawBatch


def read_image(data: object) -> Image.Image:
    """Returns an RGB picture of encoded bytes, or of a dict with "bytes" or "path"; or ValueError."""
    if isinstance(data, dict):
        data = data.get("bytes") or data.get("path")
    return read_picture(data)


def decode_image(data: object, size: int, stretch: bool = False) -> np.ndarray:
    """Returns a square RGB picture (size, size, 3) uint8 of `data`, as `read_image`.

    PIL's bilinear filter, which is antialiased, resizes the shorter side; the centre is cut out, as by
    torchvision's Resize and CenterCrop. With `stretch` both sides are resized and nothing is cut.
    """
    image = read_image(data)
    if stretch:
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    width, height = image.size
    short = min(width, height)
    if short != size:
        width, height = int(size * width / short), int(size * height / short)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image)[top : top + size, left : left + size]


def decode_pair(row: Row, size: int, stretch: bool = False) -> np.ndarray | None:
    """Returns both images of a row, (2, size, size, 3) uint8; None if one is missing or damaged."""
    try:
        return np.stack([decode_image(row[name], size, stretch) for name in IMAGE_COLUMNS])
    except ValueError:
        return None


def decode_batch(
    raw: RawBatch, size: int, stretch: bool = False, pool: Executor | None = None
) -> PairBatch:
    """Returns the tensors of a minibatch, whose rows `pool` decodes at the same time."""
    each = pool.map if pool is not None else map
    pairs = list(each(lambda row: decode_pair(row, size, stretch), raw.rows))
    grey = np.full((2, size, size, 3), 128, np.uint8)
    images = torch.from_numpy(np.stack([grey if pair is None else pair for pair in pairs]))
    weights = [
        0.0 if pair is None else 1 / row["num_example_per_prompt"]
        for row, pair in zip(raw.rows, pairs, strict=True)
    ]
    return PairBatch(
        captions=tuple(row["caption"] for row in raw.rows),
        images=images.permute(0, 1, 4, 2, 3),
        labels=torch.tensor([float(row["label_0"]) for row in raw.rows]),
        weights=torch.tensor(weights),
        places=tuple(raw.places),
    )


def decoded(
    batches: Iterator[RawBatch], size: int, workers: int, stretch: bool = False
) -> Iterator[PairBatch]:
    """Yields the tensors of `batches`, read and decoded ahead of their use by `workers` threads.

    0 workers decode on demand. Decoders release Python's lock, so threads do as well as processes.
    Raises RunError if the rows cannot be read any further.
    """
    raws = _readable(batches)
    if workers == 0:
        yield from (decode_batch(raw, size, stretch) for raw in raws)
        return
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(workers) as pool:
        found = (decode_batch(raw, size, stretch, pool) for raw in raws)
        pending = deque(reader.submit(next, found, None) for _ in range(_AHEAD))
        while (batch := pending.popleft().result()) is not None:
            pending.append(reader.submit(next, found, None))
            yield batch


def _readable(batches: Iterator[RawBatch]) -> Iterator[RawBatch]:
    try:
        yield from batches
    except UserError:
        raise
    except Exception as error:  # whatever the network, the file systems and the formats raise
        raise RunError(
            f"data.source: no row can be read any more ({type(error).__name__}: "
            f"{first_line(error)}); go on from the last checkpoint by resume_from=auto."
        ) from error
