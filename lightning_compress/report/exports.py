"""The report without pictures: all runs as one Markdown page, or as CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_compress.files import write_atomically
from lightning_compress.report import overview, rows, wording
from lightning_compress.report.engines import INT8_HEADER, int8_rows
from lightning_compress.report.loading import Run, load_runs
from lightning_compress.report.names import common_root, run_name
from lightning_compress.report.notes import notes
from lightning_compress.report.tables import csv_table, markdown_lines, markdown_table

__all__ = ["EXPORTS", "write_export"]


def write_export(run_dirs: Sequence[str | Path], out: Path) -> Path:
    """Write all runs in or beneath the folders as the file's suffix says.

    Raises:
        ValueError: for a suffix that is none of `EXPORTS`, or a run that cannot be read.
        FileNotFoundError: when a folder holds no `results.json`.
    """
    if out.suffix not in EXPORTS:
        raise ValueError(f"{out}: valid are .html, {', '.join(EXPORTS)}")
    runs, unreadable = load_runs(run_dirs)
    if unreadable:
        reasons = "; ".join(f"{one.path}: {one.reason}" for one in unreadable)
        raise ValueError(f"could not be read: {reasons}")
    root = common_root(run_dirs)
    names = [run_name(run.folder, root) for run in runs]
    text = EXPORTS[out.suffix](runs, names)
    return write_atomically(out, text, what="the report", parents=True)


def _csv(runs: Sequence[Run], names: Sequence[str]) -> str:
    return csv_table([{"run": name, **run.results} for name, run in zip(names, runs, strict=True)])


def _markdown(runs: Sequence[Run], names: Sequence[str]) -> str:
    parts: list[str] = []
    if len(runs) > 1:
        cells = [[cell.text for cell in row] for row in overview.overview_rows(runs, names)]
        parts += ["# All runs", "", *markdown_lines(overview.HEADER, cells), ""]
    for place, (run, name) in enumerate(zip(runs, names, strict=True), 1):
        parts += _one(place, run, name)
    return "\n".join(parts).rstrip() + "\n"


def _one(place: int, run: Run, name: str) -> list[str]:
    """One run: what it says, its tables, and what one must know to judge them."""
    results = run.results
    layers, engines = rows.layer_rows(results), int8_rows(results)
    parts = [f"## {place}. {name}", "", f"**{wording.headline(results)}**", ""]
    parts += [wording.judge(results).sentence, "", markdown_table(results)]
    if engines:
        parts += ["### What runs on whole numbers", "", *markdown_lines(INT8_HEADER, engines), ""]
    if layers:
        parts += ["### Stored tensors", "", *markdown_lines(rows.LAYER_HEADER, layers), ""]
    return [*parts, *(f"- {note}" for note in notes(results)), ""]


EXPORTS: dict[str, Callable[[Sequence[Run], Sequence[str]], str]] = {
    ".md": _markdown,
    ".csv": _csv,
}
