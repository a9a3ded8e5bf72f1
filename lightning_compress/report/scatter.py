"""Size and latency against quality over several runs, each with its Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

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
from lightning_compress.report.formats import number, scalar
from lightning_compress.report.loading import Run
from lightning_compress.report.pareto import pareto_front
from lightning_compress.report.points import (
    Axis,
    Mark,
    Point,
    comparable,
    latency_axis,
    point_of,
    settings,
    size_axis,
)
from lightning_compress.report.wording import Results, section

__all__ = ["scatter_plots"]

MARKERS = "osD^vPX*"
MAX_LABELS = 12


@dataclass(frozen=True)
class Kind:
    """One kind of picture: its file name, caption, x axis and the axis' label and unit."""

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
            notes.append(f"Run {place} has no .lcz size or no judged quality: not in the picture.")
            continue
        alike = groups.setdefault(comparable(run.results), {})
        alike.setdefault(settings(run.results), []).append((place, run))
    if len(groups) > 1:
        notes.append(
            "Runs on other data, with another measure, feature network or sample count "
            "are not comparable and stand in pictures of their own."
        )
    pictures = []
    for number_, alike in enumerate(groups.values(), 1):
        first = next(iter(alike.values()))[0][1].results
        for kind in KINDS:
            points = [point_of(same, kind.axis) for same in alike.values()]
            known = [point for point in points if point is not None]
            if known:
                pictures.append(_scatter(kind, number_, first, known))
    return pictures, notes


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
    """Draw the measure between two halves of real data, below which nothing is told apart."""
    floor = scalar(section(section(results, "evaluator"), "floor").get(metric))
    if floor is not None and math.isfinite(floor):
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
