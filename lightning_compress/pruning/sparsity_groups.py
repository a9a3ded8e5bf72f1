"""Sparsity groups: targets with a schedule of their own, by pattern, and each target's floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lightning_compress.errors import TargetError
from lightning_compress.projection import ProjectedWeight
from lightning_compress.schedules import Polynomial, Schedule
from lightning_compress.targets import Pattern, clean_path, select

__all__ = [
    "SparsityGroup",
    "assign_targets",
    "by_pattern",
    "check_floors",
    "check_min_keep",
    "floors_by_path",
    "make_schedules",
    "split_groups",
    "steered_sparsity",
]

Curve = Callable[[float], float]
Steered = float | Mapping[str, float] | None  # what is asked in a schedule's place
MIN_KEEP = 0.01  # of each target, where nothing else is asked
_DEFAULTS = {"final_sparsity": 0.9, "begin": 0.0, "end": 0.7}


@dataclass
class SparsityGroup:
    """Sparsity group: targets that are pruned together by one schedule.

    Args:
        pattern: what chose them; None: all targets.
        curve: from position to sparsity.
        requested: the highest sparsity asked so far.
        projected_weights: the targets, in a fit.
        fixed: the pattern of n:m leaves dense what it does not fit: what was asked counts.
    """

    pattern: Pattern | None
    curve: Curve
    requested: float = 0.0
    projected_weights: list[ProjectedWeight] = field(default_factory=list)
    fixed: bool = False

    def paths(self) -> list[str]:
        """Paths of the targets."""
        return [projected.path for projected in self.projected_weights]

    @property
    def sparsity(self) -> float:
        """Fraction of the group's weights that masks prune."""
        total = sum(projected.target.numel for projected in self.projected_weights)
        return (
            sum(projected.sparsity * projected.target.numel for projected in self.projected_weights)
            / total
        )

    def target(self, position: float) -> float:
        """The sparsity at a position.

        Raises:
            ValueError: when the schedule gives no sparsity.
        """
        value = self.curve(position)
        if not 0 <= value < 1:
            raise ValueError(f"the schedule gave {value!r} at {position}: it must lie in [0, 1)")
        return value

    def wanted(self, position: float, steered: Steered, parts: Sequence[SparsityGroup]) -> float:
        """The sparsity at a position, by the schedule or as steered in its place."""
        if steered is None:
            return self.target(position)
        if isinstance(steered, Mapping):
            return steered.get(self.paths()[0], self.requested)
        if len(parts) == 1:
            return steered
        finals = [part.target(math.inf) for part in parts]
        return steered_sparsity(steered, self.target(math.inf), max(finals))

    def miss(self, end: float, *, late: str = "") -> str:
        """Shortfall of sparsity at the end of a run, in words; empty if there is none.

        Args:
            end: of the window.
            late: why the schedule did not come to its end, where it is not that the run ended.
        """
        final, total = (
            self.target(end),
            sum(projected.target.numel for projected in self.projected_weights),
        )
        reached = self.sparsity
        unreached = round(final * total) > round(self.requested * total)
        units = [projected.unit for projected in self.projected_weights]
        near = max(max(units), sum(units) / 2)  # with scope="layer" each rounds by itself
        if not unreached and (self.fixed or (final - reached) * total <= near):
            return ""
        of = "" if self.pattern is None else f" of {self.pattern!r}"
        why = (
            late or f"the run ended before end={end!r} of the schedule"
            if unreached
            else "min_keep or whole units kept more, or zeros went with removed channels"
        )
        return f"ended at sparsity {reached:.4f}{of} instead of {final:.4f}: {why}"

    def request(self, sparsity: float) -> float:
        """The sparsity to reach now: it never falls, whatever the schedule does."""
        self.requested = max(self.requested, sparsity)
        return self.requested


