"""Distillation session: the paired modules of one fit, their hooks, clocks, adapters and state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.distillation.inject import Forward, Injector, Term, check_output
from lightning_compress.distillation.losses import LossInputs, make_losses
from lightning_compress.distillation.pairs import Pair, find_module, make_adapter
from lightning_compress.distillation.teachers import LiveTeacher
from lightning_compress.errors import TargetError
from lightning_compress.hooks import Hook, Taps, tensors_of
from lightning_compress.modes import GeneratorState, evaluating, own_random_stream
from lightning_compress.outputs import map_tensors
from lightning_compress.projection import parameter_ids
from lightning_compress.sample_inputs import sample_inputs

__all__ = [
    "PairedModules",
    "PriorDraws",
    "Session",
]
_SILENT = (
    "its module was never called: does the training step call the module itself, not its "
    "`.forward()`?",
    "no gradient reached it in Lightning's backward pass: does a manual training step call "
    "`self.manual_backward(loss)` rather than `loss.backward()`?",
)


class PairedModules:
    """Paired modules: a student's module, its teacher's, and the losses between them.

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
        self.called = self.teacher  # in its place
        if pair.wrap is not None:
            self.called = pair.wrap(self.teacher, self.student)
            if not isinstance(self.called, nn.Module):
                raise TargetError(
                    f"the pair of {pair.student!r}: wrap gave a {type(self.called).__name__}, "
                    "no module"
                )
            self.called.eval().requires_grad_(False)
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

    def run_teacher(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], random: GeneratorState | None = None
    ) -> tuple[Any, dict[str, Tensor]]:
        """The teacher's output and features for what the student's module received.

        A teacher that draws draws what the student drew from `random` on: two VAEs are compared at
        the same noise, else the noise would be most of their difference.
        """
        adapt = self.pair.inputs or getattr(type(self.teacher), "distillation_inputs", None)
        if adapt is not None:
            args, kwargs = adapt(self.teacher, *args, **kwargs), {}
        self.teacher_calls += 1
        with (
            torch.no_grad(),
            own_random_stream(self.teacher, random),
            self._taps.catching() as features,
        ):
            return self.called(*args, **kwargs), features

    def evaluate(self, call: Forward, output: Any, features: dict[str, Tensor]) -> list[Term]:
        """The losses of one call of the student's module."""
        with call.as_called():
            theirs, their_features = self.run_teacher(call.args, call.kwargs, call.random)
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
            value = loss(LossInputs(student, teacher, args))
            found.append(Term(f"{self.pair.name}/{loss.name}", weight * self.weight, value))
        for index, (mine, other) in enumerate(self.pair.features):
            for loss, weight in self.feature_losses:
                key = f"feature{index}"
                fits = loss.same_shape and key in self.adapters
                student = self.adapters[key](ours[1][mine]) if fits else ours[1][mine]
                value = loss(LossInputs(student, theirs[1][other].float(), args))
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
                evaluating(self.student, eager=True),
                own_random_stream(self.student),
                taps.catching() as features,
            ):
                output = self.student(*inputs)
        finally:
            taps.remove()
        check_output(output, self.pair.student)
        theirs = self._try_teacher(inputs)
        check_output(theirs[0], f"{self.pair.teacher} (teacher)")
        self._make_adapters((output, features), theirs)
        self._try(tuple(inputs), (_float(output), _float(features)), theirs)

    def _try_teacher(self, inputs: Sequence[Any]) -> tuple[Any, dict[str, Tensor]]:
        try:
            return self.run_teacher(tuple(inputs), {})
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
    return map_tensors(lambda one: one.float() if one.is_floating_point() else one, values)


def _shapes(values: Sequence[Any]) -> list[tuple[int, ...]]:
    return [tuple(one.shape) for one in values if isinstance(one, Tensor)]


