"""Weighted nodes: products of an exported graph with a module's weights."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_compress.conversion.integer_weights import IntegerWeight, StoredWeight
from lightning_compress.grids import AffineGrid

__all__ = [
    "MOVES",
    "SHUFFLE",
    "WeightedNode",
    "attribute",
    "constant",
    "enlargement",
    "find_weighted_nodes",
    "is_move",
    "modules_of",
    "name_modules_once",
    "only_use",
    "readers",
]

SCOPES = "pkg.torch.onnx.name_scopes"
SHUFFLE = "lightning_compress.shuffle"  # on nodes that set blocks of outputs apart
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators that hand values on as they are: rounding before them or after them is the same.
MOVES = ("DepthToSpace", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze")
MOVES += ("Transpose", "Unsqueeze", "Expand")


@dataclass(eq=False)
class WeightedNode:
    """One product with a stored weight.

    Args:
        path: the layer's path.
        node: Conv, ConvTranspose, Gemm or MatMul.
        parameter: the weight's name.
        weight: as it will be stored; laid out as the node reads it.
        bias: float32 of shape (out,), None without one.
        output: the product's value, with the bias added.
        input_grid: of what the layer reads.
        output_grid: of `output`, when the layer rounds it itself.
        why_float: why calibration gives its layer no grids; empty where it does.
        rounded: whether what it gives is rounded before anything but moves and a ReLU reads it.
        whole: whether it multiplies integers, in a runtime that has the kernels.
        dynamic: whether it rounds what it reads over each call's own range.
    """

    path: str
    node: Any
    parameter: str
    weight: StoredWeight
    bias: NDArray[np.float32] | None
    output: Any
    input_grid: AffineGrid | None = None
    output_grid: AffineGrid | None = None
    why_float: str = ""
    rounded: bool = False
    whole: bool = False
    dynamic: bool = False

    @property
    def channel_axis(self) -> int:
        """The weight's axis of output channels."""
        return {"ConvTranspose": 1, "MatMul": 1}.get(self.node.op_type, 0)


def constant(value: Any) -> NDArray | None:
    """The number array behind an initializer or a Constant node; None for computed values."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type != "Constant":
        return None
    found = node.attributes.get("value") or next(iter(node.attributes.values()))
    return found.value.numpy() if hasattr(found.value, "numpy") else np.asarray(found.value)


def attribute(node: Any, name: str, default: Any) -> Any:
    """The value of a node's attribute."""
    return node.attributes[name].value if name in node.attributes else default


def readers(value: Any) -> list[Any]:
    """Uses of a value's numbers: not of its shape or type, which no rounding changes."""
    kinds = (("Shape", 0), ("CastLike", 1))
    return [use for use in value.uses() if (use.node.op_type, use.idx) not in kinds]


def only_use(value: Any) -> Any:
    """The single node that reads a value as its first input; None if there is none or more."""
    uses = readers(value)
    if len(uses) != 1 or value.is_graph_output() or uses[0].idx != 0:
        return None
    return uses[0].node


def is_move(node: Any) -> bool:
    """Whether a node hands its first input's values on unchanged."""
    if node is None:
        return False
    nearest = node.op_type == "Resize" and attribute(node, "mode", "nearest") == "nearest"
    plain_pool = node.op_type == "MaxPool" and len(node.outputs) == 1
    return nearest or plain_pool or (node.op_type in MOVES and node.op_type != "MaxPool")


def enlargement(node: Any) -> tuple[int, int] | None:
    """How often a Resize repeats each row and each column; None for any other node.

    Only whole factors count, and sizes that the graph knows.
    """
    if node is None or node.op_type != "Resize":
        return None
    plain = (
        attribute(node, "mode", "nearest") == "nearest"
        and attribute(node, "coordinate_transformation_mode", "half_pixel") == "asymmetric"
        and attribute(node, "nearest_mode", "round_prefer_floor") == "floor"
    )
    given, made = node.inputs[0].shape, node.outputs[0].shape
    if not plain or given is None or made is None or len(given) != 4 or given[1] != made[1]:
        return None
    if not all(isinstance(shape[axis], int) for shape in (given, made) for axis in (2, 3)):
        return None
    (down, odd_rows), (along, odd_columns) = divmod(made[2], given[2]), divmod(made[3], given[3])
    return None if odd_rows or odd_columns else (down, along)


def _scopes(node: Any) -> list[str]:
    return ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))