def make_schedules(
    final_sparsity: float | Mapping[Pattern, float],
    schedule: Curve | None,
    begin: float,
    end: float,
    limit: float = 1.0,
) -> list[SparsityGroup]:
    """One group for all targets, or one for each pattern of a mapping.

    Args:
        final_sparsity: at the end.
        schedule: None: `Polynomial`.
        begin: of the window.
        end: of the window.
        limit: final sparsity that a granularity fixes; 1: none.

    Raises:
        ValueError: for arguments that contradict each other; the message names them.

    >>> [part.target(1.0) for part in make_schedules({"a.*": 0.5, "b.*": 0.8}, None, 0.0, 0.7)]
    [0.5, 0.8]
    """
    _check_schedule(schedule, {"final_sparsity": final_sparsity, "begin": begin, "end": end})
    if isinstance(final_sparsity, Mapping):
        if not final_sparsity:
            raise ValueError("final_sparsity={} names no pattern")
        parts = {one: _check_limit(value, limit) for one, value in final_sparsity.items()}
        return [
            SparsityGroup(one, _with_final(schedule, value, begin, end), fixed=limit < 1)
            for one, value in parts.items()
        ]
    given = schedule.final_sparsity if isinstance(schedule, Schedule) else final_sparsity
    if schedule is None or isinstance(schedule, Schedule):
        default = given == _DEFAULTS["final_sparsity"]
        given = limit if limit < 1 and default else _check_limit(given, limit)
        return [SparsityGroup(None, _with_final(schedule, given, begin, end), fixed=limit < 1)]
    return [SparsityGroup(None, schedule, fixed=limit < 1)]


def by_pattern(
    module: nn.Module,
    patterns: Sequence[Pattern],
    exclude: Sequence[Pattern] | Pattern,
    projected_weights: Sequence[ProjectedWeight],
) -> list[list[ProjectedWeight]]:
    """Projected weights by the first pattern that matches each.

    Raises:
        TargetError: for a pattern that matches no target, or none that no earlier one has.
    """
    left, groups = {projected.path: projected for projected in projected_weights}, []
    for pattern in patterns:
        targets = select(module, pattern, exclude).targets
        paths = [clean_path(target.path) for target in targets]
        groups.append([left.pop(path) for path in paths if path in left])
        if not groups[-1]:
            raise TargetError(f"the pattern {pattern!r} matches no target that is still free")
    return groups


def assign_targets(
    module: nn.Module,
    parts: Sequence[SparsityGroup],
    exclude: Sequence[Pattern] | Pattern,
    projected_weights: Sequence[ProjectedWeight],
) -> None:
    """Assign each group its targets; arguments and errors as `by_pattern`."""
    patterns = [part.pattern for part in parts if part.pattern is not None]
    groups = by_pattern(module, patterns, exclude, projected_weights)
    for part, own in zip(parts, groups or [list(projected_weights)], strict=True):
        part.projected_weights = own


def steered_sparsity(sparsity: float, final: float, highest: float) -> float:
    """A group's share of a common sparsity: densities keep the powers that the finals have.

    Args:
        sparsity: of the group that is pruned most.
        final: that this group's schedule ends at.
        highest: of all groups' finals.

    >>> steered_sparsity(0.99, 0.9, 0.9), round(steered_sparsity(0.99, 0.5, 0.75), 4)
    (0.99, 0.9)
    """
    if final == highest or highest <= 0:
        return sparsity
    return 1 - (1 - sparsity) ** (math.log1p(-final) / math.log1p(-highest))


def split_groups(parts: Sequence[SparsityGroup]) -> list[SparsityGroup]:
    """A group for each target, at the sparsity of its present mask."""
    return [
        SparsityGroup(
            projected.path,
            part.curve,
            requested=projected.sparsity,
            projected_weights=[projected],
            fixed=part.fixed,
        )
        for part in parts
        for projected in part.projected_weights
    ]


