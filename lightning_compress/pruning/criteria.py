"""Pruning criteria: a score for each weight; the weights with the lowest scores are pruned."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_compress.projection import ProjectedWeight
from lightning_compress.pruning.layer_inputs import LayerCall, weight_name
from lightning_compress.pruning.optimal_brain_surgeon import OptimalBrainSurgeon
from lightning_compress.pruning.statistics import (
    WHOLE_RUN,
    Criterion,
    ForwardStatistics,
    StatisticsCriterion,
    over_processes,
)

__all__ = [
    "CRITERIA",
    "Fisher",
    "GradientStatistics",
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


class InputActivation(ForwardStatistics):
    """|w| times the norm of its input, ||x||_2 over the window: Wanda (Sun et al. 2023).

    https://arxiv.org/abs/2306.11695. In a convolution x is what meets this kernel tap, over
    all output positions; in an embedding, the norm is the root of how often the row was used.

    >>> InputActivation(window=20).window
    20
    """

    def __init__(self, *, window: int = 10) -> None:
        super().__init__(window=window)

    def _blank(self, projected: ProjectedWeight, matrix: Tensor) -> Tensor:  # noqa: ARG002
        return matrix.new_zeros(matrix.shape[0], matrix.shape[2], dtype=torch.float32)

    def _seen(self, projected: ProjectedWeight, call: LayerCall) -> Tensor | None:
        inputs = call.inputs(weight_name(projected))
        return None if inputs is None else inputs.energy()

    def _score(self, projected: ProjectedWeight, sums: Tensor, calls: int) -> Tensor:  # noqa: ARG002
        return self._weight(projected, self._matrix(projected).abs() * sums.sqrt().unsqueeze(1))


class OutputActivation(ForwardStatistics):
    """|w| times the mean absolute output of its unit, before any activation that follows.

    The unit of a recurrent weight is the hidden state that its gate's row belongs to.

    >>> OutputActivation().window
    10
    """

    def __init__(self, *, window: int = 10) -> None:
        super().__init__(window=window)

    def _blank(self, projected: ProjectedWeight, matrix: Tensor) -> Tensor:  # noqa: ARG002
        return matrix.new_zeros(matrix.shape[0], matrix.shape[1], dtype=torch.float32)

    def _seen(self, projected: ProjectedWeight, call: LayerCall) -> Tensor | None:
        outputs = call.outputs(weight_name(projected))
        if outputs is None:
            return None
        return outputs.detach().float().abs().mean(0).view_as(self._sums[projected.path])

    def _score(self, projected: ProjectedWeight, sums: Tensor, calls: int) -> Tensor:
        return self._weight(projected, self._matrix(projected).abs() * (sums / calls).unsqueeze(2))


class GradientStatistics(StatisticsCriterion):
    """Base of the criteria that read every gradient of a weight as it is projected."""

    def _watch(self, projected_weights: Sequence[ProjectedWeight]) -> None:
        for projected in projected_weights:
            tap = partial(self._tap, projected)
            projected.taps.append(tap)
            self._removers.append(partial(projected.taps.remove, tap))

    @torch.no_grad()
    def _tap(self, projected: ProjectedWeight, gradient: Tensor) -> None:
        gradient = gradient.detach()
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        self._add(projected.path, self._amount(projected, gradient.float()))

    def _amount(self, projected: ProjectedWeight, gradient: Tensor) -> Tensor:
        raise NotImplementedError


class Taylor(GradientStatistics):
    """Sum of |w * dL/dw| over the window: first order (Molchanov et al. 2019).

    https://arxiv.org/abs/1906.10771: what the loss would change by without the weight.

    >>> Taylor(window=5).window
    5
    """

    def __init__(self, *, window: int = 10) -> None:
        super().__init__(window=window)

    def _amount(self, projected: ProjectedWeight, gradient: Tensor) -> Tensor:
        return (projected.values() * gradient).abs()

    def _score(self, projected: ProjectedWeight, sums: Tensor, calls: int) -> Tensor:  # noqa: ARG002
        return sums


class Fisher(GradientStatistics):
    """w^2 / 2 * E[(dL/dw)^2]: Optimal Brain Damage with the empirical Fisher's diagonal.

    LeCun et al. 1990; the expectation is over the backward passes of the window, so it is of
    mini-batch gradients, not of single examples'.

    >>> Fisher().window
    10
    """

    def __init__(self, *, window: int = 10) -> None:
        super().__init__(window=window)

    def _amount(self, projected: ProjectedWeight, gradient: Tensor) -> Tensor:  # noqa: ARG002
        return gradient.square()

    def _score(self, projected: ProjectedWeight, sums: Tensor, calls: int) -> Tensor:
        return projected.values().square() * (sums / calls) / 2


class Movement(GradientStatistics):
    """Minus the sum of w * dL/dw over the run: low for weights that shrink (Sanh et al. 2020).

    https://arxiv.org/abs/2005.07683. The window is the whole run: `end` removes the taps but
    keeps the sums, and `begin` with the same weights goes on; `reset` frees them.

    >>> criterion = Movement()
    >>> criterion.begin([]), criterion.end(), criterion.reset()
    (None, None, None)
    """

    def __init__(self) -> None:
        super().__init__(window=WHOLE_RUN)

    def end(self) -> None:
        """Remove the taps; the sums belong to the run and wait for the next `begin`."""
        if self._sums:
            self._loaded = self.state_dict()
        super().end()

    def reset(self) -> None:
        """Remove the taps and reset the sums of the run."""
        super().end()
        self._loaded = None

    def _amount(self, projected: ProjectedWeight, gradient: Tensor) -> Tensor:
        return -projected.values() * gradient

    def _score(self, projected: ProjectedWeight, sums: Tensor, calls: int) -> Tensor:  # noqa: ARG002
        return sums


class Hutchinson:
    """w^2 / 2 * d2L/dw2: Optimal Brain Damage with Hutchinson's estimate of the diagonal.

    E[z * (H z)] over random signs z (Bekas et al. 2007) is the diagonal of the Hessian H. The
    gradient goes through the graph twice, which cuDNN's recurrent layers refuse. Scores of
    negative curvature are negative: such weights go first.

    Args:
        loss_fn: returns a loss tensor at the current weights, for a fixed batch say. It runs at
            every prune event; put the module in eval mode in it where a forward moves buffers.
        samples: random sign vectors an event.
        seed: of the signs, apart from the global random state.

    Raises:
        ValueError: when samples is not an integer of 1 or more.

    >>> from torch import nn
    >>> from lightning_compress.targets import Target
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> projected = ProjectedWeight(Target("weight", layer, "weight", layer.weight))
    >>> criterion = Hutchinson(lambda: (layer.weight ** 2 * torch.tensor([1.0, 3.0])).sum())
    >>> criterion.begin([projected])
    >>> criterion.scores(projected)
    tensor([[1., 3.]])
    """

    window = 0

    def __init__(self, loss_fn: Callable[[], Tensor], *, samples: int = 8, seed: int = 0) -> None:
        if not callable(loss_fn):
            raise ValueError(f"loss_fn={loss_fn!r} must be a callable that returns a loss tensor")
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples={samples!r} must be an integer, 1 or more")
        self.loss_fn, self.samples, self.seed = loss_fn, samples, seed
        self._projected_weights: list[ProjectedWeight] = []
        self._diagonals: dict[str, Tensor] = {}

    def begin(self, projected_weights: Sequence[ProjectedWeight]) -> None:
        """Name the weights of the next event."""
        self._projected_weights, self._diagonals = list(projected_weights), {}

    def end(self) -> None:
        """Free the estimate."""
        self._projected_weights, self._diagonals = [], {}

    def scores(self, projected: ProjectedWeight) -> Tensor:
        """Predicted change of the loss without each weight; the lowest go first.

        Raises:
            RuntimeError: outside `begin` and `end`, or for a loss that no weight takes part in.
        """
        if projected not in self._projected_weights:
            raise RuntimeError(f"Hutchinson has no begin() with {projected.path}")
        if not self._diagonals:
            self._estimate()
        return projected.values().square() * self._diagonals[projected.path] / 2

    def _estimate(self) -> None:
        taps = [projected.taps for projected in self._projected_weights]
        devices = [
            d for d in {s.parameter.device for s in self._projected_weights} if d.type == "cuda"
        ]
        try:
            for projected in self._projected_weights:
                projected.taps = []  # these gradients are no training step's
            with torch.enable_grad(), torch.random.fork_rng(devices=devices):
                diagonals = self._products()
        finally:
            for projected, mine in zip(self._projected_weights, taps, strict=True):
                projected.taps = mine
        for projected, diagonal in zip(self._projected_weights, diagonals, strict=True):
            self._diagonals[projected.path] = over_processes(diagonal / self.samples)

    def _products(self) -> list[Tensor]:
        weights = [projected.parameter for projected in self._projected_weights]
        loss = self.loss_fn()
        if not loss.requires_grad:
            raise RuntimeError("the loss of Hutchinson depends on no weight: is it detached?")
        first = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        sums = [torch.zeros_like(weight) for weight in weights]
        curved = [one for one in first if one.requires_grad]
        if not curved:  # a loss linear in all weights
            return sums
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.samples):
            signs = [_signs(weight, generator) for weight in weights]
            pairs = [(g * z).sum() for g, z in zip(first, signs, strict=True) if g.requires_grad]
            second = torch.autograd.grad(
                torch.stack(pairs).sum(), weights, retain_graph=True, materialize_grads=True
            )
            for total, z, product in zip(sums, signs, second, strict=True):
                total += z * product.detach()
        return sums


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.float32)
    return (2 * signs - 1).to(weight)


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

    def begin(self, projected_weights: Sequence[ProjectedWeight]) -> None:
        """Do nothing: no statistics are needed."""

    def scores(self, projected: ProjectedWeight) -> Tensor:
        """Scores of the weight's latent values.

        Raises:
            ValueError: when the function returns another shape, or no tensor.
        """
        values = projected.values()
        scores = self.function(values)
        if not isinstance(scores, Tensor) or scores.shape != values.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"the criterion {self.function!r} gave {got} for {projected.path} of shape "
                f"{tuple(values.shape)}: scores have the weight's shape"
            )
        return scores.detach()

    def end(self) -> None:
        """Do nothing: there are no statistics."""


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

    def begin(self, projected_weights: Sequence[ProjectedWeight]) -> None:
        """Do nothing: no statistics are needed."""

    def scores(self, projected: ProjectedWeight) -> Tensor:
        """Scores in [0, 1)."""
        seed = zlib.crc32(f"{self.seed} {projected.path}".encode())
        generator = torch.Generator().manual_seed(seed)
        values = projected.values()
        return torch.rand(values.shape, generator=generator).to(values.device)

    def end(self) -> None:
        """Do nothing: there are no statistics."""


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
