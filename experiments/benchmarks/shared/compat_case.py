"""What a row of the compatibility table is made of: a project, its data, and what it ships."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import softplus

__all__ = ["OWN", "Adversarial", "Case", "Project", "batches_like"]

OWN = "own model of its structure"
Part = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A project.

    Args:
        name: of the project.
        source: where its network comes from: the package, or `OWN`.
        build: a fresh LightningModule as the project has it.
        part: what it ships, and inputs that this is called with.
        batches: of a training run, some eight; again from the start at each call.
        judges: paths of networks that are training equipment.
        batch: the one batch size of its files, where its forward takes settings from it.
    """

    name: str
    source: str
    build: Callable[[], LightningModule]
    part: Callable[[Any], Part]
    batches: Callable[[], Iterable[Any]]
    judges: Sequence[str] = ()
    batch: int | None = None


class Project(LightningModule):
    """Networks under the names that a project gives them, and one loss.

    Args:
        loss: of (self, batch).
        networks: attributes.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor], **networks: nn.Module) -> None:
        super().__init__()
        for name, network in networks.items():
            setattr(self, name, network)
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ARG002
        """The loss of one optimizer."""
        return self.loss(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of all that trains."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Adversarial(LightningModule):
    """Generators and judges under the names that a project gives them; two optimizers.

    Args:
        generate: (self, batch) -> (what the judges see of it, the real ones); a pair a judge.
        generators: attributes that draw.
        judges: attributes that judge.
        extra: a loss that is added for the generators, of (self, batch).
    """

    def __init__(
        self,
        generate: Callable[[Any, Any], list[tuple[Tensor, Tensor]]],
        generators: dict[str, nn.Module],
        judges: dict[str, nn.Module],
        extra: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        for name, network in {**generators, **judges}.items():
            setattr(self, name, network)
        self.generate, self.extra = generate, extra
        self.sides = tuple(generators), tuple(judges)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """A step of the judges, one of the generators."""
        g_optimizer, d_optimizer = self.optimizers()  # type: ignore[misc]
        judges = [getattr(self, name) for name in self.sides[1]]
        pairs = self.generate(self, batch)
        d_loss = torch.stack(
            [
                (softplus(-judge(real)) + softplus(judge(fake.detach()))).mean()
                for judge, (fake, real) in zip(judges, pairs, strict=True)
            ]
        ).sum()
        d_optimizer.zero_grad()
        self.manual_backward(d_loss)
        d_optimizer.step()
        scores = [
            softplus(-judge(fake)).mean() for judge, (fake, _) in zip(judges, pairs, strict=True)
        ]
        g_loss = torch.stack(scores).sum()
        if self.extra is not None:
            g_loss = g_loss + self.extra(self, batch)
        g_optimizer.zero_grad()
        self.manual_backward(g_loss)
        g_optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One for the generators, one for the judges."""
        return [
            torch.optim.Adam(
                [p for name in side for p in getattr(self, name).parameters()], lr=1e-3
            )
            for side in self.sides
        ]


def batches_like(*shapes: Sequence[int], count: int = 8) -> Callable[[], list[tuple[Tensor, ...]]]:
    """Batches of smooth random fields in [-1, 1], of these shapes, the same at each call."""

    def make() -> list[tuple[Tensor, ...]]:
        source = torch.Generator().manual_seed(0)
        return [
            tuple(
                torch.randn(*shape, generator=source).cumsum(-1).mul(0.3).tanh() for shape in shapes
            )
            for _ in range(count)
        ]

    return make
