"""A progress bar for work that takes longer than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

__all__ = ["shown"]

PATIENCE = 1.0  # seconds without a bar

Item = TypeVar("Item")


def shown(
    items: Iterable[Item], sizes: Iterable[int], what: str, console: Console | None = None
) -> Iterator[Item]:
    """The items, with a bar on a terminal's stderr from the second second on.

    Args:
        items: to go through.
        sizes: what each of them counts for.
        what: is being done.
        console: to draw on; None: stderr.

    >>> list(shown([1, 2], [10, 20], "counting"))
    [1, 2]
    """
    sizes = list(sizes)
    screen = Console(file=sys.stderr) if console is None else console
    bar = Progress(console=screen, transient=True, disable=not screen.is_terminal)
    task = bar.add_task(what, total=sum(sizes))
    start = time.monotonic()
    try:
        for item, size in zip(items, sizes, strict=True):
            yield item
            bar.advance(task, size)
            if not bar.live.is_started and time.monotonic() - start > PATIENCE:
                bar.start()
    finally:
        bar.stop()
