"""Channel removal plan: dependency graphs of a model's networks, trial removals, verification."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.channels.graph import (
    ChannelGraph,
    Flags,
    ScaledKept,
    channel_graph,
    combine,
)
from lightning_compress.channels.resize import check_sizes, shrink
from lightning_compress.channels.trace import Nodes, tensors_in
from lightning_compress.copies import copy_module
from lightning_compress.deployment import deployed_part
from lightning_compress.errors import TargetError
from lightning_compress.modes import bare, evaluating
from lightning_compress.projection import select_entries
from lightning_compress.targets import Target, clean_path, magnitude_path

__all__ = [
    "ChannelPlan",
    "exact_outputs",
    "masked_values",
    "removal_fault",
    "removed",
    "roots_of",
    "sizes_after",
    "zeroed_channels",
]
TOLERANCE = 1e-5


def _mask_one(values: Tensor, graph: ChannelGraph, path: str, gone: Flags) -> Tensor:
    """A tensor with 0 wherever a unit that goes is made, scaled or read."""
    values = values.clone()
    magnitudes = magnitude_path(path)
    for dim in range(values.dim()):
        units = graph.axes.get((path, dim))
        if units is None or not gone[units].any() or (magnitudes, dim) in graph.axes:
            continue  # of weight_norm, the magnitudes are set to 0: directions would divide 0 by 0
        index = torch.from_numpy(gone[units].nonzero()[0]).to(values.device)
        values.index_fill_(dim, index, 0.0)
    return values


def masked_values(
    tensors: Mapping[str, Tensor], graph: ChannelGraph, gone: Flags
) -> dict[str, Tensor]:
    """All tensors that change when units are set to 0, by path.

    Under weight_norm the length of a direction changes when inputs go: the magnitude follows, so
    that what stays of the weight is as it was.
    """
    paths = {path for (path, _), units in graph.axes.items() if gone[units].any()}
    found = {
        path: _mask_one(tensors[path], graph, path, gone)
        for path in sorted(paths)
        if path in tensors
    }
    for path in [one for one in found if magnitude_path(one) in tensors]:
        name = magnitude_path(path)
        magnitude = found.get(name, tensors[name])
        dims = [dim for dim in range(magnitude.dim()) if magnitude.shape[dim] == 1]
        after, before = (
            torch.linalg.vector_norm(one, dim=dims, keepdim=True)
            for one in (found[path], tensors[path])
        )
        found[name] = magnitude * after / before
    return found


@torch.no_grad()
def zeroed_channels(module: nn.Module, graph: ChannelGraph, gone: Flags) -> nn.Module:
    """A copy of a module with the units that go set to 0."""
    clone = copy_module(module)
    parameters = dict(clone.named_parameters())
    for path, values in masked_values(parameters, graph, gone).items():
        parameters[path].copy_(values)
    return clone


def removed(module: nn.Module, graph: ChannelGraph, gone: Flags) -> nn.Module:
    """A copy of a module without the units that go."""
    clone = copy_module(module)
    shrink(clone, graph.kept(gone), sized=sizes_after(graph, gone))
    return clone


def sizes_after(graph: ChannelGraph, gone: Flags) -> dict[str, int]:
    """Sizes of layers without tensors once units are gone."""
    return {
        path: int((~gone[units]).sum()) for path, units in graph.sized.items() if gone[units].any()
    }


def exact_outputs(module: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    """All tensors that a module gives in eval mode, without others' hooks."""
    with evaluating(module), bare(module), _exactly(module), torch.random.fork_rng(devices=[]):
        return [one.detach().clone() for one in tensors_in(module(*inputs))]


@contextmanager
def _exactly(module: nn.Module) -> Iterator[None]:
    """Without TF32, whose products on a GPU are off by more than a comparison allows."""
    if not any(one.is_cuda for one in module.parameters()):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def removal_fault(
    small: nn.Module,
    inputs: Sequence[Any],
    expected: Sequence[Tensor],
    graph: ChannelGraph,
    gone: Flags,
) -> str:
    """Why a smaller module is not the masked one that gave `expected`; "" when it is.

    Args:
        small: without the units.
        inputs: that the masked one was given.
        expected: all tensors that came out.
        graph: of the module before.
        gone: units that were removed.
    """
    try:
        found = exact_outputs(small, graph.inputs_of(inputs, gone))
    except Exception as error:  # whatever a forward pass raises
        return f"the smaller module does not run ({failed_line(error)})"
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        theirs = select_entries(theirs, _stays(graph.outputs, number, gone))
        if ours.shape != theirs.shape:
            shapes = f"{tuple(ours.shape)} in place of {tuple(theirs.shape)}"
            return f"output {number} of the smaller module is {shapes}"
        if not ours.numel() or not ours.is_floating_point():
            continue
        scale = max(1.0, float(theirs.abs().max()))
        error = float((ours - theirs).abs().max()) / scale
        # Sums in another order: in half precision each is off by some of its few steps.
        if not error <= max(TOLERANCE, 4 * torch.finfo(ours.dtype).eps):
            return f"output {number} of the smaller module is off by {error:.2g}"
    return "; ".join(check_sizes(small))


