"""SVG figures of one run: training curves, stored tensors, files."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_compress.files import write_atomically
from lightning_compress.lab.report import wording
from lightning_compress.lab.report.loading import Curves
from lightning_compress.lab.report.wording import Results, kilobytes, percent, scalar, section

__all__ = [
    "COMPRESSED",
    "DENSE",
    "INK",
    "Plot",
    "bytes_plot",
    "curve_plots",
    "draw",
    "files_plot",
    "grid",
    "inline",
    "layer_plot",
    "shorten",
    "to_svg",
]

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


STYLES = {"dense": (DENSE, "-"), "compressed": (COMPRESSED, (0, (4, 1.5)))}
MAX_POINTS, MAX_BARS, MAX_CURVES, MAX_LINES = 300, 24, 100, 8
LARGEST = 1e100
MIN_SHARE = 0.01  # tensors below this share of all have no bar of their own


def curve_plots(curves: Curves, results: Results) -> list[Plot]:
    """Return one figure a metric: losses first, then compression, then validation."""
    order = {"train": 0, "val": 2}
    names = sorted(
        curves, key=lambda name: (order.get(name.split("/")[0], 1), name != "train/loss", name)
    )
    shown = enumerate(names[:MAX_CURVES], 1)
    return [_curve_plot(place, name, curves[name], results) for place, name in shown]


def _curve_plot(
    place: int, name: str, runs: Mapping[str, list[tuple[float, float]]], results: Results
) -> Plot:
    shown = wording.metric(results, name.split("/")[-1])
    label = name if shown.label == name.split("/")[-1] else f"{name}: {shown.label}"
    ends: list[str] = []
    with draw(4.8, 2.5) as figure:
        axes = figure.subplots()
        for run, points in list(runs.items())[:MAX_LINES]:
            steps, values = _bin_means(points)
            colour, line = STYLES.get(run, (INK, ":"))
            marker = "o" if len(steps) <= 20 else ""
            axes.plot(steps, values, c=colour, ls=line, marker=marker, ms=3, label=shorten(run))
            ends.append(f"{run} ends at {max(points)[1]:.4g}")
        axes.set_title(f"{shorten(label, 36)} {shown.arrow}".rstrip())
        axes.set_xlabel("optimizer step")
        grid(axes, "y")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)
        svg = to_svg(figure)
    slug = re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_")[:60]
    alt = f"{label} over training steps: {', '.join(ends)}."
    return Plot(f"curve_{place:02d}_{slug}", "", alt, svg)


def _bin_means(points: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Sort by step and average neighbours where there are more points than a figure can show."""
    array = np.array(sorted(points, key=lambda point: point[0]), dtype=np.float64)
    # A diverged stretch is a gap, not a broken axis; beyond LARGEST matplotlib itself overflows.
    array[~(np.abs(array) <= LARGEST)] = np.nan
    if len(array) > MAX_POINTS:
        array = np.array([part.mean(axis=0) for part in np.array_split(array, MAX_POINTS)])
    return array[:, 0], array[:, 1]


def _largest(results: Results, key: str) -> list[Mapping[str, Any]]:
    """Return the stored tensors by falling "bytes" or "weights", those that a figure can show."""
    layers = [layer for layer in results.get("layers") or () if _known(layer, key)]
    least = MIN_SHARE * sum(_known(layer, key) for layer in layers)
    layers = [layer for layer in layers if _known(layer, key) >= least]
    return sorted(layers, key=lambda layer: -_known(layer, key))[:MAX_BARS]


def _known(values: Mapping[str, Any], key: str) -> float:
    """Return a finite number; 0 for a missing or broken one, which a bar cannot show."""
    value = scalar(values.get(key))
    return value if value is not None and abs(value) <= LARGEST else 0.0


def _bars(figure: Figure, names: Sequence[str], columns: int) -> list[Axes]:
    """Prepare horizontal bars with shared names, first name on top."""
    row = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    row[0].set_yticks(range(len(names)), [shorten(name) for name in names])
    row[0].invert_yaxis()
    for axes in row:
        axes.tick_params(axis="y", length=0)
        grid(axes, "x")
    return list(row)