def modules_of(node: Any) -> list[str]:
    """Paths of the modules whose forward made a node, from the outermost to the innermost."""
    return _scopes(node)[:-1]


def name_modules_once(graph: Any, module: nn.Module) -> None:
    """Let nodes know a module of several paths by its first one, as grids are kept.

    Args:
        graph: an `onnx_ir` graph as the exporter gives it; its nodes are changed.
        module: that was exported.
    """
    first: dict[nn.Module, str] = {}
    names = {
        path: first.setdefault(part, path)
        for path, part in module.named_modules(remove_duplicate=False)
    }
    for node in graph:
        if scopes := _scopes(node):
            paths = [names.get(path, path) for path in scopes[:-1]]
            node.metadata_props[SCOPES] = repr([*paths, scopes[-1]])


def find_weighted_nodes(
    graph: Any, module: nn.Module, stored: Mapping[str, StoredWeight]
) -> list[WeightedNode]:
    """Products with a weight of `stored`; a transposed weight is laid out as its product reads it.

    A layer that is called twice has two weighted nodes of one path, and a weight of two layers one
    in each. A number that a weight is multiplied with, as under an equalized learning rate, goes
    into its steps.
    A product that a layer's weight enters elsewhere is none: the layer's grids are not its own.

    Args:
        graph: an `onnx_ir` graph as the exporter gives it, with each module named once.
        module: that was exported.
        stored: parameter name -> weight.
    """
    weighted_nodes = []
    for node in graph:
        if node.op_type not in PRODUCTS or not _is_plain(node):
            continue
        name, turned, factor = _weight_behind(node)
        weight = stored.get(name)
        if weight is None or (factor != 1 and not isinstance(weight, IntegerWeight)):
            continue
        if isinstance(weight, IntegerWeight) and factor != 1:
            weight = weight.scaled(np.full([1] * weight.symbols.ndim, factor, np.float32))
        if turned:
            weight = weight.moved(np.transpose)
        path, found = _holder(node, module, name), _bias(node, weight.values.shape)
        if path is not None and found is not None:
            weighted_nodes.append(WeightedNode(path, node, name, weight, *found))
    return weighted_nodes


def _weight_behind(node: Any) -> tuple[str, bool, float]:
    """The initializer that a product multiplies with, whether transposed, and times what number.

    The name is empty where anything else is done to it.
    """
    value, turned, factor = node.inputs[1], False, 1.0
    while (step := value.producer()) is not None:
        number = constant(step.inputs[1]) if step.op_type == "Mul" else None
        if number is not None and number.size == 1 and float(number.reshape(())):
            factor *= float(number.reshape(()))
        elif step.op_type == "Transpose" and node.op_type == "MatMul" and not turned:
            turned = True
        else:
            return "", False, 1.0
        value = step.inputs[0]
    return (value.name if value.is_initializer() else ""), turned, factor


def _holder(node: Any, module: nn.Module, parameter: str) -> str | None:
    """The path of the layer whose forward made a node, if the layer itself holds the parameter."""
    path = next(reversed(modules_of(node)), "")
    own = module.get_submodule(path).parameters(recurse=False)
    weight = module.get_parameter(parameter)
    return path if any(one is weight for one in own) else None


def _is_plain(node: Any) -> bool:
    """A Gemm as a Linear layer has it."""
    if node.op_type != "Gemm":
        return True
    factors = (attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0))
    turns = (attribute(node, "transA", 0), attribute(node, "transB", 0))
    return factors == (1.0, 1.0) and turns == (0, 1)


def _bias(node: Any, shape: tuple[int, ...]) -> tuple[NDArray | None, Any] | None:
    """The bias of a product and the value that holds their sum; None for a computed bias."""
    output = node.outputs[0]
    if node.op_type != "MatMul":
        value = node.inputs[2] if len(node.inputs) > 2 else None
        bias = constant(value)
        return (
            None if value is not None and bias is None and not _is_zeros(value) else (bias, output)
        )
    add = only_use(output)
    if add is not None and add.op_type == "Add" and add.inputs[1].is_initializer():
        bias = constant(add.inputs[1])
        if bias is not None and bias.shape == shape[-1:]:
            return bias, add.outputs[0]
    return None, output


def _is_zeros(value: Any) -> bool:
    """The exporter writes a missing bias as a zero that it spreads over the channels."""
    node = value.producer()
    while node is not None and node.op_type in ("Expand", "CastLike", "Cast"):
        value = node.inputs[0]
        node = value.producer()
    found = constant(value)
    return found is not None and not found.any()
