"""A `torch.export` program that quantizes and dequantizes on the trained grids, for phones."""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_compress.conversion.blame import explained
from lightning_compress.conversion.integer_weights import (
    IntegerWeight,
    StoredWeight,
    put_on_grids,
    weight_grids,
)
from lightning_compress.conversion.program import plain_copy
from lightning_compress.conversion.signature import signature_of
from lightning_compress.grids import AffineGrid, channel_axis
from lightning_compress.lcz.lost_grids import lost_grids
from lightning_compress.quantization.bias_rounding import round_biases_in
from lightning_compress.state import (
    ActivationGrids,
    activation_grids,
    compression_state,
    rounds_dynamically,
)

__all__ = ["quantized_program"]

PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)
NORMS = nn.modules.batchnorm._BatchNorm
RESHAPES = ("view", "reshape", "unflatten", "_unsafe_view")
INT8, SHIFT = (-128, 127), 128  # from the unsigned numbers of a grid to the signed ones


def quantized_program(module: nn.Module, sample: Any) -> ExportedProgram:
    """A `torch.export` program on the module's trained grids, as mobile runtimes read it.

    Weights are int8 behind `quantized_decomposed.dequantize_per_channel` (or `_per_tensor`), and
    activations go through `quantize_per_tensor` and back wherever `fake_quantized` rounds them.
    BatchNorm right behind a layer is folded into its steps and its bias. The program computes what
    `fake_quantized(module)` computes: the same numbers, but for the rounding of a folded norm.
    ExecuTorch and Core ML convert it; their own quantizers would find other grids.

    The module is traced in eval mode from a copy and stays as it is. Weights without a grid, and
    those on codebooks, stay floats.

    Args:
        module: with grids, from a run, from `quantize_static` or `quantize_weights`.
        sample: a tensor, a tuple of arguments, a dict of keyword arguments, or a tuple that ends
            with one. The program has the sample's shapes.

    Raises:
        ValueError: when nothing has a grid, a layer rounds dynamically, parameters are not
            float32, the sample holds no tensors, or the module cannot be followed.

    >>> from lightning_compress import fake_quantized, quantize_static
    >>> module, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(8, 4)
    >>> _ = quantize_static(module, [x])
    >>> program = quantized_program(module, x)
    >>> with torch.no_grad(), fake_quantized(module):
    ...     torch.equal(program.module()(x), module(x))
    True
    """
    _check(module)
    if text := lost_grids(module):
        warnings.warn(f"kept in float, without their grids: {text}", stacklevel=2)
    _register_operators()
    plain = plain_copy(module)
    signature, leaves = signature_of(plain, sample)
    arguments = signature.rebuilt(tuple(one.detach().cpu() for one in leaves))
    stored, _ = put_on_grids(plain, weight_grids(module, plain), everything=False)
    round_biases_in(plain)
    norms = any(isinstance(one, NORMS) for one in plain.modules())
    if norms:
        stored = stored | _fold_norms(plain, stored, _traced(plain, arguments).graph)
    _round_activations(plain)
    graph = _traced(plain, arguments).module(check_guards=False)
    _store_integers(graph, stored)
    return _traced(graph, arguments)


def _check(module: nn.Module) -> None:
    for path, layer in module.named_modules():
        if rounds_dynamically(layer):
            raise ValueError(
                f"{path or 'the module'} rounds what it reads over each call's own range "
                "(quantize_dynamic): a program needs fixed grids, quantize_static finds them"
            )
    for path, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ValueError(
                f"parameter {path!r} is {parameter.dtype}: a quantized program is made from "
                "float32, module.float()"
            )
    state = compression_state(module, masks=False)
    if not state.grids and not state.activations:
        raise ValueError(
            "the module has no grids: train with QuantizationAwareTraining, or call "
            "quantize_static(module, data) first"
        )


