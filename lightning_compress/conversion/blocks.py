"""Convolutions in an exported graph, replaced by those that make blocks of pixels in int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lightning_compress.conversion.integers import IntegerWeight
from lightning_compress.conversion.rewrites import InBlocks, conv_in_blocks, transposed_as_conv
from lightning_compress.conversion.rounding import initializer
from lightning_compress.conversion.sites import Site, attribute
from lightning_compress.errors import require

__all__ = [
    "plain_padding",
    "put_in_blocks",
    "put_in_place_of",
    "rewrite_narrow",
    "rewrite_transposed",
]

KERNEL_CHANNELS = 16  # that kernels make at a time, whether they are wanted or not
TO_THE_END = np.iinfo(np.int64).max


def rewrite_transposed(graph: Any, site: Site) -> str | None:
    """Replace a ConvTranspose by Conv, DepthToSpace and Slice; returns why not, if it cannot."""
    node = site.node
    if (obstacle := _obstacle(site)) is not None:
        return obstacle
    groups, block = attribute(node, "group", 1), attribute(node, "strides", [1])[0]
    assert isinstance(site.weight, IntegerWeight)
    as_conv = transposed_as_conv(
        torch.from_numpy(site.weight.symbols),
        stride=block,
        padding=tuple(attribute(node, "pads", [0, 0])[:2]),
        output_padding=tuple(attribute(node, "output_padding", [0, 0])),
        groups=groups,
    )
    put_in_blocks(graph, site, as_conv, groups)
    return None


def rewrite_narrow(graph: Any, site: Site) -> None:
    """Let a Conv with few outputs make 2 x 2 pixels at a time, where its pictures are even."""
    node, weight = site.node, site.weight
    if node.op_type != "Conv":
        return
    if not isinstance(weight, IntegerWeight) or weight.symbols.ndim != 4:
        return
    padding, shape = plain_padding(node), node.outputs[0].shape
    kernel, few = weight.symbols.shape[2:], 4 * weight.symbols.shape[0] <= KERNEL_CHANNELS
    if padding is None or shape is None or attribute(node, "group", 1) > 1:
        return
    if not (few and min(kernel) > 1):
        return
    if all(isinstance(shape[axis], int) and shape[axis] % 2 == 0 for axis in (2, 3)):
        symbols = torch.from_numpy(weight.symbols)
        put_in_blocks(graph, site, conv_in_blocks(symbols, padding=padding), 1)


def plain_padding(node: Any) -> tuple[int, int] | None:
    """The padding of a Conv of stride and dilation 1 that pads both ends alike, else None."""
    pads = list(attribute(node, "pads", [0, 0, 0, 0]))
    ones = {*attribute(node, "strides", [1, 1]), *attribute(node, "dilations", [1, 1])} == {1}
    return (pads[0], pads[1]) if ones and pads[:2] == pads[2:] else None


def put_in_blocks(graph: Any, site: Site, as_conv: InBlocks, groups: int) -> None:
    """Replace a product by a Conv, DepthToSpace and Slice that give the same."""
    assert isinstance(site.weight, IntegerWeight)
    site.weight = _as_conv_weight(site.weight, as_conv)
    if site.bias is not None:
        site.bias = as_conv.spread(torch.from_numpy(site.bias)).numpy()
    site.node = _replace(graph, site.node, as_conv, groups)
    site.output = site.node.outputs[0]


def _obstacle(site: Site) -> str | None:
    node = site.node
    strides = list(attribute(node, "strides", [1, 1]))
    dilations = list(attribute(node, "dilations", [1, 1]))
    pads = list(attribute(node, "pads", [0, 0, 0, 0]))
    if not isinstance(site.weight, IntegerWeight):
        return "a codebook has no int8 kernel"
    if len(site.weight.symbols.shape) != 4:
        return f"ConvTranspose over {len(strides)} axes has no int8 kernel"
    if len(set(strides)) > 1 or set(dilations) != {1} or pads[:2] != pads[2:]:
        return (
            f"ConvTranspose with strides {strides}, dilations {dilations} has no int8 kernel: "
            "only equal strides and dilation 1 can be rewritten"
        )
    if site.weight.axis not in (None, 1):
        return "its grid runs along the input channels, not the output channels"
    return None


def _as_conv_weight(weight: IntegerWeight, as_conv: InBlocks) -> IntegerWeight:
    """Channel `(group, out, i, j)` or `(i, j, out)` of the convolution has the step of `out`.

    Of a transposed convolution the groups share their steps.
    """

    def spread(part: np.ndarray) -> np.ndarray:
        if part.size == 1:
            return part
        steps = as_conv.spread(torch.from_numpy(part.reshape(-1))).numpy()
        return np.tile(steps, len(as_conv.weight) // len(steps)).reshape(-1, 1, 1, 1)

    return replace(
        weight,
        symbols=as_conv.weight.numpy(),
        scale=spread(weight.scale),
        zero=spread(weight.zero),
    )


def _replace(graph: Any, node: Any, as_conv: InBlocks, groups: int) -> Any:
    """Put the three nodes in place of one; returns the convolution."""
    ir = require("onnx_ir", extra="onnx")
    scopes = dict(node.metadata_props)
    attributes = {
        "group": groups,
        "kernel_shape": list(as_conv.weight.shape[2:]),
        "pads": [*as_conv.padding, *as_conv.padding],
        "strides": [as_conv.stride, as_conv.stride],
    }
    conv = ir.node("Conv", list(node.inputs), attributes, metadata_props=scopes)
    nodes = [conv]
    if as_conv.block > 1:
        shuffle = {"blocksize": as_conv.block, "mode": "DCR" if as_conv.offsets_first else "CRD"}
        nodes.append(
            ir.node("DepthToSpace", [nodes[-1].outputs[0]], shuffle, metadata_props=scopes)
        )
    if any(as_conv.crop):
        bounds = _crop_bounds(graph, node.outputs[0].name, as_conv.crop)
        nodes.append(ir.node("Slice", [nodes[-1].outputs[0], *bounds], metadata_props=scopes))
    put_in_place_of(graph, node, nodes)
    return conv


def put_in_place_of(graph: Any, node: Any, nodes: Sequence[Any]) -> Any:
    """Let the last of some new nodes give what a node gave; returns that value."""
    graph.insert_before(node, nodes)
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.shape, new.type = old.shape, old.type
    new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return new


def _crop_bounds(graph: Any, name: str, crop: tuple[int, int, int, int]) -> list[Any]:
    top, bottom, left, right = crop
    ends = [-bottom if bottom else TO_THE_END, -right if right else TO_THE_END]
    parts = {"starts": [top, left], "ends": ends, "axes": [2, 3]}
    return [
        initializer(graph, f"{name}.crop_{part}", np.asarray(numbers, np.int64))
        for part, numbers in parts.items()
    ]
