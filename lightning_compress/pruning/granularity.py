"""Granularities: which weights are pruned together, from single weights to whole channels."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_compress.pruning.layout import Layout
from lightning_compress.pruning.n_of_m import KeepNOfM
from lightning_compress.pruning.units import Granularity, Units

__all__ = ["GRANULARITIES", "make_granularity"]

_VALID = (
    "'unstructured', 'row', 'column', 'channel', 'filter', 'n:m' such as '2:4', ('block', (r, c))"
)


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
