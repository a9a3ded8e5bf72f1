"""Statistics windows: sums per weight that criteria collect before a pruning event, by hooks.

Sums are per layer call: a layer used twice in a forward adds both, and so do a GAN generator's
forwards in discriminator steps. Forwards in eval mode are ignored. In distributed training the
sums of all processes are added when scores are asked for: every process must ask, in one order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_compress.hooks import Hook
from lightning_compress.projection import ProjectedWeight
from lightning_compress.pruning.layer_inputs import (
    LayerCall,
    find_owner,
    from_matrix,
    to_matrix,
    weight_name,
)
from lightning_compress.schedules import EventClock

__all__ = [
    "Criterion",
    "ForwardStatistics",
    "StatisticsCriterion",
    "StatisticsWindow",
    "StatisticsWindows",
    "over_processes",
]
WHOLE_RUN = 1 << 62  # a window that is open from the first step on
_SLACK = 1  # steps: in fractions of the run, how far the next event is away is an estimate


class StatisticsCriterion:
    """Base of the criteria that collect sums in a statistics window before each pruning event.

    A subclass says what to watch (`_watch`), what a sum looks like (`_empty`), and how sums make
    scores (`_score`).

    Args:
        window: steps of the owning optimizer, before an event, in which sums gather.

    Raises:
        ValueError: when the window is not an integer of 1 or more.
    """

    def __init__(self, *, window: int) -> None:
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window={window!r} must be an integer number of steps, 1 or more")
        self.window = window
        self._projected_weights: dict[str, ProjectedWeight] = {}
        self._sums: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        self._totals: dict[str, tuple[Tensor, int]] = {}  # over all processes, until more is added
        self._reasons: dict[str, str] = {}
        self._warned: set[str] = set()
        self._removers: list[Callable[[], None]] = []
        self._loaded: dict[str, Any] | None = None

    def begin(self, projected_weights: Sequence[ProjectedWeight]) -> None:
        """Start the window for these weights, empty or from a loaded state."""
        self.end()
        for projected in projected_weights:
            self._projected_weights[projected.path] = projected
            self._sums[projected.path] = self._empty(projected)
            self._calls[projected.path] = 0
        self._apply_loaded()
        self._watch(projected_weights)

    def end(self) -> None:
        """Remove the hooks and free the sums."""
        for remove in self._removers:
            remove()
        self._removers.clear()
        for kept in (self._projected_weights, self._sums, self._calls, self._totals, self._reasons):
            kept.clear()

    def scores(self, projected: ProjectedWeight) -> Tensor:
        """Scores of a weight, in its shape; the lowest go first.

        Where nothing was seen, the scores are magnitudes in the unit of the others, with a
        warning that names the weight.

        Raises:
            RuntimeError: outside `begin` and `end`.
        """
        self._check(projected)
        sums, calls = self._total(projected.path)
        if calls:
            return self._score(projected, sums, calls)
        self._warn(projected.path)
        return projected.values().abs() * self._unit()

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, so that a run resumed inside a window prunes the same."""
        if self._loaded is not None:  # a run that ends before its next window begins
            return self._loaded
        sums = {path: total.detach().clone() for path, total in self._sums.items()}
        return {"sums": sums, "calls": dict(self._calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved sums, now or when the window begins."""
        self._loaded = state if state["sums"] else None
        if self._projected_weights:
            self._apply_loaded()

    def _empty(self, projected: ProjectedWeight) -> Tensor:
        return torch.zeros_like(projected.values(), dtype=torch.float32)

    def _watch(self, projected_weights: Sequence[ProjectedWeight]) -> None:
        raise NotImplementedError

    def _score(self, projected: ProjectedWeight, sums: Tensor, calls: int) -> Tensor:
        raise NotImplementedError

    def _add(self, path: str, amount: Tensor) -> None:
        # Half precision overflows: such a step is skipped by the scaler, and so is its share.
        finite = torch.isfinite(amount).all()
        self._sums[path] += torch.where(finite, amount, 0.0)
        self._calls[path] += 1
        self._totals.pop(path, None)

    def _apply_loaded(self) -> None:
        if self._loaded is None:
            return
        state, self._loaded = self._loaded, None
        for path, total in state["sums"].items():
            mine = self._sums.get(path)
            if mine is None or mine.shape != total.shape:
                have = "nothing" if mine is None else f"shape {tuple(mine.shape)}"
                raise ValueError(
                    f"the saved statistics of {path} have shape {tuple(total.shape)}, "
                    f"{type(self).__name__} gathers {have} there"
                )
            mine.copy_(total)
            self._calls[path] = state["calls"][path]

    def _check(self, projected: ProjectedWeight) -> None:
        if self._projected_weights.get(projected.path) is not projected:
            raise RuntimeError(f"{type(self).__name__} has no begin() with {projected.path}")

    def _total(self, path: str) -> tuple[Tensor, int]:
        if path not in self._totals:
            calls = torch.tensor(self._calls[path], device=self._sums[path].device)
            calls, sums = over_processes(calls), over_processes(self._sums[path])
            self._totals[path] = sums, int(calls)
        return self._totals[path]

    def _unit(self) -> float:
        """Mean score over mean magnitude of the weights that were seen."""
        seen = [
            projected for path, projected in self._projected_weights.items() if self._total(path)[1]
        ]
        size = sum(projected.values().abs().sum().item() for projected in seen)
        scores = sum(self._score(one, *self._total(one.path)).abs().sum().item() for one in seen)
        return scores / size if size and scores else 1.0

    def _warn(self, path: str) -> None:
        if path in self._warned:
            return
        self._warned.add(path)
        reason = self._reasons.get(path, "nothing of it was seen in training mode")
        warnings.warn(
            f"{type(self).__name__} scores {path} by magnitude: {reason}", UserWarning, stacklevel=3
        )


def over_processes(value: Tensor) -> Tensor:
    """The sum over all processes, as a new tensor; a sharded tensor is left as it is."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    if distributed.get_world_size() == 1 or hasattr(value, "to_local"):
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total


def _reacting(react: Callable[[LayerCall], None]) -> Hook:
    """A forward hook that shows each training call of a layer."""

    def show(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not layer.training:
            return
        device = next((p.device.type for p in layer.parameters()), "cpu")
        with torch.no_grad(), torch.autocast(device, enabled=False):
            react(LayerCall(layer, args, kwargs, output))

    return Hook(show)


class ForwardStatistics(StatisticsCriterion):
    """Base of the criteria that read inputs or outputs of layers.

    Making one lets `torch.compile` notice hooks (`skip_nnmodule_hook_guards`): a graph compiled
    before that keeps no hooks, and its weights are scored by magnitude, with a warning. The
    hooks break graphs inside a window, so `fullgraph=True` raises there.
    """

    def __init__(self, *, window: int) -> None:
        super().__init__(window=window)
        torch._dynamo.config.skip_nnmodule_hook_guards = False  # type: ignore[attr-defined]
        self._owners: dict[str, nn.Module] = {}

    def end(self) -> None:
        """Remove the hooks and free the sums."""
        super().end()
        self._owners.clear()

    def _watch(self, projected_weights: Sequence[ProjectedWeight]) -> None:
        by_owner: dict[nn.Module, list[ProjectedWeight]] = {}
        for projected in projected_weights:
            owner = self._owners.get(projected.path)
            if owner is not None:
                by_owner.setdefault(owner, []).append(projected)
        for owner, mine in by_owner.items():
            hook = _reacting(partial(self._react, mine))
            handle = owner.register_forward_hook(hook, with_kwargs=True)
            self._removers.append(handle.remove)

    def _react(self, projected_weights: Sequence[ProjectedWeight], call: LayerCall) -> None:
        for projected in projected_weights:
            amount = self._seen(projected, call)
            if amount is None:
                kind = type(call.owner).__name__
                self._reasons[projected.path] = f"a {kind} does not show what this weight meets"
            else:
                self._add(projected.path, amount)

    def _empty(self, projected: ProjectedWeight) -> Tensor:
        owner = find_owner(projected)
        if owner is None:
            self._reasons[projected.path] = "the layer behind its parametrization is unknown"
            return projected.values().new_zeros(0)
        self._owners[projected.path] = owner
        return self._blank(projected, self._matrix(projected))

    def _matrix(self, projected: ProjectedWeight) -> Tensor:
        return to_matrix(projected.values(), self._owners[projected.path], weight_name(projected))

    def _weight(self, projected: ProjectedWeight, matrix: Tensor) -> Tensor:
        values = projected.values()
        owner = self._owners[projected.path]
        return from_matrix(matrix, owner, values.shape, weight_name(projected))

    def _blank(self, projected: ProjectedWeight, matrix: Tensor) -> Tensor:
        raise NotImplementedError

    def _seen(self, projected: ProjectedWeight, call: LayerCall) -> Tensor | None:
        raise NotImplementedError


@runtime_checkable
class Criterion(Protocol):
    """Protocol of a pruning criterion.

    Two more methods are optional: `update(projected, mask) -> Tensor | None` gives new latent
    values after pruning (None: unchanged), and `state_dict` / `load_state_dict` carry statistics
    through a resume.

    Attributes:
        window: steps of the owning optimizer before a prune event in which statistics gather;
            0: none are needed, the event itself is between `begin` and `end`.
    """

    window: int

    def begin(self, projected_weights: Sequence[ProjectedWeight]) -> None:
        """Install hooks and start to gather for these weights."""

    def scores(self, projected: ProjectedWeight) -> Tensor:
        """Scores in the weight's shape at the prune event; the lowest go first."""
        ...

    def end(self) -> None:
        """Remove the hooks and free the statistics; a second call does nothing."""


class StatisticsWindow:
    """Statistics window: turns a criterion's statistics on before an event and off after it.

    Args:
        criterion: gathers over `criterion.window` steps; 0: needs no statistics, and begins and
            ends at the event; `WHOLE_RUN`: from the first step on, and any number will do.
    """

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion
        self.since: int | None = None  # the step at which gathering began

    def look_ahead(
        self,
        projected_weights: Sequence[ProjectedWeight],
        events: EventClock,
        step: int,
        *,
        pending: bool,
        needed: Callable[[float], bool],
    ) -> None:
        """Begin when an event is near, or due and waiting; end when none will come.

        Args:
            projected_weights: the targets.
            events: the clock.
            step: the present one.
            pending: an event waits for statistics.
            needed: whether an event at a position would change anything.
        """
        window = self.criterion.window
        if not window:
            return
        ahead, slack = events.ahead(), _SLACK if events.in_fractions else 0
        reach = window + slack if self.since is None else max(window, ahead) + slack
        near = not events.over and ahead <= reach and needed(events.horizon(reach))
        near |= window >= WHOLE_RUN and not events.over
        if self.since is not None and not pending and not near:
            self.stop()
        elif self.since is None and (pending or near):
            self.criterion.begin(projected_weights)
            self.since = step

    def ready(self, step: int, *, late: bool = False) -> bool:
        """Whether there are statistics enough for an event.

        Args:
            step: the present one.
            late: the last event of several: what there is will do.
        """
        if not self.criterion.window:
            return True
        gathered = 0 if self.since is None else step - self.since
        late = late or self.criterion.window >= WHOLE_RUN
        return gathered >= self.criterion.window or (late and gathered > 0)

    def scores(
        self, projected_weights: Sequence[ProjectedWeight], wanted: Sequence[ProjectedWeight]
    ) -> list[Tensor]:
        """Scores of some weights at an event; `projected_weights` are all that have statistics.

        Args:
            projected_weights: the targets.
            wanted: those to score.
        """
        if not self.criterion.window and self.since is None:
            self.criterion.begin(projected_weights)
            self.since = 0  # until the event is over
        return [self.criterion.scores(projected) for projected in wanted]

    def updated_values(self, projected: ProjectedWeight) -> Tensor | None:
        """New weight values under a new mask, of a criterion with a Hessian-based update."""
        update = getattr(self.criterion, "update", None)
        return (
            None
            if update is None or projected.pruned is None
            else update(projected, ~projected.pruned)
        )

    def after_event(self, ahead: float) -> None:
        """Free the statistics, unless the next window has begun already."""
        if self.since is not None and ahead >= self.criterion.window:
            self.stop()

    def stop(self) -> None:
        """End gathering."""
        self.criterion.end()
        self.since = None

    def reset(self) -> None:
        """End the window and reset the sums of the whole run."""
        self.stop()
        forget = getattr(self.criterion, "reset", None)
        if forget is not None:
            forget()

    def state_dict(self) -> dict[str, Any]:
        """Begin of the window, and the criterion's own state if it has one."""
        own = getattr(self.criterion, "state_dict", None)
        return {"since": self.since, "criterion": None if own is None else own()}

    def restore(
        self, projected_weights: Sequence[ProjectedWeight], step: int, state: dict[str, Any]
    ) -> None:
        """Resume the window; a criterion without a saved state begins anew at this step."""
        load = getattr(self.criterion, "load_state_dict", None)
        if state["since"] is not None:
            self.criterion.begin(projected_weights)
            self.since = step if load is None else state["since"]
        if load is not None and state["criterion"] is not None:
            load(state["criterion"])


class StatisticsWindows(list[StatisticsWindow]):
    """Several windows at once: of the pruning criterion and of the growth criterion."""

    def look_ahead(
        self,
        projected_weights: Sequence[ProjectedWeight],
        events: EventClock,
        step: int,
        *,
        pending: bool,
        needed: Callable[[float], bool],
    ) -> None:
        """As `StatisticsWindow.look_ahead`."""
        for one in self:
            one.look_ahead(projected_weights, events, step, pending=pending, needed=needed)

    def after_event(self, ahead: float) -> None:
        """As `StatisticsWindow.after_event`."""
        for one in self:
            one.after_event(ahead)

    def stop(self) -> None:
        """End all."""
        for one in self:
            one.stop()

    def reset(self) -> None:
        """End all and forget."""
        for one in self:
            one.reset()

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each."""
        return [one.state_dict() for one in self]

    def restore(
        self, projected_weights: Sequence[ProjectedWeight], step: int, state: list[dict[str, Any]]
    ) -> None:
        """Put the state of each back."""
        for one, saved in zip(self, state, strict=True):
            one.restore(projected_weights, step, saved)
