"""Parallel map over tensors in threads with bounded memory, and a progress bar."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

__all__ = [
    "check_workers",
    "parallel_map",
    "with_progress",
]
PROGRESS_DELAY = 1.0  # seconds before the bar appears
Item = TypeVar("Item")


def with_progress(
    items: Iterable[Item], sizes: Iterable[int], what: str, console: Console | None = None
) -> Iterator[Item]:
    """The items, with a progress bar on a terminal's stderr after `PROGRESS_DELAY` seconds.

    Args:
        items: to iterate over.
        sizes: weight of each item in the bar.
        what: label of the bar.
        console: to draw on; None: stderr.

    >>> list(with_progress([1, 2], [10, 20], "counting"))
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
            if not bar.live.is_started and time.monotonic() - start > PROGRESS_DELAY:
                bar.start()
    finally:
        bar.stop()


Result = TypeVar("Result")


def check_workers(workers: int) -> None:
    """Check the number of threads.

    Raises:
        ValueError: naming the valid ones.
    """
    if workers < 1:
        raise ValueError(f"workers={workers!r}: valid are integers from 1")


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Results of `function` in the order of the items, computed by `workers` threads.

    At most `2 * workers` items are read ahead, so that a large one does not block all threads;
    `ThreadPoolExecutor.map` reads all items, which may be a whole file.

    Raises:
        ValueError: for no worker.

    >>> list(parallel_map(abs, [-1, 2, -3], workers=2))
    [1, 2, 3]
    """
    check_workers(workers)
    if workers == 1:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
