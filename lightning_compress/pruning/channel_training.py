"""Choose units while a module trains, let them fade, and remove all that is kept of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.projection import Projector, Slot
from lightning_compress.pruning.channel_budget import Compare, Costs, Rounding, Scores, cut_to
from lightning_compress.pruning.channel_plan import ChannelPlan
from lightning_compress.pruning.channel_scores import (
    ABSOLUTE,
    even_out,
    norm_scales,
    sum_over_units,
)
from lightning_compress.pruning.channel_surgery import select_optimizer_state, shrink
from lightning_compress.pruning.channels import Flags, Kept
from lightning_compress.state import RemovedChannels, note_removed

__all__ = ["Cutter"]

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
)


class Cutter:
    """What is done to a module, its optimizers and its projector together.

    Args:
        plan: the channels of the module.
        projector: of the module: it holds the values that train where others are shown.
        rounding: in which steps channels go.
        dense: units of each group at first, by name.
        kept: of these, those that stay, by the name of the group; follows each removal.
        compare: how channels of different groups compare, see `cut_to`.
    """

    def __init__(
        self,
        plan: ChannelPlan,
        projector: Projector,
        *,
        rounding: Rounding,
        dense: Mapping[str, int],
        kept: dict[str, list[int]],
        compare: Compare = "group",
    ) -> None:
        self.plan, self.projector = plan, projector
        self.compare: Compare = compare
        self.rounding, self.dense, self.kept = rounding, dense, kept

    def cost(self, kind: str) -> float:
        """What the module costs now."""
        return Costs(self.plan.graph, kind).total()

    def choose(
        self,
        scores: Scores,
        kind: str,
        target: float,
        *,
        overshoot: bool = True,
    ) -> Flags:
        """Units to remove, so that the cost comes down to a target; see `cut_to`."""
        graph = self.plan.graph
        return cut_to(
            graph,
            scores,
            Costs(graph, kind),
            target,
            rounding=self.rounding,
            dense=self.dense,
            overshoot=overshoot,
            compare=self.compare,
        )

    def own_scores(self, criterion: str) -> Scores:
        """Scores by "magnitude" or "batchnorm"."""
        graph = self.plan.graph
        squares = {path: one.square() for path, one in self._trained().items()}
        scores = sum_over_units(graph, squares)
        if criterion == "batchnorm":
            return norm_scales(graph, self.norm_weights(), scores)
        return even_out(graph, np.sqrt(scores))

    def given_scores(self, criterion: object, values: Mapping[str, Tensor]) -> Scores:
        """Scores of units from those of the weights that make them, by path."""
        scores = sum_over_units(self.plan.graph, values, ("out",))
        return scores if criterion in ABSOLUTE else even_out(self.plan.graph, scores)

    def fast_enough(self, scores: Scores, left: float) -> tuple[float, float]:
        """The largest part of the MACs that takes no more than a part of the time.

        Returns:
            The part of the MACs, 0 if there is none, and the time of the last try.
        """
        total, low, high, ratio = self.cost("macs"), 0.0, 1.0, 1.0
        for _ in range(6):
            middle = (low + high) / 2
            ratio = self.plan.latency_ratio(self.choose(scores, "macs", middle * total))
            low, high = (middle, high) if ratio <= left else (low, middle)
        return low, ratio

    def norm_weights(self) -> dict[str, Tensor]:
        """Scales of norm layers, by path."""
        found = {}
        for root in self.plan.inputs:
            for path, layer in self.plan.module.get_submodule(root).named_modules():
                if isinstance(layer, _NORMS) and layer.weight is not None:
                    found[".".join(filter(None, (root, path, "weight")))] = layer.weight
        return found

    @torch.no_grad()
    def push(self, amount: float) -> None:
        """Shrink scales of norms by an amount, not beyond 0: the proximal step of an L1 term."""
        for scale in self.norm_weights().values():
            scale.copy_(scale.sign() * (scale.abs() - amount).clamp(min=0))

    @torch.no_grad()
    def fade(self, leaving: Flags, factor: float) -> None:
        """Multiply what reads the units that leave."""
        graph, tensors = self.plan.graph, dict(self.plan.module.named_parameters())
        for (path, dim), units in graph.axes.items():
            gone = leaving[units]
            if graph.roles[path, dim] != "in" or ".original" in path or not gone.any():
                continue  # a parametrization would bring the rest up
            shape = [1] * tensors[path].dim()
            shape[dim] = -1
            scale = torch.from_numpy(np.where(gone, factor, 1.0)).reshape(shape)
            self._write(tensors[path], partial(torch.mul, scale.to(tensors[path])))

    @torch.no_grad()
    def remove(
        self,
        gone: Flags,
        optimizers: Sequence[Optimizer],
        tell: Callable[[Kept, Mapping[str, int]], None],
    ) -> list[str]:
        """Remove units from everything that has them, and check that nothing else changed.

        Args:
            gone: a flag for each unit.
            optimizers: all of them.
            tell: lets others follow, with the entries that stay and the sizes of layers without
                tensors.

        Returns:
            What begins anew, in words.

        Raises:
            RuntimeError: when the smaller module is not the one whose units are 0.
        """
        module = self.plan.module
        parameters = dict(module.named_parameters())
        for path, zeroed in self.plan.masked_values(self._trained(), gone).items():
            self._write(parameters[path], lambda _, zeroed=zeroed: zeroed)
        expected = self.plan.outputs()
        kept, sized = self.plan.kept(gone)
        cut = {parameters[path]: dims for path, dims in kept.items() if path in parameters}
        notes = select_optimizer_state(optimizers, cut)
        slots = self._slots()
        for parameter, dims in cut.items():
            if (slot := slots.get(id(parameter))) is not None:
                slot.select(dims)
        lost = self._lost(gone, kept, sized)
        shrink(module, kept, sized=sized)
        note_removed(module, lost)
        tell(kept, sized)
        self.plan.check(expected, gone)
        self.plan.after(gone)
        return notes

    def _trained(self) -> dict[str, Tensor]:
        """The values that the optimizer updates, by path: latent ones where others show."""
        slots = self._slots()
        return {
            path: slots[id(one)].values() if id(one) in slots else one.detach()
            for path, one in self.plan.module.named_parameters()
        }

    def _write(self, parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        slot = self._slots().get(id(parameter))
        if slot is None:
            parameter.copy_(change(parameter.detach()))
        else:
            slot.set_values(change(slot.values()))
            slot.project()

    def _slots(self) -> dict[int, Slot]:
        return {id(slot.parameter): slot for slot in self.projector.slots.values()}

    def _lost(self, gone: Flags, kept: Kept, sized: Mapping[str, int]) -> RemovedChannels:
        tensors: dict[str, Any] = dict(self.plan.module.named_parameters())
        tensors |= dict(self.plan.module.named_buffers())
        for group in self.plan.graph.groups:
            before = self.kept.get(group.name, list(range(len(group.units))))
            pairs = zip(before, gone[group.units].tolist(), strict=True)
            self.kept[group.name] = [one for one, goes in pairs if not goes]
        some = {name: tuple(one) for name, one in self.kept.items() if len(one) < self.dense[name]}
        shapes = {path: tuple(tensors[path].shape) for path in kept}
        return RemovedChannels(shapes, dict(sized), some)
