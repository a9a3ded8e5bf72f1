"""SIGTERM, as a cluster sends it before it takes the node away, ends a run as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["terminable"]


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt while the block runs.

    While a Trainer fits, it has put a handler of its own in place, which calls this one: then the
    batch under way is finished first, and Lightning ends the training.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change handlers
        return

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if signal.getsignal(signal.SIGTERM) is stop:
            raise KeyboardInterrupt("terminated")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
