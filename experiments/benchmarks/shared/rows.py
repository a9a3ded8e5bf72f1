"""Resumable rows of a long benchmark in a file of JSON lines."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lightning_compress.files import write_atomically

VERSION = version("torch").partition("+")[0]


class Rows:
    """The rows of one file, which is whole at any moment; one process at a time writes it.

    Args:
        path: of the file, which is made.
        keys: what tells rows apart.

    Raises:
        ValueError: for a file of rows that lack one, such as those of an earlier benchmark.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path, self.keys = path, keys
        path.parent.mkdir(parents=True, exist_ok=True)
        found = read_rows(path) if path.exists() else []
        for number, row in enumerate(found, 1):
            if missing := [key for key in keys if key not in row]:
                raise ValueError(
                    f"{path}, row {number}: no {missing[0]!r}; rows are told apart by "
                    f"{list(keys)}: move the file away, or give another"
                )
        self.known = {self._key(row): row for row in found}
        self._write()  # without a row that a kill cut short: the next would go on in its line

    def make(self, measure: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """The row of a key: what is known, or what `measure` gives, written at once."""
        if (known := self.known.get(self._key(key))) is not None:
            return known
        start = time.monotonic()
        row = {**key, **measure(), "machine": machine()}
        row["seconds"] = round(time.monotonic() - start, 1)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.known[self._key(key)] = row
        print(row, flush=True)
        return row

    def has(self, **key: Any) -> bool:
        """Whether a row is known."""
        return self._key(key) in self.known

    def drop(self, **key: Any) -> None:
        """Forget a row, if there is one, so that it is made again."""
        if self.known.pop(self._key(key), None) is not None:
            self._write()

    def amend(self, row: dict[str, Any], **values: Any) -> None:
        """Put other values into a known row."""
        row.update(values)
        self._write()

    def _write(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.known.values())
        write_atomically(self.path, lines.encode(), what="rows")

    def _key(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.keys)


@cache
def machine() -> str:
    """The processor's model and the version of PyTorch: pairs of a verdict share them."""
    lines = Path("/proc/cpuinfo")
    text = lines.read_text(encoding="utf-8", errors="replace") if lines.exists() else ""
    names = [line.partition(":")[2] for line in text.splitlines() if "model name" in line]
    return f"{(names or [platform.processor() or platform.machine()])[0].strip()}, torch {VERSION}"


def as_file_name(text: str) -> str:
    """A row's name as a file's: letters and digits, all else a dash."""
    return "".join(one if one.isalnum() else "-" for one in text)


def mean_and_spread(values: Sequence[float], style: str = ".2f") -> str:
    """A table's cell: the mean, and over more than one seed the standard deviation."""
    middle = format(mean(values), style)
    return f"{middle} ± {format(stdev(values), style.lstrip('+'))}" if len(values) > 1 else middle


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows; one that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
