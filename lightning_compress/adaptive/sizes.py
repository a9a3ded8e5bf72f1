"""What a model's file would hold, from its weights as they are: a prediction without coding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.quantization.rate import entropy_bits
from lightning_compress.state import Grid, compression_state
from lightning_compress.targets import clean_path, deployed_part

__all__ = ["part_bytes", "predicted_bytes", "tensor_bytes"]

_HEADER = 17  # bytes of a stored tensor besides its values, about


@torch.no_grad()
def tensor_bytes(values: Tensor, grid: Grid | None = None, *, bits: int | None = None) -> float:
    """Bytes of a tensor: its symbols at their zero-order entropy, or its floats and where they are.

    Args:
        values: as they are shipped.
        grid: that they lie on.
        bits: of each value that is not 0, where it is not on a grid yet; None: those of its dtype.

    >>> tensor_bytes(torch.ones(8))
    32.0
    >>> tensor_bytes(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    8.5
    """
    if grid is not None:
        return entropy_bits(grid.quantize(values)) / 8
    count, total = int(torch.count_nonzero(values)), values.numel()
    width = 8 * values.element_size() if bits is None else bits
    return (total * _binary_entropy(count / max(total, 1)) + count * width) / 8


def _binary_entropy(share: float) -> float:
    if not 0 < share < 1:
        return 0.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def part_bytes(
    module: nn.Module, parts: Sequence[str] = ("",), bits: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Predicted bytes of each stored tensor, by its path in the module.

    Args:
        module: the model.
        parts: paths of the children that ship.
        bits: of weights that go onto a grid when training has ended, by clean path.
    """
    grids = compression_state(module).grids
    by_place = {id(one): path for path, one in module.named_parameters()}
    found: dict[str, float] = {}
    for part in parts:
        for name, tensor in module.get_submodule(part).state_dict(keep_vars=True).items():
            path = f"{part}.{name}" if part else name
            grid = grids.get(by_place.get(id(tensor), ""))
            width = (bits or {}).get(clean_path(path))
            found[path] = _HEADER + tensor_bytes(tensor.detach(), grid, bits=width)
    return found


def predicted_bytes(module: nn.Module, bits: Mapping[str, int] | None = None) -> float:
    """Bytes that the part of a model that ships would need, arguments as `part_bytes`.

    At the zero-order entropy of each tensor's symbols: the default coder ends a little lower.

    >>> predicted_bytes(nn.Linear(10, 10, bias=False))
    417.0
    """
    return sum(part_bytes(module, deployed_part(module), bits).values())
