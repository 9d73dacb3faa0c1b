"""Pictures to look at: labelled grids of images."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from spo.atomic import naming, write_file

_MARGIN = 6  # pixels between cells
_CAPTION_LINES = 2


@dataclass(frozen=True)
class Cell:
    """One image of a grid, the text below it, and the colour of its frame, if any."""

    image: Image.Image
    caption: str = ""
    frame: str | None = None


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
