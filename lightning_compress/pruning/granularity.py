"""Granularities: which weights are pruned together, from single weights to whole channels."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_compress.sharding import Shards
from lightning_compress.targets import split_path

__all__ = [
    "GRANULARITIES",
    "Granularity",
    "KeepNOfM",
    "Layout",
    "Units",
    "largest",
    "layout_of",
    "make_granularity",
]
_CHUNK = 1 << 20  # elements sorted at once: bounds the extra memory of an event
_VALID = (
    "'unstructured', 'row', 'column', 'channel', 'filter', 'n:m' such as '2:4', ('block', (r, c))"
)


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
    owner, name = split_path(path)
    layer = module.get_submodule(owner)
    if isinstance(layer, nn.modules.conv._ConvNd) and name.startswith("weight"):
        return Layout(transposed=layer.transposed, groups=layer.groups)
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) and re.match("weight_[ih]h", name):
        return Layout(gates=module.get_parameter(path).shape[0] // layer.hidden_size)
    return Layout()


@dataclass(frozen=True)
class Units:
    """Units of one weight that are pruned together: a score each, and their map to weights.

    Args:
        scores: one a unit, of any shape; infinite where a unit must stay.
        closed: True where a unit is pruned already and stays so, of the same shape; or None.
        capacity: number of units that may go.
        shape: of the weight.
        spread: from a unit mask (of the shape of `scores`) to the weight's mask.
        shards: of a weight that is spread over processes: `scores` and `closed` are one's part.
        size: weights in each unit: one number, or one a unit, of the shape of `scores`.
    """

    scores: Tensor
    closed: Tensor | None
    capacity: int
    shape: torch.Size
    spread: Callable[[Tensor], Tensor]
    shards: Shards | None = None
    size: int | Tensor = 1

    @property
    def largest(self) -> int:
        """Weights in the largest unit."""
        return largest(self.size)

    @property
    def open(self) -> int:
        """Number of units that may stay: what is not closed."""
        return self.capacity - (0 if self.closed is None else self.count(self.closed))

    def count(self, flags: Tensor) -> int:
        """How many are True, over all processes that share the weight."""
        found = flags.sum()
        return int(found if self.shards is None else self.shards.all_reduce_sum(found))


def largest(size: int | Tensor) -> int:
    """The largest of the sizes of units; see `Units.size`."""
    return size if isinstance(size, int) else int(size.max())


class Granularity(Protocol):
    """Granularity: pools scores of weights into scores of units."""

    @property
    def limit(self) -> float:
        """The sparsity at which all is pruned that may be: 1, or 1 - n/m for n:m."""
        ...

    @property
    def pools(self) -> bool:
        """Whether a unit holds more than one weight."""
        ...

    def units(
        self, scores: Tensor, layout: Layout, *, closed: Tensor | None, signed: bool
    ) -> Units:
        """Units of one weight.

        Args:
            scores: of the weight's shape.
            layout: of the weight.
            closed: True where a weight is pruned and must not return.
            signed: scores may be negative: pool by the sum instead of the L2 norm.
        """
        ...

    def size(self, shape: torch.Size, layout: Layout) -> int | Tensor:
        """Weights in each unit of a weight of a shape; see `Units.size`."""
        ...

    def rest(self, shapes: Mapping[str, torch.Size], layouts: Mapping[str, Layout]) -> list[str]:
        """The weights that the granularity always keeps dense, in words."""
        ...


@dataclass(frozen=True)
class KeepNOfM:
    """Along the input axis, n of every m weights stay in the end; a rest below m stays dense.

    Before the end, the weights that go first are the lowest of all that go at last. The pattern
    of Mishra et al. 2021, arXiv:2104.08378, is 2:4.

    Args:
        n: stay.
        m: of so many neighbours on the input axis.

    >>> scores = torch.tensor([[1.0, 4.0, 2.0, 3.0, 9.0]])
    >>> KeepNOfM(2, 4).units(scores, Layout(), closed=None, signed=False).scores
    tensor([[1., inf, 2., inf, inf]])
    """

    n: int
    m: int
    pools: bool = False

    @property
    def limit(self) -> float:
        """The sparsity of the finished pattern."""
        return 1 - self.n / self.m

    def size(self, shape: torch.Size, layout: Layout) -> int:  # noqa: ARG002
        """Each weight is a unit."""
        return 1

    def units(
        self,
        scores: Tensor,
        layout: Layout,
        *,
        closed: Tensor | None,
        signed: bool,  # noqa: ARG002
    ) -> Units:
        """Units of one weight: the m - n lowest of each m, the others as infinite."""
        ranked = scores.detach().float()
        if closed is not None:
            ranked = ranked.masked_fill(closed, -torch.inf)
        view = layout.canonical(ranked).transpose(2, 3)  # the input axis last
        may_go = torch.zeros(view.shape, dtype=torch.bool, device=view.device)
        whole = view.shape[-1] // self.m * self.m
        groups = view[..., :whole].reshape(-1, self.m)
        may_go[..., :whole] = self._lowest(groups).view(*view.shape[:-1], whole)
        stays = ~layout.restore(may_go.transpose(2, 3), scores.shape)
        ranked = ranked.clamp_(max=torch.finfo(torch.float32).max).masked_fill_(stays, torch.inf)
        capacity = groups.shape[0] * (self.m - self.n)
        return Units(ranked, closed, capacity, scores.shape, lambda mask: mask)

    def rest(self, shapes: Mapping[str, torch.Size], layouts: Mapping[str, Layout]) -> list[str]:
        """Names the weights whose inputs are no multiple of m."""
        found = []
        for path, shape in shapes.items():
            # Shapes alone: a view of one element costs no memory.
            inputs = layouts[path].canonical(torch.empty(1).expand(shape)).shape[2]
            if left := inputs % self.m:
                found.append(f"{path} ({left} of {inputs} inputs)")
        joined = ", ".join(found)
        return [f"no whole groups of {self.m}, the rest stays dense: {joined}"] if found else []

    def _lowest(self, groups: Tensor) -> Tensor:
        parts = []
        for part in groups.split(max(1, _CHUNK // self.m)):
            order = part.argsort(dim=1, stable=True)[:, : self.m - self.n]
            parts.append(torch.zeros_like(part, dtype=torch.bool).scatter_(1, order, True))
        return torch.cat(parts) if parts else groups.bool()


class _NoRest:
    def rest(
        self,
        shapes: Mapping[str, torch.Size],  # noqa: ARG002
        layouts: Mapping[str, Layout],  # noqa: ARG002
    ) -> list[str]:
        return []


class _Unstructured(_NoRest):
    limit, pools = 1.0, False

    def size(self, shape: torch.Size, layout: Layout) -> int:  # noqa: ARG002
        return 1

    def units(
        self,
        scores: Tensor,
        layout: Layout,  # noqa: ARG002
        *,
        closed: Tensor | None,
        signed: bool,  # noqa: ARG002
    ) -> Units:
        return Units(scores, closed, scores.numel(), scores.shape, lambda mask: mask)


@dataclass(frozen=True)
class _Pooled(_NoRest):
    """Units that are sums over a layout's view, and flags that are spread over it again."""

    sums: Callable[[Tensor, Layout], Tensor]
    flags: Callable[[Tensor, torch.Size, Layout], Tensor]
    limit: float = 1.0
    pools: bool = True

    def units(
        self, scores: Tensor, layout: Layout, *, closed: Tensor | None, signed: bool
    ) -> Units:
        # In double precision the squares of all float32 scores are in range.
        view = layout.canonical(scores.detach()).to(torch.float64, copy=True)
        pooled = self.sums(view, layout) if signed else self.sums(view.square_(), layout).sqrt()
        shut = None
        if closed is not None:
            shut = self.sums((~layout.canonical(closed)).float(), layout) == 0

        def spread(mask: Tensor) -> Tensor:
            return layout.restore(self.flags(mask, view_shape, layout), scores.shape)

        view_shape, size = view.shape, self.size(scores.shape, layout)
        return Units(pooled.float(), shut, pooled.numel(), scores.shape, spread, size=size)

    def size(self, shape: torch.Size, layout: Layout) -> int | Tensor:
        ones = layout.canonical(torch.ones(1, dtype=torch.float64).expand(shape))
        sizes = self.sums(ones, layout).long()
        return int(sizes[0]) if (sizes == sizes[0]).all() else sizes


