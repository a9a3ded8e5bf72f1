"""Layouts: which axis of a weight is the output, which the input, of every kind of layer."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Layout", "layout_of"]


@dataclass(frozen=True)
class Layout:
    """How a weight's axes read as (groups, output, input, kernel).

    Args:
        transposed: a transposed convolution's weight, (in, out / groups, ...).
        groups: of a convolution.
        gates: matrices that a recurrent weight stacks along its first axis.

    >>> Layout(transposed=True, groups=2).canonical(torch.zeros(6, 4, 3, 3)).shape
    torch.Size([2, 4, 3, 9])
    """

    transposed: bool = False
    groups: int = 1
    gates: int = 1

    def canonical(self, weight: Tensor) -> Tensor:
        """The weight as (groups, output of a group, input of a group, kernel)."""
        if weight.dim() < 2:
            return weight.reshape(1, -1, 1, 1)
        inputs, outputs = (0, 1) if self.transposed else (1, 0)
        first = weight.shape[0] // self.groups
        view = weight.reshape(self.groups, first, weight.shape[1], -1)
        return view.transpose(1, 2) if inputs < outputs else view

    def restore(self, canonical: Tensor, shape: torch.Size) -> Tensor:
        """The reverse of `canonical`, to a weight of that shape."""
        view = canonical.transpose(1, 2) if self.transposed and len(shape) > 1 else canonical
        return view.reshape(shape)


def layout_of(module: nn.Module, path: str) -> Layout:
    """The layout of a parameter, by the layer that owns it, through parametrizations.

    >>> layout_of(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "0.weight")
    Layout(transposed=False, groups=2, gates=1)
    """
    owner, _, name = path.rpartition(".")
    if ".parametrizations." in f".{path}":
        owner, _, rest = f".{path}".partition(".parametrizations.")
        owner, name = owner.removeprefix("."), rest.split(".")[0]
    layer = module.get_submodule(owner)
    if isinstance(layer, nn.modules.conv._ConvNd) and name.startswith("weight"):
        return Layout(transposed=layer.transposed, groups=layer.groups)
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) and re.match("weight_[ih]h", name):
        return Layout(gates=module.get_parameter(path).shape[0] // layer.hidden_size)
    return Layout()
