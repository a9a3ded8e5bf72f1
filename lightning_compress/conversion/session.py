"""ONNX Runtime sessions with the options of the file, and the operators that they execute."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_compress.errors import require
from lightning_compress.files import write_atomically
from lightning_compress.lcz.arrays import onnx_model
from lightning_compress.lcz.container import MAGIC
from lightning_compress.lcz.protobuf import model_options

__all__ = ["FOLD_WEIGHTS", "executed_ops", "make_session", "onnx_session", "session_options"]

FOLD_WEIGHTS = "session.disable_quant_qdq"

INT8_PRODUCTS = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize")
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
        MissingExtraError: when onnxruntime is not installed.
        CorruptArtifactError: when an `.lcz` file is damaged.
        ValueError: for a file that is neither, or holds no such graph.
        OSError: when the file cannot be read.
    """
    require("onnxruntime", extra="onnx")
    with Path(path).open("rb") as stream:
        packed = stream.read(len(MAGIC)) == MAGIC or Path(path).suffix == ".lcz"
    data = onnx_model(path, graph) if packed else Path(path).read_bytes()
    if graph is not None and not packed:
        raise ValueError(f"graph={graph!r}: {path} is no .lcz file and holds one graph")
    try:
        settings = session_options(model_options(data))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not spinning:
        settings["session.intra_op.allow_spinning"] = "0"
    return make_session(data if packed else str(path), settings, threads=threads)


def session_options(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of a model's metadata that are options of a session.

    >>> session_options({"session.disable_quant_qdq": "1", "author": "me"})
    {'session.disable_quant_qdq': '1'}
    """
    return {key: value for key, value in metadata.items() if key.startswith("session.")}


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


def executed_ops(data: bytes, settings: Mapping[str, str]) -> tuple[dict[str, int], dict[str, int]]:
    """What ONNX Runtime runs after its own rewriting: (on integers, on floats), by type.

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
    for node in graph.node:
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
    return dict(sorted(whole.items())), dict(sorted(floats.items()))
