"""Names of an ONNX file's inputs, outputs and dynamic axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_compress.errors import require

__all__ = ["check_names", "rename"]


def check_names(what: str, names: Sequence[str] | None, count: int) -> None:
    """Whether there is one name each.

    Raises:
        ValueError: for another number of names, a name twice, or what is no name.
    """
    if names is None:
        return
    if isinstance(names, str) or len(names) != count:
        raise ValueError(f"{what}={names!r}: the file has {count}, give a list of {count} names")
    if len(set(names)) < count or not all(isinstance(one, str) and one for one in names):
        raise ValueError(f"{what}={names!r}: names are words, and no two are equal")


def rename(
    proto: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: Sequence[Mapping[int, str]],
) -> None:
    """Give inputs, outputs and free axes of a model their names, in place.

    Args:
        proto: an `onnx.ModelProto`.
        inputs: one name each.
        outputs: one name each; empty ones stay.
        axes: of each input, axis -> name.
    """
    graph = proto.graph
    _set_passed_on_apart(graph, {*inputs} | {*outputs})
    new = {entry.name: name for entry, name in zip(graph.input, inputs, strict=True)}
    new |= {entry.name: name for entry, name in zip(graph.output, outputs, strict=True) if name}
    new = {old: name for old, name in new.items() if old != name}
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken |= {one.name for one in (*graph.initializer, *graph.input, *graph.output)}
    for name in list(new.values()):
        if name in taken and name not in new:
            new[name] = _fresh(name, taken | set(new.values()))
    _apply(graph, new)
    for entry, free in zip(graph.input, axes, strict=True):
        for axis, name in free.items():
            entry.type.tensor_type.shape.dim[axis].dim_param = name


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name = f"{name}_"
    return name


def _set_passed_on_apart(graph: Any, wanted: set[str]) -> None:
    """An input that is an output too gets a name of its own as one."""
    onnx = require("onnx", extra="onnx")
    inputs = {entry.name for entry in graph.input}
    for entry in graph.output:
        if entry.name in inputs:
            name = _fresh(f"{entry.name}_out", inputs | wanted)
            graph.node.append(onnx.helper.make_node("Identity", [entry.name], [name], name=name))
            entry.name = name


def _apply(graph: Any, new: Mapping[str, str]) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
        for one in node.attribute:
            for inner in ([one.g] if one.HasField("g") else []) + list(one.graphs):
                _apply(inner, new)
    for one in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
        one.name = new.get(one.name, one.name)
