"""Checkpoints of the server: model, versions of the clients, ledger, moments of the strategy."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.files import write_atomically

__all__ = ["load_strategy", "save_strategy"]

_OWN = ("rounds", "version", "exact", "shared", "history")


def save_strategy(strategy: Any, path: Path) -> None:
    """Write the state of a `CompressedStrategy` after a round; atomically."""
    state = {name: getattr(strategy, name) for name in _OWN}
    state["strategy"] = _plain_attributes(strategy.strategy)
    stream = io.BytesIO()
    torch.save(state, stream)
    write_atomically(path, stream.getvalue(), what="the server's checkpoint", parents=True)


def load_strategy(strategy: Any, path: Path) -> None:
    """Load a checkpoint's state into a strategy; nothing in the file is executed.

    Raises:
        ValueError: when the checkpoint is of another model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError) as error:
        raise CorruptArtifactError(f"{path}: {error}") from error
    ours, theirs = _shapes(strategy.exact), _shapes(state["exact"])
    if ours != theirs:
        differ = sorted(name for name, _ in ours ^ theirs)
        raise ValueError(f"{path} is of another model: {differ[:4]} differ. Start in a new folder")
    for name in _OWN:
        setattr(strategy, name, state[name])
    strategy.history = [(int(version), data) for version, data in state["history"]]
    for name, value in state["strategy"].items():
        setattr(strategy.strategy, name, _from_tensors(value))


def _shapes(tensors: dict[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(one.shape)) for name, one in tensors.items()}


def _plain_attributes(strategy: Any) -> dict[str, Any]:
    """State of a strategy from earlier rounds: dicts of arrays, such as Adam's moments."""
    found = {}
    for name, value in vars(strategy).items():
        if isinstance(value, dict) and all(isinstance(one, np.ndarray) for one in value.values()):
            found[name] = {key: torch.from_numpy(one.copy()) for key, one in value.items()}
        elif isinstance(value, np.ndarray):
            found[name] = torch.from_numpy(value.copy())
    return found


def _from_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: one.numpy() for key, one in value.items()}
    return value.numpy()
