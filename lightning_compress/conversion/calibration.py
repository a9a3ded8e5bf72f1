"""Activation grids of a trained module from example inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.conversion.inputs import as_inputs
from lightning_compress.quantization.activations import fake_quantized
from lightning_compress.quantization.quantizers import AffineGrid, affine_grid
from lightning_compress.state import ActivationGrids, activation_grids, set_activation_grids

__all__ = ["calibrate"]

KEPT_VALUES = 2**18  # of one batch at one place, for percentiles


class _Range:
    """Smallest and largest value seen, or a percentile of a sample of them."""

    def __init__(self, percentile: float) -> None:
        self.tail = (100 - percentile) / 100
        self.low = self.high = 0.0
        self.kept: list[Tensor] = []
        self.seen = False

    def update(self, values: Tensor) -> None:
        self.seen = True
        low, high = (float(edge) for edge in values.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.tail > 0:
            flat = values.flatten()
            self.kept.append(flat[:: -(-flat.numel() // KEPT_VALUES)])

    def grid(self) -> AffineGrid:
        low, high = self.low, self.high
        if self.tail > 0:
            values = torch.cat(self.kept).sort().values
            last = values.numel() - 1
            # A rectified output is mostly zeros: the lower tail of it is zero already.
            low = min(0.0, float(values[round(self.tail * last)]))
            high = max(0.0, float(values[round((1 - self.tail) * last)]))
        return affine_grid(torch.tensor([low, high]), bits=8, symmetric=False)


@torch.no_grad()
def calibrate(
    module: nn.Module,
    places: Mapping[str, tuple[bool, bool]],
    calibration: Iterable[Tensor | tuple[Tensor, ...]],
    *,
    percentile: float = 100.0,
) -> None:
    """Give layers the 8-bit grids of what they read and give over example inputs, in place.

    Grids that a layer has already stay. Jacob et al. 2018, arXiv:1712.05877.

    Args:
        module: in eval mode; grids that it has are in force while it runs.
        places: module path -> whether its input and its output get a grid.
        calibration: inputs, each a tensor or a tuple of the module's positional inputs.
        percentile: share of the values, in percent, that the range holds at either end; 100 is
            the minimum and maximum.

    Raises:
        ValueError: for a percentile outside (50, 100], without an input, for values that are not
            finite, or a layer that no input reached.
    """
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile={percentile!r}: valid are numbers above 50 and up to 100")
    ranges: dict[tuple[str, str], _Range] = {}
    handles = []
    for path, (reads, gives) in places.items():
        layer = module.get_submodule(path)
        sides = [side for side, wanted in (("input", reads), ("output", gives)) if wanted]
        for side in sides:
            found = ranges[path, side] = _Range(percentile)
            handles.append(_watch(layer, side, partial(_see, found, f"the {side} of {path!r}")))
    try:
        with fake_quantized(module):
            _run(module, calibration)
    finally:
        for handle in handles:
            handle.remove()
    for (path, side), found in ranges.items():
        if not found.seen:
            raise ValueError(f"no calibration input reached {path!r}: it never ran")
        _give(module.get_submodule(path), side, found.grid())


def _run(module: nn.Module, calibration: Iterable[Tensor | tuple[Tensor, ...]]) -> None:
    count = 0
    for batch in calibration:
        inputs = as_inputs(tuple(batch) if isinstance(batch, list) else batch)
        for part in inputs:
            if part.is_floating_point() and not part.isfinite().all():
                raise ValueError(f"calibration input {count} holds values that are NaN or infinite")
        module(*(part.detach().cpu() for part in inputs))
        count += 1
    if count == 0:
        raise ValueError("calibration holds no inputs: give at least one batch")


def _watch(layer: nn.Module, side: str, see: Any) -> Any:
    if side == "input":
        return layer.register_forward_pre_hook(lambda _, inputs: see(inputs[0]))
    return layer.register_forward_hook(lambda _, __, output: see(output))


def _see(found: _Range, place: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError(f"{place} is NaN or infinite on the calibration inputs")
    found.update(values)


def _give(layer: nn.Module, side: str, grid: AffineGrid) -> None:
    known = activation_grids(layer) or ActivationGrids()
    sides = {"input": known.input, "output": known.output, side: grid}
    set_activation_grids(layer, ActivationGrids(**sides))
