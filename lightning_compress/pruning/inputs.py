"""What one call of a layer shows of its weights' inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress import projection
from lightning_compress.projection import Slot
from lightning_compress.pruning.recurrent import recurrent_states
from lightning_compress.pruning.unfold import gather, groups_of, windows

__all__ = ["Call", "Inputs", "find_owner", "weight_name"]

_CONV = nn.modules.conv._ConvNd
_ATTENTION = {"q_proj_weight": "query", "k_proj_weight": "key", "v_proj_weight": "value"}


def weight_name(slot: Slot) -> str:
    """The weight's name on the layer that uses it, without parametrization.

    >>> from lightning_compress.targets import Target
    >>> layer = nn.Linear(2, 1)
    >>> weight_name(Slot(Target("0.weight", layer, "weight", layer.weight)))
    'weight'
    """
    name = slot.path.rsplit(".", 1)[-1]
    for suffix in ("_orig", "_v"):  # the older spectral_norm and weight_norm
        short = name.removesuffix(suffix)
        if short != name and hasattr(slot.target.layer, short):
            return short
    return name


def find_owner(slot: Slot) -> nn.Module | None:
    """The layer whose forward uses the weight; None when it cannot be told.

    A parametrization list does not know its layer: that is looked up in the module whose
    projector holds the slot.
    """
    layer = slot.target.layer
    if not isinstance(layer, parametrize.ParametrizationList):
        return layer
    for root, projector in list(projection._REGISTRY.items()):
        if projector.slots.get(slot.path) is not slot:
            continue
        for module in root.modules():
            lists = getattr(module, "parametrizations", None)
            if isinstance(lists, nn.ModuleDict) and any(one is layer for one in lists.values()):
                return module
    return None


@dataclass(frozen=True)
class Inputs:
    """Inputs of one weight in one call.

    Attributes:
        values: (N, ...) in float32.
        windows: turns values into (N, *output, *features), a view; the sum of squares over N
            may go through it in place of the values.
        spatial: number of output axes.
        groups: the features split into so many equal parts.
    """

    values: Tensor
    windows: Callable[[Tensor], Tensor]
    spatial: int
    groups: int

    def energy(self) -> Tensor:
        """Sum of squares of each column over all output positions, (groups, columns)."""
        view = self.windows(self.values.square().sum(0, keepdim=True))
        return view.sum(tuple(range(1 + self.spatial))).reshape(self.groups, -1)

    def gram(self, limit: int, seed: int) -> Tensor:
        """Sum of products of columns over all output positions, (groups, columns, columns).

        Args:
            limit: of more positions, so many are drawn and weighted up to the sum over all.
            seed: of that draw, apart from the global random state.
        """
        view = self.windows(self.values)
        total = view.shape[: 1 + self.spatial].numel()
        index = torch.arange(total)
        if total > limit:
            generator = torch.Generator().manual_seed(seed)
            index = torch.randperm(total, generator=generator)[:limit]
        rows = gather(view, self.spatial, index.to(view.device))
        split = rows.view(len(index), self.groups, -1).transpose(0, 1)
        return (split.transpose(1, 2) @ split) * (total / max(len(index), 1))


class Call:
    """One forward call of a layer, as a forward hook sees it.

    Args:
        owner: the layer.
        args: positional arguments of the call.
        kwargs: named arguments of the call.
        output: what the call returned.

    >>> layer, x = nn.Linear(2, 1), torch.tensor([[3.0, 4.0], [4.0, 3.0]])
    >>> Call(layer, (x,), {}, layer(x)).inputs("weight").energy()
    tensor([[25., 25.]])
    """

    def __init__(
        self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self.owner, self.output = owner, output
        bound = inspect.signature(owner.forward).bind(*args, **kwargs)
        self.given: dict[str, Any] = bound.arguments
        self.first = next(iter(self.given.values()), None)

    def inputs(self, name: str) -> Inputs | None:
        """What the weight of this name was multiplied with; None where that is not visible."""
        owner = self.owner
        if isinstance(owner, nn.RNNBase):
            pair = self._states.get(name)
            return None if pair is None else _dense(pair[0])
        if isinstance(owner, nn.RNNCellBase):
            return _dense(self._cell_input(name))
        if isinstance(owner, nn.MultiheadAttention):
            return self._attention(name)
        if name != "weight" or not isinstance(self.first, Tensor):
            return None
        if isinstance(owner, _CONV):
            return self._convolution(owner, self.first)
        if isinstance(owner, nn.Embedding):  # of one-hot rows, the energy is how often each came
            counts = torch.bincount(self.first.flatten(), minlength=owner.num_embeddings)
            return _dense(counts.float().sqrt().unsqueeze(0))
        return _dense(self._product())

    def outputs(self, name: str) -> Tensor | None:
        """The layer's own output (samples, rows of the weight's matrix), or None."""
        owner = self.owner
        if isinstance(owner, nn.RNNBase):
            pair = self._states.get(name)
            weight = getattr(owner, name)
            return None if pair is None else _per_row(pair[1], weight)
        if isinstance(owner, nn.RNNCellBase):
            state = self.output[0] if isinstance(self.output, tuple) else self.output
            return _per_row(state, getattr(owner, name))
        known = (nn.Linear, nn.Bilinear, nn.Embedding, _CONV)
        if name != "weight" or not isinstance(owner, known) or not isinstance(self.output, Tensor):
            return None
        if isinstance(owner, _CONV):
            axis = self.output.dim() - 1 - len(owner.kernel_size)
            return self.output.movedim(axis, -1).flatten(0, -2)
        return self.output.reshape(-1, self.output.shape[-1])

    @cached_property
    def _states(self) -> dict[str, tuple[Tensor, Tensor]]:
        assert isinstance(self.owner, nn.RNNBase)
        assert self.first is not None
        return recurrent_states(self.owner, self.first, self.given.get("hx"), self.output)

    def _convolution(self, owner: nn.modules.conv._ConvNd, x: Tensor) -> Inputs:
        spatial = len(owner.kernel_size)
        x = x.detach().float()
        x = x if x.dim() == spatial + 2 else x.unsqueeze(0)
        size = self.output.shape[-spatial:]
        return Inputs(x, lambda values: windows(owner, values, size), spatial, owner.groups)

    def _product(self) -> Tensor | None:
        if isinstance(self.owner, nn.Linear):
            return self.first
        if isinstance(self.owner, nn.Bilinear):
            one, two = (value.flatten(0, -2) for value in self.given.values())
            return torch.einsum("ni,nj->nij", one.float(), two.float()).flatten(1)
        return None

    def _cell_input(self, name: str) -> Tensor | None:
        if name == "weight_ih":
            return self.first
        state = self.given.get("hx")
        state = state[0] if isinstance(state, tuple) else state
        if state is None:  # the cell starts at zero
            assert isinstance(self.first, Tensor)
            return self.first.new_zeros(1, getattr(self.owner, name).shape[1])
        return state

    def _attention(self, name: str) -> Inputs | None:
        if name in _ATTENTION:
            return _dense(self.given[_ATTENTION[name]])
        if name != "in_proj_weight":
            return None
        parts = [self.given[key].detach().flatten(0, -2).float() for key in _ATTENTION.values()]
        longest = max(len(part) for part in parts)  # rows of zeros add nothing to a sum
        padded = [nn.functional.pad(part, (0, 0, 0, longest - len(part))) for part in parts]
        return _dense(torch.cat(padded, 1), groups_of(self.owner, name))


def _dense(x: Tensor | None, groups: int = 1) -> Inputs | None:
    if not isinstance(x, Tensor):
        return None
    return Inputs(x.detach().reshape(-1, x.shape[-1]).float(), lambda values: values, 0, groups)


def _per_row(states: Tensor, weight: Tensor) -> Tensor | None:
    """A recurrent unit's state for each of its gates' rows."""
    units = states.shape[-1]
    if weight.shape[0] % units:
        return None  # projected states are no longer those of the units
    return states.reshape(-1, units).repeat(1, weight.shape[0] // units)
