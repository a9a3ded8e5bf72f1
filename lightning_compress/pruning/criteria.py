"""Criteria: a score for each weight; the weights with the lowest scores are pruned."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_compress.projection import Slot
from lightning_compress.pruning.activations import InputActivation, OutputActivation
from lightning_compress.pruning.gradients import Fisher, Hutchinson, Movement, Taylor
from lightning_compress.pruning.hessian import OptimalBrainSurgeon

__all__ = [
    "CRITERIA",
    "Criterion",
    "Fisher",
    "Hutchinson",
    "InputActivation",
    "Movement",
    "OptimalBrainSurgeon",
    "OutputActivation",
    "Random",
    "Stateless",
    "Taylor",
    "magnitude",
    "magnitude_l2",
    "make_criterion",
]


@runtime_checkable
class Criterion(Protocol):
    """What scores weights; any object of this shape will do.

    Two more methods are optional: `update(slot, mask) -> Tensor | None` gives new latent values
    after pruning (None: unchanged), and `state_dict` / `load_state_dict` carry statistics
    through a resume.

    Attributes:
        window: steps of the owning optimizer before a prune event in which statistics gather;
            0: none are needed, the event itself is between `begin` and `end`.
    """

    window: int

    def begin(self, slots: Sequence[Slot]) -> None:
        """Install hooks and start to gather for these weights."""

    def scores(self, slot: Slot) -> Tensor:
        """Scores in the weight's shape at the prune event; the lowest go first."""
        ...

    def end(self) -> None:
        """Remove the hooks and free the statistics; a second call does nothing."""


class Stateless:
    """A criterion from a function of the weight alone.

    Args:
        function: from a weight to its scores, in the same shape.

    >>> Stateless(magnitude).window
    0
    """

    window = 0

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def begin(self, slots: Sequence[Slot]) -> None:
        """Nothing to gather."""

    def scores(self, slot: Slot) -> Tensor:
        """Scores of the weight's latent values.

        Raises:
            ValueError: when the function returns another shape, or no tensor.
        """
        values = slot.values()
        scores = self.function(values)
        if not isinstance(scores, Tensor) or scores.shape != values.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"the criterion {self.function!r} gave {got} for {slot.path} of shape "
                f"{tuple(values.shape)}: scores have the weight's shape"
            )
        return scores.detach()

    def end(self) -> None:
        """Nothing to free."""


class Random:
    """Uniform random scores: the baseline every criterion has to beat.

    They depend on the seed and the weight's path alone: the same at every event, on every
    process and after a resume, apart from the global random state.

    >>> Random(seed=3).window
    0
    """

    window = 0

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def begin(self, slots: Sequence[Slot]) -> None:
        """Nothing to gather."""

    def scores(self, slot: Slot) -> Tensor:
        """Scores in [0, 1)."""
        seed = zlib.crc32(f"{self.seed} {slot.path}".encode())
        generator = torch.Generator().manual_seed(seed)
        values = slot.values()
        return torch.rand(values.shape, generator=generator).to(values.device)

    def end(self) -> None:
        """Nothing to free."""


def magnitude(weight: Tensor) -> Tensor:
    """Importance by absolute value, of the weight's own shape (Han et al. 2015).

    >>> magnitude(torch.tensor([-2.0, 1.0]))
    tensor([2., 1.])
    """
    return weight.detach().abs()


def magnitude_l2(weight: Tensor) -> Tensor:
    """Squares: the order of `magnitude`, and groups summed up go by their L2 norm.

    >>> magnitude_l2(torch.tensor([-2.0, 1.0]))
    tensor([4., 1.])
    """
    return weight.detach().square()


CRITERIA: dict[str, Callable[[], Criterion]] = {
    "magnitude": partial(Stateless, magnitude),
    "magnitude_l2": partial(Stateless, magnitude_l2),
    "activation": InputActivation,
    "output_activation": OutputActivation,
    "taylor": Taylor,
    "fisher": Fisher,
    "obs": OptimalBrainSurgeon,
    "movement": Movement,
    "random": Random,
}


def make_criterion(given: str | Callable[[Tensor], Tensor] | Criterion) -> Criterion:
    """A criterion from its name, a function of the weight, or itself.

    Raises:
        ValueError: for an unknown name, a class in place of an object, or an object that is
            neither a criterion nor callable.

    >>> type(make_criterion("activation")).__name__
    'InputActivation'
    >>> make_criterion("magic")
    Traceback (most recent call last):
    ValueError: criterion='magic': valid are ['activation', 'fisher', 'magnitude', ...
    """
    if isinstance(given, str):
        if given not in CRITERIA:
            raise ValueError(
                f"criterion={given!r}: valid are {sorted(CRITERIA)}, a function of the weight, "
                "or an object with window, begin, scores and end"
            )
        return CRITERIA[given]()
    if isinstance(given, type):
        raise ValueError(f"criterion={given.__name__} is a class: give an object of it")
    if isinstance(given, Criterion):
        return given
    if callable(given):
        return Stateless(given)
    raise ValueError(
        f"criterion={given!r} has no window, begin, scores and end, and is not callable; "
        f"names are {sorted(CRITERIA)}"
    )
