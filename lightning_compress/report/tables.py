"""The numbers of runs in the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_compress.report import wording
from lightning_compress.report.rows import HEADER, main_groups
from lightning_compress.report.wording import Results

__all__ = ["csv_table", "flatten", "markdown_lines", "markdown_table", "print_summary"]


def print_summary(results: Results, console: Console | None = None) -> None:
    """Print headline, main table and verdict of one run to the terminal.

    >>> results = {"model": "vae", "data": "digits", "ratio": 2.0, "compressed": {},
    ...            "dense": {"params": 12}}
    >>> print_summary(results, Console(width=80, no_color=True))
    VAE on digits: 2.00× smaller, ...
    """
    console = console or Console()
    verdict, groups = wording.judge(results), main_groups(results)
    style = {"within": "green", "outside": "red", "unknown": "yellow"}[verdict.state]
    # Text objects, not strings: a model named "[red]" must not be read as markup.
    console.print(Text(wording.headline(results), style="bold"))
    notes = "; ".join(f"{group.title.split(',')[0]}: {group.change}" for group in groups)
    table = Table(*HEADER, box=box.SIMPLE_HEAD, caption=f"Change is {notes}", padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for column in table.columns:
        column.overflow = "fold"  # a narrow terminal must not cut numbers
    for group in groups:
        table.add_row(Text(group.title, style="bold"))
        for row in group.rows:
            table.add_row(*map(Text, row.cells()))
        table.add_section()
    console.print(table)
    console.print(Text(f"{verdict.word}. {verdict.sentence}", style=style))


def markdown_table(results: Results) -> str:
    """Return the main table of one run as GitHub Markdown; cells are escaped."""
    lines = [_markdown_line(HEADER), "|:--|--:|--:|--:|--:|--:|"]
    for group in main_groups(results):
        lines.append(f"| **{_markdown_cell(group.title)}** | | | {group.change} | | |")
        lines.extend(_markdown_line(row.cells()) for row in group.rows)
    return "\n".join(lines) + "\n"


def markdown_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    r"""Return the lines of a GitHub Markdown table; cells are escaped.

    >>> markdown_lines(["a"], [["x|y"]])
    ['| a |', '|:--|', '| x\\|y |']
    """
    lines = [_markdown_line(header), "|" + ":--|" * len(header)]
    return [*lines, *map(_markdown_line, rows)]


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown_cell, cells))} |"


def _markdown_cell(text: str) -> str:
    for plain, safe in (("&", "&amp;"), ("<", "&lt;"), ("\\", "\\\\"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(plain, safe)
    return " ".join(text.split())


def flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, leaf) of nested mappings; lists are leaves.

    >>> dict(flatten({"a": {"b": 1}, "c": [2]}))
    {'a.b': 1, 'c': [2]}
    """
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def csv_table(runs: Sequence[Results]) -> str:
    """Return all runs as CSV, one row a run, one column a value, unrounded.

    The per-layer list and the metrics' labels are left out: they are not values of the run.

    >>> print(csv_table([{"model": "vae", "dense": {"params": 3}}]))
    model,dense.params
    vae,3
    """
    left_out = ("layers", "metric_info")
    flat = [dict(flatten({k: v for k, v in run.items() if k not in left_out})) for run in runs]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in flat:
        writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    return stream.getvalue()
