"""Convolutions behind an upsampling, rewritten to multiply before it.

A kernel of 3 x 3 taps that reads each pixel twice along both axes needs 4 of 9 multiplications,
with sums of weights in the place of weights. Sums are weights of int8 only where they fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.conversion.conv_rewrites import (
    InBlocks,
    plain_padding,
    put_in_blocks,
    transposed_as_conv,
)
from lightning_compress.conversion.integer_weights import (
    INT8,
    IntegerWeight,
    StoredWeight,
    Summed,
    stored_weight,
)
from lightning_compress.conversion.nodes import WeightedNode, attribute, enlargement
from lightning_compress.conversion.program import plain_copy
from lightning_compress.grids import grid_of_range
from lightning_compress.quantization.upsampled_conv import saves_by_sums, step_for_sums, summed_taps

__all__ = [
    "enlarged_as_conv",
    "let_sums_fit",
    "rewrite_enlarged",
]


def enlarged_as_conv(
    weight: Tensor, *, factor: int, padding: tuple[int, int], groups: int = 1
) -> InBlocks:
    """Rewrite nearest-neighbour upsampling and a convolution of stride 1, exactly.

    The two are a transposed convolution whose kernel holds sums of weights; a 3 x 3 kernel behind
    a factor of 2 then has 4 taps a pixel in place of 9.

    Args:
        weight: (out, in / groups, kh, kw), of any dtype.
        factor: of rows and columns, 2 or more.
        padding: of (height, width), as `Conv2d` has it, less than the kernel.
        groups: of the convolution.

    >>> import torch
    >>> from torch.nn import functional
    >>> x, weight = torch.rand(2, 3, 6, 8), torch.rand(4, 3, 3, 3)
    >>> rewritten = enlarged_as_conv(weight, factor=2, padding=(1, 1))
    >>> large = functional.interpolate(x, scale_factor=2)
    >>> torch.allclose(rewritten(x), functional.conv2d(large, weight, padding=1), atol=1e-4)
    True
    """
    full = summed_taps(weight.flip((2, 3)), factor)
    split = full.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # (in, out / groups, ...)
    cropped = tuple(size - 1 - pad for size, pad in zip(weight.shape[2:], padding, strict=True))
    return transposed_as_conv(
        split.contiguous(), stride=factor, padding=(cropped[0], cropped[1]), groups=groups
    )


def let_sums_fit(
    module: nn.Module,
    plain: nn.Module,
    weighted_nodes: Sequence[WeightedNode],
    stored: dict[str, StoredWeight],
    trained: Container[str],
) -> None:
    """Give weights without a grid of their own one on which the sums fit, a step twice as wide.

    Args:
        module: as it was, with the weights before they were rounded.
        plain: its copy, whose weights are rounded again.
        weighted_nodes: that may be rewritten; those of them that are get the new weight.
        stored: parameter -> weight; changed in place.
        trained: parameters that keep the grids they have.
    """
    uses: Counter[int | str] = Counter(
        id(one) for _, one in plain.named_parameters(remove_duplicate=False)
    )
    uses.update(weighted.parameter for weighted in weighted_nodes)
    fresh: nn.Module | None = None
    for weighted in weighted_nodes:
        factor = _gain(weighted)
        parameter = plain.get_parameter(weighted.parameter)
        scaled = weighted.weight is not stored[weighted.parameter]  # by a number in its forward
        if factor is None or scaled or weighted.parameter in trained:
            continue
        if max(uses[id(parameter)], uses[weighted.parameter]) > 1:
            continue
        fresh = plain_copy(module) if fresh is None else fresh
        weight = fresh.get_parameter(weighted.parameter).detach().float()
        width = INT8[1] * step_for_sums(weight, factor, 0, slack=0.0)
        grid = grid_of_range(-width, width, bits=8, symmetric=True, axis=0)
        found = stored_weight(plain.get_submodule(weighted.path), weight, grid)
        source = "range of sums for enlarged images, symmetric, per channel, 8 bits"
        weighted.weight = stored[weighted.parameter] = replace(found, source=source)
        parameter.data.copy_(torch.from_numpy(weighted.weight.values))


def rewrite_enlarged(graph: Any, weighted: WeightedNode) -> bool:
    """Let a Conv read an image before its enlargement, where that saves and its sums fit."""
    factor, padding = _gain(weighted), plain_padding(weighted.node)
    if factor is None or padding is None or not isinstance(weighted.weight, IntegerWeight):
        return False
    padding = (padding[0], padding[1])
    node, groups = weighted.node, attribute(weighted.node, "group", 1)
    symbols = torch.from_numpy(weighted.weight.symbols)
    as_conv = enlarged_as_conv(symbols, factor=factor, padding=padding, groups=groups)
    sums = as_conv.weight
    if int(sums.min()) < INT8[0] or int(sums.max()) > INT8[1]:
        return False
    _pass_by(graph, node)
    kernel = (symbols.shape[2], symbols.shape[3])
    put_in_blocks(graph, weighted, as_conv, groups)
    weighted.weight = replace(weighted.weight, summed=Summed(factor, kernel, groups))
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


def _gain(weighted: WeightedNode) -> int | None:
    """The factor of the enlargement that a Conv reads, where multiplying before it saves."""
    node, weight = weighted.node, weighted.weight
    if node.op_type != "Conv" or not isinstance(weight, IntegerWeight) or weight.symbols.ndim != 4:
        return None
    down, along = enlargement(node.inputs[0].producer()) or (1, 1)
    kernel, padding = weight.symbols.shape[2:], plain_padding(node)
    if down != along or padding is None or weight.axis not in (None, 0):
        return None
    if any(pad >= size for pad, size in zip(padding, kernel, strict=True)):
        return None
    return down if saves_by_sums(kernel, down) else None
