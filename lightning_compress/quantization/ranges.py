"""Range observers: the range that a grid covers, of one tensor or over many batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.fast_tensors import all_finite, row_bounds
from lightning_compress.grids import AffineGrid, check_bits, grid_of_range
from lightning_compress.quantization.learned_step import double_of
from lightning_compress.sharding import UNSHARDED, Partition

__all__ = [
    "OBSERVERS",
    "RangeObserver",
    "affine_grid",
    "find_range",
    "merge_ranges",
    "minmax_range",
    "mse_range",
    "percentile_range",
]
OBSERVERS = ("minmax", "moving_average", "percentile", "mse")
PERCENTILE = 0.999  # of the values that the range holds, half of the rest on either side
MOMENTUM = 0.05  # share of a step's new range in a moving average
MOST_VALUES = 2**16  # of an activation that percentile and mse look at
_CANDIDATES = 32  # ranges that mse tries: from 1/32 of the full one to all of it
Range = tuple[Tensor, Tensor]


def _rows(values: Tensor, axis: int | None) -> Tensor:
    values = values.detach().to(torch.float32)
    return values.reshape(1, -1) if axis is None else values.transpose(0, axis).flatten(1)


def minmax_range(
    values: Tensor, axis: int | None = None, *, partition: Partition = UNSHARDED, check: bool = True
) -> Range:
    """Smallest and largest value, widened to hold 0, each of shape (1,) or (size of axis,).

    Args:
        values: any tensor.
        axis: one range for each index of it; None: one for all.
        partition: over which processes, when these are one process's rows: ranges are the whole's.
        check: look whether all is finite, for which another device has to be waited for.

    Raises:
        ValueError: when a value is not finite.

    >>> minmax_range(torch.tensor([[1.0, 2.0], [-3.0, 0.5]]), axis=0)
    (tensor([ 0., -3.]), tensor([2.0000, 0.5000]))
    """
    bounds = _bounds(_rows(values, axis))
    if partition is UNSHARDED and check:
        return _checked(bounds, check=check)
    # Comparisons would lose a NaN: all processes must see it, to end alike.
    bounds = bounds.masked_fill(~torch.isfinite(bounds), -torch.inf)
    return _checked(partition.all_reduce_min(partition.widen(bounds, axis)), check=check)


def _bounds(rows: Tensor) -> Tensor:
    """The smallest value of each row, and the largest times -1: (2, rows)."""
    if rows.shape[1] == 0:
        return rows.new_zeros(2, rows.shape[0])
    low, high = row_bounds(rows)  # a NaN shows in both
    return torch.stack([low, -high])


def _checked(bounds: Tensor, *, check: bool) -> Range:
    if check and not all_finite(bounds):
        raise ValueError("cannot find the range of values that are NaN or infinite")
    return bounds[0].clamp(max=0), (-bounds[1]).clamp(min=0)


def _extremes(rows: Tensor, *, check: bool) -> Range:
    return _checked(_bounds(rows), check=check)


def percentile_range(
    values: Tensor,
    axis: int | None = None,
    *,
    percentile: float = PERCENTILE,
    check: bool = True,
) -> Range:
    """Range that holds a fraction of the values, the rest cut evenly from both ends.

    Args:
        values: any tensor.
        axis: one range for each index of it; None: one for all.
        percentile: the fraction inside, in (0, 1].
        check: see `minmax_range`.

    Raises:
        ValueError: when a value is not finite.

    >>> percentile_range(torch.arange(-500.0, 501.0), percentile=0.9)
    (tensor([-450.]), tensor([450.]))
    """
    rows = _rows(values, axis)
    extremes, size = _extremes(rows, check=check), rows.shape[1]
    if size == 0:
        return extremes
    tail = (1 - percentile) / 2
    ordered = rows.sort(dim=1).values
    first, last = round(tail * (size - 1)), round((1 - tail) * (size - 1))
    return ordered[:, first].clamp(max=0), ordered[:, last].clamp(min=0)


def mse_range(
    values: Tensor,
    axis: int | None = None,
    *,
    bits: int = 8,
    symmetric: bool = True,
    check: bool = True,
) -> Range:
    """The share of the min/max range whose grid gives the smallest squared error.

    Both ends shrink alike, in 32 steps, for each index of `axis` by itself (a grid search, as in
    Nagel et al. 2021, arXiv:2106.08295, section 3.1).

    Raises:
        ValueError: when a value is not finite.

    >>> values = torch.cat([torch.linspace(-1, 1, 1000), torch.tensor([4.0])])
    >>> [bound.item() for bound in mse_range(values, bits=2)]
    [-0.625, 0.625]
    """
    rows = _rows(values, axis)
    low, high = _extremes(rows, check=check)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    if rows.shape[1] == 0:
        return low, high
    levels = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    best, found = torch.full_like(high, torch.inf), torch.ones_like(high)
    for part in torch.arange(_CANDIDATES, 0, -1) / _CANDIDATES:
        error = _squared_error(rows, part * low, part * high, levels, symmetric=symmetric)
        found = torch.where(error < best, part, found)
        best = torch.minimum(error, best)
    return found * low, found * high


def _squared_error(
    rows: Tensor, low: Tensor, high: Tensor, levels: int, *, symmetric: bool
) -> Tensor:
    scale = ((high if symmetric else high - low) / levels).clamp(min=torch.finfo().tiny)[:, None]
    least = torch.full_like(scale, -levels) if symmetric else -torch.round(-low[:, None] / scale)
    most = least + (2 * levels if symmetric else levels)
    steps = torch.round(rows / scale).clamp_(least, most)
    return (steps.mul_(scale) - rows).square_().sum(dim=1)


def find_range(
    observer: str,
    values: Tensor,
    axis: int | None = None,
    *,
    bits: int = 8,
    symmetric: bool = True,
    percentile: float = PERCENTILE,
    check: bool = True,
) -> Range:
    """Range of one tensor after an observer's name; a moving average starts as min/max.

    >>> find_range("moving_average", torch.tensor([-1.0, 3.0]))
    (tensor([-1.]), tensor([3.]))
    """
    if observer == "percentile":
        return percentile_range(values, axis, percentile=percentile, check=check)
    if observer == "mse":
        return mse_range(values, axis, bits=bits, symmetric=symmetric, check=check)
    return minmax_range(values, axis, check=check)


class RangeObserver:
    """The range of a tensor that is seen again and again, such as an activation.

    `observe` gathers, `merge_ranges` takes what was gathered into the range: once an optimizer
    step, so that all forward passes of a step, on all processes, use the same range. "minmax"
    widens, the others go on as moving averages.

    Args:
        observer: a name in `OBSERVERS`.
        bits: of the grid, for "mse".
        percentile: the fraction of the values that the range holds, for "percentile".

    >>> one = RangeObserver("minmax")
    >>> one.observe(torch.tensor([1.0, 2.0])), one.observe(torch.tensor([-1.0]))
    (None, None)
    >>> merge_ranges([one])
    >>> one.range
    (-1.0, 2.0)
    """

    def __init__(self, observer: str, bits: int = 8, *, percentile: float = PERCENTILE) -> None:
        self.observer, self.bits, self.percentile = observer, bits, percentile
        self.bounds: Tensor | None = None  # (2,) where the values are: low, high
        self.gathered: Tensor | None = None  # low, -high, number of tensors

    @property
    def range(self) -> tuple[float, float] | None:
        """The range as numbers, for which the values' device is waited for."""
        if self.bounds is None:
            return None
        low, high = self.bounds.tolist()
        return low, high

    @range.setter  # noqa: A003
    def range(self, found: tuple[float, float] | None) -> None:
        self.bounds = None if found is None else torch.tensor(found, dtype=torch.float64)

    @property
    def extreme(self) -> bool:
        """Whether gathered ranges are joined by the extremes, not by the mean."""
        return self.observer in ("minmax", "moving_average")

    def observe(self, values: Tensor) -> None:
        """Gather a tensor; an empty one is nothing.

        Raises:
            ValueError: when a value in the CPU's memory is not finite; elsewhere the range shows it
                once it is read, as no step waits for another device.
        """
        if values.numel() == 0:
            return
        flat = values.detach().reshape(-1)
        if not self.extreme:
            flat = flat[:: max(1, flat.numel() // MOST_VALUES)]
        here = values.device.type == "cpu"
        low, high = find_range(
            self.observer,
            flat,
            bits=self.bits,
            symmetric=False,
            percentile=self.percentile,
            check=here,
        )
        new = torch.cat([low, -high, torch.ones_like(low)])
        if self.gathered is None:
            self.gathered = new
        elif self.extreme:
            bounds = torch.minimum(self.gathered, new)[:2]
            self.gathered = torch.cat([bounds, (self.gathered + new)[2:]])
        else:
            self.gathered = self.gathered + new

    def take(self, low: Tensor | float, high: Tensor | float) -> None:
        """Take a step's range into the range."""
        self._take(torch.stack([torch.as_tensor(low), torch.as_tensor(high)]))

    def _take(self, new: Tensor) -> None:
        new = new.to(double_of(new))
        if self.bounds is None:
            self.bounds = new
            return
        old = self.bounds.to(new.device)
        if self.observer == "minmax":
            self.bounds = torch.stack([torch.minimum(old, new)[0], torch.maximum(old, new)[1]])
        else:
            self.bounds = old + MOMENTUM * (new - old)

    def take_own(self) -> None:
        """Take the ranges that this process alone has gathered."""
        gathered = self.gathered
        assert gathered is not None
        if gathered.device.type != "cpu":
            self.take_row(gathered, seen=True)
            return
        self.gathered = None  # numbers of Python are doubles, as the bounds are
        low, negative, count = gathered.tolist()
        share = 1.0 if self.extreme else count
        low, high = low / share, -negative / share
        if (old := self.range) is not None:
            if self.observer == "minmax":
                low, high = min(old[0], low), max(old[1], high)
            else:
                low = old[0] + MOMENTUM * (low - old[0])
                high = old[1] + MOMENTUM * (high - old[1])
            if (low, high) == old:  # the same bounds, so that their grid counts on
                return
        self.range = (low, high)

    def take_row(self, row: Tensor, *, seen: bool | None) -> None:
        """Return and clear the gathered ranges: low, -high and the number of tensors.

        Args:
            row: of all processes together.
            seen: whether there was any tensor; None: only the row knows, where it is.
        """
        self.gathered = None
        if seen is False:
            return
        row = row.to(double_of(row))
        share = torch.ones_like(row[2]) if self.extreme else row[2]
        before = self.bounds
        self._take(torch.stack([row[0] / share, -row[1] / share]))
        if seen is None and before is not None and self.bounds is not None:
            self.bounds = torch.where(row[2] > 0, self.bounds, before.to(self.bounds.device))

    def state_dict(self) -> dict[str, Any]:
        """The range, and the gathered ranges."""
        return {"range": self.range, "gathered": self.gathered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self.range = None if state["range"] is None else tuple(state["range"])
        self.gathered = state["gathered"]


def merge_ranges(
    observers: Sequence[RangeObserver], reduce: Callable[[Tensor, str], Tensor] | None = None
) -> None:
    """Merge the gathered ranges of observers of one kind into their ranges.

    Args:
        observers: all of one kind.
        reduce: joins a tensor over processes by "min" or "sum"; all of them must call alike.
    """
    if not observers:
        return
    waiting = [one for one in observers if one.gathered is not None]
    if reduce is None:
        for one in waiting:
            one.take_own()
        return
    device = waiting[0].gathered.device if waiting else torch.device("cpu")  # type: ignore[union-attr]
    nothing = torch.zeros(3, device=device)
    rows = torch.stack(
        [nothing if o.gathered is None else o.gathered.to(device) for o in observers]
    )
    extreme = observers[0].extreme
    bounds = reduce(rows[:, :2].contiguous(), "min" if extreme else "sum")
    rows = torch.cat([bounds, reduce(rows[:, 2:].contiguous(), "sum")], dim=1)
    # Until each has a range, whether there is one must be known here; afterwards nobody waits.
    fresh = any(one.bounds is None for one in observers) or device.type == "cpu"
    seen = [count > 0 for count in rows[:, 2].tolist()] if fresh else [None] * len(observers)
    for observer, row, known in zip(observers, rows.unbind(), seen, strict=True):
        observer.take_row(row, seen=known)


def affine_grid(
    weight: Tensor,
    *,
    bits: int = 8,
    symmetric: bool = True,
    axis: int | None = None,
    observer: str = "minmax",
) -> AffineGrid:
    """Grid over the range of a weight, for the tensor or for each index of `axis`.

    A range of zero width (an all-zero channel) gets the step 1, so that zero stays zero.

    Args:
        weight: any tensor.
        bits: 2 to 8.
        symmetric: around 0, else from the lowest to the highest value.
        axis: one scale for each index of it; None: one for all.
        observer: what finds the range, a name in `OBSERVERS`.

    Raises:
        ValueError: for bits outside 2 to 8, or weights that are not finite.

    >>> affine_grid(torch.tensor([-1.0, 0.0, 7.0]), bits=4).scale
    tensor([1.])
    """
    check_bits("bits", bits)
    low, high = find_range(observer, weight, axis, bits=bits, symmetric=symmetric)
    return grid_of_range(low, high, bits=bits, symmetric=symmetric, axis=axis)
