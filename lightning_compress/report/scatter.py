"""Size against quality over several runs, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lightning_compress.report import wording
from lightning_compress.report.drawing import COMPRESSED, DENSE, Plot, draw, grid, shorten, to_svg
from lightning_compress.report.formats import scalar
from lightning_compress.report.loading import Run
from lightning_compress.report.pareto import pareto_front
from lightning_compress.report.wording import Results, section

__all__ = ["scatter_plots"]

MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Point:
    """One run in the scatter plot: its number, model, sizes in bytes and qualities."""

    place: int
    model: str
    size: float
    quality: float
    dense: tuple[float, float] | None


def _point(place: int, results: Results) -> Point | None:
    verdict = section(results, "verdict")
    size = scalar(section(results["compressed"], "bytes").get("lcz"))
    quality = scalar(verdict.get("compressed"))
    if not size or quality is None or not math.isfinite(size) or not math.isfinite(quality):
        return None
    before = scalar(section(results["dense"], "bytes").get("torch"))
    best = scalar(verdict.get("dense"))
    known = before and best is not None and math.isfinite(before) and math.isfinite(best)
    dense = (before, best) if before and best is not None and known else None
    return Point(place, wording.model_name(results), size, quality, dense)


def _comparable(results: Results) -> tuple[str, ...]:
    """Return what must agree before two quality values may stand in one picture."""
    evaluator = section(results, "evaluator")
    return (
        results["data"],
        str(section(results, "verdict").get("metric")),
        str(evaluator.get("feature", "")),
        str(evaluator.get("samples", "")),
    )


def scatter_plots(runs: Sequence[Run]) -> tuple[list[Plot], list[str]]:
    """Return one figure for each set of comparable runs, and notes on runs left out."""
    groups: dict[tuple[str, ...], list[Point]] = {}
    notes: list[str] = []
    first: dict[tuple[str, ...], Results] = {}
    for place, run in enumerate(runs, 1):
        point, key = _point(place, run.results), _comparable(run.results)
        if point is None:
            notes.append(f"Run {place} has no .lcz size or no judged quality: not in the picture.")
        else:
            groups.setdefault(key, []).append(point)
            first.setdefault(key, run.results)
    if len(groups) > 1:
        notes.append(
            "Runs on other data, with another measure, feature network or sample count "
            "are not comparable and stand in pictures of their own."
        )
    pictures = [
        _scatter(number, first[key], points) for number, (key, points) in enumerate(groups.items())
    ]
    return pictures, notes


def _scatter(place: int, results: Results, points: Sequence[Point]) -> Plot:
    shown = wording.metric(results, str(section(results, "verdict").get("metric")))
    front = pareto_front(
        [(point.size, point.quality) for point in points],
        higher_is_better=shown.better == "higher",
    )
    with draw(5.4, 3.5) as figure:
        axes = figure.subplots()
        _draw_points(axes, points)
        best = [points[index] for index in front]
        axes.plot(
            [point.size for point in best],
            [point.quality for point in best],
            color=COMPRESSED,
            label="Pareto front",
            zorder=1,
        )
        labelled = points if len(points) <= 12 else best
        for point in labelled:
            at = (point.size, point.quality)
            axes.annotate(str(point.place), at, (4, 4), textcoords="offset points", fontsize=8)
        _size_axis(axes)
        axes.set_ylabel(shorten(f"{shown.label} {shown.arrow}".rstrip(), 40))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, columnspacing=1)
        svg = to_svg(figure)
    caption = f"Size against quality on {results['data']}: {shown.label}"
    winners = ", ".join(str(point.place) for point in best)
    alt = f"{len(points)} runs by file size and {shown.label}; on the Pareto front: {winners}."
    return Plot(f"pareto_{place + 1:02d}", caption, alt, svg)


def _draw_points(axes: Axes, points: Sequence[Point]) -> None:
    models = list(dict.fromkeys(point.model for point in points))
    for number_, model in enumerate(models):
        mine = [point for point in points if point.model == model]
        marker = MARKERS[number_ % len(MARKERS)]
        sizes, qualities = [p.size for p in mine], [p.quality for p in mine]
        name = shorten(model)
        axes.scatter(sizes, qualities, s=28, c=COMPRESSED, marker=marker, label=name, zorder=2)
        dense = sorted({point.dense for point in mine if point.dense is not None})
        if dense:
            axes.scatter(
                [size for size, _ in dense],
                [quality for _, quality in dense],
                s=28,
                facecolors="none",
                edgecolors=DENSE,
                marker=marker,
                label=f"{name}, dense",
            )


def _size_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high / low < 10:  # a log axis shows no label within a decade unless it is asked to
        axes.set_xlim(low / 2, high * 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("file size, kB (log): .lcz compressed, torch.save dense")
    grid(axes, "both")
