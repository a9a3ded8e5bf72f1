"""Scatter plots of size and latency against quality over several runs, with Pareto fronts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lightning_compress.lab.report import wording
from lightning_compress.lab.report.loading import Run
from lightning_compress.lab.report.plots import (
    COMPRESSED,
    DENSE,
    INK,
    Plot,
    draw,
    grid,
    shorten,
    to_svg,
)
from lightning_compress.lab.report.wording import Results, number, scalar, section

__all__ = [
    "Axis",
    "Mark",
    "Point",
    "comparable",
    "latency_axis",
    "pareto_front",
    "point_of",
    "scatter_plots",
    "settings",
    "size_axis",
]


def pareto_front(
    points: Sequence[tuple[float, float]], *, higher_is_better: bool = False
) -> list[int]:
    """Return the indices of the points that no other point dominates, smallest size first.

    Args:
        points: pairs (size, quality); smaller sizes are better. Pairs with NaN never win.
        higher_is_better: the direction of the quality.

    A point is dominated when another is at least as good in both values and better in one;
    equal points keep each other.

    >>> pareto_front([(10, 1.0), (20, 0.5), (30, 0.7)])
    [0, 1]
    """
    sign = -1.0 if higher_is_better else 1.0
    known = [(x, sign * y, i) for i, (x, y) in enumerate(points) if not math.isnan(x + y)]
    front: list[tuple[float, float, int]] = []
    for x, y, index in sorted(known):
        # Sorted by size, a point survives only where it improves on the best quality so far.
        if not front or y < front[-1][1] or (x, y) == front[-1][:2]:
            front.append((x, y, index))
    return [index for _, _, index in front]


LARGEST = 1e100  # beyond it matplotlib's own arithmetic overflows


@dataclass(frozen=True)
class Mark:
    """A mark of a figure with its spread to both sides: x in bytes or ms, y a quality."""

    x: float
    y: float
    low: float = 0.0
    high: float = 0.0
    spread: float = 0.0


@dataclass(frozen=True)
class Point:
    """One setting: the numbers of its runs, the model, its mark and that of its dense baseline."""

    places: tuple[int, ...]
    model: str
    mark: Mark
    dense: Mark | None

    @property
    def label(self) -> str:
        """The numbers of its runs, as the table has them."""
        return ",".join(map(str, self.places))


Cost = tuple[float, float, float] | None  # value, and how far it spreads down and up
Axis = Callable[[Results, str], Cost]


def size_axis(results: Results, side: str) -> Cost:
    """Bytes: of the `.lcz` file, and of the dense model as `torch.save` leaves it."""
    key = "lcz" if side == "compressed" else "torch"
    size = scalar(section(results[side], "bytes").get(key))
    return (size, 0.0, 0.0) if size and 0 < size <= LARGEST else None


def latency_axis(results: Results, side: str) -> Cost:
    """Milliseconds of the fastest runtime at batch 1 in one thread, with its p10 and p90."""
    found = [
        (median, values)
        for name, values in section(results[side], "latency_ms").items()
        if name.endswith("1 thread, batch 1")
        and (median := scalar(values.get("median"))) is not None
        and 0 < median <= LARGEST
    ]
    if not found:
        return None
    median, values = min(found, key=lambda one: one[0])
    low, high = (scalar(values.get(key)) for key in ("p10", "p90"))
    down, up = max(median - (low or median), 0.0), max((high or median) - median, 0.0)
    return median, down if down <= LARGEST else 0.0, up if up <= LARGEST else 0.0


def point_of(runs: Sequence[tuple[int, Run]], axis: Axis) -> Point | None:
    """The point of runs with the same settings; None where one lacks a value."""
    marks = [_mark(run.results, axis) for _, run in runs]
    known = [mark for mark in marks if mark is not None]
    if len(known) < len(marks):
        return None
    spread = stdev([mark.y for mark in known]) if len(known) > 1 else 0.0
    whole = Mark(
        mean(mark.x for mark in known),
        mean(mark.y for mark in known),
        max(mark.low for mark in known),
        max(mark.high for mark in known),
        spread,
    )
    first = runs[0][1].results
    return Point(
        tuple(place for place, _ in runs), wording.model_name(first), whole, _dense(first, axis)
    )


def _mark(results: Results, axis: Axis) -> Mark | None:
    quality = scalar(section(results, "verdict").get("compressed"))
    cost = axis(results, "compressed")
    if cost is None or quality is None or not abs(quality) <= LARGEST:
        return None
    return Mark(cost[0], quality, cost[1], cost[2])


def _dense(results: Results, axis: Axis) -> Mark | None:
    verdict, cost = section(results, "verdict"), axis(results, "dense")
    quality = wording.reference(verdict)
    if cost is None or quality is None or not abs(quality) <= LARGEST:
        return None
    spread = section(section(results, "baseline_spread"), str(verdict.get("metric")))
    wide = scalar(spread.get("std")) or 0.0
    return Mark(cost[0], quality, cost[1], cost[2], wide if 0 <= wide <= LARGEST else 0.0)


def comparable(results: Results) -> tuple[str, ...]:
    """The settings that two runs must share for their quality to be comparable."""
    evaluator = section(results, "evaluator")
    return (
        results["data"],
        str(section(results, "verdict").get("metric")),
        str(evaluator.get("feature", "")),
        str(evaluator.get("samples", "")),
    )


def settings(results: Results) -> str:
    """All that runs of one point share, as text."""
    shared: Mapping[str, Any] = {
        key: results.get(key) for key in ("model", "data", "compression", "steps")
    }
    sizes = [results[side].get("params") for side in ("dense", "compressed")]
    return json.dumps([shared, sizes], sort_keys=True, default=str)


MARKERS = "osD^vPX*"
MAX_LABELS = 12


@dataclass(frozen=True)
class Kind:
    """One kind of figure: its file name, caption, x axis and the axis' label and unit."""

    name: str
    title: str
    axis: Axis
    label: str
    unit: float


