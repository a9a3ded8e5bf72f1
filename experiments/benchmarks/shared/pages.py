"""Insertion of tables into the pages of the documentation."""

from __future__ import annotations

from pathlib import Path

__all__ = ["FIGURES", "insert"]

FIGURES = ("<!-- figures -->", "<!-- /figures -->")  # the marks of a page that has one place


def insert(page: Path, text: str, mark: str = FIGURES[0], end: str = FIGURES[1]) -> None:
    """Puts a text between the marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(mark)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{mark}\n{text}\n{end}{after}", encoding="utf-8")
