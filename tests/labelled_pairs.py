"""Small labelled data in the columns of Pick-a-Pic: seeded images, labelled by their brightness."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CAPTIONS = ("a red fox", "a tiny house", "a blue whale", "stars above a lake")


def picture(seed: int, size: tuple[int, int] = (32, 32), form: str = "PNG") -> bytes:
    """Returns an encoded image (width, height), seeded: noise around a random colour."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(30, 220, 3)
    pixels = colour + rng.normal(0, 10, (size[1], size[0], 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, form)
    return buffer.getvalue()


def brightness(data: bytes) -> float:
    return float(np.asarray(Image.open(io.BytesIO(data))).mean())


def make_row(seed: int, **changes) -> dict:
    """Returns a valid row: the brighter image wins; every fifth is a tie."""
    images = picture(2 * seed), picture(2 * seed + 1)
    first = 0.5 if seed % 5 == 4 else float(brightness(images[0]) > brightness(images[1]))
    row = {
        "caption": CAPTIONS[seed % len(CAPTIONS)],
        "jpg_0": images[0],
        "jpg_1": images[1],
        "label_0": first,
        "label_1": 1 - first,
        "has_label": True,
        "num_example_per_prompt": 1 + seed % 3,
    }
    return row | changes


def write_rows(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def write_splits(folder: Path, train: list[dict], validation: list[dict]) -> Path:
    """Writes a folder like the config's tiny data, and returns it."""
    for split, rows in (("train", train), ("validation_unique", validation)):
        write_rows(folder / f"{split}-00000-of-00001.parquet", rows)
    return folder
