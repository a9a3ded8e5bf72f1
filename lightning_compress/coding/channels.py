"""What a module lost, in the header of a file, and a full module made to fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_compress.coding.records import TensorRecord
from lightning_compress.errors import CorruptArtifactError, TargetError
from lightning_compress.pruning.channel_surgery import match_channels
from lightning_compress.state import RemovedChannels, note_removed

__all__ = ["KEY", "fit_channels", "read_channels", "runs", "sizes_in", "unruns", "write_channels"]

KEY = "x-channels"  # a reader that does not know it passes it over
_MOST = 1 << 53


def write_channels(lost: RemovedChannels) -> dict[str, Any]:
    """The header's entry."""
    return {
        "tensors": {path: list(shape) for path, shape in lost.shapes.items()},
        "layers": dict(lost.sizes),
        "kept": {path: runs(kept) for path, kept in lost.kept.items()},
    }


def runs(kept: Iterable[int]) -> list[int]:
    """Rising numbers as lengths: left out, kept, left out, kept and so on.

    >>> runs([0, 1, 4])
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


def unruns(lengths: Iterable[int]) -> tuple[int, ...]:
    """The reverse of `runs`.

    >>> unruns([0, 2, 2, 1])
    (0, 1, 4)
    """
    found: list[int] = []
    position = 0
    for index, length in enumerate(lengths):
        if index % 2:
            found += range(position, position + length)
        position += length
    return tuple(found)


def read_channels(entry: Any) -> RemovedChannels:
    """What a header's entry says.

    Raises:
        CorruptArtifactError: when it is not what `write_channels` writes.
    """
    if entry is None:
        return RemovedChannels()
    if not isinstance(entry, dict) or set(entry) != {"tensors", "layers", "kept"}:
        raise CorruptArtifactError(f"{KEY}: {str(entry)[:80]}")
    tensors, layers, kept = (_mapping(entry[name]) for name in ("tensors", "layers", "kept"))
    for values in (*tensors.values(), *kept.values(), list(layers.values())):
        if not isinstance(values, list) or not all(map(_is_count, values)):
            raise CorruptArtifactError(f"{KEY}: {str(values)[:80]}")
    for lengths in kept.values():
        if sum(lengths) > 1 << 24:
            raise CorruptArtifactError(f"{KEY}: more channels than any layer has")
    return RemovedChannels(
        {path: tuple(shape) for path, shape in tensors.items()},
        layers,
        {path: unruns(lengths) for path, lengths in kept.items()},
    )


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorruptArtifactError(f"{KEY}: {str(value)[:80]}")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def sizes_in(
    records: list[TensorRecord], lost: RemovedChannels, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Shapes, by stored name, of tensors that are smaller in a file than in the full module.

    Only those that the file says were cut from the very shape that the module has.
    """
    return {
        record.name: record.shape
        for record in records
        if (full := lost.shapes.get(record.name)) is not None
        and record.name in tensors
        and tuple(tensors[record.name].shape) == full
        and len(record.shape) == len(full)
        and all(0 < one <= other for one, other in zip(record.shape, full, strict=True))
    }


def fit_channels(
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    lost: RemovedChannels,
    paths: Mapping[str, str],
) -> None:
    """Give a full module the sizes of a file, and let it remember what it lost.

    Args:
        module: changed in place.
        shapes: by stored name.
        lost: as the file has it.
        paths: the module's own paths, of tensors and layers, by stored name.

    Raises:
        CorruptArtifactError: when the sizes do not fit together.
    """
    try:
        match_channels(module, {paths[name]: shape for name, shape in shapes.items()})
        for path, size in lost.sizes.items():
            layer: Any = module.get_submodule(paths.get(path, path))
            layer.num_features = size
        own = RemovedChannels(
            {paths.get(path, path): shape for path, shape in lost.shapes.items()},
            {paths.get(path, path): size for path, size in lost.sizes.items()},
            {paths.get(path, path): kept for path, kept in lost.kept.items()},
        )
        note_removed(module, own)
    except (TargetError, AttributeError) as error:
        raise CorruptArtifactError(f"does not fit the module: {error}") from error
