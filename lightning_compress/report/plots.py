"""Figures about one run: its training curves, its stored tensors, its files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_compress.report import wording
from lightning_compress.report.drawing import (
    COMPRESSED,
    DENSE,
    INK,
    Plot,
    draw,
    grid,
    shorten,
    to_svg,
)
from lightning_compress.report.formats import kilobytes, percent, scalar
from lightning_compress.report.loading import Curves
from lightning_compress.report.wording import Results, section

__all__ = ["bytes_plot", "curve_plots", "files_plot", "layer_plot"]

STYLES = {"dense": (DENSE, "-"), "compressed": (COMPRESSED, (0, (4, 1.5)))}
MAX_POINTS, MAX_BARS = 300, 24
MIN_SHARE = 0.01  # tensors below this share of all have no bar of their own


def curve_plots(curves: Curves, results: Results) -> list[Plot]:
    """Return one figure a metric: losses first, then compression, then validation."""
    order = {"train": 0, "val": 2}
    names = sorted(
        curves, key=lambda name: (order.get(name.split("/")[0], 1), name != "train/loss", name)
    )
    return [_curve_plot(place, name, curves[name], results) for place, name in enumerate(names, 1)]


def _curve_plot(
    place: int, name: str, runs: Mapping[str, list[tuple[float, float]]], results: Results
) -> Plot:
    shown = wording.metric(results, name.split("/")[-1])
    label = name if shown.label == name.split("/")[-1] else f"{name}: {shown.label}"
    ends: list[str] = []
    with draw(4.8, 2.5) as figure:
        axes = figure.subplots()
        for run, points in runs.items():
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
    array[~np.isfinite(array)] = np.nan  # a diverged stretch is a gap, not a broken axis
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
    return value if value is not None and math.isfinite(value) else 0.0


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
        for key in ("torch", "safetensors", "onnx", "onnx_int8", "lcz")
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
