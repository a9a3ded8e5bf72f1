"""Checkpoints of models that lost channels: what they say, and the full model cut to fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_compress.pruning.channel_surgery import match_channels
from lightning_compress.state import RemovedChannels, note_removed

__all__ = ["CHANNELS", "rebuild_channels"]

CHANNELS = "removed_channels"  # key in a checkpoint: plain data


def rebuild_channels(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Cut a module's layers to the sizes of a checkpoint that `ChannelPruning` left, in place.

    Lightning calls `on_load_checkpoint` of a LightningModule before it loads the weights: there,
    this one line lets `load_from_checkpoint` work. A checkpoint without removed channels changes
    nothing.

    Args:
        module: in full size, or small already.
        checkpoint: as `on_load_checkpoint` gets it.

    Raises:
        TargetError: when the two differ in more than channels.

    >>> rebuild_channels(nn.Linear(2, 2), {"state_dict": {}})
    """
    lost = checkpoint.get(CHANNELS)
    if lost is None:
        return
    match_channels(module, checkpoint["state_dict"])
    for path, size in lost["sizes"].items():
        layer: Any = module.get_submodule(path)
        layer.num_features = size
    note_removed(module, RemovedChannels(lost["shapes"], lost["sizes"], lost["kept"]))
