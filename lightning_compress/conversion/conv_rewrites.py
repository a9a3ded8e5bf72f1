"""Graph rewrites of convolutions into ones that output blocks of pixels in int8."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.conversion.integer_weights import IntegerWeight
from lightning_compress.conversion.nodes import (
    SHUFFLE,
    WeightedNode,
    attribute,
    enlargement,
    only_use,
)
from lightning_compress.conversion.qdq import initializer
from lightning_compress.errors import require

__all__ = [
    "TO_FIRST",
    "TO_LAST",
    "Chain",
    "InBlocks",
    "channels_last_moves",
    "conv_in_blocks",
    "plain_padding",
    "put_in_blocks",
    "put_in_place_of",
    "rewrite_linear_as_conv",
    "rewrite_narrow",
    "rewrite_transposed",
    "shuffled",
    "transposed_as_conv",
]
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
KERNEL_CHANNELS = 16  # that kernels make at a time, whether they are wanted or not
TO_THE_END = np.iinfo(np.int64).max
MANY_OUTPUTS, FEW_INPUTS = 1024, 128  # from where on it is the faster one at batch 1 and 16


def channels_last_moves(model: Any) -> None:
    """Rewrite DepthToSpace and nearest Resize between DequantizeLinear and QuantizeLinear, exactly.

    Nodes whose images have sizes that the graph does not know stay as they are.

    Args:
        model: an `onnx_ir` model whose moves are rounded before and after on one grid.
    """
    require("onnx_ir.passes.common", extra="onnx").ShapeInferencePass()(model)
    makers = {"DepthToSpace": _shuffled, "Resize": _enlarged}
    for node in list(model.graph):
        if node.op_type not in makers:
            continue
        before, after = node.inputs[0].producer(), only_use(node.outputs[0])
        sizes = _sizes(node.inputs[0])
        if before is None or after is None or sizes is None or not _on_one_grid(before, after):
            continue
        if nodes := makers[node.op_type](model.graph, node, before.inputs[0], sizes):
            _put_in_place(model.graph, node, after, nodes)


def _on_one_grid(before: Any, after: Any) -> bool:
    """Whether a DequantizeLinear gives and a QuantizeLinear of the same numbers takes a value."""
    if (before.op_type, after.op_type) != ("DequantizeLinear", "QuantizeLinear"):
        return False
    pairs = zip(before.inputs[1:], after.inputs[1:], strict=True)
    return all(one is other for one, other in pairs)


def _sizes(value: Any) -> tuple[int, int, int] | None:
    """Channels, height and width of images, where they are known."""
    if value.shape is None or len(value.shape) != 4:
        return None
    sizes = tuple(value.shape[axis] for axis in (1, 2, 3))
    return sizes if all(isinstance(size, int) for size in sizes) else None


def _shuffled(graph: Any, node: Any, value: Any, sizes: tuple[int, int, int]) -> list[Any]:
    """Depth to space with whole runs of channels; only where those come last ("DCR")."""
    if attribute(node, "mode", "DCR") != "DCR":
        return []
    block, (depth, height, width) = attribute(node, "blocksize", 1), sizes
    channels = depth // block**2
    chain = Chain(graph, value)
    chain.transpose(TO_LAST)
    chain.reshape([0, height, width, block, block, channels])
    chain.transpose([0, 1, 3, 2, 4, 5])
    chain.reshape([0, height * block, width * block, channels])
    chain.transpose(TO_FIRST)
    return chain.nodes


def _enlarged(graph: Any, node: Any, value: Any, sizes: tuple[int, int, int]) -> list[Any]:
    """Each pixel and each row several times; only for whole factors, counted from the corner."""
    factors = enlargement(node)
    if factors is None:
        return []
    (down, along), (channels, height, width) = factors, sizes
    chain = Chain(graph, value)
    chain.transpose(TO_LAST)
    chain.repeat(along, axis=3)
    chain.reshape([0, height, 1, width * along * channels])
    chain.repeat(down, axis=2)
    chain.reshape([0, height * down, width * along, channels])
    chain.transpose(TO_FIRST)
    return chain.nodes


class Chain:
    """Nodes that hand a value on to each other.

    Args:
        graph: that they will stand in.
        value: that the first one reads.
    """

    def __init__(self, graph: Any, value: Any) -> None:
        self.graph, self.value, self.nodes = graph, value, []
        self._ir = require("onnx_ir", extra="onnx")

    def transpose(self, order: Sequence[int]) -> None:
        """With the axes in another order."""
        self._add("Transpose", [self.value], {"perm": list(order)})

    def reshape(self, shape: Sequence[int]) -> None:
        """As another shape, 0 standing for the batch."""
        name = "shape_" + "_".join(map(str, shape))
        wanted = initializer(self.graph, name, np.asarray(shape, np.int64))
        self._add("Reshape", [self.value, wanted], {})

    def repeat(self, times: int, *, axis: int) -> None:
        """The whole value several times along an axis."""
        if times > 1:
            self._add("Concat", [self.value] * times, {"axis": axis})

    def _add(self, kind: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
        self.nodes.append(self._ir.node(kind, inputs, attributes))
        self.value = self.nodes[-1].outputs[0]


def _put_in_place(graph: Any, node: Any, after: Any, nodes: list[Any]) -> None:
    """Integers go through `nodes` in place of rounding, `node` and rounding again."""
    graph.insert_before(node, nodes)
    old, new = after.outputs[0], nodes[-1].outputs[0]
    new.dtype, new.shape = old.dtype, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove([after, node], safe=True)


@dataclass(frozen=True)
class InBlocks:
    """A convolution over one to three axes that makes blocks of outputs, and what sets them apart.

    Args:
        weight: (out * block, in / groups, *taps) of the convolution, `block` being all offsets of
            a block; channel `o * block + offset` is the output channel o at an offset, counted
            along the last axis first, and channel `offset * out + o` where `offsets_first`.
        padding: zeros around the input, on both ends of each axis.
        block: its size along each axis.
        crop: what to drop after it: (before, after) of each axis, one after the other.
        offsets_first: depth-to-space as "DCR", whose outputs are whole runs of channels where
            channels stand last; else "CRD", as `torch.pixel_shuffle`.
        stride: of the convolution.
    """

    weight: Tensor
    padding: tuple[int, ...]
    block: tuple[int, ...]
    crop: tuple[int, ...]
    offsets_first: bool = False
    stride: int = 1

    def spread(self, values: Tensor) -> Tensor:
        """A number of each output channel, (out,), for the convolution's channels."""
        times = math.prod(self.block)
        return values.repeat(times) if self.offsets_first else values.repeat_interleave(times)

    def __call__(self, x: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """What the replaced layer gives, (N, out, *sizes)."""
        spread = None if bias is None else self.spread(bias)
        axes = len(self.block)
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
        y = convolve(x, self.weight, spread, self.stride, self.padding, groups=groups)
        first = (*self.block, -1) if self.offsets_first else (-1, *self.block)
        y = y.unflatten(1, first)
        y = y.movedim(axes + 1, 1) if self.offsets_first else y
        y = y.permute(shuffled(axes))
        y = y.reshape(*y.shape[:2], *(y.shape[at] * y.shape[at + 1] for at in range(2, y.dim(), 2)))
        for axis in range(axes):
            before, after = self.crop[2 * axis : 2 * axis + 2]
            y = y.narrow(axis + 2, before, y.shape[axis + 2] - before - after)
        return y


def shuffled(axes: int) -> list[int]:
    """The order of (N, out, *block, *sizes) in which each size stands before its offset."""
    return [0, 1, *(at for axis in range(axes) for at in (2 + axes + axis, 2 + axis))]


def transposed_as_conv(
    weight: Tensor,
    *,
    stride: int | tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...] | None = None,
    groups: int = 1,
) -> InBlocks:
    """Rewrite a transposed convolution of dilation 1 over one to three axes, exactly.

    With `k = stride * j + r`, output position `stride * t + r` of the uncropped result is
    `sum_j x[t - j] * weight[stride * j + r]`: one ordinary convolution for each offset r
    (Shi et al. 2016, arXiv:1609.07009). A kernel that the stride does not divide is filled up
    with zeros, which is exact too and costs their multiplications. Without groups the offsets
    come first among the channels.

    Args:
        weight: (in, out / groups, *kernel), of any dtype.
        stride: of each axis or of all, 1 or more.
        padding: of each axis, as `ConvTranspose2d` has it.
        output_padding: of each axis, less than the stride; None: 0.
        groups: of the convolution.

    >>> import torch
    >>> x, weight = torch.rand(2, 3, 5, 5), torch.rand(3, 4, 4, 4)
    >>> rewritten = transposed_as_conv(weight, stride=2, padding=(1, 1))
    >>> expected = functional.conv_transpose2d(x, weight, stride=2, padding=1)
    >>> torch.allclose(rewritten(x), expected, atol=1e-4)
    True
    """
    axes = weight.dim() - 2
    strides = (stride,) * axes if isinstance(stride, int) else tuple(stride)
    extras = (0,) * axes if output_padding is None else output_padding
    taps, crops, fills = [], [], []
    for kernel, step, pad, extra in zip(weight.shape[2:], strides, padding, extras, strict=True):
        count = -(-kernel // step)
        if extra > pad + count * step - kernel:  # asks for rows beyond the kernel's reach
            count += 1
        taps.append(count)
        fills.append(count * step - kernel)
        crops += [pad, pad + count * step - kernel - extra]
    full = functional.pad(weight, [size for fill in reversed(fills) for size in (0, fill)])
    pairs = [size for pair in zip(taps, strides, strict=True) for size in pair]
    split = full.reshape(groups, weight.shape[0] // groups, weight.shape[1], *pairs)
    # (group, in, out, j, r, ...) -> (group, out, r, ..., in, j, ...), taps running backwards
    tap, offset = range(3, 3 + 2 * axes, 2), range(4, 4 + 2 * axes, 2)
    order = (0, *offset, 2, 1, *tap) if groups == 1 else (0, 2, *offset, 1, *tap)
    ordered = split.permute(order).flip(tuple(range(-axes, 0)))
    conv = ordered.reshape(-1, weight.shape[0] // groups, *taps).contiguous()
    padding = tuple(count - 1 for count in taps)
    return InBlocks(conv, padding, strides, tuple(crops), groups == 1)


def conv_in_blocks(
    weight: Tensor, *, padding: tuple[int, ...], block: tuple[int, ...] = (2, 2)
) -> InBlocks:
    """Rewrite a convolution of stride 1 so that it makes a block of outputs at a time, exactly.

    The kernel stands at each offset of a larger one, which is 0 elsewhere. The block has to divide
    the sizes of the output.

    Args:
        weight: (out, in, *kernel), of any dtype.
        padding: of each axis, as `Conv2d` has it.
        block: one size for all axes, so that one stride serves them.

    >>> import torch
    >>> x, weight = torch.rand(2, 3, 6, 8), torch.rand(1, 3, 3, 3)
    >>> rewritten = conv_in_blocks(weight, padding=(1, 1))
    >>> torch.allclose(rewritten(x), functional.conv2d(x, weight, padding=1), atol=1e-5)
    True
    """
    offsets = itertools.product(*map(range, block))
    places = [
        functional.pad(
            weight,
            [
                side
                for at, size in reversed(list(zip(offset, block, strict=True)))
                for side in (at, size - 1 - at)
            ],
        )
        for offset in offsets
    ]
    crop = (0, 0) * len(block)
    return InBlocks(torch.cat(places), padding, block, crop, offsets_first=True, stride=block[0])


def rewrite_transposed(graph: Any, weighted: WeightedNode) -> str | None:
    """Replace a ConvTranspose by Conv, a shuffle and Slice; returns why not, if it cannot."""
    node = weighted.node
    if (obstacle := _obstacle(weighted)) is not None:
        return obstacle
    groups = attribute(node, "group", 1)
    assert isinstance(weighted.weight, IntegerWeight)
    axes = weighted.weight.symbols.ndim - 2
    as_conv = transposed_as_conv(
        torch.from_numpy(weighted.weight.symbols),
        stride=tuple(attribute(node, "strides", [1] * axes)),
        padding=tuple(attribute(node, "pads", [0] * axes)[:axes]),
        output_padding=tuple(attribute(node, "output_padding", [0] * axes)),
        groups=groups,
    )
    put_in_blocks(graph, weighted, as_conv, groups)
    return None


def rewrite_narrow(graph: Any, weighted: WeightedNode) -> None:
    """Let a Conv with few outputs make 2 x 2 pixels, or up to 16 samples, at a time.

    Only where its sizes are known, and multiples of these.
    """
    node, weight = weighted.node, weighted.weight
    if node.op_type != "Conv":
        return
    if not isinstance(weight, IntegerWeight) or weight.symbols.ndim not in (3, 4):
        return
    padding, shape = plain_padding(node, weight.symbols.ndim - 2), node.outputs[0].shape
    if padding is None or shape is None or attribute(node, "group", 1) > 1:
        return
    sizes, outputs = list(shape[2:]), weight.symbols.shape[0]
    if min(weight.symbols.shape[2:]) == 1 or not all(isinstance(size, int) for size in sizes):
        return
    axes = len(sizes)
    fitting = [size for size in ((2,) if axes == 2 else (16, 8, 4)) if not _odd(sizes, size)]
    fitting = [size for size in fitting if outputs * size**axes <= KERNEL_CHANNELS]
    if fitting:
        symbols, block = torch.from_numpy(weight.symbols), (fitting[0],) * axes
        put_in_blocks(graph, weighted, conv_in_blocks(symbols, padding=padding, block=block), 1)


def _odd(sizes: Sequence[int], block: int) -> bool:
    return any(size % block for size in sizes)


def plain_padding(node: Any, axes: int = 2) -> tuple[int, ...] | None:
    """The padding of a Conv of stride and dilation 1 that pads both ends alike, else None."""
    pads = list(attribute(node, "pads", [0, 0] * axes))
    ones = {*attribute(node, "strides", [1]), *attribute(node, "dilations", [1])} == {1}
    return tuple(pads[:axes]) if ones and pads[:axes] == pads[axes:] else None


def put_in_blocks(graph: Any, weighted: WeightedNode, as_conv: InBlocks, groups: int) -> None:
    """Replace a product by a Conv, DepthToSpace and Slice that give the same."""
    assert isinstance(weighted.weight, IntegerWeight)
    weighted.weight = _as_conv_weight(weighted.weight, as_conv)
    if weighted.bias is not None:
        weighted.bias = as_conv.spread(torch.from_numpy(weighted.bias)).numpy()
    weighted.node = _replace(graph, weighted.node, as_conv, groups)
    weighted.output = weighted.node.outputs[0]


def _obstacle(weighted: WeightedNode) -> str | None:
    node, weight = weighted.node, weighted.weight
    if not isinstance(weight, IntegerWeight):
        return "a codebook has no int8 kernel"
    axes = weight.symbols.ndim - 2
    strides = list(attribute(node, "strides", [1] * axes))
    dilations = list(attribute(node, "dilations", [1] * axes))
    pads = list(attribute(node, "pads", [0, 0] * axes))
    if set(dilations) != {1} or pads[:axes] != pads[axes:]:
        return (
            f"ConvTranspose with strides {strides}, dilations {dilations} has no int8 kernel: "
            "only dilation 1 can be rewritten"
        )
    if weight.axis not in (None, 1):
        return "its grid runs along the input channels, not the output channels"
    known = node.inputs[0].shape is not None and all(
        isinstance(size, int) for size in node.inputs[0].shape[2:]
    )
    if axes > 1 and not (known or (axes == 2 and len(set(strides)) == 1)):
        return f"ConvTranspose with strides {strides} has no int8 kernel for inputs of any size"
    return None


def _as_conv_weight(weight: IntegerWeight, as_conv: InBlocks) -> IntegerWeight:
    """Channel `(group, out, i, j)` or `(i, j, out)` of the convolution has the step of `out`.

    Of a transposed convolution the groups share their steps.
    """

    def spread(part: np.ndarray) -> np.ndarray:
        if part.size == 1:
            return part
        steps = as_conv.spread(torch.from_numpy(part.reshape(-1))).numpy()
        return np.tile(steps, len(as_conv.weight) // len(steps)).reshape(
            -1, *[1] * (as_conv.weight.dim() - 1)
        )

    return replace(
        weight,
        symbols=as_conv.weight.numpy(),
        scale=spread(weight.scale),
        zero=spread(weight.zero),
    )


def _replace(graph: Any, node: Any, as_conv: InBlocks, groups: int) -> Any:
    """Put the convolution, the shuffle and the crop in place of one; returns the convolution."""
    ir = require("onnx_ir", extra="onnx")
    scopes = dict(node.metadata_props)
    attributes = {
        "group": groups,
        "kernel_shape": list(as_conv.weight.shape[2:]),
        "pads": [*as_conv.padding, *as_conv.padding],
        "strides": [as_conv.stride] * len(as_conv.block),
    }
    conv = ir.node("Conv", list(node.inputs), attributes, metadata_props=scopes)
    nodes = [conv, *_shuffle(graph, conv, as_conv, node.inputs[0].shape)]
    if any(as_conv.crop):
        bounds = _crop_bounds(graph, node.outputs[0].name, as_conv.crop)
        nodes.append(ir.node("Slice", [nodes[-1].outputs[0], *bounds]))
    for one in nodes[1:]:
        one.metadata_props.update(scopes)
    put_in_place_of(graph, node, nodes)
    return conv


def _shuffle(graph: Any, conv: Any, as_conv: InBlocks, given: Any) -> list[Any]:
    """Nodes that set the blocks apart; as runs of channels along one axis, else by sizes."""
    ir = require("onnx_ir", extra="onnx")
    block, axes = as_conv.block, len(as_conv.block)
    if math.prod(block) == 1:
        return []
    if axes == 2 and len(set(block)) == 1:
        mode = {"blocksize": block[0], "mode": "DCR" if as_conv.offsets_first else "CRD"}
        return [ir.node("DepthToSpace", [conv.outputs[0]], mode)]
    chain, out = Chain(graph, conv.outputs[0]), len(as_conv.weight) // math.prod(block)
    if axes == 1 and as_conv.offsets_first:
        chain.transpose([0, 2, 1])
        chain.reshape([0, -1, out])
        chain.transpose([0, 2, 1])
    else:
        made = [
            -1 if axes == 1 else size + 2 * pad - taps + 1
            for size, pad, taps in zip(
                given[2:], as_conv.padding, as_conv.weight.shape[2:], strict=True
            )
        ]
        chain.reshape([0, *block, out, *made] if as_conv.offsets_first else [0, out, *block, *made])
        if as_conv.offsets_first:
            chain.transpose([0, 1 + axes, *range(1, 1 + axes), *range(2 + axes, 2 + 2 * axes)])
        chain.transpose(shuffled(axes))
        sizes = [-1 if axes == 1 else size * step for size, step in zip(made, block, strict=True)]
        chain.reshape([0, out, *sizes])
    for node in chain.nodes:
        node.metadata_props[SHUFFLE] = "DCR" if as_conv.offsets_first else "CRD"
    return chain.nodes


def put_in_place_of(graph: Any, node: Any, nodes: Sequence[Any]) -> Any:
    """Let the last of some new nodes give what a node gave; returns that value."""
    graph.insert_before(node, nodes)
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.shape, new.type = old.shape, old.type
    new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return new


def _crop_bounds(graph: Any, name: str, crop: tuple[int, ...]) -> list[Any]:
    starts, ends = list(crop[::2]), [-size if size else TO_THE_END for size in crop[1::2]]
    parts = {"starts": starts, "ends": ends, "axes": list(range(2, 2 + len(starts)))}
    return [
        initializer(graph, f"{name}.crop_{part}", np.asarray(numbers, np.int64))
        for part, numbers in parts.items()
    ]


def rewrite_linear_as_conv(graph: Any, weighted: WeightedNode) -> Any:
    """Let a Gemm of many outputs and few inputs run as a 1 x 1 convolution, exactly.

    The batch becomes the rows of one image, so that the product stays one of two matrices; with
    channels last, the moves around it cost nothing. Returns the value that now holds what the Gemm
    gave, None where it stays.
    """
    weight, node = weighted.weight, weighted.node
    if node.op_type != "Gemm" or not isinstance(weight, IntegerWeight) or weight.axis != 0:
        return None
    outputs, inputs = weight.symbols.shape
    if outputs < MANY_OUTPUTS or inputs > FEW_INPUTS:
        return None
    ir = require("onnx_ir", extra="onnx")
    before = Chain(graph, node.inputs[0])
    before.reshape([1, -1, 1, inputs])
    before.transpose(TO_FIRST)
    conv = ir.node("Conv", [before.value, node.inputs[1]], {"kernel_shape": [1, 1]})
    after = Chain(graph, conv.outputs[0])
    after.transpose(TO_LAST)
    after.reshape([-1, outputs])
    weighted.node, weighted.output = conv, conv.outputs[0]
    weighted.weight = weight.moved(lambda part: part[:, :, None, None])
    return put_in_place_of(graph, node, [*before.nodes, conv, *after.nodes])
