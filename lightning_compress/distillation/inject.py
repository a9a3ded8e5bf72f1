"""Inject a loss into the student's backward pass by an identity node on its output.

The forward pass gives the values unchanged. In the backward pass, and only if a gradient really
arrives, the node evaluates losses of the output and of tapped features on detached float32 copies
and adds `weight * scale * gradient`. So the user's loss stays as it is, and the teacher costs
nothing in a step that does not train the student (a discriminator's).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.pairs import gradient_norm
from lightning_compress.errors import TargetError
from lightning_compress.hooks import Hook, Taps
from lightning_compress.modes import GeneratorState, own_random_stream, without_running_statistics
from lightning_compress.outputs import flatten, map_tensors

__all__ = [
    "Forward",
    "Injector",
    "Term",
    "check_output",
    "detached",
]
_PLAIN = (Tensor, int, float, bool, str, bytes, type(None), torch.dtype, torch.device)
Prior = Callable[[tuple[Any, ...]], tuple[Any, ...]]


@dataclass(frozen=True)
class Term:
    """One loss of a forward pass: its name, its weight and its value with a graph."""

    name: str
    weight: float
    value: Tensor


def detached(values: Any) -> Any:
    """The same structure with its tensors detached: equal storage, no graph."""
    return map_tensors(Tensor.detach, values)


def check_output(output: Any, path: str) -> None:
    """Check that an output's tensors can be found.

    Raises:
        TargetError: for types that are neither tensors nor structures that `flatten` looks into.
    """
    for leaf in flatten(output)[0]:
        if not isinstance(leaf, _PLAIN):
            raise TargetError(
                f"{path!r} gives a {type(leaf).__name__}: distillation finds tensors in tuples, "
                "lists, named tuples, mappings, dataclasses and distributions only; "
                "pair a module inside that gives them"
            )


@dataclass(eq=False)
class Forward:
    """Record of a module's call: inputs and outputs without graphs.

    Args:
        args: by position.
        kwargs: by name.
        autocast: (device type, enabled, dtype) of the call.
        random: where its draws begin.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, bool, torch.dtype]
    random: GeneratorState
    injected: bool = False
    material: list[Any] = field(default_factory=list)  # (output, features), flat and detached
    slots: dict[int, int] = field(default_factory=dict)  # of the material: index of the edge
    _spec: Any = None
    _watched: list[tuple[str, Tensor, int]] = field(default_factory=list)

    def keep(
        self, output: Any, features: dict[str, Tensor], carried: Sequence[Tensor]
    ) -> list[Tensor]:
        """Keep the tensors of the losses; returns the edges beyond the tensors carried."""
        flat, self._spec = flatten((output, features))
        places, edges = {id(tensor): index for index, tensor in enumerate(carried)}, []
        for index, one in enumerate(flat):
            if not isinstance(one, Tensor) or not one.requires_grad:
                continue
            if id(one) not in places:
                places[id(one)] = len(carried) + len(edges)
                edges.append(one)
            self.slots[index] = places[id(one)]
        self.material = detached(flat)
        self.watch("an output", self.material)
        return edges

    def leaves(self) -> tuple[list[Tensor], Any, dict[str, Tensor]]:
        """Float32 leaves, one a slot, and the output and the features that hold them."""
        fresh = list(self.material)
        for index, one in enumerate(fresh):
            if isinstance(one, Tensor) and one.is_floating_point():
                fresh[index] = one.detach().float().requires_grad_(index in self.slots)
        output, features = self._spec(iter(fresh))
        return [fresh[index] for index in self.slots], output, features

    def watch(self, what: str, values: Any) -> None:
        """Record the versions of tensors, to detect changes in place."""
        for leaf in flatten(values)[0]:
            if isinstance(leaf, Tensor) and not leaf.is_inference():
                self._watched.append((what, leaf, leaf._version))

    def check(self, path: str) -> None:
        """Check that nothing was changed in place since.

        Raises:
            RuntimeError: when something was; the teacher would see other values.
        """
        for what, tensor, version in self._watched:
            if tensor._version != version:
                raise RuntimeError(
                    f"{what} of {path!r}, shape {tuple(tensor.shape)}, was changed in place before "
                    "the backward pass: the teacher would see other values; clone it first"
                )

    def as_called(self) -> AbstractContextManager[Any]:
        """The autocast state of the call."""
        device, enabled, dtype = self.autocast
        return torch.autocast(device, dtype=dtype, enabled=enabled)