KINDS = (
    Kind(
        "pareto", "Size", size_axis, "file size, kB (log): .lcz compressed, torch.save dense", 1000
    ),
    Kind("latency", "Latency", latency_axis, "ms (log): fastest runtime, batch 1, one thread", 1),
)


def scatter_plots(runs: Sequence[Run]) -> tuple[list[Plot], list[str]]:
    """Return two figures for each set of comparable runs, and notes on runs left out.

    Runs that differ in their seed alone are one point: the mean, with the standard deviation.
    """
    groups: dict[tuple[str, ...], dict[str, list[tuple[int, Run]]]] = {}
    notes: list[str] = []
    for place, run in enumerate(runs, 1):
        if point_of([(place, run)], size_axis) is None:
            notes.append(f"Run {place} has no .lcz size or no judged quality: not in the figure.")
            continue
        alike = groups.setdefault(comparable(run.results), {})
        alike.setdefault(settings(run.results), []).append((place, run))
    if len(groups) > 1:
        notes.append(
            "Runs on other data, with another measure, feature network or sample count "
            "are not comparable and have figures of their own."
        )
    figures = []
    for number_, alike in enumerate(groups.values(), 1):
        first = next(iter(alike.values()))[0][1].results
        for kind in KINDS:
            points = [point_of(same, kind.axis) for same in alike.values()]
            known = [point for point in points if point is not None]
            if known:
                figures.append(_scatter(kind, number_, first, known))
    return figures, notes


def _scatter(kind: Kind, place: int, results: Results, points: Sequence[Point]) -> Plot:
    metric = str(section(results, "verdict").get("metric"))
    shown = wording.metric(results, metric)
    front = pareto_front(
        [(point.mark.x, point.mark.y) for point in points],
        higher_is_better=shown.better == "higher",
    )
    best = [points[index] for index in front]
    with draw(4.8, 3.3) as figure:
        axes = figure.subplots()
        _draw_points(axes, points)
        _draw_front(axes, points, best)
        _draw_floor(axes, results, metric)
        _cost_axis(axes, kind)
        axes.set_ylabel(shorten(f"{shown.label} {shown.arrow}".rstrip(), 40))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, columnspacing=1)
        svg = to_svg(figure)
    caption = f"{kind.title} against quality on {results['data']}: {shown.label}"
    winners = ", ".join(point.label for point in best)
    runs = sum(len(point.places) for point in points)
    alt = f"{runs} runs by {kind.title.lower()} and {shown.label}; on the Pareto front: {winners}."
    return Plot(f"{kind.name}_{place:02d}", caption, alt, svg)


def _draw_front(axes: Axes, points: Sequence[Point], best: Sequence[Point]) -> None:
    axes.plot(
        [point.mark.x for point in best],
        [point.mark.y for point in best],
        color=COMPRESSED,
        label="Pareto front",
        zorder=1,
    )
    for point in points if len(points) <= MAX_LABELS else best:
        at = (point.mark.x, point.mark.y)
        axes.annotate(point.label, at, (4, 4), textcoords="offset points", fontsize=8)


def _draw_points(axes: Axes, points: Sequence[Point]) -> None:
    models = list(dict.fromkeys(point.model for point in points))
    for number_, model in enumerate(models):
        mine = [point for point in points if point.model == model]
        marker, name = MARKERS[number_ % len(MARKERS)], shorten(model)
        _draw_marks(axes, [point.mark for point in mine], marker, COMPRESSED, name)
        dense = sorted({point.dense for point in mine if point.dense is not None}, key=_order)
        _draw_marks(axes, dense, marker, DENSE, f"{name}, dense")


def _order(mark: Mark) -> tuple[float, float]:
    return mark.x, mark.y


def _draw_marks(axes: Axes, marks: Sequence[Mark], marker: str, colour: str, label: str) -> None:
    """Draw marks with bars for what is known of their spread; dense ones are hollow."""
    if not marks:
        return
    axes.errorbar(
        [mark.x for mark in marks],
        [mark.y for mark in marks],
        xerr=[[mark.low for mark in marks], [mark.high for mark in marks]],
        yerr=[mark.spread for mark in marks],
        fmt=marker,
        ms=5.5,
        color=colour,
        mfc=colour if colour == COMPRESSED else "none",
        elinewidth=0.8,
        label=label,
        zorder=2,
    )


def _draw_floor(axes: Axes, results: Results, metric: str) -> None:
    """Draw the measure between two halves of real data, the resolution of the metric."""
    floor = scalar(section(section(results, "evaluator"), "floor").get(metric))
    if floor is not None and abs(floor) <= LARGEST:
        label = f"floor: real against real, {number(floor, 3)}"
        axes.axhline(floor, color=INK, linestyle=":", linewidth=1, label=label, zorder=0)


def _cost_axis(axes: Axes, kind: Kind) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high / low < 10:  # a log axis shows no label within a decade unless it is asked to
        axes.set_xlim(low / 2, high * 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / kind.unit:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(kind.label)
    grid(axes, "both")
