"""Post-training quantization: put trained weights onto grids, with no further training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lightning_compress.quantization.quantizers import affine_grid, channel_axis
from lightning_compress.state import set_grid
from lightning_compress.targets import Pattern, Selection, select

__all__ = ["SCHEMES", "quantize_weights"]

SCHEMES = ("symmetric", "affine")


@torch.no_grad()
def quantize_weights(
    module: nn.Module,
    bits: int = 8,
    *,
    scheme: str = "symmetric",
    per_channel: bool = True,
    include: Sequence[Pattern] | Pattern | None = None,
    exclude: Sequence[Pattern] | Pattern = (),
) -> Selection:
    """Round weights in place to a grid over their min/max range; zeros stay zero.

    The grids are remembered in the module (`compression_state`), so that a saved file holds whole
    numbers. Activations are left alone. Jacob et al. 2018, arXiv:1712.05877.

    Args:
        module: the trained model.
        bits: 2 to 8.
        scheme: "symmetric" (around 0) or "affine" (from the minimum to the maximum).
        per_channel: one scale an output channel, else one a tensor.
        include: path globs or layer classes; None: the weights of the part that ships.
        exclude: the same, taken away again.

    Raises:
        ValueError: for bits or a scheme out of range, or weights that are not finite.
        TargetError: for patterns that match nothing.

    >>> layer = nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.1, 1.0]]))
    >>> _ = quantize_weights(layer, 4)
    >>> layer.weight.data
    tensor([[0.1429, 1.0000]])
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r}: valid are {list(SCHEMES)}")
    selection = select(module, include, exclude)
    for target in selection.targets:
        axis = channel_axis(target.layer) if per_channel else None
        try:
            grid = affine_grid(
                target.parameter, bits=bits, symmetric=scheme == "symmetric", axis=axis
            )
        except ValueError as error:
            raise ValueError(f"{target.path}: {error}") from error
        target.parameter.copy_(grid.project(target.parameter))
        set_grid(target.layer, target.name, grid)
    return selection