def failed_line(error: BaseException) -> str:
    """What went wrong in words: an assertion is named by its own source line.

    >>> try:
    ...     assert 1 == 2
    ... except AssertionError as error:
    ...     failed_line(error).partition(":")[0]
    'AssertionError'
    """
    said = str(error).strip().partition("\n")[0]
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, AssertionError) and frames:
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        line = f"{frames[-1].line or 'an assertion'} ({where})"
        said = f"{line}: {said}" if said else line
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _stays(ends: dict[tuple[int, int], Nodes], number: int, gone: Flags) -> dict[int, Tensor]:
    return {
        dim: torch.from_numpy((~gone[units]).nonzero()[0])
        for (index, dim), units in ends.items()
        if index == number and gone[units].any()
    }


def roots_of(module: nn.Module, targets: Sequence[Target]) -> list[str]:
    """The networks that hold the targets: deployed parts, else children of the module.

    >>> from lightning_compress.targets import select
    >>> gan = nn.ModuleDict({"generator": nn.Linear(1, 1), "critic": nn.Linear(1, 1)})
    >>> roots_of(gan, select(gan, "critic").targets)
    ['critic']
    """
    parts, found = deployed_part(module), []
    for target in targets:
        path = clean_path(target.path)
        part = next((one for one in parts if not one or path.startswith(f"{one}.")), None)
        root = path.partition(".")[0] if part is None and "." in path else part or ""
        compiled = hasattr(module.get_submodule(root), "_orig_mod")
        # What torch.compile wraps is plain Python inside, which can be followed.
        found.append(".".join(filter(None, (root, "_orig_mod"))) if compiled else root)
    return list(dict.fromkeys(found))


