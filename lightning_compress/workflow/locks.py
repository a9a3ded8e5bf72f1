"""A run folder belongs to one run at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_only

__all__ = ["LOCK", "FolderInUseError", "sole_run"]

LOCK = "run.lock"


class FolderInUseError(OSError):
    """Another run writes to the same folder."""


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Hold a run folder while the block runs.

    The lock is the operating system's: it goes when its holder is killed, and the file that stays
    behind means nothing. The other processes of a DDP run belong to the first's.

    Raises:
        FolderInUseError: when another run holds the folder.
    """
    if getattr(rank_zero_only, "rank", 0):
        yield
        return
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUseError(
            f"another run is writing to {folder}: wait for it to end, or choose another folder "
            "with hydra.run.dir=..."
        ) from None
    except OSError as error:  # a file system without locks is no reason not to train
        print(f"{folder} cannot be locked against a second run: {error}", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()
