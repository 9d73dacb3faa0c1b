"""Self-contained HTML pages: one skeleton, and the pieces that several pages are made of."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from spo.errors import UserError

_ASSETS = Path(__file__).parent
PIXELATED = 64  # images up to this side, in pixels, are shown as the pixels they are
# The browser itself refuses whatever is not in the file.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_page(path: Path, title: str, sections: Iterable[str], script: str = "") -> Path:
    """Write an HTML page of `sections`, which are HTML; `script` is a file beside this module."""
    code = f"<script>\n{_asset(script)}</script>" if script else ""
    html = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">
<title>{escape(title)}</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
<main>
{"".join(sections)}</main>
{code}
</body>
</html>
"""
    # A command line may hold bytes that are no text: they become question marks.
    path.write_text(html, encoding="utf-8", errors="replace")
    return path


def header(title: str, lines: Iterable[str]) -> str:
    """The head of a page: plain text."""
    return f"<header><h1>{escape(title)}</h1>{''.join(map(paragraph, lines))}</header>\n"


def section(title: str, *parts: str) -> str:
    """A section of HTML `parts` under a heading of plain text."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{''.join(parts)}</section>\n"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>\n"


def details(summary: str, content: str) -> str:
    """HTML `content` that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}</details>\n"


def panels(svgs: Iterable[str]) -> str:
    """Figures side by side, as many as the window is wide."""
    return '<div class="panels">' + "".join(f"<div>{svg}</div>\n" for svg in svgs) + "</div>\n"


def facts(values: Mapping[str, Any]) -> str:
    """A table of names and values, nested mappings under dotted names."""
    rows = (
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_text(value))}</td></tr>\n'
        for name, value in _leaves(values)
    )
    return f'<div class="wide"><table class="facts">\n{"".join(rows)}</table></div>\n'


def data_block(name: str, value: Any) -> str:
    """`value` as JSON, under the id `name`, for a script; safe whatever text it holds."""
    # All of it is ASCII, and without "<" nothing in it can end the script element.
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def embedded_image(path: Path, size: Sequence[int]) -> str:
    """The image of a file as a data URI, made smaller to fit `size` (width, height) if it must.

    Raises UserError where it cannot be read.
    """
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path}: cannot be read as an image: {error}") from error
    image.thumbnail(size, Image.Resampling.LANCZOS)
    file = BytesIO()
    image.save(file, format="webp", quality=82, lossless=max(image.size) <= PIXELATED)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