class PriorDraws:
    """Standard normal inputs of a module, for any batch size.

    Args:
        count: examples a draw.
        seed: of the stream.

    >>> PriorDraws(5, seed=0)((torch.zeros(2, 3),))[0].shape
    torch.Size([5, 3])
    """

    def __init__(self, count: int, *, seed: int) -> None:
        self.count = count
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, args: tuple[Any, ...]) -> tuple[Tensor]:
        """Draw.

        Raises:
            TargetError: when the module's first input is no floating-point tensor.
        """
        like = args[0] if args else None
        if len(args) != 1 or not isinstance(like, Tensor) or not like.is_floating_point():
            raise TargetError(
                "prior draws take the place of one floating-point tensor, a latent; this module "
                f"receives {[type(one).__name__ for one in args]}"
            )
        drawn = torch.randn(self.count, *like.shape[1:], generator=self.generator)
        return (drawn.to(like.device, like.dtype),)


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
        inputs: sample inputs of students' modules, by path, where they are known.

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
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self.teacher, self.live = teacher, live
        self.paired_modules = [
            PairedModules(pair, student, teacher, temperature=temperature) for pair in pairs
        ]
        self.priors = [
            PriorDraws(pair.prior, seed=1_000_003 * rank + index) if pair.prior else None
            for index, pair in enumerate(pairs)
        ]
        self.steps = [0] * len(self.paired_modules)
        self._optimizers: list[torch.optim.Adam | None] = [None] * len(self.paired_modules)
        self._handles: list[RemovableHandle] = []
        self.injectors: list[Injector] = []
        for paired, prior in zip(self.paired_modules, self.priors, strict=True):
            received = (inputs or {}).get(paired.pair.student)
            if received is None:
                received = sample_inputs(student, paired.pair.student, paired.student)
            if received is not None:
                if prior is not None:
                    PriorDraws(1, seed=0)(tuple(received))
                paired.probe(received)
            elif paired.pair.features:
                raise TargetError(
                    f"the pair of {paired.pair.student!r} has features, whose sizes are not known: "
                    "set example_input_array, or parts(), of the LightningModule"
                )
            self.injectors.append(self._injector(paired, prior, balance))

    @staticmethod
    def _injector(paired: PairedModules, prior: PriorDraws | None, balance: bool) -> Injector:
        return Injector(
            paired.student,
            paired.evaluate,
            path=paired.pair.student,
            taps=[ours for ours, _ in paired.pair.features],
            adapters=list(paired.adapters.parameters()),
            prior=prior,
            balance=balance,
        )

    def attach(self, optimizers: Sequence[Optimizer], *, adapter_lr: float) -> None:
        """Hook the optimizer of each student module: its steps are the clock.

        Raises:
            TargetError: when no optimizer trains a student's module.
        """
        for index, paired in enumerate(self.paired_modules):
            owner = _owner(paired.student, optimizers)
            if owner is None:
                raise TargetError(f"no optimizer trains {paired.pair.student!r}: nothing to teach")
            if paired.adapters:
                self._optimizers[index] = torch.optim.Adam(paired.adapters.parameters(), adapter_lr)
            self._handles.append(owner.register_step_post_hook(Hook(self._stepper(index))))

    def _stepper(self, index: int) -> Any:
        def after(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            self.steps[index] += 1
            if (adapters := self._optimizers[index]) is not None:
                _average_gradients(self.paired_modules[index].adapters)
                adapters.step()
                adapters.zero_grad()
            if self.live is not None:
                self.live.on_step(
                    [(self.paired_modules[index].student, self.paired_modules[index].teacher)]
                )

        return after

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters of all adapters."""
        return [
            parameter
            for paired in self.paired_modules
            for parameter in paired.adapters.parameters()
        ]

    def begin_batch(self, batch: Any, index: int) -> None:
        """Record the calls of a batch, where the weight is above 0."""
        if self.live is not None:
            self.live.on_batch(batch, index)
        for paired, injector in zip(self.paired_modules, self.injectors, strict=True):
            injector.begin_batch(active=paired.weight > 0)

    def end_batch(self) -> None:
        """Record no more calls."""
        for injector in self.injectors:
            injector.begin_batch(active=False)

    def begin_backward(self, *, scale: float, share: float) -> None:
        """Inject from now on; see `Injector.begin_backward`."""
        for injector in self.injectors:
            injector.begin_backward(scale=scale, share=share)

    def end_backward(self) -> None:
        """Inject no more."""
        for injector in self.injectors:
            injector.end_backward()

    def read_values(self) -> dict[str, Tensor]:
        """Mean of each loss since it was last read, by name."""
        found = {}
        for injector in self.injectors:
            found |= {name: torch.stack(values).mean() for name, values in injector.values.items()}
            injector.values = {}
        return found

    def silent(self) -> list[tuple[str, str]]:
        """Paths of pairs without any loss, with reasons."""
        return [
            (paired.pair.student, _SILENT[injector.calls > 0])
            for paired, injector in zip(self.paired_modules, self.injectors, strict=True)
            if paired.weight > 0 and injector.injections == 0
        ]

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        for one in (*self.injectors, *self.paired_modules):
            one.remove()

    def state_dict(self) -> dict[str, Any]:
        """Clocks, adapters and their optimizers, streams, and a teacher that changes."""
        state: dict[str, Any] = {
            "steps": list(self.steps),
            "adapters": [paired.adapters.state_dict() for paired in self.paired_modules],
            "optimizers": [one and one.state_dict() for one in self._optimizers],
            "priors": [one and one.generator.get_state() for one in self.priors],
        }
        if self.live is not None:
            state["teacher"] = self.teacher.state_dict()
            state["live"] = self.live.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`.

        Raises:
            TargetError: for the state of other pairs.
        """
        if len(state["steps"]) != len(self.paired_modules):
            raise TargetError(
                f"the checkpoint distilled {len(state['steps'])} pairs, this run "
                f"{len(self.paired_modules)}"
            )
        self.steps = list(state["steps"])
        for index, paired in enumerate(self.paired_modules):
            paired.adapters.load_state_dict(state["adapters"][index])
            if (optimizer := self._optimizers[index]) is not None:
                optimizer.load_state_dict(state["optimizers"][index])
            if (prior := self.priors[index]) is not None:
                prior.generator.set_state(state["priors"][index].cpu())
        if self.live is not None:
            self.teacher.load_state_dict(state["teacher"])
            self.live.load_state_dict(state["live"])


def _owner(module: nn.Module, optimizers: Sequence[Optimizer]) -> Optimizer | None:
    own = {id(parameter) for parameter in module.parameters()}
    return next((one for one in optimizers if own & parameter_ids(one)), None)


def _average_gradients(adapters: nn.Module) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for parameter in adapters.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= torch.distributed.get_world_size()