def _register_operators() -> None:
    """Importing this module of PyTorch's is what defines `torch.ops.quantized_decomposed`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch.ao.quantization.fx._decomposed")


def _traced(module: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=r"The tensor attributes? .*_flat_weights")
        try:
            return torch.export.export(module, arguments[0], arguments[1], strict=False)
        except Exception as error:
            raise explained(error) from error


def _fold_norms(
    plain: nn.Module, stored: Mapping[str, StoredWeight], graph: Any
) -> dict[str, StoredWeight]:
    """Fold each BatchNorm that alone reads a product into it, in place; the changed weights.

    Jacob et al. 2018, arXiv:1712.05877, equation 14: `gamma / sigma` multiplies the steps of a
    channel; where it is negative the integers change their sign.
    """
    calls = Counter(filter(None, map(_path, graph.nodes)))
    owners = Counter(id(one) for _, one in plain.named_parameters(remove_duplicate=False))
    changed: dict[str, StoredWeight] = {}
    for node, norm_node in _followed_by_norm(graph):
        path, norm_path = _path(node) or "", _path(norm_node) or ""
        layer, norm = plain.get_submodule(path), plain.get_submodule(norm_path)
        if not isinstance(layer, PRODUCTS) or not isinstance(norm, NORMS):
            continue
        once = calls[path] == calls[norm_path] == owners[id(layer.weight)] == 1
        if not once or not _foldable(layer, norm):
            continue
        name = f"{path}.weight" if path else "weight"
        weight = stored.get(name)
        if weight is None or isinstance(weight, IntegerWeight):
            folded = _fold(layer, norm, weight)
            if folded is not None:
                changed[name] = folded
    return changed


def _followed_by_norm(graph: Any) -> Iterator[tuple[Any, Any]]:
    """Products, and the norms that alone read them, through at most a reshape."""
    for node in graph.nodes:
        if "batch_norm" not in str(node.target):
            continue
        given = node.args[0]
        if _is_reshape(given) and len(given.users) == 1 and _channels_lead(given):
            given = given.args[0]
        if _path(given) is not None and len(given.users) == 1:
            yield given, node


def _is_reshape(node: Any) -> bool:
    return node.op == "call_function" and any(
        str(node.target).startswith(f"aten.{one}.") for one in RESHAPES
    )


def _channels_lead(node: Any) -> bool:
    """Whether a reshape makes (N, channels, ...) of (N, channels * size)."""
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    return len(before) == 2 and len(after) > 2 and before[0] == after[0]


def _path(node: Any) -> str | None:
    """The module whose own product or norm a node is; None for another node."""
    if node.op != "call_function" or not node.meta.get("nn_module_stack"):
        return None
    kinds = ("aten.linear", "aten.conv", "aten.batch_norm")
    if not str(node.target).startswith(kinds):
        return None
    return str(list(node.meta["nn_module_stack"].values())[-1][0])


def _foldable(layer: nn.Module, norm: nn.Module) -> bool:
    before, behind = (activation_grids(one) or ActivationGrids() for one in (layer, norm))
    shared = isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1
    return (
        before.output is None  # a rounding in between is the module's own
        and behind.input is None
        and getattr(norm, "running_mean", None) is not None
        and not shared  # its steps run along the channels of a group, a norm's along all
    )


@torch.no_grad()
def _fold(layer: Any, norm: Any, weight: IntegerWeight | None) -> IntegerWeight | None:
    spread = norm.running_var.double().add(norm.eps).sqrt()
    gamma = torch.ones_like(spread) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(spread) if norm.bias is None else norm.bias.double()
    axis = channel_axis(layer)
    factor = gamma / spread
    repeats = layer.weight.shape[axis] // len(factor)
    shift = (beta - norm.running_mean.double() * factor).repeat_interleave(repeats)
    factor = factor.repeat_interleave(repeats)
    shape = [1] * layer.weight.dim()
    shape[axis] = -1
    bias = 0.0 if layer.bias is None else layer.bias.double()
    folded = None
    if weight is None:
        layer.weight.copy_(layer.weight.double() * factor.reshape(shape))
    else:
        folded = weight.scaled(factor.float().reshape(shape).numpy())
        layer.weight.copy_(torch.from_numpy(folded.values))
    layer.bias = nn.Parameter((bias * factor + shift).float(), requires_grad=False)
    norm.forward = _unchanged  # its hooks, and so a rounding behind it, still run
    return folded


def _unchanged(x: Tensor) -> Tensor:
    return x


def _round_activations(plain: nn.Module) -> None:
    """Hooks that the trace follows, where `fake_quantized` rounds."""
    for layer in plain.modules():
        grids = activation_grids(layer)
        if grids is not None and grids.input is not None:
            layer.register_forward_pre_hook(partial(_round_first, grids.input), with_kwargs=True)
        if grids is not None and grids.output is not None:
            layer.register_forward_hook(partial(_round_result, grids.output))


def _round_first(
    grid: AffineGrid, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (_rounded(args[0], grid), *args[1:]), kwargs
    return args, {**kwargs, "input": _rounded(kwargs["input"], grid)}


def _round_result(grid: AffineGrid, _layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return _rounded(output, grid)


def _rounded(x: Tensor, grid: AffineGrid) -> Tensor:
    """Quantized to int8 and back."""
    shift = 0 if grid.symmetric else SHIFT
    least, most = grid.qmin - shift, grid.qmax - shift
    how = (float(grid.scale), int(grid.zero_point) - shift, least, most, torch.int8)
    operators = torch.ops.quantized_decomposed
    return operators.dequantize_per_tensor(operators.quantize_per_tensor(x, *how), *how)


def _store_integers(graph: Any, stored: Mapping[str, StoredWeight]) -> None:
    """Put integers and a dequantization in the place of each weight that has them."""
    places: dict[int, str] = {}  # a tied weight is stored once
    for node in list(graph.graph.nodes):
        weight = stored.get(node.target) if node.op == "get_attr" else None
        if isinstance(weight, IntegerWeight):
            _dequantize(graph, node, weight, places.setdefault(id(weight), node.target))
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name in stored:
        owner, _, leaf = name.rpartition(".")
        if name not in used and hasattr(graph.get_submodule(owner), leaf):
            delattr(graph.get_submodule(owner), leaf)
    graph.graph.lint()
    graph.recompile()


def _dequantize(graph: Any, node: Any, weight: IntegerWeight, place: str) -> None:
    symbols, zero = _signed(weight)
    operators = torch.ops.quantized_decomposed
    owner, _, leaf = place.rpartition(".")
    stored = _buffers(graph, owner, {f"{leaf}_int8": symbols})
    if weight.axis is None:
        how = (float(weight.scale.reshape(-1)[0]), int(zero[0]))
        operator, axis = operators.dequantize_per_tensor.default, ()
    else:
        names = {f"{leaf}_scale": weight.scale.reshape(-1), f"{leaf}_zero": zero}
        how, axis = _buffers(graph, owner, names), (weight.axis,)
        operator = operators.dequantize_per_channel.default
    least = -127 if not zero.any() and symbols.min(initial=0) > INT8[0] else INT8[0]
    with graph.graph.inserting_before(node):
        values = [graph.graph.get_attr(one) if isinstance(one, str) else one for one in how]
        whole = graph.graph.get_attr(stored[0])
        arguments = (whole, *values, *axis, least, INT8[1], torch.int8)
        new = graph.graph.call_function(operator, arguments)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


def _signed(weight: IntegerWeight) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """int8 numbers, and the zero point of each step."""
    kind, stored, zero = weight.encoded()
    count = weight.scale.size
    if kind == "int8" or zero is None:
        return stored.astype(np.int8), np.zeros(count, np.int64)
    shifted = stored.astype(np.int32) - SHIFT
    return shifted.astype(np.int8), zero.reshape(-1).astype(np.int64) - SHIFT


def _buffers(graph: Any, owner: str, arrays: Mapping[str, NDArray]) -> tuple[str, ...]:
    """Buffers beside the weight that they stand for; their paths."""
    place = graph.get_submodule(owner)
    for name, array in arrays.items():
        if not hasattr(place, name):
            place.register_buffer(name, torch.from_numpy(np.array(array)))
    return tuple(f"{owner}.{name}" if owner else name for name in arrays)
