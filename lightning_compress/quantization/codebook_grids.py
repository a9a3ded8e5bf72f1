"""Shared values of a weight: clustered while it trains, then trained themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_compress.quantization.clustering import cluster, recluster
from lightning_compress.quantization.codebooks import CodebookGrid
from lightning_compress.quantization.positive import Adam
from lightning_compress.sharding import ONE_PIECE, Spread

__all__ = ["CodebookGrids", "centre_gradient"]


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
    index = symbols.reshape(-1).long() + grid.zero_index
    sums = torch.zeros(grid.centres.numel(), device=gradient.device)
    sums.index_add_(0, index, gradient.detach().reshape(-1).float())
    sums[grid.zero_index] = 0.0
    return sums


class CodebookGrids:
    """A codebook by k-means, made anew at events; when frozen, its centres learn.

    Until `freeze` the latent weights train straight through and events go on with Lloyd's rounds
    from the centres of before. Then each weight keeps its centre, and the centres follow their
    summed gradients. The centre 0 stays.

    Args:
        bits: 2 to 8, of `2^bits` centres.
        lr: change of a centre at an update, in units of the centres' rms.
        spread: over which processes: each clusters the whole weight, at events.

    >>> maker = CodebookGrids(bits=2, lr=0.001)
    >>> maker.start(torch.tensor([-1.0, 0.0, 3.0, 5.0]))
    >>> maker.grid(torch.zeros(1)).centres
    tensor([-1.,  0.,  3.,  5.])
    """

    def __init__(self, *, bits: int, lr: float, spread: Spread = ONE_PIECE) -> None:
        self.bits, self.lr, self.spread = bits, lr, spread
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
        return cluster(self.spread.whole(values), 2**self.bits)

    def grid(self, values: Tensor) -> CodebookGrid:
        """The codebook of now."""
        centres = self._clustered(values) if self.centres is None else self.centres
        return CodebookGrid(centres.to(values.device))

    def gradient(self, gradient: Tensor, values: Tensor) -> None:
        """Keep the centres' gradient when they learn; the weights then get none."""
        if self.frozen:
            grid = self.grid(values)
            self._symbols = grid.quantize(values)
            self._gradient = self.spread.sum(centre_gradient(gradient, self._symbols, grid))
            gradient.zero_()

    def step(self, values: Tensor, *, event: bool) -> Tensor | None:
        """Cluster again at an event; or move the centres, and the weights with them."""
        if self.centres is None:
            return None
        if not self.frozen:
            if event:
                self.centres = recluster(self.spread.whole(values), self.centres)
            return None
        if self._gradient is None or self._symbols is None:
            return None
        self._move(self._gradient.cpu())
        shared = self.grid(values).dequantize(self._symbols, values.dtype)
        self._gradient = self._symbols = None
        return shared

    def _move(self, gradient: Tensor) -> None:
        if self.centres is None or not bool(torch.isfinite(gradient).all()):
            return
        move = self.lr * self.centres.square().mean().sqrt() * self._adam.direction(gradient)
        while not bool((torch.diff(self.centres - move) > 0).all()):
            move = move / 2  # centres never pass one another; in the end nothing moves
        self.centres = self.centres - move

    def freeze(self, values: Tensor) -> None:  # noqa: ARG002
        """Let each weight keep its centre."""
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
        """Put them back."""
        self.centres, self.frozen = state["centres"], state["frozen"]
        self._adam.load_state_dict(state["adam"])
