"""Inputs and outputs of a layer's weights in one forward call, as matrices."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_compress.projection import ProjectedWeight, Projector

__all__ = [
    "Inputs",
    "LayerCall",
    "find_owner",
    "from_matrix",
    "gather",
    "groups_of",
    "recurrent_states",
    "to_matrix",
    "weight_name",
    "windows",
]
_CONV = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_ATTENTION = {"q_proj_weight": "query", "k_proj_weight": "key", "v_proj_weight": "value"}


def recurrent_states(
    owner: nn.RNNBase, x: Tensor | PackedSequence, hx: Any, output: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each weight of a recurrent layer: what it was multiplied with, and its units' states.

    Inner layers are run again one by one, without the dropout between them (the hooks of the
    layer see its ends alone). `weight_hr` of a projected LSTM stays invisible and is left out.

    Args:
        owner: the layer.
        x: its input, padded, packed or without a batch.
        hx: its initial state, or None for zeros.
        output: what it returned.

    Returns:
        name -> (inputs (samples, columns), states (samples, hidden)).

    >>> gru, x = nn.GRU(2, 3), torch.zeros(5, 1, 2)
    >>> states = recurrent_states(gru, x, None, gru(x))
    >>> {name: tuple(pair[0].shape) for name, pair in states.items()}
    {'weight_ih_l0': (5, 2), 'weight_hh_l0': (5, 3)}
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    weight = owner.weight_ih_l0
    assert isinstance(weight, Tensor)
    dtype = weight.dtype  # the call itself may have run in half precision
    x, hx = x.to(dtype), _cast(hx, dtype)
    initial = hx[0] if isinstance(hx, tuple) else hx
    directions = 2 if owner.bidirectional else 1
    for depth in range(owner.num_layers):
        state = None if hx is None else _of_depth(hx, depth, directions)
        last = owner.num_layers == 1
        y = output[0] if last else _single(owner, depth)(x, state)[0]
        steps, valid = _time_major(x, owner.batch_first)
        states = _time_major(y, owner.batch_first)[0].to(dtype)
        for way in range(directions):
            name = f"l{depth}" + ("_reverse" if way else "")
            mine = states.chunk(directions, 2)[way]
            first = _initial(initial, depth * directions + way, mine)
            before = _shifted(mine, first, valid, backward=bool(way))
            found[f"weight_ih_{name}"] = (steps[valid], mine[valid])
            found[f"weight_hh_{name}"] = (before[valid], mine[valid])
        x = y
    return found


def _of_depth(hx: Any, depth: int, directions: int) -> Any:
    part = slice(depth * directions, (depth + 1) * directions)
    return tuple(one[part] for one in hx) if isinstance(hx, tuple) else hx[part]


def _cast(hx: Any, dtype: torch.dtype) -> Any:
    if isinstance(hx, tuple):
        return tuple(one.to(dtype) for one in hx)
    return None if hx is None else hx.to(dtype)


def _single(owner: nn.RNNBase, depth: int) -> nn.RNNBase:
    """One layer of several by itself, made without touching the random state."""
    directions = 2 if owner.bidirectional else 1
    size = owner.proj_size or owner.hidden_size
    extra: dict[str, Any] = {}
    if isinstance(owner, nn.RNN):
        extra["nonlinearity"] = owner.nonlinearity
    weight = getattr(owner, f"weight_ih_l{depth}")
    kind = next(kind for kind in (nn.GRU, nn.LSTM, nn.RNN) if isinstance(owner, kind))
    size_in = owner.input_size if depth == 0 else size * directions
    if owner.proj_size:
        extra["proj_size"] = owner.proj_size
    single = kind(
        size_in,
        owner.hidden_size,
        bias=owner.bias,
        batch_first=owner.batch_first,
        bidirectional=owner.bidirectional,
        device="meta",  # where initial values cost no random numbers
        dtype=weight.dtype,
        **extra,
    ).to_empty(device=weight.device)
    for name, parameter in single.named_parameters():
        parameter.requires_grad_(False)
        parameter.copy_(getattr(owner, name.replace("_l0", f"_l{depth}")))
    single.flatten_parameters()
    return single


def _time_major(x: Tensor | PackedSequence, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Values (T, N, features), and which (T, N) of them are steps of a sequence."""
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x)
        padded = padded.detach()
        steps = torch.arange(padded.shape[0]).unsqueeze(1)
        return padded, (steps < lengths).to(padded.device)
    x = x.detach()
    x = x.unsqueeze(1) if x.dim() == 2 else x.transpose(0, 1) if batch_first else x
    return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def _initial(hx: Tensor | None, index: int, states: Tensor) -> Tensor:
    if hx is None:
        return torch.zeros_like(states[:1])
    return hx[index].detach().view(1, -1, states.shape[2])


def _shifted(states: Tensor, first: Tensor, valid: Tensor, *, backward: bool) -> Tensor:
    """The state that each step started from."""
    if not backward:
        return torch.cat([first, states[:-1]])
    following = torch.cat([states[1:], first])
    ends = valid & ~torch.cat([valid[1:], torch.zeros_like(valid[:1])])
    return torch.where(ends.unsqueeze(2), first, following)


def groups_of(layer: nn.Module, name: str = "weight") -> int:
    """Number of independent products that a layer's weight takes part in."""
    if isinstance(layer, nn.MultiheadAttention) and name == "in_proj_weight":
        return 3  # queries, keys and values, each with inputs of its own
    return layer.groups if isinstance(layer, _CONV) else 1


