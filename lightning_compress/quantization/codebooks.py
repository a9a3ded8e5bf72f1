"""CodebookGrid: a weight takes one of a few shared values, of which one is 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CodebookGrid"]


@dataclass(frozen=True)
class CodebookGrid:
    """Shared values of a whole tensor (Han et al. 2016, arXiv:1510.00149, section 3).

    Args:
        centres: float32 of shape (K,), 2 <= K <= 256, strictly rising, finite; one of them is 0.

    >>> grid = CodebookGrid(torch.tensor([-1.0, 0.0, 0.5, 2.0]))
    >>> grid.quantize(torch.tensor([0.1, -3.0, 1.9])).tolist()
    [0, -1, 2]
    >>> grid.project(torch.tensor([0.1, -3.0, 1.9]))
    tensor([ 0., -1.,  2.])
    """

    centres: Tensor

    @property
    def axis(self) -> None:
        """One codebook serves the whole tensor."""
        return

    @property
    def bits(self) -> int:
        """Bits that tell the centres apart."""
        return max(1, (self.centres.numel() - 1).bit_length())

    @property
    def zero_index(self) -> int:
        """Where the centre 0 stands."""
        return int((self.centres == 0).nonzero()[0, 0])

    def quantize(self, weight: Tensor) -> Tensor:
        """Nearest centre of each weight, counted from the centre 0: int32, 0 means value 0."""
        centres = self.centres.to(weight.device)
        middles = (centres[1:] + centres[:-1]) / 2
        index = torch.bucketize(weight.detach().float(), middles)
        return (index - self.zero_index).to(torch.int32)

    def dequantize(self, symbols: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of what `quantize` returns."""
        centres = self.centres.to(symbols.device)
        return centres[symbols.long() + self.zero_index].to(dtype)

    def project(self, weight: Tensor) -> Tensor:
        """The centre nearest to each weight, in the weight's own dtype."""
        return self.dequantize(self.quantize(weight), weight.dtype)
