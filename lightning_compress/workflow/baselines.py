"""Dense models that many runs share: trained once, by whichever job comes first."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_compress.files import write_atomically
from lightning_compress.workflow.identity import recipe_hash
from lightning_compress.workflow.resume import Earlier
from lightning_compress.workflow.training import FINAL

__all__ = ["shared_checkpoint"]

PHASE = "dense"
RECORD = "baseline.json"  # written last: what stands beside it is whole


def shared_checkpoint(
    store: Path, recipe: Any, train: Callable[[Path, Path | None], Any]
) -> tuple[Path, float]:
    """The final checkpoint of a recipe's model and its seconds of training; trained if need be.

    Jobs that ask at the same time wait for the one that trains. The lock is the operating
    system's: it goes when its holder is killed, and the next one goes on from the last epoch.

    Args:
        store: the folder of all shared models; a recipe has a folder of its own in there.
        recipe: all that determines the model, as plain data.
        train: called with the folder to train in and the checkpoint to go on from, or None;
            leaves `final.ckpt` there.
    """
    home = store / recipe_hash(recipe)
    home.mkdir(parents=True, exist_ok=True)
    with _turn(store / f"{home.name}.lock"):
        if not (home / RECORD).is_file():
            start = time.monotonic()
            train(home / PHASE, Earlier(home).unfinished(PHASE))
            record = {"train_seconds": time.monotonic() - start, "recipe": recipe}
            text = json.dumps(record, indent=1, default=str)
            write_atomically(home / RECORD, text, what="the baseline's record")
    seconds = json.loads((home / RECORD).read_text("utf-8"))["train_seconds"]
    return home / PHASE / FINAL, float(seconds)


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Wait for one's turn and say so; the other processes of a DDP run belong to the first's."""
    if getattr(rank_zero_only, "rank", 0):
        yield
        return
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for the dense model that another job trains ({path})", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
