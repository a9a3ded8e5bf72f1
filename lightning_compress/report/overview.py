"""Several runs beside each other: one row a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_compress.report import formats, wording
from lightning_compress.report.formats import kilobytes, number, scalar
from lightning_compress.report.loading import Run
from lightning_compress.report.tables import flatten
from lightning_compress.report.wording import Results, section

__all__ = ["HEADER", "Cell", "differing_settings", "overview_rows", "zeros"]

HEADER = (
    "#",
    "Run",
    "Ratio",
    ".lcz",
    "Zeros",
    "Measure",
    "Dense",
    "Compressed",
    "Change",
    "Quality",
    "Model",
    "Data",
    "Seed",
    "Settings",
)


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and the number to sort by (None: sort by the text)."""

    text: str
    key: float | None = None

    @property
    def numeric(self) -> bool:
        """Whether the cell holds a number, so that it is set to the right."""
        return self.key is not None


def _figure(value: object, form: object = number) -> Cell:
    plain = scalar(value)
    text = form(plain) if callable(form) else str(value)
    # A missing number sorts behind all others, in both directions; the page's script knows NaN.
    return Cell(str(text), math.nan if plain is None else plain)


def zeros(results: Results) -> float | None:
    """Return the fraction of zero parameters of the compressed model."""
    total = scalar(results["compressed"].get("params"))
    nonzero = scalar(results["compressed"].get("nonzero_params"))
    return 1 - nonzero / total if total and nonzero is not None else None


def differing_settings(runs: Sequence[Run], limit: int = 4) -> list[str]:
    """Return for each run the compression settings in which the runs differ, at most `limit`.

    Where nothing differs, the names of the methods are returned instead.
    """
    flat = [dict(flatten(section(run.results, "compression"))) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for settings in flat for key in settings)
        if len({repr(settings.get(key)) for settings in flat}) > 1
    ]
    texts: list[str] = []
    for run, settings in zip(runs, flat, strict=True):
        shown = [
            f"{key}={_setting(settings[key])}" for key in keys if settings.get(key) is not None
        ]
        more = f", and {len(shown) - limit} more" if len(shown) > limit else ""
        methods = ", ".join(section(run.results, "compression")) or "none recorded"
        texts.append(", ".join(shown[:limit]) + more if shown else methods)
    return texts


def _setting(value: object) -> str:
    # Six digits: a sweep's 0.8300000000000001 was meant as 0.83.
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def overview_rows(runs: Sequence[Run], names: Sequence[str]) -> list[list[Cell]]:
    """Return one row a run, cells in the order of `HEADER`."""
    settings = differing_settings(runs)
    return [
        _overview_row(place, run.results, name, setting)
        for place, (run, name, setting) in enumerate(zip(runs, names, settings, strict=True), 1)
    ]


def _overview_row(place: int, results: Results, name: str, setting: str) -> list[Cell]:
    verdict = section(results, "verdict")
    measure = wording.metric(results, str(verdict.get("metric") or formats.DASH))
    size = section(results["compressed"], "bytes").get("lcz")
    seed = results.get("seed")
    dense, compressed = wording.reference(verdict), scalar(verdict.get("compressed"))
    change = None if dense is None or compressed is None else compressed - dense
    return [
        Cell(str(place), place),
        Cell(name),
        _figure(wording.size_ratio(results), formats.times),
        _figure(size, kilobytes),
        _figure(zeros(results), formats.percent),
        Cell(f"{measure.label} {measure.arrow}".rstrip()),
        _figure(dense),
        _figure(compressed),
        _figure(change, formats.signed),
        Cell(wording.judge(results).word),
        Cell(wording.model_name(results)),
        Cell(results["data"]),
        Cell(str(seed), scalar(seed)) if seed is not None else Cell(formats.DASH, math.nan),
        Cell(setting),
    ]