class ChannelPlan:
    """Channel removal plan: dependency graphs of a module's networks, tried and verified.

    Args:
        module: the whole.
        inputs: sample inputs of each part, by its path.
        targets: weights that may make fewer channels; what other weights make stays.
        channelwise: functions and layer classes that treat each channel by itself.
        tapped: modules, by path, whose outputs keep their sizes, and why.
        refused: groups that were tried before and failed, and why; is added to.

    Raises:
        TargetError: for parts that do not run, or when no channel may go.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Mapping[str, Sequence[Any]],
        *,
        targets: Sequence[str],
        channelwise: Sequence[Any] = (),
        tapped: Mapping[str, str] | None = None,
        refused: dict[str, str] | None = None,
    ) -> None:
        self.module, self.inputs = module, dict(inputs)
        self.targets, self.channelwise = set(targets), tuple(channelwise)
        self.tapped = dict(tapped or {})
        self.refused = {} if refused is None else refused
        self._trace()
        if failed := self._try_all():
            self.refused |= failed
            self._trace()
        if not any(len(group.free) for group in self.graph.groups):
            why = "; ".join(f"{one.name}: {', '.join(one.reasons)}" for one in self.graph.groups)
            raise TargetError(
                f"no channel may go ({why or 'no layer makes any'}). Where a function or layer is "
                "not known, but treats each channel by itself, name it in channelwise=[...]"
            )

    def _trace(self) -> None:
        self.parts = {root: self._graph(root) for root in self.inputs}
        self.graph = combine(self.parts)

    def _graph(self, root: str) -> ChannelGraph:
        part = self.module.get_submodule(root)
        prefix = f"{root}." if root else ""
        shared = self._shared(root)

        def protect(path: str, role: str) -> str:
            if path in shared:
                return f"{path} is shared with {shared[path]}"
            if role != "out":
                return ""
            owner = prefix + path
            for group, reason in self.refused.items():
                if owner in self._members.get(group, ()):
                    return reason
            return "" if clean_path(owner) in self.targets else "no target"

        return channel_graph(
            part,
            self.inputs[root],
            protect=protect,
            channelwise=self.channelwise,
            tapped={
                path.removeprefix(prefix): why
                for path, why in self.tapped.items()
                if path.startswith(prefix)
            },
        )

    @property
    def _members(self) -> dict[str, set[str]]:
        """Weights that make the channels of a group, as the last trace had them."""
        if not hasattr(self, "graph"):
            return {}
        group_of, found = self.graph.group_of(), {}
        for (path, _), role in self.graph.roles.items():
            if role == "out":
                units = self.graph.axes[path, _]
                name = self.graph.groups[int(group_of[units[0]])].name
                found.setdefault(name, set()).add(path)
        return found

    def _shared(self, root: str) -> dict[str, str]:
        """Tensors of a part that other parts of the module use too, and where."""
        prefix = f"{root}." if root else ""
        names: dict[int, list[str]] = {}
        for name, one in self.module.named_parameters(remove_duplicate=False):
            names.setdefault(id(one), []).append(name)
        found = {}
        for own in names.values():
            outside = [name for name in own if not name.startswith(prefix)]
            for name in own if outside else ():
                found[name.removeprefix(prefix)] = outside[0]
        return found

    def _split(self, gone: Flags) -> dict[str, Flags]:
        found, offset = {}, 0
        for root, graph in self.parts.items():
            found[root] = gone[offset : offset + graph.count]
            offset += graph.count
        return found

    def _try_all(self) -> dict[str, str]:
        """Remove half of each group from a copy; groups that fail, and why."""
        everything = [group.free[::2] for group in self.graph.groups if len(group.free)]
        if not everything or not self._try(np.concatenate(everything)):
            return {}
        failed = {}
        for group in self.graph.groups:
            if len(group.free) and (why := self._try(group.free[::2])):
                failed[group.name] = why
        good = [group.free[::2] for group in self.graph.groups if group.name not in failed]
        if why := self._try(np.concatenate(good)) if good else "":
            raise TargetError(f"channels cannot be removed together: {why}")
        return failed

    def _try(self, units: Nodes) -> str:
        for root, gone in self._split(self.graph.flags(units)).items():
            part, graph = self.module.get_submodule(root), self.parts[root]
            if not gone.any():
                continue
            clone = zeroed_channels(part, graph, gone)
            expected = exact_outputs(clone, self.inputs[root])
            small = removed(clone, graph, gone)
            if why := removal_fault(small, self.inputs[root], expected, graph, gone):
                return why
        return ""

    def masked_values(self, values: Mapping[str, Tensor], gone: Flags) -> dict[str, Tensor]:
        """Tensors of the module with units set to 0, those that change, by path."""
        return masked_values(values, self.graph, gone)

    def outputs(self) -> dict[str, list[Tensor]]:
        """What each part gives on its sample inputs."""
        return {
            root: exact_outputs(self.module.get_submodule(root), inputs)
            for root, inputs in self.inputs.items()
        }

    def kept(self, gone: Flags) -> tuple[ScaledKept, dict[str, int]]:
        """Entries that stay by path and axis, and sizes of layers without tensors."""
        return self.graph.kept(gone), sizes_after(self.graph, gone)

    def check(self, expected: Mapping[str, Sequence[Tensor]], gone: Flags) -> None:
        """Check that the module, without its units, is what it was with them set to 0.

        Raises:
            RuntimeError: when it is not.
        """
        for root, flags in self._split(gone).items():
            part, graph = self.module.get_submodule(root), self.parts[root]
            if why := removal_fault(part, self.inputs[root], expected[root], graph, flags):
                raise RuntimeError(f"removing channels changed {root or 'the module'!r}: {why}")

    def after(self, gone: Flags) -> None:
        """Trace the smaller module again, after a removal."""
        for root, flags in self._split(gone).items():
            self.inputs[root] = self.parts[root].inputs_of(self.inputs[root], flags)
        self._trace()

    def latency_ratio(self, gone: Flags, *, repeats: int = 15) -> float:
        """Time of the networks without units over the present time: the least of alternating runs.

        What else a machine does can only add to a time, and to half of the runs on a busy one.
        """
        pairs = []
        for root, flags in self._split(gone).items():
            part, graph = self.module.get_submodule(root), self.parts[root]
            small = removed(part, graph, flags)
            pair = (copy_module(part).eval(), small.eval())
            inputs = (self.inputs[root], graph.inputs_of(self.inputs[root], flags))
            pairs.append([_least_times(pair, inputs, repeats)])
        totals = np.array(pairs).sum((0, 1))
        return float(totals[1] / totals[0])


@torch.no_grad()
def _least_times(modules: Sequence[nn.Module], inputs: Sequence[Any], repeats: int) -> list[float]:
    times: list[list[float]] = [[] for _ in modules]
    for _ in range(repeats):
        for index, (module, given) in enumerate(zip(modules, inputs, strict=True)):
            start = time.perf_counter()
            module(*given)
            times[index].append(time.perf_counter() - start)
    return [min(one) for one in times]
