"""Codebook quantization: shared values of a weight, clustered and then trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_compress.grids import CodebookGrid
from lightning_compress.quantization.learned_step import Adam
from lightning_compress.sharding import UNSHARDED, Partition

__all__ = [
    "CodebookGrids",
    "centre_gradient",
    "cluster",
    "exact_centres",
    "lloyd_centres",
    "recluster",
]
Floats = NDArray[np.float64]
_MOST_POINTS = 1024  # of the exact search; more values are first put into so many bins
_MOST_WORK = 3e7  # centres * points^2 of the exact search
_MOST_ROUNDS = 100
_HALVINGS = 149  # to the smallest float32


def cluster(values: Tensor, count: int, *, weights: Tensor | None = None) -> Tensor:
    """Centres of a weight's values, of which one is 0.

    The sum of `weight * (value - nearest centre)^2` is smallest where the values, or bins of them,
    are few enough for an exact search (Wang & Song 2011, by dynamic programming); Lloyd's rounds
    over all values follow where they were binned, and start from the density of the values where
    there are too many. Zeros cost nothing and move no centre.

    Args:
        values: of any shape, finite.
        count: most centres, 2 to 256; there are fewer when the values are.
        weights: importance of each value, >= 0, of the same shape; None: all 1.

    Returns:
        Float32, rising, on the CPU.

    Raises:
        ValueError: for values that are not finite, or a count out of range.

    >>> cluster(torch.tensor([-1.1, -0.9, 0.0, 0.1, 2.0]), 3)
    tensor([-1.,  0.,  2.])
    """
    if not 2 <= count <= 256:
        raise ValueError(f"count={count!r}: valid are 2 to 256 centres")
    points, mass = _points(values, weights)
    if len(points) <= count - 1:
        return _as_grid(points)
    few, few_mass = _binned(points, mass)
    if count * len(few) ** 2 <= _MOST_WORK:
        centres = exact_centres(few, few_mass, count)
    else:
        # Centres lie as the cube root of the density where there are many (Panter & Dite 1951).
        width = np.gradient(few) if len(few) > 1 else np.ones(1)
        share = (np.cbrt(few_mass / width) * width).cumsum()
        ranks = (np.arange(count - 1) + 0.5) / (count - 1)
        spread = few[np.searchsorted(share, ranks * share[-1])]
        centres = np.unique(np.append(spread, 0.0))
    if len(few) < len(points) or count * len(few) ** 2 > _MOST_WORK:
        centres = lloyd_centres(points, mass, centres)
    return _as_grid(centres)


def recluster(values: Tensor, centres: Tensor) -> Tensor:
    """Lloyd's rounds from known centres, for values that have moved a little.

    >>> recluster(torch.tensor([1.2, 3.0, 3.2]), torch.tensor([0.0, 1.0, 3.0]))
    tensor([0.0000, 1.2000, 3.1000])
    """
    points, mass = _points(values, None)
    if len(points) == 0:
        return centres
    return _as_grid(lloyd_centres(points, mass, centres.cpu().double().numpy()))


def _points(values: Tensor, weights: Tensor | None) -> tuple[Floats, Floats]:
    """Rising different values other than 0, and their mass."""
    flat = values.detach().reshape(-1).cpu().double().numpy()
    if not np.isfinite(flat).all():
        raise ValueError("cannot cluster values that are NaN or infinite")
    mass = None if weights is None else weights.detach().reshape(-1).cpu().double().numpy()
    keep = flat != 0 if mass is None else (flat != 0) & (mass > 0)
    flat = flat[keep]
    if mass is None:
        points, counts = np.unique(flat, return_counts=True)
        return points, counts.astype(np.float64)
    points, index = np.unique(flat, return_inverse=True)
    return points, np.bincount(index, weights=mass[keep]).astype(np.float64)


def _binned(points: Floats, mass: Floats) -> tuple[Floats, Floats]:
    """At most `_MOST_POINTS` bins between the extremes: their means and masses."""
    if len(points) <= _MOST_POINTS:
        return points, mass
    width = (points[-1] - points[0]) / _MOST_POINTS
    index = np.minimum((points - points[0]) / width, _MOST_POINTS - 1).astype(np.int64)
    total = np.bincount(index, weights=mass).astype(np.float64)
    moment = np.bincount(index, weights=mass * points).astype(np.float64)
    return moment[total > 0] / total[total > 0], total[total > 0]


def _as_grid(centres: Floats) -> Tensor:
    """Rising different float32 numbers, 0 among them, at least two."""
    grid = torch.from_numpy(np.append(centres, 0.0)).float().unique()
    return grid if len(grid) > 1 else torch.tensor([0.0, 1.0])


def exact_centres(points: Floats, mass: Floats, count: int) -> Floats:
    """The best `count` centres, one of them 0, by dynamic programming over rising points.

    With k free centres, `free[j]` is the least cost of the first j points, and `zero[j]` that with
    the centre 0 besides. The last interval belongs to a free centre or, once, to 0.

    >>> exact_centres(np.array([-1.0, 3.0, 5.0]), np.ones(3), 2)
    array([0., 4.])
    """
    own, at_zero = _interval_costs(points, mass)
    free, zero = np.full(len(points) + 1, np.inf), at_zero[0]
    free[0] = 0.0
    steps: list[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]] = []
    for _ in range(count - 1):
        by_own = zero[:, None] + own
        by_free = free[:, None] + own
        free_from, free = by_free.argmin(0), by_free.min(0)
        by_zero = free[:, None] + at_zero
        takes_zero = by_zero.min(0) < by_own.min(0)
        # -1: the last interval is a free centre's; else where 0's begins
        zero_from = np.where(takes_zero, by_zero.argmin(0), -1)
        steps.append((free_from, by_own.argmin(0), zero_from))
        zero = np.minimum(by_zero.min(0), by_own.min(0))
    return _traced(points, mass, steps)


def _interval_costs(points: Floats, mass: Floats) -> tuple[Floats, Floats]:
    """Squared error of points i to j - 1 about their mean and about 0, infinite where i > j."""
    m, mx, mxx = (np.append(0.0, (mass * points**k).cumsum()) for k in range(3))
    weight, moment, square = (one[None, :] - one[:, None] for one in (m, mx, mxx))
    order = np.arange(len(points) + 1)
    valid = order[:, None] <= order[None, :]
    spread = np.maximum(square - moment**2 / np.where(weight > 0, weight, 1.0), 0.0)
    return np.where(valid, spread, np.inf), np.where(valid, square, np.inf)


def _traced(
    points: Floats,
    mass: Floats,
    steps: list[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]],
) -> Floats:
    """The centres of the best partition, read from its last interval to its first."""
    centres, end, zero_left = [0.0], len(points), True
    for free_from, own_from, zero_from in reversed(steps):
        if zero_left and zero_from[end] >= 0:
            end, zero_left = zero_from[end], False
        start = (own_from if zero_left else free_from)[end]
        if start < end:
            part = slice(start, end)
            centres.append(float((mass[part] * points[part]).sum() / mass[part].sum()))
        end = start
    return np.unique(centres)


def lloyd_centres(points: Floats, mass: Floats, centres: Floats) -> Floats:
    """Lloyd's rounds over rising points until nothing moves; the centre 0 stays.

    A centre that no point is nearest to stays where it is.

    >>> lloyd_centres(np.array([1.0, 2.0, 9.0]), np.ones(3), np.array([0.0, 4.0, 8.0]))
    array([0. , 1.5, 9. ])
    """
    total = np.append(0.0, mass.cumsum())
    moment = np.append(0.0, (mass * points).cumsum())
    for _ in range(_MOST_ROUNDS):
        edges = np.searchsorted(points, (centres[1:] + centres[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(points)]])
        weight, sums = np.diff(total[edges]), np.diff(moment[edges])
        means = np.where(weight > 0, sums / np.maximum(weight, 1e-300), centres)
        moved = np.where(centres == 0, 0.0, means)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def centre_gradient(gradient: Tensor, symbols: Tensor, grid: CodebookGrid) -> Tensor:
    """Gradient of each centre: the sum over the weights that share it; the centre 0 gets none.

    Han et al. 2016, arXiv:1510.00149, equation 3.

    Args:
        gradient: at the visible weight.
        symbols: the centre of each weight, as `grid.quantize` counts them.
        grid: the codebook.

    >>> grid = CodebookGrid(torch.tensor([-1.0, 0.0, 2.0]))
    >>> centre_gradient(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 1, 0]), grid)
    tensor([0., 0., 3.])
    """
    zero = grid.centres.to(gradient.device) == 0
    index = symbols.reshape(-1).long() + zero.to(torch.uint8).argmax()
    sums = torch.zeros(grid.centres.numel(), device=gradient.device)
    sums.index_add_(0, index, gradient.detach().reshape(-1).float())
    return sums.masked_fill_(zero, 0.0)


class CodebookGrids:
    """Weight quantizer of a k-means codebook, clustered again at events; frozen centres train.

    Until `freeze` the latent weights train straight through and events go on with Lloyd's rounds
    from the centres of before. Then each weight keeps its centre, and the centres follow their
    summed gradients. The centre 0 stays.

    Args:
        bits: 2 to 8, of `2^bits` centres.
        lr: change of a centre at an update, in units of the centres' rms.
        partition: over which processes: each clusters the whole weight, at events.

    >>> quantizer = CodebookGrids(bits=2, lr=0.001)
    >>> quantizer.start(torch.tensor([-1.0, 0.0, 3.0, 5.0]))
    >>> quantizer.grid(torch.zeros(1)).centres
    tensor([-1.,  0.,  3.,  5.])
    """

    def __init__(self, *, bits: int, lr: float, partition: Partition = UNSHARDED) -> None:
        self.bits, self.lr, self.partition = bits, lr, partition
        self.centres: Tensor | None = None
        self.frozen = False
        self._adam = Adam()
        self._gradient: Tensor | None = None
        self._symbols: Tensor | None = None

    def start(self, values: Tensor) -> None:
        """Cluster, unless an earlier fit did."""
        if self.centres is None:
            self.centres = self._clustered(values)

    def _clustered(self, values: Tensor) -> Tensor:
        return cluster(self.partition.whole(values), 2**self.bits).to(values.device)

    def grid(self, values: Tensor) -> CodebookGrid:
        """Current codebook."""
        centres = self._clustered(values) if self.centres is None else self.centres
        return CodebookGrid(centres.to(values.device))

    def gradient(self, gradient: Tensor, values: Tensor) -> None:
        """Keep the centres' gradient when they learn; the weights then get none."""
        if self.frozen:
            grid = self.grid(values)
            self._symbols = grid.quantize(values)
            self._gradient = self.partition.all_reduce_sum(
                centre_gradient(gradient, self._symbols, grid)
            )
            gradient.zero_()

    def step(self, values: Tensor, *, event: bool) -> Tensor | None:
        """Cluster again at an event; or move the centres, and the weights with them."""
        if self.centres is None:
            return None
        if not self.frozen:
            if event:
                centres = recluster(self.partition.whole(values), self.centres)
                self.centres = centres.to(values.device)
            return None
        if self._gradient is None or self._symbols is None:
            return None
        self._move(self._gradient)
        shared = self.grid(values).dequantize(self._symbols, values.dtype)
        self._gradient = self._symbols = None
        return shared

    def _move(self, gradient: Tensor) -> None:
        if self.centres is None:
            return
        centres = self.centres.to(gradient.device)
        finite = torch.isfinite(gradient).all()
        move = self.lr * centres.square().mean().sqrt() * self._adam.direction(gradient, finite)
        # Centres never pass one another: of the move, its half and so on, the first that keeps
        # their order; in the end nothing moves. All are tried at once, without asking the device.
        halves = 0.5 ** torch.arange(_HALVINGS, device=centres.device)
        moves = torch.cat([halves[:, None] * move, torch.zeros_like(move)[None]])
        rising = (torch.diff(centres - moves, dim=1) > 0).all(dim=1)
        first = rising.to(torch.uint8).argmax().reshape(1)
        moved = centres - moves.index_select(0, first)[0]
        self.centres = torch.where(finite, moved, centres)

    def freeze(self, values: Tensor) -> None:  # noqa: ARG002
        """Freeze the assignment of weights to centres."""
        self.frozen = True

    def thaw(self) -> None:
        """Cluster again."""
        self.frozen = False
        self._adam = Adam()

    def select(self, kept: Mapping[int, Tensor]) -> None:
        """One grid serves the whole weight: nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """Centres and moments."""
        return {"centres": self.centres, "frozen": self.frozen, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.centres, self.frozen = state["centres"], state["frozen"]
        self._adam.load_state_dict(state["adam"])
