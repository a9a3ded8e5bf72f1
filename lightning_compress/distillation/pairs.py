"""Pairs of modules by name, one in the student and one in the teacher."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.distillation.weights import Weight, check_weight
from lightning_compress.errors import TargetError
from lightning_compress.targets import clean_path, deployed_part

__all__ = ["Pair", "find_module", "make_pairs"]

Inputs = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Pair:
    """Two modules that are fed the same inputs: what the student's module received.

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

    def __post_init__(self) -> None:
        check_weight("weight", self.weight)
        if isinstance(self.prior, bool) or not isinstance(self.prior, int) or self.prior < 0:
            raise ValueError(f"prior={self.prior!r}: give a number of draws, 0 for none")
        for one in self.features:
            if isinstance(one, str) or len(one) != 2:
                raise ValueError(f"features holds {one!r}: give (student path, teacher path)")
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
        given: paths, (student path, teacher path), or `Pair`s; None: the part that ships.
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
        raise TargetError("pairs is empty: give paths, or None for the part that ships")
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


def deployed_names(module: nn.Module) -> bool:
    """Whether a module is a model of several parts rather than one part."""
    return deployed_part(module) != ("",)


def _with_teacher(pair: Pair, teacher: str) -> Pair:
    from dataclasses import replace

    return replace(pair, teacher=teacher)
