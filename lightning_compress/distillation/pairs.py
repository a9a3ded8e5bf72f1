"""Pairs of modules by path, one in the student and one in the teacher; weights and adapters."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.deployment import deployed_part
from lightning_compress.errors import TargetError
from lightning_compress.schedules import check_window
from lightning_compress.targets import clean_path

__all__ = [
    "ChannelAdapter",
    "Pair",
    "Ramp",
    "check_weight",
    "differing_axis",
    "find_module",
    "gradient_norm",
    "in_fractions",
    "inner_pair",
    "make_adapter",
    "make_pairs",
    "weight_at",
]
SHAPES = ("linear", "cosine")
Weight = float | Callable[[float], float]
Inputs = Callable[..., tuple[Any, ...]]
Wrap = Callable[[Any, Any], nn.Module]


class ChannelAdapter(nn.Module):
    """A linear map along one axis: for (N, C, H, W) and axis 1 a 1x1 convolution.

    >>> ChannelAdapter(1, 3, 5)(torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2, 5, 4, 4])
    """

    def __init__(self, axis: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.axis, self.map = axis, nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map the axis."""
        return self.map(x.movedim(self.axis, -1)).movedim(-1, self.axis)


def differing_axis(student: Sequence[int], teacher: Sequence[int], *, what: str) -> int | None:
    """The one axis behind the batch in which two shapes differ; None when they are equal.

    >>> differing_axis((2, 3, 4), (2, 5, 4), what="x")
    1

    Raises:
        TargetError: when more axes differ, or their number does.
    """
    pairs = list(zip(student[1:], teacher[1:], strict=False))
    axes = [axis for axis, (ours, theirs) in enumerate(pairs, 1) if ours != theirs]
    if len(student) != len(teacher) or len(axes) > 1:
        raise TargetError(
            f"{what}: the student gives {tuple(student)}, the teacher {tuple(teacher)}; a learned "
            "adapter maps one axis, and more than one differs: are latent and image sizes equal?"
        )
    return axes[0] if axes else None


def make_adapter(
    student: Sequence[int], teacher: Sequence[int], *, what: str, allowed: bool
) -> nn.Module | None:
    """The adapter that two shapes need, or None; weights drawn without moving random streams.

    Raises:
        TargetError: when one is needed and not allowed, or one axis is not enough.
    """
    axis = differing_axis(student, teacher, what=what)
    if axis is None:
        return None
    if not allowed:
        raise TargetError(
            f"{what}: the student gives {tuple(student)}, the teacher {tuple(teacher)}; for a loss "
            "that compares them give the pair adapter=True, or choose modules of equal sizes"
        )
    with torch.random.fork_rng([]):
        torch.manual_seed(student[axis] * 100_003 + teacher[axis])
        return ChannelAdapter(axis, student[axis], teacher[axis])


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A weight that goes from `initial` at `begin` to `final` at `end`: up, or annealed down.

    Args:
        initial: the value up to `begin`.
        final: the value from `end` on.
        begin: int: steps of the optimizer that owns the student; float: fraction of the run.
        end: in the same unit.
        shape: "linear" or "cosine".

    Raises:
        ValueError: for an empty window, mixed units, a negative weight, or another shape.

    >>> ramp = Ramp(initial=1.0, final=0.0, begin=0, end=10)
    >>> ramp(0), ramp(5), ramp(10), ramp(99)
    (1.0, 0.5, 0.0, 0.0)
    """

    initial: float = 0.0
    final: float = 1.0
    begin: float = 0.0
    end: float = 1.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        check_window(self.begin, self.end)
        check_weight("initial", self.initial)
        check_weight("final", self.final)
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r}: valid are {list(SHAPES)}")

    def __call__(self, position: float) -> float:
        """The weight at a step, or at a fraction of the run."""
        share = (position - self.begin) / (self.end - self.begin)
        share = min(max(share, 0.0), 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.initial + (self.final - self.initial) * share


def check_weight(name: str, value: object) -> None:
    """Check a weight.

    Raises:
        ValueError: for a negative or non-finite number, or what is neither number nor callable.
    """
    if callable(value):
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type]
        raise ValueError(f"{name}={value!r}: give a number of at least 0, or a schedule")


def in_fractions(weight: Weight) -> bool:
    """Whether a schedule's `begin` and `end` are fractions of the run; others count steps."""
    begin, end = getattr(weight, "begin", None), getattr(weight, "end", None)
    return begin is not None and end is not None and check_window(begin, end)


def weight_at(weight: Weight, *, step: int, fraction: float) -> float:
    """A weight at a position: at a step of the student's optimizer, at a fraction of the run.

    >>> weight_at(2.0, step=3, fraction=0.1), weight_at(Ramp(end=10), step=3, fraction=0.1)
    (2.0, 0.3)
    """
    if not callable(weight):
        return float(weight)
    return float(weight(fraction if in_fractions(weight) else step))


def gradient_norm(gradients: list[Tensor | None]) -> Tensor:
    """Norm of several gradients together, in float32; over all processes where there are some."""
    found = [one.float().square().sum() for one in gradients if one is not None]
    total = torch.stack(found).sum() if found else torch.zeros(())
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total.sqrt()


