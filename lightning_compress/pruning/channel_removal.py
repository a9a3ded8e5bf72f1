"""Mask units, remove them, and check that both are the same function."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.modes import bare, evaluating
from lightning_compress.pruning.channel_labels import Labels
from lightning_compress.pruning.channel_sizes import check_sizes
from lightning_compress.pruning.channel_surgery import select_entries, shrink
from lightning_compress.pruning.channel_trace import tensors_in
from lightning_compress.pruning.channels import ChannelGraph, Flags

__all__ = ["compare", "masked", "masked_values", "outputs_of", "removed", "sizes_after"]

TOLERANCE = 1e-5


def _mask_one(values: Tensor, graph: ChannelGraph, path: str, gone: Flags) -> Tensor:
    """A tensor with 0 wherever a unit that goes is made, scaled or read."""
    values = values.clone()
    magnitudes = path.removesuffix("1") + "0" if path.endswith(".original1") else ""
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
    for path in [one for one in found if one.endswith(".original1")]:
        name = path.removesuffix("1") + "0"
        magnitude = found.get(name, tensors[name])
        dims = [dim for dim in range(magnitude.dim()) if magnitude.shape[dim] == 1]
        after, before = (
            torch.linalg.vector_norm(one, dim=dims, keepdim=True)
            for one in (found[path], tensors[path])
        )
        found[name] = magnitude * after / before
    return found


@torch.no_grad()
def masked(module: nn.Module, graph: ChannelGraph, gone: Flags) -> nn.Module:
    """A copy of a module with the units that go set to 0."""
    twin = copy.deepcopy(module)
    parameters = dict(twin.named_parameters())
    for path, values in masked_values(parameters, graph, gone).items():
        parameters[path].copy_(values)
    return twin


def removed(module: nn.Module, graph: ChannelGraph, gone: Flags) -> nn.Module:
    """A copy of a module without the units that go."""
    twin = copy.deepcopy(module)
    shrink(twin, graph.kept(gone), sized=sizes_after(graph, gone))
    return twin


def sizes_after(graph: ChannelGraph, gone: Flags) -> dict[str, int]:
    """Sizes of layers without tensors once units are gone."""
    return {
        path: int((~gone[units]).sum()) for path, units in graph.sized.items() if gone[units].any()
    }


def outputs_of(module: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
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


def compare(
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
        found = outputs_of(small, graph.inputs_of(inputs, gone))
    except Exception as error:  # whatever a forward pass raises
        return f"the smaller module does not run ({type(error).__name__}: {error})"
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


def _stays(ends: dict[tuple[int, int], Labels], number: int, gone: Flags) -> dict[int, Tensor]:
    return {
        dim: torch.from_numpy((~gone[units]).nonzero()[0])
        for (index, dim), units in ends.items()
        if index == number and gone[units].any()
    }
