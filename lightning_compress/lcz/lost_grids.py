"""Detection of quantized weights that carry no grid, by their few distinct values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compress.sharding import local_part
from lightning_compress.state import has_grid

__all__ = ["few_valued", "is_lightning", "lost_grids", "quantized_by_value"]

_SAMPLE = 2048  # weights of a channel that are looked at for a grid
_FEWEST = 3  # values of a channel on a grid: of two bits


@torch.no_grad()
def quantized_by_value(module: nn.Module) -> list[str]:
    """Paths of weights that take few values, as quantized ones do, but carry no grid.

    A sample of one channel decides: its non-zero weights take half as many values, or fewer.

    >>> layer = nn.Linear(64, 1)
    >>> quantized_by_value(layer)
    []
    >>> _ = layer.weight.data.copy_((layer.weight * 50).round() / 50)
    >>> quantized_by_value(layer)
    ['weight']
    """
    return few_valued(_without_grid(module))


def _without_grid(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # A tied weight carries its grid in one of its layers.
    known = {
        id(parameter)
        for layer in module.modules()
        for name, parameter in layer.named_parameters(recurse=False)
        if has_grid(layer, name)
    }
    for path, parameter in module.named_parameters():
        if id(parameter) not in known and not is_lazy(parameter):
            yield path, local_part(parameter.detach())


def few_valued(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of those tensors of two or more axes that take few values, as on a grid."""
    return [
        name
        for name, tensor in tensors
        if tensor.dim() > 1 and tensor.is_floating_point() and _takes_few_values(tensor)
    ]


def _takes_few_values(weight: Tensor) -> bool:
    for axis in (0, 1):  # of the output channels, of transposed convolutions the second
        channel = weight.detach().movedim(axis, 0)[:1].reshape(-1)[:_SAMPLE]
        values = channel[channel != 0]
        if _FEWEST <= len(values.unique()) <= len(values) // 2:
            return True
    return False


def is_lightning(module: nn.Module) -> bool:
    """Whether a module is a LightningModule, which `load_from_checkpoint` may have made."""
    return any(kind.__name__ == "LightningModule" for kind in type(module).__mro__)


def lost_grids(module: nn.Module) -> str:
    """Warning for a module that has lost its grids; empty where none is missing.

    >>> lost_grids(nn.Linear(64, 1))
    ''
    """
    if not (names := quantized_by_value(module)):
        return ""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return (
        f"{', '.join(names[:2])}{more} take few values but carry no grid: a state_dict holds "
        "weights alone. If a Lightning checkpoint knows the grids, "
        "restore_compression(module, checkpoint) restores them"
    )
