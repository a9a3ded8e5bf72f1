"""A pair at work: the teacher's module, the losses, the adapters, and their values for a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.adapters import make_adapter
from lightning_compress.distillation.forward import Forward, Term, check_output
from lightning_compress.distillation.hooks import Taps, evaluating, own_random_stream
from lightning_compress.distillation.pairs import Pair, find_module
from lightning_compress.distillation.terms import Call, make_losses, tensors_of
from lightning_compress.errors import TargetError

__all__ = ["Link"]


class Link:
    """One pair's teacher, ready to be asked.

    Args:
        pair: the paths and the losses.
        student: the model in training.
        teacher: the teacher, frozen.
        temperature: of the losses that are given by name.

    Raises:
        TargetError: for paths that lead nowhere.
        ValueError: for unknown losses.
    """

    def __init__(
        self, pair: Pair, student: nn.Module, teacher: nn.Module, *, temperature: float
    ) -> None:
        self.pair = pair
        path = pair.student if pair.teacher is None else pair.teacher
        self.student = find_module(student, pair.student, side="student")
        self.teacher = find_module(teacher, path, side="teacher")
        self.losses = make_losses(pair.loss, temperature=temperature)
        feature_loss = pair.feature_loss if pair.features else None
        self.feature_losses = make_losses(feature_loss, temperature=temperature)
        for ours, theirs in pair.features:
            find_module(self.student, ours, side=f"student's {pair.student!r}")
            find_module(self.teacher, theirs, side=f"teacher's {path!r}")
        for loss, _ in [*self.losses, *self.feature_losses]:
            loss.bind(teacher)
        self.adapters = nn.ModuleDict()
        self.teacher_calls = 0
        self.weight = 1.0  # at this moment
        self._taps = Taps(self.teacher, [theirs for _, theirs in pair.features])

    def remove(self) -> None:
        """Remove the hooks from the teacher."""
        self._taps.remove()
        for loss, _ in [*self.losses, *self.feature_losses]:
            loss.release()

    def ask_teacher(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Tensor]]:
        """The teacher's output and features for what the student's module received."""
        adapt = self.pair.inputs or getattr(type(self.teacher), "distillation_inputs", None)
        if adapt is not None:
            args, kwargs = adapt(self.teacher, *args, **kwargs), {}
        self.teacher_calls += 1
        with torch.no_grad(), own_random_stream(self.teacher), self._taps.catching() as features:
            return self.teacher(*args, **kwargs), features

    def evaluate(self, call: Forward, output: Any, features: dict[str, Tensor]) -> list[Term]:
        """The losses of one call of the student's module."""
        with call.as_called():
            theirs, their_features = self.ask_teacher(call.args, call.kwargs)
        return self.terms(call.args, (output, features), (theirs, their_features))

    def terms(
        self,
        args: tuple[Any, ...],
        ours: tuple[Any, dict[str, Tensor]],
        theirs: tuple[Any, dict[str, Tensor]],
    ) -> list[Term]:
        """The losses of (output, features) of both sides."""
        found, teacher = [], _float(theirs[0])
        for loss, weight in self.losses:
            student = self._adapted(ours[0]) if loss.same_shape else ours[0]
            value = loss(Call(student, teacher, args))
            found.append(Term(f"{self.pair.name}/{loss.name}", weight * self.weight, value))
        for index, (mine, other) in enumerate(self.pair.features):
            for loss, weight in self.feature_losses:
                key = f"feature{index}"
                fits = loss.same_shape and key in self.adapters
                student = self.adapters[key](ours[1][mine]) if fits else ours[1][mine]
                value = loss(Call(student, theirs[1][other].float(), args))
                name = f"{self.pair.name}/{mine}/{loss.name}"
                found.append(Term(name, weight * self.weight, value))
        return found

    def _adapted(self, output: Any) -> Any:
        if not any(key.startswith("output") for key in self.adapters):
            return output
        tensors = [
            self.adapters[key](one) if (key := f"output{i}") in self.adapters else one
            for i, one in enumerate(tensors_of(output))
        ]
        return tensors[0] if isinstance(output, Tensor) else tuple(tensors)

    @torch.no_grad()
    def probe(self, inputs: Sequence[Any]) -> None:
        """Run both modules once: find mistakes, and make the adapters that sizes ask for.

        Args:
            inputs: what the student's module could receive, two examples.

        Raises:
            TargetError: when the teacher cannot take it, or the sizes do not match.
        """
        taps = Taps(self.student, [ours for ours, _ in self.pair.features])
        try:
            with (
                evaluating(self.student),
                own_random_stream(self.student),
                taps.catching() as features,
            ):
                output = self.student(*inputs)
        finally:
            taps.remove()
        check_output(output, self.pair.student)
        theirs = self._probe_teacher(inputs)
        check_output(theirs[0], f"{self.pair.teacher} (teacher)")
        self._make_adapters((output, features), theirs)
        self._try(tuple(inputs), (_float(output), _float(features)), theirs)

    def _probe_teacher(self, inputs: Sequence[Any]) -> tuple[Any, dict[str, Tensor]]:
        try:
            return self.ask_teacher(tuple(inputs), {})
        except (RuntimeError, TypeError, ValueError) as error:
            raise TargetError(
                f"the teacher's {self.pair.teacher!r} cannot take what the student's "
                f"{self.pair.student!r} receives, {_shapes(inputs)}: are latent and image sizes "
                f"equal? ({error})"
            ) from error
        finally:
            self.teacher_calls = 0

    def _make_adapters(self, ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
        if any(loss.same_shape for loss, _ in self.losses):
            both = tensors_of(ours[0]), tensors_of(theirs[0])
            if len(both[0]) != len(both[1]):
                raise TargetError(
                    f"{self.pair.name}: the student gives {len(both[0])} tensors, the teacher "
                    f"{len(both[1])}"
                )
            for index, (mine, other) in enumerate(zip(*both, strict=True)):
                self._adapter(f"output{index}", mine, other, allowed=bool(self.pair.adapter))
        if any(loss.same_shape for loss, _ in self.feature_losses):
            for index, (mine, other) in enumerate(self.pair.features):
                self._adapter(
                    f"feature{index}",
                    ours[1][mine],
                    theirs[1][other],
                    allowed=self.pair.adapter is not False,
                )

    def _adapter(self, key: str, ours: Tensor, theirs: Tensor, *, allowed: bool) -> None:
        what = f"pair {self.pair.name!r}, {key}"
        adapter = make_adapter(ours.shape, theirs.shape, what=what, allowed=allowed)
        if adapter is not None:
            self.adapters[key] = adapter.to(ours.device)

    def _try(self, args: Any, ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
        try:
            self.terms(args, ours, theirs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            names = [loss.name for loss, _ in [*self.losses, *self.feature_losses]]
            raise TargetError(
                f"pair {self.pair.name!r}: {names} do not fit what the modules give, "
                f"{_shapes(tensors_of(ours[0]))} and {_shapes(tensors_of(theirs[0]))} ({error})"
            ) from error


def _float(values: Any) -> Any:
    from torch.utils import _pytree as pytree

    return pytree.tree_map(
        lambda one: one.float() if isinstance(one, Tensor) and one.is_floating_point() else one,
        values,
    )


def _shapes(values: Sequence[Any]) -> list[tuple[int, ...]]:
    return [tuple(one.shape) for one in values if isinstance(one, Tensor)]
