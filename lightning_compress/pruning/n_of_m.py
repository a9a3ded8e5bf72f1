"""Semi-structured sparsity: n of every m neighbours stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.pruning.layout import Layout
from lightning_compress.pruning.units import Units

__all__ = ["KeepNOfM"]

_CHUNK = 1 << 20  # elements sorted at once: bounds the extra memory of an event


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
