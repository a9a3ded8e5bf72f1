"""Levers of a budget: compression settings, from level 0 (none) to 1 (the limit).

`lever_of` makes the lever of a `Steerable` callback, which knows nothing of levers itself. A lever
that moves in leaps has `reached(level)` too: where it came to. One that is `reversible` takes back
at a lower level what it did at a higher one, as weights train on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning_compress.budget.sensitivity import Sensitivity

__all__ = [
    "KINDS",
    "BitsLever",
    "ChannelLever",
    "LambdaLever",
    "Lever",
    "Limits",
    "SparsityLever",
    "Steerable",
    "StepLever",
    "all_reversible",
    "levels_reached",
    "lever_of",
]

Share = Callable[[float], Mapping[str, float]]
_FACTOR = 100.0  # that lambda moves by, down and up


@dataclass(frozen=True)
class Limits:
    """Limits of the levers.

    Args:
        max_sparsity: at level 1; densities go down by equal factors.
        steps: of entropy grids, at level 0 and at level 1; by equal factors too.
        lambdas: of rate-distortion grids, at level 0 and at level 1; by equal factors too. None:
            a hundredth of the callback's own `lmbda`, and a hundred times that.
        min_bits: at level 1, of the other grids.
        min_channels: part of the channels that stays at level 1, to the next whole block; of the
            MACs or the parameters where `ChannelPruning` counts those.
        sensitivity: of the layers: a scan, or the file of one. They share the sparsity by it;
            None: by the pruning callback's own scope.

    Raises:
        ValueError: for values outside their range.
    """

    max_sparsity: float = 0.99
    steps: tuple[float, float] = (0.25, 3.0)
    lambdas: tuple[float, float] | None = None
    min_bits: int = 2
    min_channels: float = 0.1
    sensitivity: Sensitivity | str | Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.sensitivity, (str, Path)):
            object.__setattr__(self, "sensitivity", Sensitivity.load(self.sensitivity))
        if not 0 < self.max_sparsity < 1:
            raise ValueError(f"max_sparsity={self.max_sparsity!r} must lie in (0, 1)")
        if len(self.steps) != 2 or not 0 < self.steps[0] < self.steps[1]:
            raise ValueError(f"steps={self.steps!r}: give the finest and the coarsest, both > 0")
        lambdas = self.lambdas
        if lambdas is not None and (len(lambdas) != 2 or not 0 < lambdas[0] < lambdas[1]):
            raise ValueError(f"lambdas={self.lambdas!r}: give the least and the most, both > 0")
        if not 2 <= self.min_bits <= 8:
            raise ValueError(f"min_bits={self.min_bits!r}: valid are 2 to 8")
        if not 0 < self.min_channels < 1:
            raise ValueError(f"min_channels={self.min_channels!r} must lie in (0, 1)")

    def shares(self, paths: Sequence[str]) -> Share | None:
        """From the sparsity of some layers together to that of each; None without a scan.

        Raises:
            ValueError: naming layers that were not scanned.
        """
        scan = self.sensitivity
        return scan.of(paths).sparsities if isinstance(scan, Sensitivity) else None


@runtime_checkable
class Steerable(Protocol):
    """A callback that a budget steers, and whose state it can roll back.

    Beside these it has `steer(...)`, which takes what its kind of lever moves.
    """

    name: str

    @property
    def state_key(self) -> str:
        """Name in messages."""
        ...

    @property
    def steered_by(self) -> str | Callable[[Limits], Lever] | None:
        """A key of `KINDS`, or a function that makes the lever; None: not steered in this run."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """Save point of the state that belongs to the present weights."""
        ...

    def roll_back_to(self, snapshot: dict[str, Any]) -> None:
        """Roll back to a save point's state; weights are not changed."""


class Lever(Protocol):
    """Lever: one compression setting."""

    @property
    def name(self) -> str:
        """Name of the lever."""
        ...

    @property
    def step(self) -> float:
        """The smallest change of level that changes anything; 0: any does."""
        ...

    def move(self, level: float) -> None:
        """Set a level, between two steps of training."""

    @property
    def arrived(self) -> bool:
        """Whether the model has reached the level: some changes wait for statistics."""
        ...

    def setting(self, level: float) -> str:
        """The setting of a level, in words."""
        ...


def all_reversible(levers: Sequence[Lever]) -> bool:
    """Whether a lower level of all of them takes back what a higher one did."""
    return all(getattr(lever, "reversible", False) for lever in levers)


def levels_reached(levers: Sequence[Lever], levels: Sequence[float]) -> tuple[float, ...]:
    """Where levers are that were brought to some levels."""
    known = [getattr(lever, "reached", float) for lever in levers]
    return tuple(reached(level) for reached, level in zip(known, levels, strict=True))


@dataclass
class SparsityLever:
    """The sparsity of a `GradualPruning`.

    >>> round(SparsityLever(None, 0.99).sparsity(0.5), 6)
    0.9
    """

    callback: Any
    most: float
    share: Share | None = None
    step: float = 0.0

    @property
    def name(self) -> str:
        """Name of the callback."""
        return str(self.callback.name)

    def sparsity(self, level: float) -> float:
        """At a level: each equal step of it takes away the same part of what is left."""
        return -math.expm1(level * math.log1p(-self.most))

    def move(self, level: float) -> None:
        """Set the sparsity of a level."""
        asked = self.sparsity(level)
        self.callback.steer(asked if self.share is None else self.share(asked))

    @property
    def arrived(self) -> bool:
        """Whether masks have reached the sparsity."""
        return bool(self.callback.arrived)

    def setting(self, level: float) -> str:
        """The sparsity."""
        return f"sparsity {self.sparsity(level):.4f}"


