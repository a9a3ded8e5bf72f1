"""One-shot pruning of a trained module, in place: no Lightning, no training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import check_choice
from lightning_compress.projection import ProjectedWeight
from lightning_compress.pruning.criteria import GradientStatistics, make_criterion
from lightning_compress.pruning.granularity import layout_of, make_granularity
from lightning_compress.pruning.layer_inputs import find_owner
from lightning_compress.pruning.mask_plan import MaskPlan, largest_in_rows, normed_axis
from lightning_compress.pruning.masks import SCOPES
from lightning_compress.pruning.sparsity_groups import MIN_KEEP
from lightning_compress.pruning.statistics import Criterion
from lightning_compress.sample_inputs import calibration_batches, run_batch
from lightning_compress.targets import Pattern, select

__all__ = ["prune_weights"]


@torch.no_grad()
def prune_weights(
    module: nn.Module,
    sparsity: float | None = None,
    *,
    threshold: float | None = None,
    criterion: str | Callable[[Tensor], Tensor] | Criterion = "magnitude",
    scope: str = "global",
    granularity: str | Sequence[object] = "unstructured",
    data: Iterable[object] | Tensor | None = None,
    batch_to_args: Callable[[Any], Any] | None = None,
    include: Sequence[Pattern] | Pattern | None = None,
    exclude: Sequence[Pattern] | Pattern = (),
) -> nn.Module:
    """Set the weights with the lowest scores of a trained module to 0, in place.

    Sparsity is the absolute fraction of zeros in the targets, exact to the weight; zeros that are
    there already count first, and each target keeps 1 % where the sparsity leaves room for it, so
    that no layer dies by accident. Weights that do not train are targets too. For a module that is
    trained on afterwards, `GradualPruning(keep_zeros=True)` keeps the zeros.

    Args:
        module: of any kind.
        sparsity: fraction of zeros in the targets, in [0, 1).
        threshold: in its place: what scores below it goes; of "magnitude", `|W| < threshold`.
        criterion: a name in `CRITERIA`, a callable from a weight to its scores, or a `Criterion`.
        scope: "global" compares all targets together, "layer" prunes each by the same fraction,
            "erk" by Erdos-Renyi-Kernel densities.
        granularity: as in `GradualPruning`; of "n:m" the sparsity is 1 - n/m.
        data: batches that criteria of activations, Hessians and gradients look at. For those of
            gradients the module must return its loss.
        batch_to_args: from a batch to what the module is called with: a tensor, a tuple of
            arguments, or a dict of them; None: the batch itself.
        include: path globs or layer classes; None: the weights of the deployed part.
        exclude: the same, taken away again.

    Returns:
        The module.

    Raises:
        ValueError: for values outside their range, data that are missing, empty or not finite.
        TargetError: for patterns that match nothing.

    >>> layer = nn.Linear(4, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.1, -2.0, 0.0, 3.0]]))
    >>> prune_weights(layer, 0.5).weight.data
    tensor([[ 0., -2.,  0.,  3.]])
    >>> prune_weights(layer, threshold=2.5).weight.data
    tensor([[0., 0., 0., 3.]])
    """
    _check(sparsity, threshold, scope)
    units, judge = make_granularity(granularity), make_criterion(criterion)
    projected_weights = [
        ProjectedWeight(target) for target in select(module, include, exclude, frozen=True).targets
    ]
    if judge.window and data is None:
        raise ValueError(
            f"criterion={criterion!r} looks at what goes through the layers: give data=[...], "
            "batches that the module is called with"
        )
    judge.begin(projected_weights)
    try:
        if judge.window and data is not None:
            gather_statistics(
                module, projected_weights, judge, calibration_batches(data, batch_to_args)
            )
        scores = [judge.scores(projected) for projected in projected_weights]
        for projected in projected_weights:
            projected.pruned = projected.data == 0
        if threshold is None:
            plan = MaskPlan(units, SCOPES[scope], reopen=False)
            plan.layouts = {
                one.path: layout_of(module, one.target.path) for one in projected_weights
            }
            plan.check(projected_weights)
            wanted = units.limit if units.limit < 1 else float(sparsity or 0.0)
            plan.floors = {one.path: min(MIN_KEEP, 1 - wanted) for one in projected_weights}
            masks = plan.masks(projected_weights, scores, wanted)
        else:
            masks = [
                _above(*pair, threshold) for pair in zip(projected_weights, scores, strict=True)
            ]
        for projected, mask in zip(projected_weights, masks, strict=True):
            projected.set_mask(mask & ~projected.pruned if projected.pruned is not None else mask)
            update = getattr(judge, "update", None)
            if update is not None and (values := update(projected, mask)) is not None:
                projected.set_values(values)
            projected.project()
    finally:
        judge.end()
    return module


def _check(sparsity: float | None, threshold: float | None, scope: str) -> None:
    if (sparsity is None) == (threshold is None):
        raise ValueError(
            f"sparsity={sparsity!r}, threshold={threshold!r}: give one of the two, such as "
            "sparsity=0.9 or threshold=0.01"
        )
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r} must lie in [0, 1)")
    if threshold is not None and not threshold > 0:
        raise ValueError(f"threshold={threshold!r} must be above 0")
    check_choice("scope", scope, SCOPES)


def _above(projected: ProjectedWeight, scores: Tensor, threshold: float) -> Tensor:
    mask = scores >= threshold
    if (axis := normed_axis(projected.target)) is not None:  # its norm divides: no row may die
        mask |= largest_in_rows(projected.values(), axis, None)
    return mask


def gather_statistics(
    module: nn.Module,
    projected_weights: Sequence[ProjectedWeight],
    judge: Criterion,
    batches: Sequence[object],
) -> None:
    """Run batches through a module for a criterion between its `begin` and `end`."""
    gradients = isinstance(judge, GradientStatistics)
    with _watched(module, projected_weights, gradients=gradients):
        for batch in batches:
            with torch.set_grad_enabled(gradients):
                out = run_batch(module, batch)
            if not gradients:
                continue
            if not (isinstance(out, Tensor) and out.numel() == 1 and out.requires_grad):
                raise ValueError(
                    f"criterion {type(judge).__name__} needs gradients of a loss, and the module "
                    f"returns {_named(out)}: give a module that returns its loss, or another "
                    "criterion"
                )
            torch.autograd.backward(
                out, inputs=[projected.parameter for projected in projected_weights]
            )


def _named(out: object) -> str:
    return f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else str(type(out))


@contextmanager
def _watched(
    module: nn.Module, projected_weights: Sequence[ProjectedWeight], *, gradients: bool
) -> Iterator[None]:
    """Eval mode with gradients for the scored layers, within a block."""
    modes = {layer: layer.training for layer in module.modules()}
    trained = {
        projected.parameter: projected.parameter.requires_grad for projected in projected_weights
    }
    before = {projected.parameter: projected.parameter.grad for projected in projected_weights}
    module.eval()
    for owner in filter(None, map(find_owner, projected_weights)):
        owner.training = True  # statistics are of layers in training mode
    with ExitStack() as stack:
        if gradients:
            for projected in projected_weights:
                projected.parameter.requires_grad = True
                projected.parameter.grad = None
                stack.callback(projected.parameter.register_hook(projected.mask_gradient).remove)
        try:
            yield
        finally:
            for parameter, trains in trained.items():
                parameter.requires_grad = trains
                parameter.grad = before[parameter]
            for layer, mode in modes.items():
                layer.training = mode