@dataclass(frozen=True)
class Pair:
    """Pair of modules that receive the same inputs, those of the student's module.

    Args:
        student: path of a module in the student; "" is the student itself.
        teacher: path in the teacher; "" is the teacher itself; None: as in the student.
        loss: of the outputs: a name in `LOSSES`, a `Loss`, a function of (student output, teacher
            output), a sequence of these, a mapping from names to weights; None: none.
        weight: of all losses of the pair; a number or a schedule such as `Ramp`.
        features: (student path, teacher path) of layers inside the two modules.
        feature_loss: as `loss`, of each pair of features.
        adapter: learned maps of the student's side where sizes differ along one axis: 1x1
            convolutions. None: for features, not for outputs.
        prior: if above 0, the losses are taken at so many draws of N(0, I), in the shape of the
            module's first input, instead of at what it received: needs no data.
        inputs: (teacher's module, *received) -> what the teacher's module is called with; None:
            its method `distillation_inputs` if it has one, else what was received.
        wrap: (teacher's module, student's module) -> a module that is called in the teacher's
            place, such as one that makes two of its steps; None: the teacher's module itself.

    Raises:
        ValueError: for a bad weight or count.

    >>> Pair("decoder").teacher is None
    True
    """

    student: str
    teacher: str | None = None
    loss: Any = "mse"
    weight: Weight = 1.0
    features: Sequence[tuple[str, str]] = ()
    feature_loss: Any = "mse"
    adapter: bool | None = None
    prior: int = 0
    inputs: Inputs | None = None
    wrap: Wrap | None = None

    def __post_init__(self) -> None:
        check_weight("weight", self.weight)
        if isinstance(self.prior, bool) or not isinstance(self.prior, int) or self.prior < 0:
            raise ValueError(f"prior={self.prior!r}: give a number of draws, 0 for none")
        for one in self.features:
            if isinstance(one, str) or len(one) != 2:
                raise ValueError(f"features holds {one!r}: give (student path, teacher path)")
        if self.wrap is not None and not callable(self.wrap):
            raise ValueError(
                f"wrap={self.wrap!r}: give a function of (teacher's module, student's module) that "
                "returns a module"
            )
        if self.loss is None and not self.features:
            raise ValueError(f"the pair of {self.student!r} has neither a loss nor features")

    @property
    def name(self) -> str:
        """The student's path, as it is logged."""
        name = self.student or "model"
        return f"{name}.prior" if self.prior else name


def find_module(root: nn.Module, path: str, *, side: str) -> nn.Module:
    """The module at a path; wrappers of `torch.compile` need not be spelled.

    Args:
        root: the student or the teacher.
        path: its child's path, "" for itself.
        side: what to call the root in a message.

    Raises:
        TargetError: with the closest paths, when there is no such module.
    """
    named = {clean_path(name): module for name, module in root.named_modules()}
    for name, module in root.named_modules():
        if name == path:
            return module
    if path in named:
        return named[path]
    close = difflib.get_close_matches(path, [name for name in named if name], n=3, cutoff=0.0)
    raise TargetError(f"the {side} has no module {path!r}; closest: {close}")


def make_pairs(
    given: Sequence[Any] | str | Pair | None, student: nn.Module, teacher: nn.Module, loss: Any
) -> list[Pair]:
    """Pairs of a student and a teacher, each with a teacher's path.

    Args:
        given: paths, (student path, teacher path), or `Pair`s; None: the deployed part.
        student: the model in training.
        teacher: the teacher.
        loss: of the pairs that are given by paths.

    Raises:
        TargetError: for an empty list, or what is no pair.
    """
    if given is None:
        given = deployed_part(student)
    listed = [given] if isinstance(given, (str, Pair)) else list(given)
    if not listed:
        raise TargetError("pairs is empty: give paths, or None for the deployed part")
    return [_one(one, teacher, loss, alone=len(listed) == 1) for one in listed]


def _one(given: Any, teacher: nn.Module, loss: Any, *, alone: bool) -> Pair:
    if isinstance(given, str):
        given = Pair(given, loss=loss)
    elif not isinstance(given, Pair):
        if len(given) != 2 or not all(isinstance(path, str) for path in given):
            raise TargetError(f"{given!r} is no pair: give (student path, teacher path) or a Pair")
        given = Pair(*given, loss=loss)
    if given.teacher is not None:
        return given
    # A teacher that is a plain generator has no child of that name: it is the part itself.
    known = {clean_path(name) for name, _ in teacher.named_modules()}
    plain = alone and given.student not in known and not known & {given.student.split(".")[0]}
    fits = plain and not deployed_names(teacher)
    return _with_teacher(given, "" if fits else given.student)


def inner_pair(pair: Pair, path: str) -> Pair:
    """The pair of a module inside a pair's, of the same place in the teacher.

    Args:
        pair: with both its paths.
        path: of the module in the student.

    >>> inner_pair(Pair("decoder", "net"), "decoder.estimator").teacher
    'net.estimator'
    """
    inside = path.removeprefix(pair.student).removeprefix(".")
    teacher = pair.student if pair.teacher is None else pair.teacher
    return replace(pair, student=path, teacher=".".join(filter(None, (teacher, inside))))


def deployed_names(module: nn.Module) -> bool:
    """Whether a module is a model of several parts rather than one part."""
    return deployed_part(module) != ("",)


def _with_teacher(pair: Pair, teacher: str) -> Pair:
    return replace(pair, teacher=teacher)
