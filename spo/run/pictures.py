"""Pictures: read from files as a person sees them, written, and in labelled grids."""

import contextlib
import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from spo.atomic import naming, write_file
from spo.errors import first_line

# What a scorer keeps of a pixel takes up to 80 bytes: this is 2.7 GB, and 8K video has as many.
MAX_PIXELS = 2**25
MAX_RATIO = 50  # longer side over the shorter one, which scorers resize to some hundred pixels
# PIL warns of sizes that are refused here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_MARGIN = 6  # pixels between cells
_CAPTION_LINES = 2


@dataclass(frozen=True)
class Cell:
    """One image of a grid, the text below it, and the colour of its frame, if any."""

    image: Image.Image
    caption: str = ""
    frame: str | None = None


def open_picture(file: Path | str | bytes) -> Image.Image:
    """Opens the image in a file or in encoded bytes; raises ValueError if it is none or is too large.

    Its size is looked at before its pixels: a small file may hold more than fits into memory.
    """
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    except Exception as error:  # which one depends on the format, and on where the damage is
        raise ValueError(first_line(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_RATIO * min(width, height):
        image.close()
        limit = f"at most {MAX_PIXELS:,} pixels, and {MAX_RATIO} times as long as wide, are read"
        raise ValueError(f"{width} x {height} pixels; {limit}")
    return image


def read_picture(file: Path | str | bytes) -> Image.Image:
    """Returns an image in RGB as a person sees it: upright, over white, of whatever mode and depth.

    Raises ValueError for what `open_picture` refuses, for damage, and for numbers without a white.
    """
    with open_picture(file) as image:
        try:
            seen, info = _eight_bits(image), image.info
            if seen.has_transparency_data:
                seen = seen.convert("RGBA")
                seen = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
            seen = seen.convert("RGB")
        except Exception as error:  # as above
            raise ValueError(first_line(error)) from error
    seen.info = {name: value for name, value in info.items() if name != "transparency"}
    with contextlib.suppress(Exception):  # a damaged EXIF block turns nothing
        ImageOps.exif_transpose(seen, in_place=True)
    return seen


def _eight_bits(image: Image.Image) -> Image.Image:
    """Returns an image whose white PIL knows, decoded: of numbers above 255 it clips all to white."""
    image.load()
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in key)  # as PIL reads the pixels
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"its numbers, of mode {image.mode}, do not say which of them is white")
    levels = np.asarray(image)
    if getattr(image, "tag_v2", {}).get(262) == 0:  # TIFF: "white is zero"
        levels = 65535 - levels
    if key is not None:
        levels = np.where(levels == key, 65535, levels)
    return Image.fromarray((levels / 257).round().astype(np.uint8))


def write_png(path: Path, image: Image.Image, text: Mapping[str, str] = {}) -> None:
    """Saves a PNG with `text` in it, whole or not at all, and its folder if missing."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in text.items():
        chunks.add_itxt(key, value)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as png:
        image.save(png, "png", pnginfo=chunks)
        write_file(path, png.getvalue())


def grid(
    rows: Sequence[Sequence[Cell]], title: str, labels: Sequence[str] = (), side: int = 256
) -> Image.Image:
    """Draws rows of cells under a title; `labels`, of one or more lines, stand left of the rows."""
    font = ImageFont.load_default(size=max(11, side // 18))
    line_height = font.size + 3
    lines = [line for label in labels for line in label.splitlines()]
    left = max((int(font.getlength(line)) for line in lines), default=0) + 2 * _MARGIN
    cell_height = side + _CAPTION_LINES * line_height + _MARGIN
    width = left + max(len(row) for row in rows) * (side + _MARGIN)
    top = 2 * line_height
    width = max(width, int(font.getlength(title)) + 2 * _MARGIN)
    sheet = Image.new("RGB", (width, top + len(rows) * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    characters = max(8, int(side / font.getlength("n")))
    draw.text((_MARGIN, _MARGIN), title, fill="black", font=font)
    for r, row in enumerate(rows):
        y = top + r * cell_height
        if labels:
            draw.multiline_text((_MARGIN, y + side // 3), labels[r], fill="black", font=font)
        for c, cell in enumerate(row):
            x = left + c * (side + _MARGIN)
            # Small images are enlarged without smoothing, so that their pixels show.
            is_small = cell.image.width < side
            method = Image.Resampling.NEAREST if is_small else Image.Resampling.LANCZOS
            sheet.paste(cell.image.resize((side, side), method), (x, y))
            if cell.frame:
                box = (x, y, x + side - 1, y + side - 1)
                draw.rectangle(box, outline=cell.frame, width=side // 40 + 2)
            lines = textwrap.wrap(
                cell.caption, characters, max_lines=_CAPTION_LINES, placeholder=" …"
            )
            below = x, y + side + 2
            draw.multiline_text(below, "\n".join(lines), fill="black", font=font, spacing=3)
    return sheet
