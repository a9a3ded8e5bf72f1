"""What a pair asks for: losses by name, or objects that need more than two outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.losses import (
    bernoulli_kl,
    cross_entropy,
    gaussian_kl,
    kl_divergence,
    l1,
    mse,
)
from lightning_compress.distillation.relations import (
    attention_transfer,
    linear_cka,
    similarity_preserving,
)
from lightning_compress.distillation.sequences import step_kl
from lightning_compress.errors import TargetError

__all__ = ["LOSSES", "Call", "FunctionLoss", "Loss", "StepKL", "make_losses", "tensors_of"]


@dataclass(frozen=True)
class Call:
    """What both modules gave for the same inputs: detached float32 copies, the student's leaves.

    Args:
        student: the student's output, in its own structure.
        teacher: the teacher's output, in its own structure.
        inputs: what the student's module received, by position.
    """

    student: Any
    teacher: Any
    inputs: tuple[Any, ...] = ()


class Loss:
    """A loss of a `Call`; subclasses may look up networks of the teacher in `bind`."""

    name = "loss"
    same_shape = True  # the two sides must be equal in shape, if need be by an adapter

    def bind(self, teacher: nn.Module) -> None:
        """Find what the loss needs inside the frozen teacher; called once, before training."""

    def release(self) -> None:
        """Let go of what `bind` found."""

    def __call__(self, call: Call) -> Tensor:
        """The loss, a scalar."""
        raise NotImplementedError


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of an output: itself, or those of a tuple, list or mapping."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    return [part for part in parts if isinstance(part, Tensor)]


class FunctionLoss(Loss):
    """A function of (student output, teacher output); `each`: of each tensor in them, added up.

    >>> FunctionLoss(mse)(Call(torch.zeros(2), torch.ones(2))).item()
    1.0
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        name: str | None = None,
        each: bool = True,
        same_shape: bool = True,
        **options: Any,
    ) -> None:
        self.function, self.each, self.same_shape, self.options = (
            function,
            each,
            same_shape,
            options,
        )
        self.name = name or getattr(function, "__name__", type(function).__name__)

    def __call__(self, call: Call) -> Tensor:
        """The function's value."""
        if not self.each:
            return self.function(call.student, call.teacher, **self.options)
        sides = zip(tensors_of(call.student), tensors_of(call.teacher), strict=True)
        values = [self.function(ours, theirs, **self.options) for ours, theirs in sides]
        return torch.stack(values).sum()


class StepKL(Loss):
    """`step_kl` on the first output of a decoder whose first input are tokens (N, T).

    Steps whose input is padding or the end token predict padding alone and count nothing.

    Args:
        temperature: T, above 0.
        over: tokens after which nothing is predicted: pad and end.
    """

    name = "step_kl"
    same_shape = False  # the states beside the logits have each side's own size

    def __init__(self, *, temperature: float = 1.0, over: Sequence[int] = (0, 2)) -> None:
        self.temperature, self.over = temperature, tuple(over)

    def __call__(self, call: Call) -> Tensor:
        """The loss, in nats a sequence."""
        tokens = call.inputs[0]
        keep = torch.ones_like(tokens, dtype=torch.bool)
        for token in self.over:
            keep &= tokens != token
        ours, theirs = tensors_of(call.student)[0], tensors_of(call.teacher)[0]
        return step_kl(ours, theirs, keep=keep, temperature=self.temperature)


LOSSES: dict[str, Callable[[float], Loss]] = {
    "mse": lambda _: FunctionLoss(mse),
    "l1": lambda _: FunctionLoss(l1),
    "cross_entropy": lambda t: FunctionLoss(cross_entropy, temperature=t),
    "kl": lambda t: FunctionLoss(kl_divergence, name="kl", temperature=t),
    "bernoulli_kl": lambda t: FunctionLoss(bernoulli_kl, temperature=t),
    "gaussian_kl": lambda _: FunctionLoss(gaussian_kl, each=False),
    "attention": lambda _: FunctionLoss(attention_transfer, name="attention", same_shape=False),
    "similarity": lambda _: FunctionLoss(
        similarity_preserving, name="similarity", same_shape=False
    ),
    "cka": lambda _: FunctionLoss(linear_cka, name="cka", same_shape=False),
    "step_kl": lambda t: StepKL(temperature=t),
}

LossSpec = str | Loss | Callable[..., Tensor]


def make_losses(given: Any, *, temperature: float = 1.0) -> list[tuple[Loss, float]]:
    """Losses and their weights.

    Args:
        given: a name in `LOSSES`, a `Loss`, a function of (student output, teacher output), a
            sequence of these, a mapping from names to weights, or None for no loss.
        temperature: of the losses that are given by name and have one.

    Raises:
        ValueError: for an unknown name, with the valid ones.

    >>> [(loss.name, weight) for loss, weight in make_losses({"mse": 1.0, "l1": 0.5})]
    [('mse', 1.0), ('l1', 0.5)]
    """
    if given is None:
        return []
    if isinstance(given, Mapping):
        return [(_one(spec, temperature), float(weight)) for spec, weight in given.items()]
    several = isinstance(given, Sequence) and not isinstance(given, str)
    return [(_one(spec, temperature), 1.0) for spec in (given if several else [given])]


def _one(spec: Any, temperature: float) -> Loss:
    if isinstance(spec, Loss):
        return spec
    if isinstance(spec, str):
        if spec not in LOSSES:
            raise ValueError(f"loss={spec!r}: valid are {list(LOSSES)}, a Loss or a function")
        return LOSSES[spec](temperature)
    if callable(spec):
        function: Callable[..., Any] = spec
        options: dict[str, Any] = {"each": False, "same_shape": False}
        if "temperature" in inspect.signature(function).parameters:
            options["temperature"] = temperature
        return FunctionLoss(function, **options)
    raise TargetError(f"loss={spec!r}: give a name in {list(LOSSES)}, a Loss or a function")
