"""Convolutions in an exported graph, replaced by those that make blocks of pixels in int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.conversion.integer_weights import IntegerWeight
from lightning_compress.conversion.nodes import Site, attribute, enlargement, only_use
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
    "rewrite_narrow",
    "rewrite_transposed",
    "rewrite_wide",
    "transposed_as_conv",
]
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def channels_last_moves(model: Any) -> None:
    """Rewrite DepthToSpace and nearest Resize between DequantizeLinear and QuantizeLinear, exactly.

    Nodes whose pictures have sizes that the graph does not know stay as they are.

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
    """Channels, height and width of pictures, where they are known."""
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
    """Whole numbers go through `nodes` in place of rounding, `node` and rounding again."""
    graph.insert_before(node, nodes)
    old, new = after.outputs[0], nodes[-1].outputs[0]
    new.dtype, new.shape = old.dtype, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove([after, node], safe=True)


@dataclass(frozen=True)
class InBlocks:
    """A convolution that makes blocks of pixels, and what sets them apart.

    Args:
        weight: (out * block^2, in / groups, taps, taps) of the convolution; channel
            `o * block^2 + i * block + j` is the output channel o at offset (i, j), and channel
            `(i * block + j) * out + o` where `offsets_first`.
        padding: zeros around the input, on both ends of (height, width).
        block: rows and columns of a block; depth-to-space by it.
        crop: rows and columns to drop after it: (top, bottom, left, right).
        offsets_first: depth-to-space as "DCR", whose pixels are whole runs of channels where
            channels stand last; else "CRD", as `torch.pixel_shuffle`.
        stride: of the convolution.
    """

    weight: Tensor
    padding: tuple[int, int]
    block: int
    crop: tuple[int, int, int, int]
    offsets_first: bool = False
    stride: int = 1

    def spread(self, values: Tensor) -> Tensor:
        """A number of each output channel, (out,), for the convolution's channels."""
        times = self.block**2
        return values.repeat(times) if self.offsets_first else values.repeat_interleave(times)

    def __call__(self, x: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """What the replaced layer gives, (N, out, H, W)."""
        spread = None if bias is None else self.spread(bias)
        y = functional.conv2d(x, self.weight, spread, self.stride, self.padding, groups=groups)
        if self.offsets_first:
            y = y.unflatten(1, (self.block**2, -1)).transpose(1, 2).flatten(1, 2)
        y = functional.pixel_shuffle(y, self.block)
        top, bottom, left, right = self.crop
        return y[:, :, top : y.shape[2] - bottom, left : y.shape[3] - right]


def transposed_as_conv(
    weight: Tensor,
    *,
    stride: int,
    padding: tuple[int, int],
    output_padding: tuple[int, int] = (0, 0),
    groups: int = 1,
) -> InBlocks:
    """Rewrite a transposed convolution of dilation 1 and equal strides, exactly.

    With `k = stride * j + r`, output position `stride * t + r` of the uncropped result is
    `sum_j x[t - j] * weight[stride * j + r]`: one ordinary convolution for each offset r
    (Shi et al. 2016, arXiv:1609.07009). A kernel that the stride does not divide is filled up
    with zeros, which is exact too and costs their multiplications. Without groups the offsets
    come first among the channels.

    Args:
        weight: (in, out / groups, kh, kw), of any dtype.
        stride: of both axes, 1 or more.
        padding: of (height, width), as `ConvTranspose2d` has it.
        output_padding: of (height, width), less than the stride.
        groups: of the convolution.

    >>> import torch
    >>> x, weight = torch.rand(2, 3, 5, 5), torch.rand(3, 4, 4, 4)
    >>> rewritten = transposed_as_conv(weight, stride=2, padding=(1, 1))
    >>> expected = functional.conv_transpose2d(x, weight, stride=2, padding=1)
    >>> torch.allclose(rewritten(x), expected, atol=1e-4)
    True
    """
    taps, crops, fills = [], [], []
    for kernel, pad, extra in zip(weight.shape[2:], padding, output_padding, strict=True):
        count = -(-kernel // stride)
        if extra > pad + count * stride - kernel:  # asks for rows beyond the kernel's reach
            count += 1
        taps.append(count)
        fills.append(count * stride - kernel)
        crops.append((pad, pad + count * stride - kernel - extra))
    full = functional.pad(weight, (0, fills[1], 0, fills[0]))
    split = full.reshape(
        groups, weight.shape[0] // groups, weight.shape[1], taps[0], stride, taps[1], stride
    )
    # (group, in, out, j, r, j', r') -> (group, out, r, r', in, j, j'), taps running backwards
    order = (0, 4, 6, 2, 1, 3, 5) if groups == 1 else (0, 2, 4, 6, 1, 3, 5)
    ordered = split.permute(order).flip((5, 6))
    conv = ordered.reshape(-1, weight.shape[0] // groups, taps[0], taps[1]).contiguous()
    padding = (taps[0] - 1, taps[1] - 1)
    return InBlocks(conv, padding, stride, (*crops[0], *crops[1]), groups == 1)


def conv_in_blocks(weight: Tensor, *, padding: tuple[int, int]) -> InBlocks:
    """Rewrite a convolution of stride 1 so that it makes 2 x 2 pixels at a time, exactly.

    The kernel stands at four places of a larger one, which is 0 elsewhere. The output must have an
    even number of rows and columns.

    Args:
        weight: (out, in, kh, kw), of any dtype.
        padding: of (height, width), as `Conv2d` has it.

    >>> import torch
    >>> x, weight = torch.rand(2, 3, 6, 8), torch.rand(1, 3, 3, 3)
    >>> rewritten = conv_in_blocks(weight, padding=(1, 1))
    >>> torch.allclose(rewritten(x), functional.conv2d(x, weight, padding=1), atol=1e-5)
    True
    """
    places = [functional.pad(weight, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)]
    return InBlocks(torch.cat(places), padding, 2, (0, 0, 0, 0), offsets_first=True, stride=2)


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


MANY_OUTPUTS, FEW_INPUTS = 1024, 128  # from where on it is the faster one at batch 1 and 16


def rewrite_wide(graph: Any, site: Site) -> Any:
    """Let a Gemm of many outputs and few inputs run as a 1 x 1 convolution, exactly.

    The batch becomes the rows of one picture, so that the product stays one of two matrices; with
    channels last, the moves around it cost nothing. Returns the value that now holds what the Gemm
    gave, None where it stays.
    """
    weight, node = site.weight, site.node
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
    site.node, site.output = conv, conv.outputs[0]
    site.weight = weight.moved(lambda part: part[:, :, None, None])
    return put_in_place_of(graph, node, [*before.nodes, conv, *after.nodes])
