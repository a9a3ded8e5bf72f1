"""Export to ONNX, checked against PyTorch under ONNX Runtime."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.conversion.inputs import as_inputs, take_rows
from lightning_compress.conversion.plain import plain_copy
from lightning_compress.errors import require

__all__ = ["OnnxInfo", "OnnxMismatchError", "export_onnx"]

PROTOBUF_LIMIT = 2**31 - 1

# What the exporter says of its own workings; everything else still reaches the user.
EXPORTER_WARNINGS = (
    ".*_check_is_size will be removed",  # its own use of an old check
    r"The tensor attributes? .*_flat_weights",  # recurrent layers list their weights anew
    "# The axis name: batch.* will not be used",  # all inputs share one batch axis, as meant
)


class OnnxMismatchError(ValueError):
    """An exported file that does not compute what the PyTorch module computes."""


@dataclass(frozen=True)
class OnnxInfo:
    """An exported file.

    Args:
        path: where it lies.
        bytes: its size.
        max_abs_error: largest difference from PyTorch over all outputs and checked batch sizes.
        inputs: their names, in order.
        outputs: their names, in order.
        float_ops: operators that return floats, type -> count.
        int8_ops: operators that run on int8, type -> count.
    """

    path: Path
    bytes: int
    max_abs_error: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    float_ops: Mapping[str, int]
    int8_ops: Mapping[str, int] = field(default_factory=dict)


def export_onnx(
    module: nn.Module,
    path: str | Path,
    sample: Tensor | tuple[Tensor, ...],
    *,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> OnnxInfo:
    """Write a module as one fp32 ONNX file and check it against PyTorch.

    The module is exported in eval mode from a copy and stays as it is. BatchNorm right behind a
    layer is folded into it, parametrizations (spectral_norm, weight_norm) into their weights.

    Args:
        module: takes the sample as positional arguments; returns tensors, possibly nested.
        path: of the file; it appears only when the check has passed.
        sample: inputs; axis 0 is the batch and is dynamic in the file.
        opset: ONNX operator set version; None leaves the choice to the exporter.
        tolerance: largest absolute difference from PyTorch, at the sample's and at other batch
            sizes.

    Raises:
        OnnxMismatchError: when the file's outputs differ by more than `tolerance`.
        ValueError: when the inputs do not share a batch size or the module fixes it, the opset
            cannot be reached, or the file would exceed 2 GiB.
        MissingExtraError: when onnx, onnxscript or onnxruntime is not installed.
    """
    onnx = require("onnx", extra="onnx")
    require("onnxscript", extra="onnx")
    require("onnxruntime", extra="onnx")
    inputs = tuple(part.detach().cpu() for part in as_inputs(sample))
    plain = plain_copy(module)
    proto = _export(plain, take_rows(inputs, max(2, len(inputs[0]))), opset)
    if proto.ByteSize() > PROTOBUF_LIMIT:
        raise ValueError(f"{path} would take {proto.ByteSize()} bytes; a single file ends at 2 GiB")
    onnx.checker.check_model(proto, full_check=True)
    data = proto.SerializeToString()
    error = _check(plain, data, inputs, tolerance, Path(path))
    _write(Path(path), data)
    return OnnxInfo(
        path=Path(path),
        bytes=len(data),
        max_abs_error=error,
        inputs=tuple(entry.name for entry in proto.graph.input),
        outputs=tuple(entry.name for entry in proto.graph.output),
        float_ops=_float_ops(proto),
    )


@contextmanager
def _exporter_warnings_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in EXPORTER_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


def _export(module: nn.Module, inputs: tuple[Tensor, ...], opset: int | None) -> Any:
    """The ONNX model; the exporter would bake in a batch size of 1, so it gets 2 or more."""
    batch = torch.export.Dim("batch", min=1)
    with _exporter_warnings_ignored(), torch.no_grad():
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    _check_request(program.model_proto, opset)
    return program.model_proto


def _check_request(proto: Any, opset: int | None) -> None:
    """The exporter may give another opset or a fixed batch size without an error."""
    actual = next(entry.version for entry in proto.opset_import if entry.domain == "")
    if opset not in (None, actual):
        raise ValueError(f"opset {opset} cannot be reached, the exporter stays at opset {actual}")
    for entry in proto.graph.input:
        first = entry.type.tensor_type.shape.dim[0]
        if not first.dim_param:
            raise ValueError(
                f"input {entry.name!r} has its batch size fixed at {first.dim_value} by the "
                "module's forward: use x.shape[0] there, not len(x) or a number"
            )


def _check(
    module: nn.Module, data: bytes, inputs: tuple[Tensor, ...], tolerance: float, path: Path
) -> float:
    """Largest difference from PyTorch at the sample's batch size, one more, and one."""
    runtime = require("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    worst, size = 0.0, len(inputs[0])
    for count in sorted({size, size + 1, 1}):
        batch = take_rows(inputs, count)
        feed = {name: part.numpy() for name, part in zip(names, batch, strict=True)}
        with torch.no_grad():
            expected = [leaf for leaf in pytree.tree_leaves(module(*batch)) if leaf is not None]
        results = [torch.from_numpy(value) for value in session.run(None, feed)]
        for name, got, want in zip(session.get_outputs(), results, expected, strict=True):
            error = _difference(got, want)
            if not error <= tolerance:  # also catches NaN
                raise OnnxMismatchError(
                    f"{path}: output {name.name!r} differs from PyTorch by {error:g} at batch "
                    f"size {count}, above the tolerance {tolerance:g}; no file was written"
                )
            worst = max(worst, error)
    return worst


def _difference(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())  # equal infinities would give NaN
    return float((got - want).abs().masked_fill(same, 0.0).max()) if got.numel() else 0.0


def _float_ops(proto: Any) -> dict[str, int]:
    """Operators with a floating-point result, so without the arithmetic on shapes."""
    onnx = require("onnx", extra="onnx")
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    types = {
        entry.name: entry.type.tensor_type.elem_type
        for entry in (*inferred.value_info, *inferred.output)
    }
    kinds = onnx.TensorProto
    floats = {kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE}
    counts = Counter(
        node.op_type
        for node in inferred.node
        if any(types.get(name, kinds.FLOAT) in floats for name in node.output if name)
    )
    return dict(sorted(counts.items()))


def _write(path: Path, data: bytes) -> None:
    """Write through a temporary file in the same folder, so that no half file ever shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            temporary.unlink()
            raise
    temporary.replace(path)
