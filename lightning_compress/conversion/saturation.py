"""Where CPUs without VNNI would cut sums off, and weights must be stored so that they do not.

Their fast kernels multiply uint8 by int8 and add products in pairs of 16 bits: beyond 32,767 the
sum stays there. Weights stored as uint8 around 128 go through kernels that keep all bits: slower
where there is no VNNI, and exact everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_compress.conversion.integers import IntegerWeight
from lightning_compress.quantization.activations import fake_quantized
from lightning_compress.quantization.quantizers import AffineGrid
from lightning_compress.state import activation_grids

__all__ = ["is_cut_off", "seen_inputs"]

LARGEST = 32_767
CAUTION = 0.9  # inputs to come may be a little larger than those seen
KEPT_ROWS = 8192


@torch.no_grad()
def seen_inputs(
    module: nn.Module, paths: Iterable[str], batches: Sequence[tuple[Tensor, ...]]
) -> dict[str, NDArray[np.int32]]:
    """What layers read, as the uint8 of the file: path -> (rows, channels).

    Args:
        module: its layers carry activation grids.
        paths: of layers with an input grid.
        batches: inputs of the module.
    """
    found: dict[str, list[NDArray[np.int32]]] = {path: [] for path in paths}
    with fake_quantized(module):
        handles = [
            module.get_submodule(path).register_forward_pre_hook(partial(_keep, rows))
            for path, rows in found.items()
        ]
        for batch in batches:
            module(*batch)
    for handle in handles:
        handle.remove()
    return {path: np.concatenate(rows) for path, rows in found.items() if rows}


def _keep(rows: list[NDArray[np.int32]], layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    grids = activation_grids(layer)
    assert grids is not None
    assert isinstance(grids.input, AffineGrid)
    scale, zero = (
        float(grids.input.scale.reshape(-1)[0]),
        int(grids.input.zero_point.reshape(-1)[0]),
    )
    values = ((inputs[0] / scale).round().int() + zero) * 2 ** (8 - grids.input.bits)
    linear = isinstance(layer, nn.Linear)
    flat = values.reshape(-1, values.shape[-1]) if linear else values.movedim(1, -1).flatten(0, -2)
    rows.append(flat[:: -(-len(flat) // KEPT_ROWS)].numpy())


def is_cut_off(weight: IntegerWeight, op: str, seen: Mapping[str, Any], path: str) -> bool:
    """Whether the inputs seen come near a cut-off sum.

    Args:
        weight: laid out as its product reads it.
        op: Conv, Gemm or MatMul.
        seen: what `seen_inputs` gave.
        path: of the layer.
    """
    if not weight.may_be_cut_off(op):
        return False
    rows = weight.symbols.T if op == "MatMul" else weight.symbols
    rows = np.moveaxis(rows, 1, -1).reshape(-1, rows.shape[1])
    values = seen.get(path)
    if values is None or values.shape[1] != rows.shape[1] or rows.shape[1] % 2:
        return True  # never seen, or grouped, or neighbours of different taps: be careful
    return any(
        _pair_is_cut_off(values[:, at : at + 2], rows[:, at : at + 2])
        for at in range(0, rows.shape[1], 2)
    )


def _pair_is_cut_off(values: NDArray[np.int32], weights: NDArray[np.int32]) -> bool:
    limit = CAUTION * LARGEST
    # Inputs are never below 0: of a pair with both signs, one may stand alone.
    most = np.maximum(weights.clip(min=0).sum(1), -weights.clip(max=0).sum(1))
    strong = np.unique(weights[most * 255 > limit], axis=0)
    large = np.unique(values[values.sum(1) * 127 > limit], axis=0)
    if not len(strong) or not len(large):
        return False
    sums = large.astype(np.float32) @ strong.T.astype(np.float32)
    return bool(np.abs(sums).max() > limit)
