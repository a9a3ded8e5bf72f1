"""ONNX Runtime sessions with the options of the file, and the operators that they execute."""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_compress.errors import CorruptArtifactError, require
from lightning_compress.files import write_atomically
from lightning_compress.lcz.arrays import onnx_model
from lightning_compress.lcz.container import MAGIC
from lightning_compress.lcz.protobuf import external_file, model_options, onnx_tensors
from lightning_compress.terminal import printable

__all__ = [
    "FOLD_WEIGHTS",
    "ExecutedOps",
    "check_tensors",
    "executed_ops",
    "make_session",
    "onnx_session",
    "session_options",
]

FOLD_WEIGHTS = "session.disable_quant_qdq"

# The others name files that are read or written, libraries, threads: nothing a file may decide.
_OPTIONS = {
    FOLD_WEIGHTS, "session.enable_quant_qdq_cleanup", "session.qdqisint8allowed",
    "session.set_denormal_as_zero", "session.disable_prepacking",
    "session.disable_double_qdq_remover", "session.qdq_matmulnbits_accuracy_level",
}  # fmt: skip
_STRING = 8  # `data_type` of a tensor of texts
INT8_PRODUCTS = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize")
FLOAT_PRODUCTS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
MOVED = {"Reshape", "Transpose", "DepthToSpace", "Slice", "Resize", "MaxPool", "Concat", "Flatten"}
MOVED |= {"Squeeze", "Unsqueeze", "Gather", "Min", "BitShift", "Identity", "Expand"}


def onnx_session(
    path: str | Path,
    *,
    graph: str | None = None,
    threads: int | None = None,
    spinning: bool = True,
) -> Any:
    """An ONNX Runtime session on the CPU with the options of the file's metadata.

    Weights that wait for a DequantizeLinear at every call make a file of integers up to 3
    times slower: `session.disable_quant_qdq` has them evaluated once.

    Args:
        path: of an ONNX file, or of an `.lcz` file that holds a runnable graph; torch and onnx
            need not be installed for either.
        graph: of an `.lcz` file with several, the name of one.
        threads: for one call; None takes what ONNX Runtime takes.
        spinning: whether threads wait for the next call by spinning, as is ONNX Runtime's way.

    Raises:
    A file of a stranger may be opened: external weights are read from the folder of the model
    alone, of options in the metadata those that read or write no file count, and lengths are
    compared with the bytes that are there. To run its graph is another matter: a model may ask for
    any memory and any time, so run it in a process with limits.

    Raises:
        MissingExtraError: when onnxruntime is not installed.
        CorruptArtifactError: when an `.lcz` file is damaged.
        ValueError: for a file that is neither, holds no such graph, leads out of its folder, or
            that ONNX Runtime does not open.
        OSError: when the file cannot be read.
    """
    require("onnxruntime", extra="onnx")
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise ValueError(f"{path} is a device, pipe or socket, no regular file")
    with Path(path).open("rb") as stream:
        packed = stream.read(len(MAGIC)) == MAGIC or Path(path).suffix == ".lcz"
    data = onnx_model(path, graph) if packed else Path(path).read_bytes()
    if graph is not None and not packed:
        raise ValueError(f"graph={graph!r}: {path} is no .lcz file and holds one graph")
    fault = CorruptArtifactError if packed else ValueError
    try:
        check_tensors(data, None if packed else Path(path).parent)
        settings = session_options(model_options(data))
    except ValueError as error:
        raise fault(f"{path}: {printable(str(error))}") from None
    if not spinning:
        settings["session.intra_op.allow_spinning"] = "0"
    try:
        return make_session(data if packed else str(path), settings, threads=threads)
    except Exception as error:  # one class a reason, without a base class of their own
        raise fault(f"{path}: {_who()} does not open it: {_reason(error)}") from error


def _who() -> str:
    return f"onnxruntime {require('onnxruntime', extra='onnx').__version__}"


def _reason(error: Exception) -> str:
    """An error of ONNX Runtime without the C++ function that raised it."""
    text = printable(str(error).strip(), lines=False)
    return re.sub(r"^.*?/onnxruntime_src/\S+:\d+ .*?\) (?=[A-Z])", "", text)[:500]


