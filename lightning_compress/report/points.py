"""From runs to the points of a picture: runs that differ in their seed alone are one point."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from lightning_compress.report import wording
from lightning_compress.report.formats import scalar
from lightning_compress.report.loading import Run
from lightning_compress.report.wording import Results, section

__all__ = [
    "Axis",
    "Mark",
    "Point",
    "comparable",
    "latency_axis",
    "point_of",
    "settings",
    "size_axis",
]


@dataclass(frozen=True)
class Mark:
    """A place in a picture with its spread to both sides: x in bytes or ms, y a quality."""

    x: float
    y: float
    low: float = 0.0
    high: float = 0.0
    spread: float = 0.0


@dataclass(frozen=True)
class Point:
    """One setting: the numbers of its runs, the model, its mark and that of its dense twin."""

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
    return (size, 0.0, 0.0) if size and math.isfinite(size) else None


def latency_axis(results: Results, side: str) -> Cost:
    """Milliseconds of the fastest runtime at batch 1 in one thread, with its p10 and p90."""
    found = [
        (median, values)
        for name, values in section(results[side], "latency_ms").items()
        if name.endswith("1 thread, batch 1")
        and (median := scalar(values.get("median"))) is not None
        and median > 0
        and math.isfinite(median)
    ]
    if not found:
        return None
    median, values = min(found, key=lambda one: one[0])
    low, high = (scalar(values.get(key)) for key in ("p10", "p90"))
    return median, max(median - (low or median), 0.0), max((high or median) - median, 0.0)


def point_of(runs: Sequence[tuple[int, Run]], axis: Axis) -> Point | None:
    """The point of runs with the same settings; None where one lacks what the picture shows."""
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
    if cost is None or quality is None or not math.isfinite(quality):
        return None
    return Mark(cost[0], quality, cost[1], cost[2])


def _dense(results: Results, axis: Axis) -> Mark | None:
    verdict, cost = section(results, "verdict"), axis(results, "dense")
    quality = wording.reference(verdict)
    if cost is None or quality is None or not math.isfinite(quality):
        return None
    spread = section(section(results, "baseline_spread"), str(verdict.get("metric")))
    return Mark(cost[0], quality, cost[1], cost[2], scalar(spread.get("std")) or 0.0)


def comparable(results: Results) -> tuple[str, ...]:
    """What must agree before two quality values may stand in one picture."""
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
