"""The look of every figure: one style, one colour per model, PNG files or inline SVG."""

import re
import warnings
from contextlib import AbstractContextManager
from io import StringIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Legible on white and on black. The first colour is that of the model that others are compared with.
COLOURS = ("#808893", "#3b7dd8", "#d9822b", "#2a9d6f", "#b5589c", "#a08a1f", "#4aa3b5", "#c5524c")
INK = "#2b2f36"  # text and lines: in SVG replaced by the colour of the page's text
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS[1:]),
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.3,
    "text.parse_math": False,  # a model's name may hold a dollar sign
    "svg.fonttype": "none",  # text that can be selected, in the page's font
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}


def style(**changes: object) -> AbstractContextManager:
    """Gives figures made or saved inside the common style."""
    return matplotlib.rc_context(_STYLE | changes)


def panel_axes(rows: int = 5) -> tuple[Figure, Axes]:
    """Makes a figure of one panel, in inches, for `rows` rows of text; inside `style()`."""
    figure = Figure(figsize=(3.9, max(2.0, 0.9 + 0.32 * rows)), layout="constrained")
    return figure, figure.subplots()


def colour(index: int) -> str:
    """Returns the colour of model `index` of an evaluation."""
    return COLOURS[index % len(COLOURS)]


def to_svg(figure: Figure, name: str) -> str:
    """Returns an SVG element for an HTML page, in which no other figure may have this `name`."""
    file = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # The salt keeps the ids of two figures of a page apart.
    with style(**{"svg.hashsalt": name}), warnings.catch_warnings():
        # A browser has the characters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    return svg.replace(INK, "currentColor")
