"""Rewinding: after each round of pruning, weights go back to what they were at an early step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.base import run_progress
from lightning_compress.projection import Projector, Slot

__all__ = ["Rewinder", "Rewinding"]


@dataclass(frozen=True, kw_only=True)
class Rewinding:
    """Where weights go back to when `GradualPruning` has raised the sparsity.

    The lottery ticket of Frankle & Carbin 2019, arXiv:1803.03635 (`to=0`), and the late rewinding
    of Frankle et al. 2020, arXiv:1912.05671. All parameters of the optimizers that own the targets
    go back, and the buffers of their layers, under the masks of now. Learning-rate schedules do
    not: keep the rate constant, or let it repeat in each round.

    Args:
        to: int: steps of the owning optimizer; float in [0, 1]: fraction of the run.
        reset_optimizer: forget momenta too.

    Raises:
        ValueError: for a position out of range.

    >>> Rewinding(to=100).reset_optimizer
    True
    """

    to: float = 0
    reset_optimizer: bool = True

    def __post_init__(self) -> None:
        number = isinstance(self.to, (int, float)) and not isinstance(self.to, bool)
        if not number or self.to < 0 or (isinstance(self.to, float) and self.to > 1):
            raise ValueError(f"to={self.to!r}: steps (int) are >= 0, fractions lie in [0, 1]")

    @property
    def in_fractions(self) -> bool:
        """The unit of `to`."""
        return isinstance(self.to, float)


class Rewinder:
    """Keeps the weights of one step and puts them back.

    Args:
        plan: where to, and what else is reset.
        module: the module in training.
        slots: the targets: their optimizers' parameters are kept.
        optimizers: all optimizers.
        projector: knows the latent values of what is compressed.
    """

    def __init__(
        self,
        plan: Rewinding,
        module: nn.Module,
        slots: Sequence[Slot],
        optimizers: Sequence[Optimizer],
        projector: Projector,
    ) -> None:
        self.plan, self._projector = plan, projector
        wanted = {id(slot.parameter) for slot in slots}
        self._optimizers = [one for one in optimizers if wanted & _ids(one)]
        owned = set().union(*(_ids(one) for one in self._optimizers))
        self._parameters = {
            name: one for name, one in module.named_parameters() if id(one) in owned
        }
        self._slots = {id(slot.parameter): slot for slot in projector.slots.values()}
        self._buffers = {
            f"{path}.{name}" if path else name: buffer
            for path, layer in module.named_modules()
            if any(id(one) in owned for one in layer.parameters(recurse=False))
            for name, buffer in layer.named_buffers(recurse=False)
        }
        self.saved: dict[str, Tensor] | None = None

    def watch(self, trainer: Trainer, step: int) -> None:
        """Keep the weights of the position to go back to, when the run is there."""
        self.keep_once(run_progress(trainer) if self.plan.in_fractions else step)

    def keep_once(self, position: float) -> None:
        """Keep the weights of now, if the position to go back to is reached and none are kept."""
        if self.saved is None and position >= self.plan.to:
            self.save()

    @torch.no_grad()
    def save(self) -> None:
        """Keep the values of now."""
        self.saved = {name: self._values(one).clone() for name, one in self._parameters.items()}
        self.saved |= {name: buffer.clone() for name, buffer in self._buffers.items()}

    @torch.no_grad()
    def rewind(self) -> None:
        """Put the kept values back, under the masks of now.

        Raises:
            RuntimeError: when nothing was kept yet.
        """
        if self.saved is None:
            raise RuntimeError(
                f"pruning began before the weights of step to={self.plan.to!r} were kept: begin "
                "to prune later, or rewind to an earlier step"
            )
        for name, parameter in self._parameters.items():
            slot = self._slots.get(id(parameter))
            values = self.saved[name].to(parameter.device)
            if slot is None:
                parameter.copy_(values)
            else:
                slot.set_values(values)
        for name, buffer in self._buffers.items():
            buffer.copy_(self.saved[name])
        if self.plan.reset_optimizer:
            for optimizer in self._optimizers:
                optimizer.state.clear()
        self._projector.project()
        rank_zero_info(f"pruned weights go back to those of to={self.plan.to!r}")

    def _values(self, parameter: nn.Parameter) -> Tensor:
        slot = self._slots.get(id(parameter))
        return parameter.detach() if slot is None else slot.values()

    def state_dict(self) -> dict[str, Any]:
        """The kept values."""
        return {"saved": self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the kept values of a checkpoint in place."""
        self.saved = state["saved"]


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
