"""Protocols between callbacks of one Trainer: steering, and following removed channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import nn

from lightning_compress.channels.graph import Kept


@runtime_checkable
class Steers(Protocol):
    """A callback that decides how far others go, in the place of their schedules."""

    steers: bool

    @property
    def state_key(self) -> str:
        """Name in messages."""
        ...


@runtime_checkable
class FollowsRemoval(Protocol):
    """A callback that holds something of the sizes of the module in training."""

    def on_channels_removed(self, module: nn.Module, kept: Kept, sized: Mapping[str, int]) -> None:
        """Follow a removal of channels.

        Args:
            module: already smaller.
            kept: by parameter or buffer and axis, which entries stay.
            sized: the new sizes of layers, by path.
        """


@runtime_checkable
class FollowsReturn(Protocol):
    """A callback that looks at the module anew when removed channels have come back."""

    def on_channels_restored(self, module: nn.Module) -> None:
        """Follow a roll-back to a model with more channels."""
