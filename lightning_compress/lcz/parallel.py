"""Work on tensors side by side, in threads, with no more of them in memory than asked for."""

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
    "mapped",
    "shown",
]
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


Result = TypeVar("Result")


def check_workers(workers: int) -> None:
    """Refuses a number of threads that is none.

    Raises:
        ValueError: naming the valid ones.
    """
    if workers < 1:
        raise ValueError(f"workers={workers!r}: valid are whole numbers from 1")


def mapped(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """The results in the order of the items, `workers` of them being worked on at a time.

    No more than twice as many are taken ahead of the result that is asked for, so that a large one
    does not hold up all threads; `ThreadPoolExecutor.map` takes all, which may be a whole file.

    Raises:
        ValueError: for no worker.

    >>> list(mapped(abs, [-1, 2, -3], workers=2))
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
