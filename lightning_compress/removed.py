"""Record of removed channels as plain numbers: readable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["RemovedChannels"]


@dataclass(frozen=True)
class RemovedChannels:
    """What a module lost.

    Args:
        shapes: of tensors before channels were removed, by path.
        sizes: of layers that know a size and hold no tensors, as it is now, by path.
        kept: of the channels that a layer made at first, those that stay, by path.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.shapes or self.sizes)