def to_matrix(weight: Tensor, layer: nn.Module, name: str = "weight") -> Tensor:
    """A weight as (groups, rows, columns): rows are outputs, columns are inputs and taps.

    >>> to_matrix(torch.zeros(6, 2, 4, 4), nn.ConvTranspose2d(6, 4, 4, groups=2)).shape
    torch.Size([2, 2, 48])
    """
    groups = groups_of(layer, name)
    if isinstance(layer, nn.Embedding):  # a one-hot row times the table
        return weight.t().unsqueeze(0)
    if isinstance(layer, _TRANSPOSED):
        taps = weight.flip(_spatial(weight)).flatten(2)  # (in, out / groups, taps)
        split = taps.view(groups, -1, taps.shape[1], taps.shape[2]).transpose(1, 2)
        return split.flatten(2)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def from_matrix(
    matrix: Tensor, layer: nn.Module, shape: Sequence[int], name: str = "weight"
) -> Tensor:
    """The weight of a shape from its matrix; the reverse of `to_matrix`.

    >>> layer = nn.ConvTranspose2d(6, 4, 3, groups=2)
    >>> matrix = to_matrix(layer.weight, layer)
    >>> torch.equal(from_matrix(matrix, layer, layer.weight.shape), layer.weight)
    True
    """
    if isinstance(layer, nn.Embedding):
        return matrix[0].t()
    if isinstance(layer, _TRANSPOSED):
        groups = groups_of(layer, name)
        split = matrix.view(groups, shape[1], shape[0] // groups, -1).transpose(1, 2)
        weight = split.reshape(tuple(shape))
        return weight.flip(_spatial(weight))
    return matrix.reshape(tuple(shape))


def windows(layer: nn.Module, x: Tensor, size: Sequence[int] = ()) -> Tensor:
    """Input windows of each output position of a convolution: (N, *output, C, *kernel), a view.

    Args:
        layer: a convolution, transposed or not, of any dimension.
        x: its input (N, C, *spatial); zeros and borders commute with squaring, so that the
            windows of squares are the squares of windows.
        size: spatial size of the output; only a transposed convolution needs it, since its
            `output_padding` may come from the call.

    >>> windows(nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 4, 4, 3, 3, 3])
    """
    if not isinstance(layer, _CONV):
        raise TypeError(f"{type(layer).__name__} is no convolution")
    if isinstance(layer, _TRANSPOSED):
        return _slide(_spread(layer, x, size), layer.kernel_size, None, layer.dilation)
    pads = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, pads, mode=mode) if any(pads) else x
    return _slide(x, layer.kernel_size, layer.stride, layer.dilation)


def gather(view: Tensor, spatial: int, index: Tensor) -> Tensor:
    """Rows (len(index), features) of a window view at flat output positions."""
    where = torch.unravel_index(index, view.shape[: 1 + spatial])
    return view[where].flatten(1)


def _spatial(weight: Tensor) -> list[int]:
    return list(range(2, weight.dim()))


def _spread(layer: nn.modules.conv._ConvTransposeNd, x: Tensor, size: Sequence[int]) -> Tensor:
    """The input with stride - 1 zeros between its values, padded to give `size` outputs."""
    stride = layer.stride
    inner = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *inner)
    spread[(..., *(slice(None, None, step) for step in stride))] = x
    pads: list[int] = []
    for axis in reversed(range(len(inner))):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        left = reach - int(layer.padding[axis])
        pads += [left, size[axis] + reach - left - inner[axis]]  # negative: cropped
    return F.pad(spread, pads)


def _slide(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int] | None, dilation: Sequence[int]
) -> Tensor:
    dims = len(kernel)
    for axis in range(dims):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        step = 1 if stride is None else stride[axis]
        x = x.unfold(2 + axis, reach, step)[..., :: dilation[axis]]
    return x.movedim(1, 1 + dims)


def weight_name(projected: ProjectedWeight) -> str:
    """The weight's name on the layer that uses it, without parametrization.

    >>> from lightning_compress.targets import Target
    >>> layer = nn.Linear(2, 1)
    >>> weight_name(ProjectedWeight(Target("0.weight", layer, "weight", layer.weight)))
    'weight'
    """
    name = projected.path.rsplit(".", 1)[-1]
    for suffix in ("_orig", "_v"):  # the older spectral_norm and weight_norm
        short = name.removesuffix(suffix)
        if short != name and hasattr(projected.target.layer, short):
            return short
    return name


def find_owner(projected: ProjectedWeight) -> nn.Module | None:
    """The layer whose forward uses the weight; None when it is unknown.

    A parametrization list does not know its layer: that is looked up in the module whose
    projector holds the projected weight.
    """
    layer = projected.target.layer
    if not isinstance(layer, parametrize.ParametrizationList):
        return layer
    root = Projector.module_of(projected)
    for module in root.modules() if root is not None else ():
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


class LayerCall:
    """One forward call of a layer, as a forward hook sees it.

    Args:
        owner: the layer.
        args: positional arguments of the call.
        kwargs: named arguments of the call.
        output: what the call returned.

    >>> layer, x = nn.Linear(2, 1), torch.tensor([[3.0, 4.0], [4.0, 3.0]])
    >>> LayerCall(layer, (x,), {}, layer(x)).inputs("weight").energy()
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
        """Inputs that the weight of this name was multiplied with; None where unknown."""
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