def layer_plot(results: Results) -> Plot | None:
    """Return zeros and stored bits a weight for each tensor; None without layers."""
    layers = _largest(results, "weights")
    if not layers:
        return None
    places = range(len(layers))
    zeros = [100 * _known(layer, "sparsity") for layer in layers]
    with draw(4.8, 0.8 + 0.2 * len(layers)) as figure:
        left, right = _bars(figure, [str(layer.get("name")) for layer in layers], 2)
        left.barh(places, zeros, color=COMPRESSED, height=0.7)
        left.set(xlim=(0, 100), xlabel="zeros, %")
        right.barh(places, _bits(layers, "bytes"), color=COMPRESSED, height=0.7, label="stored")
        bound = _bits(layers, "bound_bytes")
        right.plot(bound, places, "|", color=DENSE, ms=10, mew=2, label="entropy bound")
        right.set_xlabel("bits/weight")
        right.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, columnspacing=1)
        svg = to_svg(figure)
    caption = "Zeros and stored bits a weight, largest tensors first; the table below has all"
    alt = f"Bars for {len(layers)} tensors; the table of stored tensors has the same numbers."
    return Plot("layers", caption, alt, svg)


def _bits(layers: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [
        8 * _known(layer, key) / weights if (weights := _known(layer, "weights")) else math.nan
        for layer in layers
    ]


def bytes_plot(results: Results) -> Plot | None:
    """Return where the bytes of the `.lcz` file lie, tensor by tensor; None without layers."""
    layers = _largest(results, "bytes")
    if not layers:
        return None
    sizes = [_known(layer, "bytes") for layer in layers]
    names = [str(layer.get("name")) for layer in layers]
    stored = sum(_known(layer, "bytes") for layer in results["layers"])
    total = max(_known(section(results["compressed"], "bytes"), "lcz"), stored)
    rest = {"smaller tensors": stored - sum(sizes), "header and the rest": total - stored}
    for name, size in rest.items():
        if size > 0:
            names.append(name)
            sizes.append(size)
    texts = [f"{kilobytes(size)}, {percent(size / total)}" for size in sizes]
    with draw(4.8, 0.6 + 0.2 * len(names)) as figure:
        axes = _bars(figure, names, 1)[0]
        _labelled(axes, range(len(names)), [size / 1000 for size in sizes], texts, COMPRESSED)
        axes.set_xlabel("kB in the .lcz file")
        svg = to_svg(figure)
    return Plot(
        "bytes", "Share of each tensor in the .lcz file", f"{names[0]} takes most: {texts[0]}.", svg
    )


def _labelled(
    axes: Axes, places: Sequence[float], values: Sequence[float], texts: Sequence[str], colour: str
) -> None:
    bars = axes.barh(places, values, color=colour, height=0.7 if len(texts) > 2 else 0.4)
    axes.bar_label(bars, texts, padding=3, fontsize=8)
    # The longest bar carries its label at its end: leave room for it.
    axes.set_xlim(0, 1.45 * max(values))


def files_plot(results: Results) -> Plot | None:
    """Return the sizes of all files, dense and compressed; None when there are none."""
    bars = [
        (f"{key}, {side}", size, STYLES[side][0])
        for key in ("torch", "safetensors", "onnx", "onnx_int8", "lcz_graph", "lcz")
        for side in ("dense", "compressed")
        if (size := _known(section(results[side], "bytes"), key))
    ]
    if not bars:
        return None
    with draw(4.8, 0.6 + 0.2 * len(bars)) as figure:
        axes = _bars(figure, [name for name, _, _ in bars], 1)[0]
        places = range(len(bars))
        drawn = axes.barh(
            places, [s / 1000 for _, s, _ in bars], color=[c for *_, c in bars], height=0.7
        )
        axes.bar_label(drawn, [kilobytes(size) for _, size, _ in bars], padding=3, fontsize=8)
        axes.set_xlim(0, 1.3 * max(size for _, size, _ in bars) / 1000 or 1.0)
        axes.set_xlabel("kB on disk")
        svg = to_svg(figure)
    alt = f"Bars: {'; '.join(f'{name} {kilobytes(size)}' for name, size, _ in bars)}."
    return Plot("files", "Files on disk", alt, svg)
