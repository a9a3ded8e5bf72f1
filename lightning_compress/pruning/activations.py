"""Criteria that look at activations: what goes into a weight, and what comes out of its unit."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.projection import Slot
from lightning_compress.pruning.inputs import Call, weight_name
from lightning_compress.pruning.statistics import ForwardStatistics

__all__ = ["InputActivation", "OutputActivation"]


class InputActivation(ForwardStatistics):
    """|w| times the norm of its input, ||x||_2 over the window: Wanda (Sun et al. 2023).

    https://arxiv.org/abs/2306.11695. In a convolution x is what meets this kernel tap, over
    all output positions; in an embedding, the norm is the root of how often the row was used.

    >>> InputActivation(window=20).window
    20
    """

    def __init__(self, *, window: int = 10) -> None:
        super().__init__(window=window)

    def _blank(self, slot: Slot, matrix: Tensor) -> Tensor:  # noqa: ARG002
        return matrix.new_zeros(matrix.shape[0], matrix.shape[2], dtype=torch.float32)

    def _seen(self, slot: Slot, call: Call) -> Tensor | None:
        inputs = call.inputs(weight_name(slot))
        return None if inputs is None else inputs.energy()

    def _score(self, slot: Slot, sums: Tensor, calls: int) -> Tensor:  # noqa: ARG002
        return self._weight(slot, self._matrix(slot).abs() * sums.sqrt().unsqueeze(1))


class OutputActivation(ForwardStatistics):
    """|w| times the mean absolute output of its unit, before any activation that follows.

    The unit of a recurrent weight is the hidden state that its gate's row belongs to.

    >>> OutputActivation().window
    10
    """

    def __init__(self, *, window: int = 10) -> None:
        super().__init__(window=window)

    def _blank(self, slot: Slot, matrix: Tensor) -> Tensor:  # noqa: ARG002
        return matrix.new_zeros(matrix.shape[0], matrix.shape[1], dtype=torch.float32)

    def _seen(self, slot: Slot, call: Call) -> Tensor | None:
        outputs = call.outputs(weight_name(slot))
        if outputs is None:
            return None
        return outputs.detach().float().abs().mean(0).view_as(self._sums[slot.path])

    def _score(self, slot: Slot, sums: Tensor, calls: int) -> Tensor:
        return self._weight(slot, self._matrix(slot).abs() * (sums / calls).unsqueeze(2))
