"""Insertion of tables into the pages of the documentation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .rows import read_rows

__all__ = ["FIGURES", "insert", "show"]

FIGURES = ("<!-- figures -->", "<!-- /figures -->")  # the marks of a page that has one place


def insert(page: Path, text: str, mark: str = FIGURES[0], end: str = FIGURES[1]) -> None:
    """Puts a text between the marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(mark)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{mark}\n{text}\n{end}{after}", encoding="utf-8")


def show(table: Callable[[list[dict[str, Any]]], str], marks: tuple[str, str] = FIGURES) -> None:
    """The command `show_*.py rows.jsonl [page.md]`: print a table, or put it into a page."""
    text = table(read_rows(Path(sys.argv[1])))
    if len(sys.argv) > 2:
        insert(Path(sys.argv[2]), text, *marks)
    else:
        print(text)
