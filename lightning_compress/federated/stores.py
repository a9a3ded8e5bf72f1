"""Stores of a client's state between rounds: its model, residual and optimizers."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from lightning_compress.files import write_atomically

__all__ = ["FolderStore", "RecordStore", "Store"]

KEPT = 2  # rounds: one that was interrupted is repeated from the state before it


class Store(Protocol):
    """The state of one client by round."""

    def load(self, part: str, before: int) -> dict[str, Any] | None:
        """The newest state of an earlier round than `before`; None: there is none."""
        ...

    def save(self, part: str, number: int, state: dict[str, Any]) -> None:
        """Keep the state that round `number` ended with."""
        ...


def _to_bytes(state: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def _newest(rounds: Iterable[int], last: int) -> set[int]:
    """The rounds to keep, up to the last; a client need not have been in the one before it.

    >>> _newest([1, 2, 5, 9], 5)
    {2, 5}
    """
    return set(sorted(number for number in rounds if number <= last)[-KEPT:])


class FolderStore:
    """Store of files in a client's own folder, written atomically; outlives the process.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = FolderStore(Path(folder))
    ...     for number in (1, 2, 3):
    ...         store.save("update", number, {"value": number})
    ...     store.load("update", before=3), store.load("update", before=2)
    ({'value': 2}, None)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _rounds(self, part: str) -> dict[int, Path]:
        pattern = re.compile(re.escape(part) + r"-(\d+)\.pt")
        found = ((pattern.fullmatch(path.name), path) for path in self.folder.glob(f"{part}-*.pt"))
        return {int(match[1]): path for match, path in found if match}

    def load(self, part: str, before: int) -> dict[str, Any] | None:
        """The newest state of an earlier round than `before`; nothing in the file is executed."""
        rounds = {number: path for number, path in self._rounds(part).items() if number < before}
        if not rounds:
            return None
        return torch.load(rounds[max(rounds)], map_location="cpu", weights_only=True)

    def save(self, part: str, number: int, state: dict[str, Any]) -> None:
        """Write the state of a round; the one before it stays, all others are removed."""
        path = self.folder / f"{part}-{number:06d}.pt"
        write_atomically(path, _to_bytes(state), what="the client's state", parents=True)
        rounds = self._rounds(part)
        for other in rounds.keys() - _newest(rounds, number):
            rounds[other].unlink(missing_ok=True)


class RecordStore:
    """Store in Flower's `context.state`, which lives as long as the node.

    Args:
        records: of the context.
        make: Flower's `ConfigRecord`.
    """

    def __init__(self, records: Any, make: Any) -> None:
        self.records, self.make = records, make

    def load(self, part: str, before: int) -> dict[str, Any] | None:
        """The newest state of an earlier round than `before`."""
        known = self.records.get(f"lightning_compress.{part}", {})
        rounds = [int(number) for number in known if int(number) < before]
        if not rounds:
            return None
        return torch.load(io.BytesIO(known[str(max(rounds))]), weights_only=True)

    def save(self, part: str, number: int, state: dict[str, Any]) -> None:
        """Keep the state of a round and of the one before it."""
        key = f"lightning_compress.{part}"
        known = {**self.records.get(key, {}), str(number): _to_bytes(state)}
        kept = _newest(map(int, known), number)
        self.records[key] = self.make(
            {one: data for one, data in known.items() if int(one) in kept}
        )
