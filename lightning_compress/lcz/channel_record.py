"""Header entry of removed channels, without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.removed import RemovedChannels

__all__ = [
    "KEY",
    "ChannelRecord",
    "from_run_lengths",
    "read_channels",
    "to_run_lengths",
    "write_channels",
]

KEY = "x-channels"  # readers ignore unknown keys that begin with x-
_MAX_INT = 1 << 53
_MAX_CHANNELS = 1 << 24  # of all layers together


def write_channels(lost: RemovedChannels) -> dict[str, Any]:
    """The header's entry of removed channels."""
    return {
        "tensors": {path: list(shape) for path, shape in lost.shapes.items()},
        "layers": dict(lost.sizes),
        "kept": {path: to_run_lengths(kept) for path, kept in lost.kept.items()},
    }


def to_run_lengths(kept: Iterable[int]) -> list[int]:
    """Increasing indices as alternating run lengths: removed, kept, removed, kept.

    >>> to_run_lengths([0, 1, 4])
    [0, 2, 2, 1]
    """
    found: list[int] = []
    end = 0
    for one in kept:
        if not found or one > end:
            found += [one - end, 0]
        found[-1] += 1
        end = one + 1
    return found


def from_run_lengths(lengths: Iterable[int]) -> tuple[int, ...]:
    """The reverse of `to_run_lengths`.

    >>> from_run_lengths([0, 2, 2, 1])
    (0, 1, 4)
    """
    found: list[int] = []
    position = 0
    for index, length in enumerate(lengths):
        if index % 2:
            found += range(position, position + length)
        position += length
    return tuple(found)


@dataclass(frozen=True)
class ChannelRecord:
    """Removed channels as in the header: checked, run lengths not expanded.

    Args:
        shapes: of tensors before channels were removed, by stored name.
        sizes: of layers that know a size and hold no tensors, by stored path.
        kept: indices of the remaining channels of a layer, as run lengths.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)


def read_channels(entry: Any) -> ChannelRecord:
    """Parse the header's entry of removed channels.

    Raises:
        CorruptArtifactError: when it is not what `write_channels` writes.

    >>> read_channels({"tensors": {}, "layers": {}, "kept": {"conv": [0, 2, 2, 1]}}).kept
    {'conv': [0, 2, 2, 1]}
    """
    if entry is None:
        return ChannelRecord()
    if not isinstance(entry, dict) or set(entry) != {"tensors", "layers", "kept"}:
        raise CorruptArtifactError(f"{KEY}: {str(entry)[:80]!r}")
    tensors, layers, kept = (_mapping(entry[name]) for name in ("tensors", "layers", "kept"))
    for values in (*tensors.values(), *kept.values(), list(layers.values())):
        if not isinstance(values, list) or not all(map(_is_count, values)):
            raise CorruptArtifactError(f"{KEY}: {str(values)[:80]!r}")
    if kept and sum(map(sum, kept.values())) > _MAX_CHANNELS:
        raise CorruptArtifactError(f"{KEY}: more channels than any model has")
    shapes = {path: tuple(shape) for path, shape in tensors.items()}
    return ChannelRecord(shapes, layers, kept)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorruptArtifactError(f"{KEY}: {str(value)[:80]}")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_INT
