"""Layers that provably follow each other, channel by channel, so that channels may be rewritten.

Proof: they stand side by side in an `nn.Sequential` with its own `forward`, without hooks, each is
in the module once, and what stands between them treats channels alike and apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

__all__ = ["Chain", "chains"]

CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Identity,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """A layer, the BatchNorms behind it, and the layer behind those, by their paths.

    Args:
        first: path of a linear layer or convolution.
        norms: paths of BatchNorms over its channels.
        adjacent: whether a norm follows `first` with nothing in between.
        last: path of a layer of the same kind that takes these channels; None: there is none.
    """

    first: str
    norms: tuple[str, ...]
    adjacent: bool
    last: str | None


def chains(module: nn.Module) -> Iterator[Chain]:
    """All chains of a module.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    >>> next(chains(net))
    Chain(first='0', norms=('1',), adjacent=True, last='3')
    """
    uses = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    for prefix, part in module.named_modules():
        if isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward:
            path = f"{prefix}." if prefix else ""
            layers = [(path + name, layer) for name, layer in part.named_children()]
            plain = len(layers) == len(part) and uses[id(part)] == 1
            for start, (_, layer) in enumerate(layers):
                if plain and _is_layer(layer) and _alone(layer, uses):
                    yield _chain(layers[start:], uses)


def _chain(layers: list[tuple[str, nn.Module]], uses: Counter[int]) -> Chain:
    (first, layer), *others = layers
    norms: list[str] = []
    last = None
    for path, other in others:
        if not _alone(other, uses):
            break
        if isinstance(other, NORMS):
            norms.append(path)
        elif _is_layer(other) and isinstance(other, nn.Linear) == isinstance(layer, nn.Linear):
            last = path
            break
        elif type(other) not in _ELEMENTWISE:
            break
    return Chain(first, tuple(norms), bool(others) and others[0][0] in norms, last)


def _is_layer(layer: nn.Module) -> bool:
    if type(layer) in CONVOLUTIONS:
        return vars(layer)["groups"] == 1
    return type(layer) is nn.Linear


def _alone(layer: nn.Module, uses: Counter[int]) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks)
    return uses[id(layer)] == 1 and not any(hooks) and not layer._backward_hooks
