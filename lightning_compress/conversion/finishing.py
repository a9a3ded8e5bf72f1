"""The last steps of an int8 model: weights and biases in their places, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from lightning_compress.conversion.channels_last import channels_last_moves
from lightning_compress.conversion.integers import IntegerWeight, StoredWeight
from lightning_compress.conversion.runtime import FOLD_WEIGHTS
from lightning_compress.conversion.saturation import is_cut_off
from lightning_compress.conversion.sites import Site, modules_of
from lightning_compress.conversion.storing import place_bias, place_weight, rewrite_storage
from lightning_compress.errors import require

__all__ = ["finished_models"]

RECURRENT = ("Slice", "Unsqueeze", "Concat", "GRU", "LSTM", "RNN")


def finished_models(
    model: Any,
    sites: Sequence[Site],
    stored: Mapping[str, StoredWeight],
    seen: Mapping[str, NDArray],
    *,
    channels_last: bool = True,
) -> tuple[list[Any], dict[str, str]]:
    """Store the weights; returns the finished models and why some weights multiply as floats.

    The first model is the fastest. A second one, if there is one, cuts off no sum on CPUs without
    VNNI either: more of its weights stand around 128. In both, those do whose inputs do not rest
    at 0, since sums of such inputs are large all the time. The optimizer stores equal weights once,
    so that all products of one parameter have it alike.
    """
    graph = model.graph
    placed: dict[str, StoredWeight] = {}
    risky: set[str] = set()
    shifted: set[str] = set()
    for number, site in enumerate(sites):
        name = site.parameter if site.parameter not in placed else f"{site.parameter}.{number}"
        if site.whole and isinstance(site.weight, IntegerWeight):
            site.weight = site.weight.stretched()
        placed[name] = site.weight
        site.node.replace_input_with(1, place_weight(graph, name, site.weight))
        place_bias(graph, site)
        if not site.whole or not isinstance(site.weight, IntegerWeight):
            continue
        if is_cut_off(site.weight, site.node.op_type, seen, site.path):
            risky.add(site.parameter)
        if site.input_grid is not None and bool(site.input_grid.zero_point.any()):
            shifted.add(site.parameter)
    whole = {site.parameter for site in sites if site.whole}
    parameters = {name: site.parameter for name, site in zip(placed, sites, strict=True)}
    reasons = _place_others(graph, stored, placed)
    parameters |= {f"{name}.shared": name for name in stored if f"{name}.shared" in placed}
    parameters = {name: whose for name, whose in parameters.items() if whose in whole}
    require("onnxscript.optimizer", extra="onnx").optimize(model)
    if channels_last:
        channels_last_moves(model)
    ir = require("onnx_ir", extra="onnx")
    levels = [risky & shifted] + ([risky] if risky - shifted else [])
    copies = [model, *(ir.from_proto(ir.to_proto(model)) for _ in levels[1:])]
    for one, around_128 in zip(copies, levels, strict=True):
        _finish(one, placed, {name: whose in around_128 for name, whose in parameters.items()})
    return copies, reasons


def _place_others(
    graph: Any, stored: Mapping[str, StoredWeight], placed: dict[str, StoredWeight]
) -> dict[str, str]:
    """Weights that something else than a product of a layer reads."""
    reasons = {}
    for name, weight in stored.items():
        value = graph.initializers.get(name)
        used = [] if value is None else [use.node for use in value.uses() if _is_alive(use.node)]
        if value is None or not used:
            continue
        key = name if name not in placed else f"{name}.shared"
        placed[key] = weight
        value.replace_all_uses_with(place_weight(graph, key, weight))
        reasons[name.rpartition(".")[0]] = _why_alone(used)
    return reasons


def _is_alive(node: Any) -> bool:
    """Whether a node needs the weight's numbers: not for a shape, nor to turn them for nothing."""
    if node.op_type == "Transpose":
        return any(list(out.uses()) for out in node.outputs)
    return node.op_type != "Shape"


def _why_alone(nodes: Sequence[Any]) -> str:
    if any(node.op_type == "Gather" for node in nodes):
        return "a lookup does not multiply: its weights alone are whole numbers"
    if any(node.op_type in RECURRENT for node in nodes):
        return "recurrent layers have no int8 kernel: their weights alone are whole numbers"
    scopes = sorted({part for node in nodes for part in modules_of(node)})
    return f"no product of a layer in {scopes}: its weights alone are whole numbers"


def _finish(model: Any, placed: Mapping[str, StoredWeight], whole: Mapping[str, bool]) -> None:
    common = require("onnx_ir.passes.common", extra="onnx")
    rewrite_storage(model.graph, placed, whole=whole)
    model.graph.sort()
    for cleaner in (common.RemoveUnusedNodesPass(), common.ClearMetadataAndDocStringPass()):
        cleaner(model)
    _drop_notes(model.graph)
    if set(placed) - set(whole) and not whole:
        model.metadata_props[FOLD_WEIGHTS] = "1"


def _drop_notes(graph: Any) -> None:
    """Names of nodes and shapes of values in between: a tenth of a small model's file."""
    kept = set(graph.outputs)
    for node in graph:
        node.name = None
        for value in node.outputs:
            if value not in kept:
                value.shape = value.type = None
