"""The four pictures of the headline page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib import ticker

from .headline_arms import PEERS
from .headline_tables import DENSE, FAMILIES, LABELS, Table

__all__ = ["draw"]

GROUPS = {
    "dense": (DENSE, "s", "0.35"),
    "narrow dense, 8 bits": (FAMILIES["narrow, from scratch"], "v-", "C1"),
    "zeros, entropy grid": (FAMILIES["zeros, entropy grid"], "o-", "C2"),
    "rate-distortion": (FAMILIES["rate-distortion"], "D-", "C0"),
    "rate-distortion, taught": (FAMILIES["rate-distortion, taught"], "d:", "C9"),
    "rate-distortion, int8": (FAMILIES["rate-distortion, int8"], "h", "C5"),
    "half the MACs": (FAMILIES["half the MACs"], "^", "C6"),
    "half the MACs, taught": (FAMILIES["half the MACs, taught"], "2", "C7"),
    "int8": (FAMILIES["int8"], "P", "C4"),
    "rdoq at save": (FAMILIES["at save"], "*", "C8"),
    "peers": (list(PEERS), "x", "C3"),
}
FAR = 6.0  # margins above the reference beyond which a row is only pointed at


def draw(
    tables: Sequence[Table], curves: Mapping[str, Sequence[Sequence[float]]], folder: Path
) -> None:
    """Write bytes against quality, paired differences, baselines' curves, and speeds."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    kinds = {"bytes": _bytes, "pairs": _pairs, "speed": _speed}
    for kind, panel in kinds.items():
        size = (6.2 * len(tables), 4.6)
        figure, axes = plt.subplots(1, len(tables), figsize=size, squeeze=False)
        figure.set_layout_engine("constrained")
        for axis, table in zip(axes.flat, tables, strict=True):
            panel(axis, table)
            axis.set_title(table.title)
            axis.grid(alpha=0.3)
        _save(figure, folder / f"headline_{kind}.png")
    if curves:
        size = (5 * len(curves), 3.6)
        figure, axes = plt.subplots(1, len(curves), figsize=size, squeeze=False)
        figure.set_layout_engine("constrained")
        for axis, (title, seeds) in zip(axes.flat, curves.items(), strict=True):
            for curve in seeds:
                axis.plot(range(1, len(curve) + 1), curve, linewidth=1)
            last = len(seeds[0]) - max(1, len(seeds[0]) // 3)
            axis.axvspan(last + 0.5, len(seeds[0]) + 0.5, color="0.9")
            low, middle = min(map(min, seeds)), seeds[0][len(seeds[0]) // 4]
            axis.set(title=title, xlabel="epoch", ylabel="metric on the validation split")
            axis.set_ylim(low - 0.1 * (middle - low), middle + 0.3 * (middle - low))
            axis.grid(alpha=0.3)
        _save(figure, folder / "headline_baselines.png")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=90, bbox_inches="tight")


def _bytes(axis: Any, table: Table) -> None:
    """Absolute bytes of the artifact against the test metric.

    An arm of fewer seeds has other seeds' mean: what is drawn is the reference's mean plus the
    paired difference, with its standard error.
    """
    base, margin = table.over(table.reference, table.metric), table.margin.margin
    axis.axhspan(base - margin, base + margin, color="0.9", label="margin of no loss")
    top = base + FAR * margin
    for label, (arms, style, colour) in GROUPS.items():
        known = sorted((a for a in arms if a in table.arms), key=lambda a: table.over(a, "bytes"))
        x = [table.over(arm, "bytes") / 1000 for arm in known]
        found = [table.verdict(arm) for arm in known]
        y = [base + table.worse(arm, table.metric) for arm in known]
        spread = [(one.standard_error or 0.0) if one else 0.0 for one in found]
        if known:
            axis.errorbar(x, y, spread, fmt=style, color=colour, elinewidth=1, label=label)
        for at, value in zip(x, y, strict=True):
            if value > top:
                place: Any = {"va": "top", "ha": "center", "rotation": 90}
                axis.annotate(f"{value:.4g} ↑", (at, top), color=colour, fontsize=8, **place)
    axis.set(
        xscale="log",
        xlabel="kilobytes of the artifact",
        ylabel=f"{LABELS[table.metric]} (paired, ± SE)",
    )
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_ylim(base - 2 * margin, top)
    axis.legend(frameon=False, fontsize=8)


def _pairs(axis: Any, table: Table) -> None:
    """Paired differences with their one-sided 95 % bounds, beside the margin."""
    margin = table.margin.margin
    arms = [arm for arm in table.arms if arm != table.reference][::-1]
    axis.axvspan(0, margin, color="0.9")
    for height, arm in enumerate(arms):
        found = table.verdict(arm)
        if found is None:
            continue
        middle = min(found.difference, FAR * margin)
        if found.lower is not None and found.upper is not None:
            axis.plot([found.lower, found.upper], [height] * 2, color="C0")
        word = table.word(arm).partition(";")[0]
        colour = {"established": "C2", "worse": "C3"}.get(word, "0.4")
        axis.plot(middle, height, "o" if middle == found.difference else ">", color=colour)
    axis.set_yticks(range(len(arms)), arms, fontsize=7)
    axis.set_xlim(-2 * margin, FAR * margin)
    axis.locator_params(axis="x", nbins=5)
    axis.axvline(0, color="0.4", linestyle="--", linewidth=1)
    axis.set_xlabel(f"{LABELS[table.metric]}, worse than the best dense model by")


def _speed(axis: Any, table: Table) -> None:
    """Speed at batch 16 against quality."""
    margin = table.margin.margin
    for label, (arms, style, colour) in GROUPS.items():
        known = {arm: table.verdict(arm) for arm in arms if arm in table.arms}
        points = [
            (mean(row["speed"]["batch 16"] for row in table.arms[arm]), found.difference)
            for arm, found in known.items()
            if found is not None
        ]
        if points:
            speeds, worse = zip(*points, strict=True)
            capped = [min(one, FAR * margin) for one in worse]
            axis.plot(speeds, capped, style[0], color=colour, label=label)
    axis.legend(frameon=False, fontsize=8)
    axis.axhspan(-margin, margin, color="0.9")
    axis.set(xlabel="times faster than the dense artifact, batch 16, one thread")
    axis.set_ylabel(f"{LABELS[table.metric]}, worse by (capped)")
