"""Work on tensors side by side, in threads, with no more of them in memory than asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["check_workers", "mapped"]

Item = TypeVar("Item")
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
