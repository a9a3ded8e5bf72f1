"""Projected weights, the one mechanism: `visible = quantize(mask * latent)`.

The module's own parameter always holds the visible value, except inside the optimizer's update:
a hook before the step puts the latent values back, the optimizer updates them, a hook after the
step projects again. The gradient taken at the visible weight is applied to the latent one, which
is the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432).

Nothing here knows Lightning: `Projector.of(module)`, `add`, `attach(optimizers)` serve any loop.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.errors import TargetError
from lightning_compress.fast_tensors import count_non_finite, zeroed
from lightning_compress.grids import AffineGrid, grid_step
from lightning_compress.sharding import (
    UNSHARDED,
    Partition,
    Shards,
    is_sharded,
    local_part,
    shards_of,
)
from lightning_compress.state import Grid, clear_grid, set_grid
from lightning_compress.targets import Target, clean_path

__all__ = [
    "ProjectedWeight",
    "Projector",
    "divergence_message",
    "naming_divergence",
    "parameter_ids",
    "select_entries",
]

_FEW = 256
_SMALL = 1 << 17  # weights of which the visible values are kept, not computed again

Quantizer = Callable[[Tensor], Grid]
_HALF = (
    "The weights are float16, in which Adam's eps of 1e-8 is 0 and nothing is above 65504: use "
    "precision='16-mixed' or 'bf16-true'"
)
_MODULES: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # that have a projector
_ATTRIBUTE = "_compression_projector"  # in the module's `__dict__`: the two end together


class _Held:
    """A module's own projector: no copy and no pickle of the module takes it along."""

    def __init__(self, module: nn.Module, projector: Projector) -> None:
        self.module, self.projector = weakref.ref(module), projector

    def __deepcopy__(self, _: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


class ProjectedWeight:
    """Projected weight: a parameter, its mask, its quantizer, its latent values if it needs any.

    Args:
        target: the parameter and the layer that holds it.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.path = clean_path(target.path)
        self.shards: Shards | None = shards_of(target.parameter)
        self.partition: Partition = self.shards or UNSHARDED
        self.pruned: Tensor | None = None  # True where the weight is 0
        self.unit = 1  # positions that a mask prunes together, at most
        self.owners: dict[str, str] = {}  # the one callback of its "mask", "grid", "activations"
        self.quantizer: Quantizer | None = None
        self.dense_gradient = False  # pruned positions keep training, hidden in the latent
        self.latent: Tensor | None = None
        self.grid: Grid | None = None  # where `data` lies since the last projection
        self._holds_latent = False  # what the parameter holds at this moment
        self._rewritten: Tensor | None = None  # whether user code wrote into it before
        # What was last projected, for small weights: the latent values, the grid, the result.
        self._shown: tuple[Tensor, Grid | None, Tensor] | None = None
        self.taps: list[Callable[[Tensor], None]] = []  # read each gradient before it is masked
        # Reads and changes the final gradient (clipped, unscaled, reduced) before the update.
        self.gradient_rule: Callable[[Tensor], None] | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The module's own parameter."""
        return self.target.parameter

    @property
    def data(self) -> Tensor:
        """The parameter's values that this process holds, without a graph: all, unless sharded."""
        return local_part(self.parameter.detach())

    @property
    def sparsity(self) -> float:
        """Fraction of positions that the mask prunes."""
        if self.pruned is None:
            return 0.0
        return self.partition.all_reduce_sum(self.pruned.sum()).item() / self.parameter.numel()

    def whole(self, part: Tensor) -> Tensor:
        """All of a tensor like `data`, on every process; of a sharded weight in the CPU's memory.

        All processes must ask.
        """
        return part if self.shards is None else self.shards.whole(part).cpu()

    @property
    def in_update(self) -> bool:
        """Whether the parameter holds latent values: its optimizer updates them at this moment."""
        return self._holds_latent

    def values(self) -> Tensor:
        """The latent values: what the optimizer updates and what criteria look at."""
        if self.latent is None or self._holds_latent:
            return self.data
        return self.latent

    @torch.no_grad()
    def set_values(self, values: Tensor) -> None:
        """Replace the latent values; they show after the next `project`."""
        self.restore()
        self.data.copy_(values)

    def set_mask(self, mask: Tensor | None) -> None:
        """Replace the mask (True where a weight stays); it shows after the next `project`."""
        self.restore()  # with the projection that the parameter was written by
        if mask is None:
            self.pruned = None
            return
        if mask.shape != self.data.shape:
            shapes = f"{tuple(mask.shape)}, the weight {tuple(self.data.shape)}"
            raise TargetError(f"mask of {self.path} has shape {shapes}")
        self.pruned = ~mask.to(self.parameter.device)

    def select(self, kept: Mapping[int, Tensor]) -> None:
        """Keep some entries along axes, as the parameter is about to: mask, latent values, grid."""
        self.pruned, self.latent = (
            None if one is None else select_entries(one, kept) for one in (self.pruned, self.latent)
        )
        if isinstance(self.grid, AffineGrid):
            self.grid = self.grid.select(kept)
            set_grid(self.target.layer, self.target.name, self.grid)

    def forget(self) -> Tensor:
        """Let go of mask, latent values and grid, so that the weight may get another size.

        Returns:
            The latent values.
        """
        values = self.values().clone()
        self.pruned = self.latent = self.grid = self._shown = None
        self._holds_latent = False
        clear_grid(self.target.layer, self.target.name)
        return values

    def set_quantizer(self, quantizer: Quantizer | None) -> None:
        """Replace what makes the grid; it shows after the next `project`."""
        self.restore()
        self.quantizer = quantizer

    def visible(self, values: Tensor) -> tuple[Tensor, Grid | None]:
        """The projection of any values of this weight's shape, and the grid it lies on."""
        if self.pruned is not None:
            values = self.zero_pruned(values)
        if self.quantizer is None:
            return values, None
        grid = self.quantizer(values)
        return self._here(grid).project(values), grid

    def grid_for(self, values: Tensor) -> Grid | None:
        """The grid that these values of this process would be projected on."""
        return None if self.quantizer is None else self._here(self.quantizer(values))

    def _here(self, grid: Grid) -> Grid:
        """What this process's rows need of a grid of the whole weight."""
        if self.shards is None or not isinstance(grid, AffineGrid):
            return grid
        return grid.select({0: torch.arange(*self.shards.bounds)})

    @torch.no_grad()
    def restore(self) -> None:
        """Put the latent values into the parameter, so that the optimizer updates them.

        What user code wrote into the parameter since counts: there it is the new latent value.
        Where that happens again (clamping or normalisation at each step), the latent value keeps
        its distance to its grid point, up to a step: otherwise no update smaller than half a step
        would ever show.
        """
        if self.latent is None or self._holds_latent:
            return
        data = self.data
        if data.device.type == "cpu" and self._shows(self.latent):
            data.copy_(self.latent)
        else:  # without asking whether anything differs, for which a GPU would have to wait
            expected = self._expected(self.latent)
            other = data != expected
            written = data
            if self._rewritten is not None:
                written = data + self._rewritten * self._distance(self.latent, expected)
            again = False if self._rewritten is None else self._rewritten
            self._rewritten = other.any() | again
            data.copy_(torch.where(other, written, self.latent))
        self._holds_latent = True

    def _shows(self, latent: Tensor) -> bool:
        """Whether the parameter holds what was last projected: user code wrote nothing since."""
        if self._shown is None and isinstance(self.grid, AffineGrid):
            return self.grid.matches(self._masked_latent(latent), self.data)
        return torch.equal(self.data, self._expected(latent))

    def _expected(self, latent: Tensor) -> Tensor:
        """What the parameter holds, unless user code wrote into it."""
        if (shown := self._shown) is not None and shown[0] is latent and shown[1] is self.grid:
            return shown[2]
        masked = self._masked_latent(latent)
        return masked if self.grid is None else self.grid.project(masked)

    def zero_pruned(self, values: Tensor, *, in_place: bool = False) -> Tensor:
        """Values of this weight's shape with 0 where the mask prunes; as they are without one."""
        pruned = self.pruned
        return values if pruned is None else zeroed(values, pruned, in_place=in_place)

    def _distance(self, latent: Tensor, expected: Tensor) -> Tensor:
        """How far latent values lie from their grid points, a step at most."""
        if self.grid is None:
            return torch.zeros_like(latent)
        step = grid_step(self.grid, latent).to(latent.dtype)
        return (latent - expected).clamp(-step, step)

    @property
    def overwritten(self) -> bool:
        """Whether user code wrote into the parameter since it was projected."""
        if self._holds_latent:
            return False
        if self.latent is None:
            return self.pruned is not None and bool(self.data[self.pruned].any())
        return not self._shows(self.latent)

    def settle(self) -> None:
        """Project what user code wrote since the last step."""
        if self.overwritten:
            self.project(same_grid=self.shards is not None)

    @contextmanager
    def unprojected(self) -> Iterator[None]:
        """The latent values in the parameter's place for a moment, between two updates."""
        if self.latent is None:
            yield
            return
        visible = self.data.clone()
        self.restore()
        try:
            yield
        finally:
            self.data.copy_(visible)
            self._holds_latent = False

    @torch.no_grad()
    def project(self, *, same_grid: bool = False) -> None:
        """Put the visible values into the parameter; on the grid that it had, or on a new one."""
        if self.quantizer is None and not (self.dense_gradient and self.pruned is not None):
            self._drop_latent()
            if self.pruned is not None:
                self.zero_pruned(self.data, in_place=True)
            return
        self.restore()
        latent = self.data
        if self.pruned is not None and not self.dense_gradient:
            self.zero_pruned(latent, in_place=True)
        self.latent = latent.clone() if self.latent is None else self.latent.copy_(latent)
        masked = self._masked_latent(self.latent)
        if not same_grid:
            self._make_grid(masked)
        if isinstance(self.grid, AffineGrid) and latent.numel() > _SMALL:
            self.grid.project(masked, out=latent)
            self._shown = None
        else:
            visible = masked if self.grid is None else self.grid.project(masked)
            latent.copy_(visible)
            keep = visible is not self.latent and visible.numel() <= _SMALL
            self._shown = (self.latent, self.grid, visible) if keep else None
        self._holds_latent = False

    def _make_grid(self, masked: Tensor) -> None:
        if self.quantizer is None:
            self.grid = None
            clear_grid(self.target.layer, self.target.name)
        else:
            with naming_divergence([self]):
                whole = self.quantizer(masked)
            self.grid = self._here(whole)
            set_grid(self.target.layer, self.target.name, whole)

    def _masked_latent(self, latent: Tensor) -> Tensor:
        # Without dense gradients what is pruned is 0 in the latent too.
        if self.pruned is None or not self.dense_gradient:
            return latent
        return self.zero_pruned(latent)

    @torch.no_grad()
    def prepare_update(self) -> None:
        """Put the latent values back for the optimizer, and let the rule see its gradient."""
        self.restore()
        if self.gradient_rule is not None and self.parameter.grad is not None:
            self.gradient_rule(local_part(self.parameter.grad))

    def hide(self, *, alone: bool = False) -> None:
        """Project if the latent values show, as after an update that failed half way.

        Args:
            alone: other processes may not do so, thus a sharded weight gets the grid that it had.
        """
        if self._holds_latent:
            self.project(same_grid=alone and self.shards is not None)

    def _drop_latent(self) -> None:
        if self.latent is not None:
            self.restore()
            self.latent, self.grid, self._holds_latent = None, None, False
            self._shown = None
            clear_grid(self.target.layer, self.target.name)

    def mask_gradient(self, gradient: Tensor) -> Tensor:
        """Zero the gradient of pruned positions, so that it stays out of the clipping norm.

        With `dense_gradient` it reaches the latent values in full.
        """
        for tap in self.taps:
            tap(gradient)
        if self.pruned is None or self.dense_gradient:
            return gradient
        return self.zero_pruned(gradient)

    @torch.no_grad()
    def mask_sharded_gradient(self, parameter: Tensor) -> None:
        """The same for a sharded parameter, whose gradient arrives past autograd's hooks."""
        if parameter.grad is not None:
            gradient = local_part(parameter.grad)
            gradient.copy_(self.mask_gradient(gradient))


@contextmanager
def naming_divergence(projected_weights: Sequence[ProjectedWeight]) -> Iterator[None]:
    """Name the weight that is no longer finite where that is why something failed.

    Raises:
        FloatingPointError: in place of the error.
    """
    try:
        yield
    except (ValueError, RuntimeError, OverflowError) as error:
        for projected in projected_weights:
            if int(projected.partition.all_reduce_sum(count_non_finite(projected.values()))):
                raise FloatingPointError(divergence_message(projected)) from error
        raise


def divergence_message(*projected_weights: ProjectedWeight) -> str:
    """The message for parameters that are no longer finite."""
    half = any(projected.parameter.dtype == torch.float16 for projected in projected_weights)
    paths = ", ".join(projected.path for projected in projected_weights)
    return (
        f"{paths} holds weights that are NaN or infinite: training has diverged. "
        f"{_HALF if half else 'Lower the learning rate, or look at the data'}"
    )


class Projector:
    """All projected parameters of one module, and the hooks on the optimizers that own them.

    >>> layer = nn.Linear(2, 1)
    >>> projector = Projector.of(layer)
    >>> projected = projector.add(Target("weight", layer, "weight", layer.weight))
    >>> projected.set_mask(torch.tensor([[True, False]]))
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> projector.attach([optimizer])  # what no optimizer owns
    []
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> _ = optimizer.step()
    >>> layer.weight[0, 1].item(), projector.steps
    (0.0, [1])
    >>> projector.detach()
    """

    def __init__(self) -> None:
        self.projected_weights: dict[str, ProjectedWeight] = {}
        self.steps: list[int] = []
        # torch's loader of sharded optimizers makes a step of its own, with a rate of 0: while
        # asleep, steps are not the training's.
        self.asleep = False
        self.copies: Any = None  # of the weights, which user code keeps and which follow
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._owners: dict[str, list[int]] = {}
        self._handlers: list[tuple[int, Callable[[], None]]] = []
        self._handles: dict[int, list[RemovableHandle]] = {}  # on optimizers, by index
        self._gradients: dict[str, RemovableHandle] = {}  # on parameters, by path
        self._marks: dict[int, _Mark] = {}  # of optimizers that have made no step yet

    def __repr__(self) -> str:
        return f"Projector({len(self.projected_weights)} weights, steps={self.steps})"

    @classmethod
    def of(cls, module: nn.Module) -> Projector:
        """The projector that all callbacks of one module share; made at the first call."""
        found = cls.find(module)
        if found is None:
            found = cls()
            _MODULES.add(module)
            module.__dict__[_ATTRIBUTE] = _Held(module, found)
        return found

    @staticmethod
    def find(module: nn.Module) -> Projector | None:
        """The module's projector while one is in use."""
        held = module.__dict__.get(_ATTRIBUTE)
        # A shallow copy of a module shares its `__dict__`'s values.
        return held.projector if held is not None and held.module() is module else None

    @staticmethod
    def module_of(projected: ProjectedWeight) -> nn.Module | None:
        """The module whose projector holds a projected weight."""
        for module in _MODULES:
            projector = Projector.find(module)
            if (
                projector is not None
                and projector.projected_weights.get(projected.path) is projected
            ):
                return module
        return None

    def add(self, target: Target) -> ProjectedWeight:
        """Take a parameter under projection, or return its `ProjectedWeight`.

        A parameter that has taken another's place gets a projected weight of its own.
        """
        path = clean_path(target.path)
        projected = self.projected_weights.get(path)
        if projected is not None and projected.parameter is not target.parameter:
            self.drop(path)
            projected = None
        if projected is None:
            projected = self.projected_weights[path] = ProjectedWeight(target)
            if target.parameter.requires_grad:  # a frozen weight gets no gradient
                self._gradients[path] = _hook_gradient(projected)
        return projected

    def drop(self, path: str) -> None:
        """Let go of a parameter that is no longer the module's."""
        del self.projected_weights[path]
        if (handle := self._gradients.pop(path, None)) is not None:
            handle.remove()
        self._owners.pop(path, None)

    def on_step(self, handler: Callable[[], None], *, order: int) -> None:
        """Run a handler after each optimizer step, before projecting; lower orders go first."""
        self._handlers.append((order, handler))
        self._handlers.sort(key=lambda pair: pair[0])

    @property
    def slots(self) -> dict[str, ProjectedWeight]:
        """Former name of `projected_weights`, which warns."""
        warnings.warn("`slots` is `projected_weights` now", FutureWarning, stacklevel=2)
        return self.projected_weights

    def attach(self, optimizers: Sequence[Optimizer], *, strict: bool = True) -> list[str]:
        """Hook the optimizers that own the weights; calling it again takes in what is new.

        An optimizer in another's place goes on with its clock; one more begins with that of the
        slowest owner.

        Args:
            optimizers: all of them.
            strict: refuse weights that no optimizer owns.

        Returns:
            Paths of weights that no optimizer owns.

        Raises:
            TargetError: when an optimizer keeps weights of its own, or owns none of them.
        """
        groups = [parameter_ids(optimizer) for optimizer in optimizers]
        for path, projected in self.projected_weights.items():
            self._owners[path] = [
                i for i, ids in enumerate(groups) if id(projected.parameter) in ids
            ]
            if projected.parameter.requires_grad and path not in self._gradients:  # thawed since
                self._gradients[path] = _hook_gradient(projected)
        begun = min((self.steps[i] for i in self._in_use() if i < len(self.steps)), default=0)
        self.steps += [begun] * (len(optimizers) - len(self.steps))
        for index, optimizer in enumerate(optimizers):
            if index not in self._handles or self._optimizers[index]() is not optimizer:
                _check_optimizer(optimizer)
                self._unhook(index)
                self._optimizers[index : index + 1] = [weakref.ref(optimizer)]
                self._hook(optimizer, index)
        for index in range(len(optimizers), len(self._optimizers)):
            self._unhook(index)
        del self._optimizers[len(optimizers) :]
        orphans = [
            path
            for path, owners in self._owners.items()
            if not owners and self.projected_weights[path].parameter.requires_grad
        ]
        if orphans and strict:
            raise TargetError(
                f"no optimizer owns {orphans}: such weights never train; exclude them, or give "
                "them to an optimizer in configure_optimizers"
            )
        return orphans

    def is_attached_to(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether these are the optimizers whose steps are watched."""
        known = [reference() for reference in self._optimizers]
        same = zip(known, optimizers, strict=False)
        return len(known) == len(optimizers) and all(one is other for one, other in same)

    def idle(self, paths: Sequence[str]) -> list[tuple[Optimizer, bool]]:
        """Optimizers that own the parameters and have made no step since they were hooked.

        Returns:
            Each with whether the weights have changed all the same.
        """
        found = []
        for index in sorted({index for path in paths for index in self._owners.get(path, ())}):
            optimizer, mark = self._optimizers[index](), self._marks.get(index)
            if optimizer is not None and mark is not None:
                projected = self.projected_weights.get(mark.path)
                found.append((optimizer, projected is not None and mark.moved(projected)))
        return found

    def _in_use(self) -> set[int]:
        return {index for owners in self._owners.values() for index in owners}

    def _unhook(self, index: int) -> None:
        for handle in self._handles.pop(index, []):
            handle.remove()
        self._marks.pop(index, None)

    def detach(self) -> None:
        """Remove all hooks; the parameters stay visible."""
        for projected in self.projected_weights.values():
            projected.hide(alone=True)
        for index in list(self._handles):
            self._unhook(index)
        for handle in self._gradients.values():
            handle.remove()
        self._gradients.clear()
        self._handlers.clear()
        self._optimizers.clear()
        for module in [one for one in _MODULES if Projector.find(one) is self]:
            del module.__dict__[_ATTRIBUTE]
            _MODULES.discard(module)

    def clock(self, paths: Sequence[str]) -> int:
        """Steps of the optimizer that owns the parameters; of several, the slowest one's.

        Frozen weights have none: where all are, the fastest optimizer counts.
        """
        owners = {index for path in paths for index in self._owners[path]} or self._in_use()
        if not owners:
            return max(self.steps, default=0)
        return min(self.steps[index] for index in owners)

    def settle(self) -> None:
        """Project what user code wrote into parameters since the last step."""
        for projected in self.projected_weights.values():
            projected.settle()

    def project(self) -> None:
        """Make every parameter visible."""
        for projected in self.projected_weights.values():
            projected.project()

    def _hook(self, optimizer: Optimizer, index: int) -> None:
        def before(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return None if self.asleep else self._before_step(index, args, kwargs)

        def after(_: Optimizer, _args: Any, _kwargs: Any) -> None:
            if not self.asleep:
                self._after_step(index)

        self._handles[index] = [
            optimizer.register_step_pre_hook(_untraced(before)),
            optimizer.register_step_post_hook(_untraced(after)),
        ]
        if owned := self._owned(index):
            self._marks[index] = _Mark(owned[0])

    def _owned(self, index: int) -> list[ProjectedWeight]:
        return [
            self.projected_weights[path] for path, owners in self._owners.items() if index in owners
        ]

    def _before_step(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        projected_weights = self._owned(index)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            for projected in projected_weights:
                projected.prepare_update()
            return None

        def visible_closure() -> Any:
            # Lightning runs forward and backward in here, and LBFGS does so several times: each
            # must see visible weights, and leave latent ones for the update that follows.
            for projected in projected_weights:
                projected.hide()
            result = closure()
            for projected in projected_weights:
                projected.prepare_update()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": visible_closure}
        return (*args[:1], visible_closure, *args[2:]), kwargs

    def _after_step(self, index: int) -> None:
        self.steps[index] += 1
        self._marks.pop(index, None)
        for _, handler in self._handlers:
            handler()
        for projected in self._owned(index):
            projected.project()


class _Mark:
    """A few values of a weight, to tell later whether it was updated."""

    def __init__(self, projected: ProjectedWeight) -> None:
        self.path, self.values = projected.path, self._few(projected)

    @staticmethod
    def _few(projected: ProjectedWeight) -> Tensor:
        return projected.values().reshape(-1)[:_FEW].clone()

    def moved(self, projected: ProjectedWeight) -> bool:
        """Whether the weight has other values now."""
        now = self._few(projected)
        same = now.shape == self.values.shape and torch.equal(now, self.values)
        return projected.overwritten or not same


def select_entries(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The entries of a tensor that stay, axis by axis.

    >>> select_entries(torch.arange(6).reshape(2, 3), {1: torch.tensor([0, 2])}).tolist()
    [[0, 2], [3, 5]]
    """
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.contiguous()


def _hook_gradient(projected: ProjectedWeight) -> RemovableHandle:
    weight = projected.parameter
    if is_sharded(weight):
        return weight.register_post_accumulate_grad_hook(_untraced(projected.mask_sharded_gradient))
    return weight.register_hook(_untraced(projected.mask_gradient))


def _untraced(hook: Callable[..., Any]) -> Any:
    """A hook that `torch.compile` leaves alone: traced hooks are silently wrong."""
    return torch.compiler.disable(hook)


def parameter_ids(optimizer: Optimizer) -> set[int]:
    """The ids of all parameters that an optimizer updates."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _check_optimizer(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TargetError(f"{name} has no step hooks: it does not call Optimizer.__init__")
    lowered = name.lower()
    if any(word in lowered for word in ("schedulefree", "lookahead")):
        raise TargetError(
            f"{name} keeps a second copy of the weights, which would bring pruned weights back: "
            "use an optimizer that updates the parameters themselves"
        )
