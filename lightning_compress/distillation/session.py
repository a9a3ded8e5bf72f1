"""All pairs of one fit: their hooks, clocks and adapters, and the state that a resume needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.distillation.graft import Graft
from lightning_compress.distillation.hooks import Hook
from lightning_compress.distillation.inputs import sample_inputs
from lightning_compress.distillation.link import Link
from lightning_compress.distillation.pairs import Pair
from lightning_compress.distillation.prior import PriorDraws
from lightning_compress.distillation.teachers import LiveTeacher
from lightning_compress.errors import TargetError

__all__ = ["Session"]

_SILENT = (
    "its module was never called: does the training step call the module itself, not its "
    "`.forward()`?",
    "no gradient reached it in Lightning's backward pass: does a manual training step call "
    "`self.manual_backward(loss)` rather than `loss.backward()`?",
)


class Session:
    """The pairs of a student and its teacher while they are hooked.

    Args:
        pairs: what is compared, with the teacher's paths.
        student: the model in training.
        teacher: the teacher, prepared.
        live: what changes the teacher, if it changes.
        temperature: of the losses that are given by name.
        balance: whether gradients are scaled to the norm of the user's.
        rank: of this process: each draws its own prior samples.

    Raises:
        TargetError: for paths that lead nowhere, and sizes that do not match.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        student: nn.Module,
        teacher: nn.Module,
        *,
        live: LiveTeacher | None = None,
        temperature: float = 1.0,
        balance: bool = False,
        rank: int = 0,
    ) -> None:
        self.teacher, self.live = teacher, live
        self.links = [Link(pair, student, teacher, temperature=temperature) for pair in pairs]
        self.priors = [
            PriorDraws(pair.prior, seed=1_000_003 * rank + index) if pair.prior else None
            for index, pair in enumerate(pairs)
        ]
        self.steps = [0] * len(self.links)
        self._optimizers: list[torch.optim.Adam | None] = [None] * len(self.links)
        self._handles: list[RemovableHandle] = []
        self.grafts: list[Graft] = []
        for link, prior in zip(self.links, self.priors, strict=True):
            inputs = sample_inputs(student, link.pair.student, link.student)
            if inputs is not None:
                if prior is not None:
                    PriorDraws(1, seed=0)(tuple(inputs))
                link.probe(inputs)
            elif link.pair.features:
                raise TargetError(
                    f"the pair of {link.pair.student!r} has features, whose sizes are not known: "
                    "set example_input_array, or parts(), of the LightningModule"
                )
            self.grafts.append(self._graft(link, prior, balance))

    @staticmethod
    def _graft(link: Link, prior: PriorDraws | None, balance: bool) -> Graft:
        return Graft(
            link.student,
            link.evaluate,
            path=link.pair.student,
            taps=[ours for ours, _ in link.pair.features],
            adapters=list(link.adapters.parameters()),
            prior=prior,
            balance=balance,
        )

    def attach(self, optimizers: Sequence[Optimizer], *, adapter_lr: float) -> None:
        """Hook the optimizer of each student module: its steps are the clock.

        Raises:
            TargetError: when no optimizer trains a student's module.
        """
        for index, link in enumerate(self.links):
            owner = _owner(link.student, optimizers)
            if owner is None:
                raise TargetError(f"no optimizer trains {link.pair.student!r}: nothing to teach")
            if link.adapters:
                self._optimizers[index] = torch.optim.Adam(link.adapters.parameters(), adapter_lr)
            self._handles.append(owner.register_step_post_hook(Hook(self._stepper(index))))

    def _stepper(self, index: int) -> Any:
        def after(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            self.steps[index] += 1
            if (adapters := self._optimizers[index]) is not None:
                _average_gradients(self.links[index].adapters)
                adapters.step()
                adapters.zero_grad()
            if self.live is not None:
                self.live.on_step([(self.links[index].student, self.links[index].teacher)])

        return after

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters of all adapters."""
        return [parameter for link in self.links for parameter in link.adapters.parameters()]

    def begin_batch(self, batch: Any, index: int) -> None:
        """Carry the calls of a batch, where the weight is above 0."""
        if self.live is not None:
            self.live.on_batch(batch, index)
        for link, graft in zip(self.links, self.grafts, strict=True):
            graft.begin_batch(active=link.weight > 0)

    def end_batch(self) -> None:
        """Carry nothing more."""
        for graft in self.grafts:
            graft.begin_batch(active=False)

    def begin_backward(self, *, scale: float, share: float) -> None:
        """Inject from now on; see `Graft.begin_backward`."""
        for graft in self.grafts:
            graft.begin_backward(scale=scale, share=share)

    def end_backward(self) -> None:
        """Inject no more."""
        for graft in self.grafts:
            graft.end_backward()

    def read_values(self) -> dict[str, Tensor]:
        """Mean of each loss since it was last read, by name."""
        found = {}
        for graft in self.grafts:
            found |= {name: torch.stack(values).mean() for name, values in graft.values.items()}
            graft.values = {}
        return found

    def silent(self) -> list[tuple[str, str]]:
        """Paths of pairs that should have taught and did not, and why."""
        return [
            (link.pair.student, _SILENT[graft.calls > 0])
            for link, graft in zip(self.links, self.grafts, strict=True)
            if link.weight > 0 and graft.injections == 0
        ]

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        for one in (*self.grafts, *self.links):
            one.remove()

    def state_dict(self) -> dict[str, Any]:
        """Clocks, adapters and their optimizers, streams, and a teacher that changes."""
        state: dict[str, Any] = {
            "steps": list(self.steps),
            "adapters": [link.adapters.state_dict() for link in self.links],
            "optimizers": [one and one.state_dict() for one in self._optimizers],
            "priors": [one and one.generator.get_state() for one in self.priors],
        }
        if self.live is not None:
            state["teacher"] = self.teacher.state_dict()
            state["live"] = self.live.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put everything back.

        Raises:
            TargetError: for the state of other pairs.
        """
        if len(state["steps"]) != len(self.links):
            raise TargetError(
                f"the checkpoint distilled {len(state['steps'])} pairs, this run {len(self.links)}"
            )
        self.steps = list(state["steps"])
        for index, link in enumerate(self.links):
            link.adapters.load_state_dict(state["adapters"][index])
            if (optimizer := self._optimizers[index]) is not None:
                optimizer.load_state_dict(state["optimizers"][index])
            if (prior := self.priors[index]) is not None:
                prior.generator.set_state(state["priors"][index].cpu())
        if self.live is not None:
            self.teacher.load_state_dict(state["teacher"])
            self.live.load_state_dict(state["live"])


def _owner(module: nn.Module, optimizers: Sequence[Optimizer]) -> Optimizer | None:
    own = {id(parameter) for parameter in module.parameters()}
    for optimizer in optimizers:
        if any(id(one) in own for group in optimizer.param_groups for one in group["params"]):
            return optimizer
    return None


def _average_gradients(adapters: nn.Module) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for parameter in adapters.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= torch.distributed.get_world_size()
