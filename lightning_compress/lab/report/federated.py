"""Figures of a federated run: quality over the bytes sent, and bytes a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from lightning_compress.lab.report import wording
from lightning_compress.lab.report.plots import COMPRESSED, DENSE, Plot, draw, grid, shorten, to_svg
from lightning_compress.lab.report.wording import Results, kilobytes, scalar, section, times

__all__ = ["facts", "round_plots"]


def _rows(results: Results) -> list[Mapping[str, Any]]:
    rows = section(results, "federated").get("rounds")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _bytes(row: Mapping[str, Any], way: str) -> float:
    value = scalar(row.get(way))
    return value if value is not None and math.isfinite(value) else 0.0


def facts(results: Results) -> list[tuple[str, str]]:
    """Key figures at the top of the page: (value, description); none for other runs."""
    known = section(results, "federated")
    if not known:
        return []
    up, down = (scalar(known.get(way)) for way in ("up", "down"))
    return [
        (times(scalar(known.get("ratio_up"))), f"fewer bytes up than fp32: {kilobytes(up)}"),
        (times(scalar(known.get("ratio"))), f"fewer bytes in all; {kilobytes(down)} down"),
    ]


def round_plots(results: Results) -> list[Plot]:
    """Quality over the bytes sent so far, and the bytes of each round; none for other runs."""
    rows = _rows(results)
    return [plot for plot in (_quality(results, rows), _sizes(rows)) if plot is not None]


def _quality(results: Results, rows: list[Mapping[str, Any]]) -> Plot | None:
    name = str(section(results, "verdict").get("metric", ""))
    sent = accumulate(_bytes(row, "up") + _bytes(row, "down") for row in rows)
    points = [
        (total / 1e6, value)
        for total, row in zip(sent, rows, strict=True)
        if (value := scalar(section(row, "quality").get(name))) is not None
    ]
    if not points:
        return None
    baseline = scalar(section(results["dense"], "quality").get(name))
    shown = wording.metric(results, name)
    with draw(4.8, 2.5) as figure:
        axes = figure.subplots()
        x, y = zip(*points, strict=True)
        axes.plot(x, y, c=COMPRESSED, marker="o" if len(x) <= 40 else "", ms=3, label="federated")
        if baseline is not None:
            axes.axhline(baseline, c=DENSE, ls="--", label="centralised baseline")
        axes.set_title(f"{shorten(shown.label, 36)} {shown.arrow}".rstrip())
        axes.set_xlabel("MB sent, up and down")
        grid(axes, "y")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)
        svg = to_svg(figure)
    beside = "" if baseline is None else f"; the centralised baseline has {baseline:.4g}"
    alt = f"{shown.label} ends at {y[-1]:.4g} after {x[-1]:.3g} MB{beside}."
    return Plot("federated_quality", "Quality over the bytes sent", alt, svg)


def _sizes(rows: list[Mapping[str, Any]]) -> Plot | None:
    if not rows:
        return None
    numbers = range(1, len(rows) + 1)
    with draw(4.8, 2.5) as figure:
        axes = figure.subplots()
        for way, colour, line in (("up", COMPRESSED, "-"), ("down", DENSE, (0, (4, 1.5)))):
            axes.plot(
                numbers, [_bytes(row, way) / 1e3 for row in rows], c=colour, ls=line, label=way
            )
        axes.set_title("kB a round, all clients together")
        axes.set_xlabel("round")
        axes.set_ylim(bottom=0)
        grid(axes, "y")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)
        svg = to_svg(figure)
    up, down = (kilobytes(_bytes(rows[-1], way)) for way in ("up", "down"))
    alt = f"The last round sent {up} up, {down} down."
    return Plot("federated_bytes", "Bytes of each round", alt, svg)
