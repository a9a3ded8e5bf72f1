"""Convolutions that read an enlarged picture: they multiply before it is enlarged.

A kernel of 3 x 3 taps that reads each pixel twice along both axes needs 4 of 9 multiplications,
with sums of weights in the place of weights. Sums are weights of int8 only where they fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_compress.conversion.blocks import plain_padding, put_in_blocks
from lightning_compress.conversion.integers import (
    INT8,
    IntegerWeight,
    StoredWeight,
    stored_weight,
)
from lightning_compress.conversion.plain import plain_copy
from lightning_compress.conversion.rewrites import enlarged_as_conv
from lightning_compress.conversion.sites import Site, attribute, enlargement
from lightning_compress.conversion.summed import Summed
from lightning_compress.quantization.enlarging import saves_by_sums, step_for_sums
from lightning_compress.quantization.quantizers import grid_of_range

__all__ = ["let_sums_fit", "rewrite_enlarged"]


def let_sums_fit(
    module: nn.Module,
    plain: nn.Module,
    sites: Sequence[Site],
    stored: dict[str, StoredWeight],
    trained: Container[str],
) -> None:
    """Give weights without a grid of their own one on which the sums fit, a step twice as wide.

    Args:
        module: as it was, with the weights before they were rounded.
        plain: its copy, whose weights are rounded again.
        sites: that may be rewritten; those of them that are get the new weight.
        stored: parameter -> weight; changed in place.
        trained: parameters that keep the grids they have.
    """
    uses: Counter[int | str] = Counter(
        id(one) for _, one in plain.named_parameters(remove_duplicate=False)
    )
    uses.update(site.parameter for site in sites)
    fresh: nn.Module | None = None
    for site in sites:
        factor = _gain(site)
        parameter = plain.get_parameter(site.parameter)
        if factor is None or site.parameter in trained:
            continue
        if max(uses[id(parameter)], uses[site.parameter]) > 1:
            continue
        fresh = plain_copy(module) if fresh is None else fresh
        weight = fresh.get_parameter(site.parameter).detach().float()
        width = INT8[1] * step_for_sums(weight, factor, 0, slack=0.0)
        grid = grid_of_range(-width, width, bits=8, symmetric=True, axis=0)
        found = stored_weight(plain.get_submodule(site.path), weight, grid)
        source = "range of sums for enlarged pictures, symmetric, per channel, 8 bits"
        site.weight = stored[site.parameter] = replace(found, source=source)
        parameter.data.copy_(torch.from_numpy(site.weight.values))


def rewrite_enlarged(graph: Any, site: Site) -> bool:
    """Let a Conv read a picture before its enlargement, where that saves and its sums fit."""
    factor, padding = _gain(site), plain_padding(site.node)
    if factor is None or padding is None or not isinstance(site.weight, IntegerWeight):
        return False
    node, groups = site.node, attribute(site.node, "group", 1)
    symbols = torch.from_numpy(site.weight.symbols)
    as_conv = enlarged_as_conv(symbols, factor=factor, padding=padding, groups=groups)
    sums = as_conv.weight
    if int(sums.min()) < INT8[0] or int(sums.max()) > INT8[1]:
        return False
    _pass_by(graph, node)
    kernel = (symbols.shape[2], symbols.shape[3])
    put_in_blocks(graph, site, as_conv, groups)
    site.weight = replace(site.weight, summed=Summed(factor, kernel, groups))
    return True


def _pass_by(graph: Any, node: Any) -> None:
    """Let a node read what its Resize reads; a Resize that nothing reads any more goes."""
    large = node.inputs[0]
    resize = large.producer()
    small = resize.inputs[0]
    node.replace_input_with(0, small)
    for use in list(large.uses()):
        if use.node.op_type == "CastLike" and use.idx == 1:
            use.node.replace_input_with(1, small)  # of the same type
    if not list(large.uses()) and not large.is_graph_output():
        graph.remove(resize, safe=True)


def _gain(site: Site) -> int | None:
    """The factor of the enlargement that a Conv reads, where multiplying before it saves."""
    node, weight = site.node, site.weight
    if node.op_type != "Conv" or not isinstance(weight, IntegerWeight) or weight.symbols.ndim != 4:
        return None
    down, along = enlargement(node.inputs[0].producer()) or (1, 1)
    kernel, padding = weight.symbols.shape[2:], plain_padding(node)
    if down != along or padding is None or weight.axis not in (None, 0):
        return None
    if any(pad >= size for pad, size in zip(padding, kernel, strict=True)):
        return None
    return down if saves_by_sums(kernel, down) else None