def check_min_keep(
    min_keep: float | Mapping[Pattern, float], parts: Sequence[SparsityGroup]
) -> None:
    """Check `min_keep` before the targets are known.

    Raises:
        ValueError: for a fraction that is none, or leaves no room for a schedule's final value.
    """
    curves = [part.curve for part in parts]
    finals = [one.final_sparsity for one in curves if isinstance(one, Schedule)]
    each = min_keep.values() if isinstance(min_keep, Mapping) else [min_keep]
    most = 1.0 if isinstance(min_keep, Mapping) else 1 - max(finals, default=0.0)
    for value in each:
        if not 0 <= value <= most:
            raise ValueError(f"min_keep={value!r} must lie between 0 and 1 - final sparsity")


def floors_by_path(
    module: nn.Module,
    min_keep: float | Mapping[Pattern, float],
    projected_weights: Sequence[ProjectedWeight],
) -> dict[str, float]:
    """Fraction of each target that stays, by path.

    Args:
        module: the model.
        min_keep: one for all, or by pattern: of two that match the first counts, and what none
            matches keeps `MIN_KEEP`.
        projected_weights: the targets.

    Raises:
        TargetError: for a pattern that matches no target.
    """
    if not isinstance(min_keep, Mapping):
        return {projected.path: min_keep for projected in projected_weights}
    floors = {projected.path: MIN_KEEP for projected in projected_weights}
    groups = by_pattern(module, list(min_keep), (), projected_weights)
    for value, group in zip(min_keep.values(), groups, strict=True):
        floors.update({projected.path: value for projected in group})
    return floors


def check_floors(
    projected_weights: Sequence[ProjectedWeight],
    floors: Mapping[str, float],
    final: float,
    *,
    each: bool,
) -> None:
    """Check that the floors leave room for the final sparsity.

    Args:
        projected_weights: of one group.
        floors: fraction of each that stays, by path.
        final: the sparsity in the end.
        each: every weight has to reach it, not only all together.

    Raises:
        ValueError: when it does not; names the weight or the sum.
    """
    for projected in projected_weights if each else ():
        if floors[projected.path] > 1 - final + 1e-9:
            raise ValueError(
                f"min_keep={floors[projected.path]!r} of {projected.path} leaves no room for the "
                f"sparsity {final!r}: at most {1 - final:.4g} may stay"
            )
    total = sum(projected.target.numel for projected in projected_weights)
    kept = sum(floors[projected.path] * projected.target.numel for projected in projected_weights)
    if kept > (1 - final + 1e-9) * total:
        raise ValueError(
            f"min_keep keeps {kept / total:.4g} of the weights, which leaves no room for the "
            f"sparsity {final!r}"
        )


def _check_schedule(schedule: Curve | None, given: Mapping[str, object]) -> None:
    if schedule is None:
        return
    if not callable(schedule):
        raise ValueError(f"schedule={schedule!r} must be callable, such as Polynomial(...)")
    several = isinstance(given["final_sparsity"], Mapping)
    if several and not isinstance(schedule, Schedule):
        raise ValueError("with a mapping as final_sparsity, schedule must be a Schedule: its shape")
    checked = {key: value for key, value in given.items() if not isinstance(value, Mapping)}
    changed = sorted(key for key, value in checked.items() if value != _DEFAULTS[key])
    if isinstance(schedule, Schedule) and changed:
        raise ValueError(f"the schedule brings its own {changed}: set them there alone")


def _check_limit(value: float, limit: float) -> float:
    if limit < 1 and not math.isclose(value, limit):
        raise ValueError(
            f"final_sparsity={value!r} does not fit a granularity of n:m: it ends at {limit:.6g}"
        )
    return value


def _with_final(schedule: Curve | None, final: float, begin: float, end: float) -> Curve:
    if isinstance(schedule, Schedule):
        return replace(schedule, final_sparsity=final)
    return Polynomial(final_sparsity=final, begin=begin, end=end)