@dataclass
class StepLever:
    """The step of the entropy grids of a `QuantizationAwareTraining`."""

    callback: Any
    finest: float
    coarsest: float
    step: float = 0.0
    arrived: bool = True
    reversible: bool = True

    @property
    def name(self) -> str:
        """Name of the callback."""
        return str(self.callback.name)

    def relative_step(self, level: float) -> float:
        """At a level, in units of the rms."""
        return self.finest * (self.coarsest / self.finest) ** level

    def move(self, level: float) -> None:
        """Set the step of a level."""
        self.callback.steer(step=self.relative_step(level))

    def setting(self, level: float) -> str:
        """The step."""
        return f"step {self.relative_step(level):.3f} rms"


@dataclass
class LambdaLever:
    """The Lagrange multiplier of a rate-distortion `QuantizationAwareTraining`.

    >>> round(LambdaLever(None, 1.0, 100.0).lmbda(0.5), 6)
    10.0
    """

    callback: Any
    least: float
    most: float
    step: float = 0.0
    reversible: bool = True

    @property
    def name(self) -> str:
        """Name of the callback."""
        return str(self.callback.name)

    @property
    def arrived(self) -> bool:
        """Whether the bytes have followed the multiplier."""
        return bool(self.callback.rate_settled)

    def lmbda(self, level: float) -> float:
        """At a level."""
        return self.least * (self.most / self.least) ** level

    def move(self, level: float) -> None:
        """Set the multiplier of a level; weights follow as they train on."""
        self.callback.steer(lmbda=self.lmbda(level))

    def setting(self, level: float) -> str:
        """The multiplier."""
        return f"lambda {self.lmbda(level):.3g}"


@dataclass
class BitsLever:
    """The bits of a `QuantizationAwareTraining` of any other scheme.

    Args:
        callback: the callback.
        most: bits of each weight at level 0, by path.
        fewest: at level 1.
    """

    callback: Any
    most: Mapping[str, int]
    fewest: int
    arrived: bool = True

    @property
    def name(self) -> str:
        """Name of the callback."""
        return str(self.callback.name)

    @property
    def step(self) -> float:
        """One bit."""
        return 1 / max(max(self.most.values()) - self.fewest, 1)

    def bits(self, level: float) -> dict[str, int]:
        """Of each weight at a level: all lose the same number, down to the fewest."""
        fewer = round(level * (max(self.most.values()) - self.fewest))
        return {path: max(most - fewer, min(self.fewest, most)) for path, most in self.most.items()}

    def move(self, level: float) -> None:
        """Set the bits of a level."""
        self.callback.steer(bits=self.bits(level))

    def setting(self, level: float) -> str:
        """The bits, or their range."""
        found = sorted(set(self.bits(level).values()))
        return f"{found[0]} bits" if len(found) == 1 else f"{found[0]} to {found[-1]} bits"


@dataclass
class ChannelLever:
    """Remaining fraction of channels, MACs or parameters of a `ChannelPruning`.

    Whole blocks of channels go, so a level is reached or passed; the next one counts from there.

    Args:
        callback: the callback.
        fewest: part that is left at level 1, if as few are possible.
    """

    callback: Any
    fewest: float
    step: float = 0.0

    @property
    def name(self) -> str:
        """Name of the callback."""
        return str(self.callback.name)

    @property
    def _floor(self) -> float:
        return max(self.fewest, self.callback.least)

    def left(self, level: float) -> float:
        """The part that is left at a level: equal steps take away equal parts of it."""
        return self._floor**level

    def move(self, level: float) -> None:
        """Set the remaining fraction of a level."""
        self.callback.steer(self.left(level))

    @property
    def arrived(self) -> bool:
        """Whether all channels of the level are removed."""
        return bool(self.callback.arrived)

    def reached(self, level: float) -> float:  # noqa: ARG002
        """The level of the channels that are left."""
        return min(math.log(self.callback.left) / math.log(self._floor), 1.0)

    def setting(self, level: float) -> str:
        """The part that is left."""
        return f"{self.left(level):.4f} of the {self.callback.kind}"


def _lambdas(callback: Any, limits: Limits) -> tuple[float, float]:
    """The least and the most, in the unit of the user's loss, which `lmbda` tells."""
    own = callback.requested_lmbda
    if limits.lambdas is None and not own:
        raise ValueError(
            f"{callback.state_key}: a budget moves lambda by factors, and lmbda={own!r}: give the "
            "lmbda to begin the search around, or limits={'lambdas': (least, most)}"
        )
    return limits.lambdas or (own / _FACTOR, own * _FACTOR)


KINDS: dict[str, Callable[[Any, Limits], Lever]] = {
    "sparsity": lambda one, limits: SparsityLever(
        one, limits.max_sparsity, limits.shares(one.paths())
    ),
    "channels": lambda one, limits: ChannelLever(one, limits.min_channels),
    "step": lambda one, limits: StepLever(one, *limits.steps),
    "lmbda": lambda one, limits: LambdaLever(one, *_lambdas(one, limits)),
    "bits": lambda one, limits: BitsLever(one, dict(one.requested_bits), limits.min_bits),
}


def lever_of(callback: Steerable, limits: Limits) -> Lever | None:
    """The lever that moves a callback, as far as `limits` says; None where it has none."""
    kind = callback.steered_by
    if kind is None or callable(kind):
        return None if kind is None else kind(limits)
    return KINDS[kind](callback, limits)