def _row_sums(view: Tensor, layout: Layout) -> Tensor:  # noqa: ARG001
    return view.sum((2, 3)).flatten()


def _row_flags(mask: Tensor, shape: torch.Size, layout: Layout) -> Tensor:  # noqa: ARG001
    return mask.view(*shape[:2], 1, 1).expand(shape)


def _column_sums(view: Tensor, layout: Layout) -> Tensor:  # noqa: ARG001
    return view.sum((1, 3)).flatten()


def _column_flags(mask: Tensor, shape: torch.Size, layout: Layout) -> Tensor:  # noqa: ARG001
    return mask.view(shape[0], 1, shape[2], 1).expand(shape)


def _channel_sums(view: Tensor, layout: Layout) -> Tensor:
    return _row_sums(view, layout).view(layout.gates, -1).sum(0)


def _channel_flags(mask: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    return _row_flags(mask.repeat(layout.gates), shape, layout)


def _block_sums(rows: int, columns: int, view: Tensor, layout: Layout) -> Tensor:  # noqa: ARG001
    matrix = view.reshape(view.shape[0] * view.shape[1], -1)
    high, wide = matrix.shape
    # Blocks at the edges are smaller: what is padded adds nothing to them.
    matrix = nn.functional.pad(matrix, (0, -wide % columns, 0, -high % rows))
    return matrix.view(matrix.shape[0] // rows, rows, -1, columns).sum((1, 3)).flatten()


def _block_flags(
    rows: int,
    columns: int,
    mask: Tensor,
    shape: torch.Size,
    layout: Layout,  # noqa: ARG001
) -> Tensor:
    high, wide = shape[0] * shape[1], shape[2] * shape[3]
    grid = mask.view(-(-high // rows), 1, -1, 1).expand(-1, rows, -1, columns)
    return grid.reshape(grid.shape[0] * rows, -1)[:high, :wide].reshape(shape)


def _blocks(rows: int, columns: int) -> _Pooled:
    return _Pooled(partial(_block_sums, rows, columns), partial(_block_flags, rows, columns))


_ROW = _Pooled(_row_sums, _row_flags)
_CHANNEL = _Pooled(_channel_sums, _channel_flags)
GRANULARITIES: dict[str, Granularity] = {
    "unstructured": _Unstructured(),
    "row": _ROW,
    "column": _Pooled(_column_sums, _column_flags),
    "channel": _CHANNEL,
    "filter": _CHANNEL,
}


def make_granularity(given: str | Sequence[object]) -> Granularity:
    """The granularity of a name.

    `"unstructured"`: single weights. `"n:m"`: n of every m along the input axis stay. `("block",
    (r, c))`: blocks of the (output, input x kernel) matrix. `"row"`: rows of that matrix.
    `"column"`: an input unit. `"channel"` or `"filter"`: an output unit, in recurrent layers all
    its gates. A unit's score is the L2 norm of its weights' scores, or their sum when a
    criterion gives negative ones.

    Raises:
        ValueError: for an unknown name; the message names the valid ones.

    >>> make_granularity("2:4").limit
    0.5
    """
    if isinstance(given, str):
        if given in GRANULARITIES:
            return GRANULARITIES[given]
        if match := re.fullmatch(r"(\d+):(\d+)", given):
            n, m = int(match[1]), int(match[2])
            if not 0 < n < m:
                raise ValueError(f"granularity={given!r}: n:m keeps n of m weights, 0 < n < m")
            return KeepNOfM(n, m)
    elif isinstance(given, Sequence) and len(given) == 2 and given[0] == "block":
        size = given[1]
        if (
            isinstance(size, Sequence)
            and len(size) == 2
            and all(isinstance(one, int) and one > 0 for one in size)
        ):
            return _blocks(size[0], size[1])
    raise ValueError(f"granularity={given!r}: valid are {_VALID}")
