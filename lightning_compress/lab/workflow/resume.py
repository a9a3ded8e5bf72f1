"""Resuming of interrupted runs: finished phases are reused, unfinished ones are continued."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_compress.files import atomic_file, write_atomically
from lightning_compress.lab.workflow.run_identity import CKPT_PATH, recipe_hash, run_folder
from lightning_compress.lab.workflow.training import FINAL, INTERRUPTED, LAST

__all__ = [
    "LOCK",
    "Earlier",
    "FolderInUseError",
    "resume_command",
    "shared_checkpoint",
    "sole_run",
]
LOCK = "run.lock"


class FolderInUseError(OSError):
    """Another run writes to the same folder."""


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Hold a run folder while the block runs.

    The lock is the operating system's: it goes when its holder is killed, and a file that is left
    over is ignored. The other processes of a DDP run belong to the first's.

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


RECORD = "config.yaml"  # written when a run starts: its folder may hold no checkpoint yet


@dataclass(frozen=True)
class Earlier:
    """An earlier run's folder, or none.

    >>> Earlier.at(None).unfinished("dense") is None
    True
    """

    folder: Path | None
    midway: str | None = None  # the phase that resumes in the middle of an epoch

    @classmethod
    def at(cls, ckpt_path: str | None) -> Earlier:
        """The run that a folder or one of its checkpoints belongs to.

        Its phases go on from their last whole epoch, so that they end as if nothing had happened.
        A named `interrupted.ckpt` is resumed as it is: nothing is lost, but the data
        of the rest of its epoch come in another order.

        Raises:
            FileNotFoundError: when there is nothing at the path, or what is there is no run.
        """
        if ckpt_path is None:
            return cls(None)
        path = Path(ckpt_path)
        if not path.exists():
            raise FileNotFoundError(f"ckpt_path={ckpt_path!r}: there is nothing to resume from")
        folder = run_folder(ckpt_path)
        if not any(folder.glob("*/*.ckpt")) and not (folder / RECORD).is_file():
            raise FileNotFoundError(
                f"ckpt_path={ckpt_path!r}: {folder} is no run folder, it holds neither {RECORD} "
                "nor a */*.ckpt"
            )
        return cls(folder, path.parent.name if path.name == INTERRUPTED else None)

    def carried_to(self, folder: Path) -> Earlier:
        """Copy the checkpoints into another folder, so that the run can be resumed there.

        Links would let writers to the new folder change the old files.
        """
        if self.folder is None or self.folder.resolve() == folder.resolve():
            return self
        for path in self._kept(self.folder) if not getattr(rank_zero_only, "rank", 0) else ():
            target = folder / path.relative_to(self.folder)
            with (
                path.open("rb") as source,
                atomic_file(target, what="the earlier run's checkpoint", parents=True) as stream,
            ):
                shutil.copyfileobj(source, stream)
        return Earlier(folder, self.midway)

    @staticmethod
    def _kept(folder: Path) -> list[Path]:
        return [path for name in (FINAL, LAST, INTERRUPTED) for path in folder.glob(f"*/{name}")]

    def finished(self, phase: str) -> Path | None:
        """The final checkpoint of a phase that came to its end."""
        return self._found(phase, FINAL)

    def unfinished(self, phase: str) -> Path | None:
        """The checkpoint to go on from: the last whole epoch's, if there is one."""
        return self._found(phase, INTERRUPTED if phase == self.midway else LAST)

    def _found(self, phase: str, name: str) -> Path | None:
        if self.folder is None or not (path := self.folder / phase / name).is_file():
            return None
        return path


def resume_command(folder: Path, words: Sequence[str]) -> str:
    """The command line that resumes an interrupted run.

    Args:
        folder: of the run.
        words: overrides and flags of its command.

    >>> resume_command(Path("outputs/a b"), ["--config-dir=mine", "model=vae"])
    "lightning-compress --config-dir=mine model=vae 'ckpt_path=outputs/a b'"
    """
    kept = [one for one in words if not one.startswith(CKPT_PATH)]
    return shlex.join(["lightning-compress", *kept, f"{CKPT_PATH}{_value(str(folder))}"])


def _value(text: str) -> str:
    r"""A text in Hydra's grammar, quoted unless it is plain.

    >>> print(_value("outputs/a b"), _value("it's (a)"))
    outputs/a b 'it\'s (a)'
    """
    if re.fullmatch(r"[\w./:-]+( [\w./:-]+)*", text, re.ASCII):
        return text
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", text) + "'"


PHASE = "dense"
BASELINE_RECORD = "baseline.json"  # written last: marks a complete folder


def shared_checkpoint(
    store: Path, recipe: Any, train: Callable[[Path, Path | None], Any]
) -> tuple[Path, float]:
    """The final checkpoint of a recipe's model and its seconds of training; trained if need be.

    Jobs that ask at the same time wait for the one that trains. The lock is the operating
    system's: it goes when its holder is killed, and the next one resumes from the last epoch.

    Args:
        store: the folder of all shared models; a recipe has a folder of its own in there.
        recipe: all that determines the model, as plain data.
        train: called with the folder to train in and the checkpoint to go on from, or None;
            leaves `final.ckpt` there.
    """
    home = store / recipe_hash(recipe)
    home.mkdir(parents=True, exist_ok=True)
    with _locked(store / f"{home.name}.lock"):
        if not (home / BASELINE_RECORD).is_file():
            start = time.monotonic()
            train(home / PHASE, Earlier(home).unfinished(PHASE))
            record = {"train_seconds": time.monotonic() - start, "recipe": recipe}
            text = json.dumps(record, indent=1, default=str)
            write_atomically(home / BASELINE_RECORD, text, what="the baseline's record")
    seconds = json.loads((home / BASELINE_RECORD).read_text("utf-8"))["train_seconds"]
    return home / PHASE / FINAL, float(seconds)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for the lock with a message; the other processes of a DDP run belong to the first's."""
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
