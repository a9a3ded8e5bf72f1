"""What a compressed module knows of itself: the masks and grids behind its visible weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_compress.quantization.quantizers import AffineGrid

__all__ = ["CompressionState", "clear_grid", "compression_state", "set_grid"]

# A plain attribute of the owning layer: it follows deepcopy and pickle, never enters state_dict.
_ATTRIBUTE = "_compression_grids"


@dataclass(frozen=True)
class CompressionState:
    """Masks and grids by parameter name, as `named_parameters` spells it."""

    masks: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, AffineGrid] = field(default_factory=dict)


def set_grid(layer: nn.Module, name: str, grid: AffineGrid) -> None:
    """Remember that `layer.<name>` lies on a grid."""
    layer.__dict__.setdefault(_ATTRIBUTE, {})[name] = grid


def clear_grid(layer: nn.Module, name: str) -> None:
    """Forget the grid of `layer.<name>`, if it had one."""
    layer.__dict__.get(_ATTRIBUTE, {}).pop(name, None)


def compression_state(module: nn.Module) -> CompressionState:
    """Masks (where a weight is not 0) and grids that a module carries.

    A mask is listed for each parameter of two or more axes that holds a zero.

    >>> layer = nn.Linear(2, 2)
    >>> _ = layer.weight.data.copy_(layer.weight.new_tensor([[0.0, 1.0], [2.0, 0.0]]))
    >>> compression_state(layer).masks["weight"].tolist()
    [[False, True], [True, False]]
    """
    masks, grids = {}, {}
    for prefix, layer in module.named_modules():
        known = layer.__dict__.get(_ATTRIBUTE, {})
        for name, parameter in layer.named_parameters(recurse=False):
            path = f"{prefix}.{name}" if prefix else name
            if name in known:
                grids[path] = known[name]
            if parameter.dim() > 1 and not (mask := parameter.detach() != 0).all():
                masks[path] = mask
    return CompressionState(masks, grids)