Evaluate = Callable[[Forward, Any, dict[str, Tensor]], Sequence[Term]]


class _Node(torch.autograd.Function):
    """Identity on the first `count` tensors; the others are edges that gradients leave by."""

    @staticmethod
    def forward(ctx: Any, injector: Injector, call: Forward, count: int, *tensors: Tensor) -> Any:
        ctx.injector, ctx.call, ctx.edges = injector, call, len(tensors) - count
        ctx.set_materialize_grads(False)
        # Copies: what the user changes in place afterwards must not change what the losses see.
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> Any:  # type: ignore[override]
        gradients = [*arriving, *[None] * ctx.edges]
        for index, more in ctx.injector.added(ctx.call, arriving).items():
            mine, dtype = gradients[index], more[1]
            total = more[0] if mine is None else mine.float() + more[0]
            gradients[index] = total.to(dtype)  # cast last: half a precision is lost only once
        return (None, None, None, *gradients)


class Injector:
    """Injects losses behind one student module: its hooks, its node, and when it may inject.

    Args:
        module: the student's module.
        evaluate: from a forward pass, its output and features (float32 leaves) to losses.
        path: what the module is called in messages.
        taps: paths, inside the module, of the layers whose outputs are features.
        adapters: parameters that train by the same losses: their `.grad` accumulates.
        prior: draws other inputs for the student, on which the losses are taken instead.
        balance: scale each term to `weight` times the norm of the gradient that arrives.
    """

    def __init__(
        self,
        module: nn.Module,
        evaluate: Evaluate,
        *,
        path: str,
        taps: Sequence[str] = (),
        adapters: Sequence[nn.Parameter] = (),
        prior: Prior | None = None,
        balance: bool = False,
    ) -> None:
        self.module, self.evaluate, self.path = module, evaluate, path
        self.adapters, self.prior, self.balance = list(adapters), prior, balance
        self.active = False  # calls are recorded
        self.calls = self.injections = 0
        self.values: dict[str, list[Tensor]] = {}  # since they were last read
        self._taps = Taps(module, list(taps))
        self._stack: list[Forward | None] = []
        self._injected: weakref.WeakSet[Forward] = weakref.WeakSet()
        self._open, self._cleared, self._scale, self._share = False, True, 1.0, 1.0
        self._forward = module.forward
        self._handles = [
            module.register_forward_pre_hook(Hook(self._before), with_kwargs=True),
            module.register_forward_hook(Hook(self._after), with_kwargs=True),
        ]

    def remove(self) -> None:
        """Remove all hooks."""
        self.active = self._open = False
        self._taps.remove()
        for handle in self._handles:
            handle.remove()

    def begin_batch(self, *, active: bool) -> None:
        """Record calls from now on, or stop."""
        self.active = active
        self._stack.clear()
        self._taps.clear()

    def begin_backward(self, *, scale: float, share: float) -> None:
        """Inject from now on.

        Args:
            scale: of the user's loss: a gradient scaler's factor, over the accumulated batches.
            share: of this batch in the adapters' gradients.
        """
        self._open, self._scale, self._share, self._cleared = True, scale, share, True
        if self.adapters or self._injected:
            grads = [parameter.grad for parameter in self.module.parameters()]
            self._cleared = not any(grad is not None and bool(grad.any()) for grad in grads)
        if self._cleared:
            for parameter in self.adapters:
                parameter.grad = None

    def end_backward(self) -> None:
        """Be a plain identity again: for `autograd.grad` penalties of the user."""
        self._open = False

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Lightning calls a whole LightningModule to redirect to `training_step`.
        redirected = module.forward != self._forward
        if not self.active or redirected or not torch.is_grad_enabled():
            self._stack.append(None)
            return
        autocast, random = _autocast_state(module), GeneratorState.of(module)
        call = Forward(detached(args), detached(kwargs), autocast, random)
        call.watch("an input", (call.args, call.kwargs))
        self._stack.append(call)
        self._taps.begin()

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        del args, kwargs
        call = self._stack.pop() if self._stack else None
        if call is None:
            return None
        features = self._taps.end()
        check_output(output, self.path)
        flat, rebuild = flatten(output)
        carried = [i for i, one in enumerate(flat) if isinstance(one, Tensor) and one.requires_grad]
        if not carried:
            return None
        self.calls += 1
        given = output
        if self.prior is not None:
            call, given, features = self._on_prior(module, call)
        tensors = [flat[index] for index in carried]
        edges = call.keep(given, features, tensors)
        for index, one in zip(
            carried, _Node.apply(self, call, len(tensors), *tensors, *edges), strict=True
        ):
            flat[index] = one
        return rebuild(iter(flat))

    def _on_prior(self, module: nn.Module, call: Forward) -> tuple[Forward, Any, dict[str, Tensor]]:
        assert self.prior is not None
        call = Forward(self.prior(call.args), {}, call.autocast, GeneratorState.of(module))
        with (
            own_random_stream(module),
            without_running_statistics(module),
            self._taps.catching() as features,
        ):
            output = module.forward(*call.args)
        return call, output, features

    def added(
        self, call: Forward, arriving: Sequence[Tensor | None]
    ) -> dict[int, tuple[Tensor, torch.dtype]]:
        """Gradients of the losses for each edge, in float32 and in the edge's own type."""
        if not self._open or (call.injected and not self._cleared):
            return {}
        call.check(self.path)
        with torch.enable_grad(), torch.autocast(call.autocast[0], enabled=False):
            leaves, output, features = call.leaves()
            terms = self.evaluate(call, output, features)
            sums = self._gradients(terms, leaves, arriving)
        for term in terms:
            self.values.setdefault(term.name, []).append(term.value.detach())
        self.injections += 1
        call.injected = True
        self._injected.add(call)
        found: dict[int, tuple[Tensor, torch.dtype]] = {}
        for (index, edge), gradient in zip(call.slots.items(), sums, strict=True):
            if gradient is not None:
                found[edge] = (gradient, call.material[index].dtype)
        return found

    def _gradients(
        self, terms: Sequence[Term], leaves: list[Tensor], arriving: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        if not terms:
            return [None] * len(leaves)
        if not self.balance:
            total = torch.stack([term.weight * term.value for term in terms]).sum()
            found = self._one(total, leaves, 1.0)
            return [None if one is None else self._scale * one for one in found]
        norm = gradient_norm(list(arriving))
        sums: list[Tensor | None] = [None] * len(leaves)
        for term in terms:
            found = self._one(term.value, leaves, term.weight, keep=term is not terms[-1])
            own = gradient_norm(found).clamp_min(torch.finfo(torch.float32).tiny)
            factor = term.weight * norm.to(own.device) / own
            sums = [
                _plus(a, None if b is None else factor * b)
                for a, b in zip(sums, found, strict=True)
            ]
        return sums

    def _one(
        self, value: Tensor, leaves: list[Tensor], weight: float, *, keep: bool = False
    ) -> list[Tensor | None]:
        """Gradients of the leaves; those of the adapters are added to their `.grad`."""
        if not value.requires_grad:
            return [None] * len(leaves)
        found = torch.autograd.grad(
            value, [*leaves, *self.adapters], allow_unused=True, retain_graph=keep
        )
        for parameter, gradient in zip(self.adapters, found[len(leaves) :], strict=True):
            if gradient is not None:
                parameter.grad = _plus(parameter.grad, weight * self._share * gradient)
        return list(found[: len(leaves)])


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _autocast_state(module: nn.Module) -> tuple[str, bool, torch.dtype]:
    kind = next(module.parameters(), torch.zeros(())).device.type
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
