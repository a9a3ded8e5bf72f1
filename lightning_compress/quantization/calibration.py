"""Calibration: run a trained module on some batches and see the ranges of its activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.activation_ranges import ActivationQuantizer

__all__ = ["calibrate", "calibration_batches", "run_batch"]


def calibration_batches(data: Iterable[object] | Tensor) -> list[object]:
    """The batches of calibration data, checked.

    Args:
        data: inputs of the module: each a tensor, a tuple or list of arguments, or a dict of
            keyword arguments. A single tensor is one batch.

    Raises:
        ValueError: when there is nothing, or values that are NaN or infinite.

    >>> len(calibration_batches([torch.zeros(2, 3), (torch.ones(2, 3),)]))
    2
    """
    batches: list[object] = [data] if isinstance(data, Tensor) else list(data)
    tensors = [[one for one in _values(batch) if isinstance(one, Tensor)] for batch in batches]
    if not any(one.numel() for row in tensors for one in row):
        raise ValueError("the calibration data are empty: give at least one batch of inputs")
    for index, row in enumerate(tensors):
        for one in row:
            if one.is_floating_point() and not bool(torch.isfinite(one).all()):
                raise ValueError(f"batch {index} of the calibration data holds NaN or infinity")
    return batches


def _values(batch: object) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, (tuple, list)) else [batch]


def run_batch(module: nn.Module, batch: object) -> object:
    """Call a module on a batch of `calibration_batches`."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*_values(batch))


def calibrate(module: nn.Module, side: ActivationQuantizer, batches: Sequence[object]) -> None:
    """Let an attached quantizer see all batches; the module is run as it is, in eval mode.

    Raises:
        ValueError: for layers that no batch went through, and for activations that are not finite
            or always 0.
    """
    side.calibrating = True
    side.attach()
    try:
        for batch in batches:
            # Only the graph of a pass with gradients tells which layers are the last ones.
            with torch.set_grad_enabled(side.last is None):
                run_batch(module, batch)
            side.step()
        side.freeze()
    except FloatingPointError as error:
        raise ValueError(f"calibration: {error}") from error
    finally:
        side.detach()
        side.calibrating = False