def check_tensors(data: bytes, folder: Path | None) -> None:
    """Check that the tensors of a model hold as much as they declare, inside its folder.

    Args:
        data: of the model.
        folder: of the model; None: it is one file, without external weights.

    Raises:
        ValueError: naming the tensor.
    """
    for tensor in onnx_tensors(data):
        held = sum(end - start for spans in tensor.values.values() for start, end in spans)
        if tensor.external:
            held = external_file(tensor, folder).stat().st_size
        elements = math.prod(tensor.shape)
        if elements > 8 * held and tensor.kind != _STRING:  # the narrowest elements have one bit
            raise ValueError(
                f"tensor {tensor.name!r} of shape {tensor.shape[:8]} holds {held} bytes"
            )


def session_options(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of a model's metadata that are options of a session.

    Options that are no matter of the model, such as a file that ONNX Runtime reads or writes, are
    left out with a warning.

    >>> session_options({"session.disable_quant_qdq": "1", "author": "me"})
    {'session.disable_quant_qdq': '1'}
    """
    asked = {key: value for key, value in metadata.items() if key.startswith("session.")}
    if unknown := sorted(set(asked) - _OPTIONS):
        warnings.warn(
            f"session options of the file are not used: {printable(repr(unknown[:5]))}. Set them "
            "in a session of your own if you trust the file",
            stacklevel=3,
        )
    return {key: value for key, value in asked.items() if key in _OPTIONS}


def make_session(
    model: str | bytes,
    settings: Mapping[str, str],
    *,
    threads: int | None = None,
    optimized: Path | None = None,
) -> Any:
    """A quiet session on the CPU; `optimized` is where it leaves the graph that it runs."""
    runtime = require("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class ExecutedOps:
    """What ONNX Runtime runs after its own rewriting.

    Args:
        whole: operators on integers, type -> count.
        floats: those on floats, type -> count.
        float_weights: names of the constants that products of floats multiply with.
    """

    whole: Mapping[str, int]
    floats: Mapping[str, int]
    float_weights: Collection[str]


def executed_ops(data: bytes, settings: Mapping[str, str]) -> ExecutedOps:
    """What ONNX Runtime runs of a model.

    Conversions between the two are listed with the floats; arithmetic on shapes is in neither.

    Raises:
        OSError: naming the temporary file, when there is no room for one.
    """
    onnx = require("onnx", extra="onnx")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        try:
            make_session(data, settings, optimized=path)
            graph = onnx.load(path).graph
        except Exception:  # ONNX Runtime does not say so when the disk is the reason; this does
            write_atomically(path, data, what="a temporary ONNX file")
            raise
    kinds = onnx.TensorProto
    constants = {entry.name: entry.data_type for entry in graph.initializer}
    bytes_of = {name for name, kind in constants.items() if kind in (kinds.INT8, kinds.UINT8)}
    shapes = {name for name, kind in constants.items() if kind == kinds.INT64}
    whole: Counter[str] = Counter()
    floats: Counter[str] = Counter()
    source: dict[str, str] = {}  # of a value: the first input of what made it, and so on
    float_weights: set[str] = set()
    for node in graph.node:
        first: str = next(iter(node.input), "")
        source.update(dict.fromkeys(node.output, source.get(first, first)))
        if node.op_type in FLOAT_PRODUCTS:
            weight: str = node.input[1]
            float_weights.add(source.get(weight, weight))
        inputs = [name for name in node.input if name]
        if node.op_type.startswith(INT8_PRODUCTS) or (
            node.op_type in MOVED and bytes_of.intersection(inputs)
        ):
            whole[node.op_type] += 1
            bytes_of.update(node.output)
        elif node.op_type == "Shape" or (inputs and shapes.issuperset(inputs)):
            shapes.update(node.output)
        else:
            floats[node.op_type] += 1
            if node.op_type == "QuantizeLinear":
                bytes_of.update(node.output)
    return ExecutedOps(dict(sorted(whole.items())), dict(sorted(floats.items())), float_weights)
