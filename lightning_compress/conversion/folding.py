"""Rewrites of an exported graph that bring its products and their rounding together, all exact."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.conversion.integers import IntegerWeight
from lightning_compress.conversion.sites import Site, attribute, constant, is_move, only_use

__all__ = ["fold_batch_norm", "lift_elementwise", "norm_behind", "norm_factors"]

ELEMENTWISE = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh")


def norm_behind(site: Site) -> tuple[Any, int] | None:
    """The BatchNormalization that alone reads a product, and how many outputs share a channel.

    Between them may stand the steps that a rewritten transposed convolution ends with, or a
    reshape of (N, channels * size) to (N, channels, ...): then `size` weights share a channel.
    """
    if site.output_grid is not None:
        return None
    value = site.output
    node = only_use(value)
    while is_move(node) and node.op_type in ("DepthToSpace", "Slice", "Reshape"):
        value = node.outputs[0]
        node = only_use(value)
    if node is None or node.op_type != "BatchNormalization":
        return None
    gamma, outputs = constant(node.inputs[1]), site.weight.values.shape[site.channel_axis]
    if site.node.op_type == "ConvTranspose":
        outputs *= attribute(site.node, "group", 1)
    if gamma is None or outputs % gamma.size:
        return None
    if site.node.op_type == "MatMul" and value is not site.output:
        return None
    return node, outputs // gamma.size


def fold_batch_norm(graph: Any, site: Site) -> Any:
    """Fold the BatchNormalization behind a product into its steps and bias.

    `gamma / sigma` multiplies the steps of a channel; where gamma is negative the whole numbers
    change their sign. Returns the value that now holds what the norm gave, None without a norm.
    """
    found = norm_behind(site)
    if found is None or not isinstance(site.weight, IntegerWeight):
        return None
    if site.node.op_type == "ConvTranspose" and attribute(site.node, "group", 1) > 1:
        return None  # its steps run along the channels of a group, a norm's factors along all
    norm, repeats = found
    factor, shift = norm_factors(norm)
    spread = np.tile if _offsets_first(site) else np.repeat
    factor, shift = spread(factor, repeats), spread(shift, repeats)
    shape = [1] * site.weight.symbols.ndim
    shape[site.channel_axis] = -1
    site.weight = site.weight.scaled(factor.astype(np.float32).reshape(shape))
    bias = 0.0 if site.bias is None else site.bias
    site.bias = (bias * factor + shift).astype(np.float32)
    old, new = norm.outputs[0], norm.inputs[0]
    if old.is_graph_output():
        new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    return new


def norm_factors(norm: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a BatchNormalization multiplies each channel with, and what it adds then."""
    gamma, beta, mean, variance = (_numbers(value) for value in norm.inputs[1:5])
    factor = gamma / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    return factor, beta - mean * factor


def _offsets_first(site: Site) -> bool:
    """Whether a rewritten transposed convolution's channels are `(i, j, out)`."""
    node = only_use(site.output)
    return (
        node is not None
        and node.op_type == "DepthToSpace"
        and attribute(node, "mode", "DCR") == "DCR"
    )


def _numbers(value: Any) -> NDArray[np.float64]:
    found = constant(value)
    assert found is not None
    return found.astype(np.float64)


def lift_elementwise(graph: Any, site: Site, rounded: Container[Any]) -> None:
    """Bring an activation right behind its product, before reshapes and the like.

    Runtimes fuse a product, its activation and its rounding only where they stand side by side.
    Values that are `rounded` before their activation stay where they are.
    """
    first = last = only_use(site.output)
    if not _reorders(first) or site.output_grid is not None:
        return
    while _reorders(following := only_use(last.outputs[0])):
        last = following
    if last.outputs[0] in rounded or following is None:
        return
    if following.op_type in ELEMENTWISE:
        _swap(graph, site.output, first, last, following)


def _reorders(node: Any) -> bool:
    return is_move(node) and node.op_type not in ("MaxPool", "Resize")


def _swap(graph: Any, value: Any, first: Any, last: Any, activation: Any) -> None:
    """`activation(last(...first(value)))` becomes `last(...first(activation(value)))`."""
    moved, result = last.outputs[0], activation.outputs[0]
    graph.remove(activation)
    result.replace_all_uses_with(moved, replace_graph_outputs=True)
    activation.replace_input_with(0, value)
    graph.insert_before(first, activation)
    first.replace_input_with(0, result)
    moved.name, result.name = result.name, moved.name
    moved.type = result.type
    result.shape = value.shape
