"""How every figure is drawn, saved and inlined.

Figures have a transparent background and mid-grey axes, so that a saved file can be read on
dark and light; inlined in a page their ink follows the page's own colours.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_compress.files import write_atomically

__all__ = ["COMPRESSED", "DENSE", "INK", "Plot", "draw", "grid", "inline", "shorten", "to_svg"]

# Okabe and Ito (2008): told apart with any colour vision, and by line style besides.
DENSE, COMPRESSED, INK = "#0072b2", "#d55e00", "#808080"
STYLE: Any = {
    "svg.fonttype": "none",  # real text: selectable, searchable, in the page's own font
    "svg.hashsalt": "lightning_compress",  # the same numbers give the same file
    "text.parse_math": False,  # a name with a dollar sign is a name
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    **dict.fromkeys(
        ["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK
    ),
}


@dataclass(frozen=True)
class Plot:
    """One figure: file name without suffix, caption (may be empty), alt text, and the SVG."""

    name: str
    caption: str
    alt: str
    svg: str

    def save(self, folder: Path) -> Path:
        """Write the figure as `<name>.svg` into a folder."""
        path = folder / f"{self.name}.svg"
        return write_atomically(path, self.svg, what="the plot", parents=True)


@contextmanager
def draw(width: float, height: float) -> Iterator[Figure]:
    """Give a figure of width x height inches in this module's style."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # The text stays text in the SVG: the reader's fonts have the glyph, not matplotlib's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Figure) -> str:
    """Render without date, licence block or document type: only the drawing."""
    stream = io.StringIO()
    metadata = dict.fromkeys(["Date", "Creator", "Format", "Type"])
    figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    text = stream.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def inline(plot: Plot, prefix: str) -> str:
    """Return the SVG for a page: ids made unique by the prefix, colours as CSS variables."""
    svg = re.sub(r'\bid="', f'id="{prefix}-', plot.svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", svg)
    for colour, variable in ((INK, "currentColor"), (DENSE, "var(--dense)")):
        svg = svg.replace(colour, variable)
    return svg.replace(COMPRESSED, "var(--compressed)")


def shorten(text: str, limit: int = 28) -> str:
    """Cut the middle out of a long name; control characters, illegal in SVG, become spaces.

    >>> shorten("decoder.blocks.0.convolution.weight", 20)
    'decoder.b…ion.weight'
    """
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    head = (limit - 1) // 2
    if len(text) <= limit:
        return text
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[head + 1 - limit :]}"


def grid(axes: Axes, axis: Literal["x", "y", "both"]) -> None:
    """Draw faint grid lines behind the data."""
    axes.grid(axis=axis, color=INK, alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
