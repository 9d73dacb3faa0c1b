"""Self-contained HTML pages, made of the templates beside this file."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from spo.atomic import write_file
from spo.errors import UserError
from spo.publish.record import public_values
from spo.run.pictures import read_picture

PIXELATED = 64  # images up to this side, in pixels, are shown as the pixels they are
_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_PAGES.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Writes the page that `template` makes of `values`, with every text in them escaped."""
    html = _PAGES.get_template(template).render(values)
    # A command line may hold bytes that are no text: they become question marks.
    write_file(path, html.encode(errors="replace"))
    return path


def embedded_image(path: Path, size: Sequence[int]) -> str:
    """Returns an image file as a data URI that fits `size` (width, height); UserError if unreadable."""
    try:
        image = read_picture(path)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as an image: {error}") from error
    image.thumbnail(size, Image.Resampling.LANCZOS)
    file = BytesIO()
    image.save(file, format="webp", quality=82, lossless=max(image.size) <= PIXELATED)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            value = public_values(value)
            is_text = isinstance(value, str)
            yield prefix + name, value if is_text else json.dumps(value, ensure_ascii=False)


_PAGES.filters["leaves"] = _leaves
