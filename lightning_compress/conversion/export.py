"""Export to ONNX, checked against PyTorch under ONNX Runtime."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.conversion.checks import (
    OnnxMismatchError,
    Parity,
    check_batches,
    check_float,
    check_int8,
)
from lightning_compress.conversion.int8 import RUNTIMES, int8_model
from lightning_compress.conversion.program import onnx_program, plain_copy
from lightning_compress.conversion.session import executed_ops, session_options
from lightning_compress.errors import require
from lightning_compress.files import write_atomically
from lightning_compress.lcz.lost_grids import lost_grids
from lightning_compress.sample_inputs import as_inputs

__all__ = [
    "OnnxInfo",
    "OnnxMismatchError",
    "export_onnx",
    "refuse_unsupported",
]
INT8 = "an int8 file is made from float32"
BFLOAT16 = "ONNX Runtime's CPU kernels lack it"


def refuse_unsupported(module: nn.Module, inputs: tuple[Tensor, ...], *, int8: bool) -> None:
    """Check numbers and layers.

    Args:
        module: to be exported.
        inputs: of the module.
        int8: whether weights and activations are to be whole numbers, in steps of float32.

    Raises:
        ValueError: for bfloat16, which ONNX Runtime's CPU kernels lack; with `int8` for any other
            numbers than float32; for an LSTM with a projection, which ONNX has no operator for.

    >>> double = nn.Linear(2, 2).double()
    >>> refuse_unsupported(double, (torch.zeros(1, 2),), int8=True)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: parameter 'weight' is torch.float64, an int8 file is made from float32: ...
    """
    values = {f"parameter {name!r}": one for name, one in module.named_parameters()}
    values |= {f"input {number}": one for number, one in enumerate(inputs)}
    for what, value in values.items():
        refused = value.dtype != torch.float32 if int8 else value.dtype == torch.bfloat16
        if value.is_floating_point() and refused:
            why = INT8 if int8 else BFLOAT16
            raise ValueError(
                f"{what} is {value.dtype}, {why}: export a copy in float32, module.float(), with "
                "inputs in float32"
            )
    for path, part in module.named_modules():
        if isinstance(part, nn.LSTM) and part.proj_size:
            raise ValueError(
                f"{path or 'the module'} is an LSTM with proj_size={part.proj_size}, which ONNX "
                "has no operator for: train it with proj_size=0"
            )


PROTOBUF_LIMIT = 2**31 - 1
CHECKED_BATCHES = 4  # of the calibration inputs


@dataclass(frozen=True)
class OnnxInfo:
    """An exported file.

    Args:
        path: where it lies.
        bytes: its size.
        max_abs_error: largest difference from PyTorch over all outputs and checked inputs; for an
            int8 file, from the fake-quantized module.
        inputs: their names, in order.
        outputs: their names, in order.
        float_ops: operators that return floats, type -> count; for an int8 file, after ONNX
            Runtime's own rewriting.
        int8_ops: operators that run on whole numbers in ONNX Runtime, type -> count.
        reasons: layer or parameter -> why it stays float or multiplies as float.
        weights: parameter -> the grid it is stored on.
        parity: runtime -> how the differences from the fake-quantized module are distributed.
        session: options that `onnx_session` reads from the file's metadata.
    """

    path: Path
    bytes: int
    max_abs_error: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    float_ops: Mapping[str, int]
    int8_ops: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    parity: Mapping[str, Parity] = field(default_factory=dict)
    session: Mapping[str, str] = field(default_factory=dict)


def export_onnx(
    module: nn.Module,
    path: str | Path,
    sample: Tensor | tuple[Tensor, ...],
    *,
    int8: bool = False,
    calibration: Iterable[Tensor | tuple[Tensor, ...]] | None = None,
    percentile: float = 100.0,
    opset: int | None = None,
    tolerance: float = 1e-4,
    runtime: str = RUNTIMES[0],
) -> OnnxInfo:
    """Write a module as one ONNX file and check it against PyTorch.

    The module is exported in eval mode from a copy and stays as it is. BatchNorm right behind a
    layer is folded into it, parametrizations (spectral_norm, weight_norm) into their weights.

    With `int8`, weights are stored as whole numbers on the grids that training left; a weight
    without one gets 8 bits over its min/max range, unless other weights have grids and there is no
    calibration. Layers with an input grid, trained or calibrated, multiply in int8: transposed
    convolutions as convolutions (for ONNX Runtime also linear layers with many outputs of few
    inputs), and one behind nearest-neighbour upsampling in front of it, where sums of its weights
    fit. Others store whole numbers and multiply as floats, see `OnnxInfo.reasons`. Open such a
    file with `onnx_session`.

    Args:
        module: takes the sample as positional arguments; returns tensors, possibly nested.
        path: of the file; it appears only when the check has passed.
        sample: inputs; axis 0 is the batch and is dynamic in the file.
        int8: store and multiply whole numbers where that can be.
        calibration: for `int8`, inputs that show the range of activations without a grid.
        percentile: share of those activations, in percent, that a range holds at either end.
        opset: ONNX operator set version; None leaves the choice to the exporter (int8: 21).
        tolerance: largest absolute difference from PyTorch, at the sample's and at other batch
            sizes. Where activations are rounded, the measure is one step of the output's grid.
        runtime: "onnxruntime" or "openvino": which one an int8 file is to be fastest in. Both
            run either file; where OpenVINO, if it is installed, cannot and was not asked for, a
            warning says why and `OnnxInfo.parity` leaves it out.

    Raises:
        OnnxMismatchError: when the file's outputs differ by more than `tolerance`, or by more than
            a step.
        ValueError: when the inputs do not share a batch size or the module fixes it, the opset
            cannot be reached, the calibration is empty, not finite or given without `int8`, the
            file would exceed 2 GiB, or numbers or a layer have no place in it (bfloat16; with
            `int8` all but float32; an LSTM with a projection).
        MissingExtraError: when onnx, onnxscript or onnxruntime is not installed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name, extra="onnx")
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime={runtime!r}: valid are {list(RUNTIMES)}")
    if calibration is not None and not int8:
        raise ValueError("calibration is for int8=True: an fp32 file has no ranges to find")
    inputs = tuple(part.detach().cpu() for part in as_inputs(sample))
    plain = plain_copy(module)
    refuse_unsupported(plain, inputs, int8=int8)
    if int8:
        if text := lost_grids(module):
            warnings.warn(f"stored on new grids of 8 bits: {text}", stacklevel=2)
        return _export_int8(
            module,
            plain,
            Path(path),
            inputs,
            opset=opset,
            calibration=calibration,
            percentile=percentile,
            tolerance=tolerance,
            runtime=runtime,
        )
    model = onnx_program(plain, inputs, opset).model
    proto = _proto(model, Path(path))
    data = proto.SerializeToString()
    error = check_float(plain, data, inputs, tolerance, Path(path))
    write_atomically(Path(path), data, what="the ONNX file", parents=True)
    return OnnxInfo(
        **_facts(proto, Path(path), data), max_abs_error=error, float_ops=_float_ops(proto)
    )


def _export_int8(
    module: nn.Module,
    plain: nn.Module,
    path: Path,
    inputs: tuple[Tensor, ...],
    *,
    opset: int | None,
    calibration: Iterable[Tensor | tuple[Tensor, ...]] | None,
    percentile: float,
    tolerance: float,
    runtime: str,
) -> OnnxInfo:
    shown: list[tuple[Tensor, ...]] = []
    if calibration is not None:
        batches = iter(calibration)
        first = list(islice(batches, CHECKED_BATCHES))
        shown, calibration = [as_inputs(one) for one in first], chain(first, batches)
    shown = [*check_batches(inputs), *shown]
    built = int8_model(
        module,
        plain,
        inputs,
        opset=opset,
        calibration=calibration,
        percentile=percentile,
        shown=shown,
        runtime=runtime,
    )
    protos = [_proto(model, path) for model in built.models]
    settings = session_options({entry.key: entry.value for entry in protos[0].metadata_props})
    files = [proto.SerializeToString() for proto in protos]
    parity: dict[str, Parity] = {}
    data = files[0]
    if built.rounds:
        data, parity = check_int8(built, files, settings, shown, path, runtime=runtime)
        error = parity["onnxruntime"].max_abs_error
    else:
        error = check_float(plain, data, inputs, tolerance, path, settings)
    whole, floats = executed_ops(data, settings)
    write_atomically(path, data, what="the ONNX file", parents=True)
    return OnnxInfo(
        **_facts(protos[0], path, data),
        max_abs_error=error,
        float_ops=floats,
        int8_ops=whole,
        reasons=built.reasons,
        weights=built.weights,
        parity=parity,
        session=settings,
    )


def _proto(model: Any, path: Path) -> Any:
    """The model as it is written: checked, small enough, without traces of where it was made."""
    onnx, ir = require("onnx", extra="onnx"), require("onnx_ir", extra="onnx")
    common = require("onnx_ir.passes.common", extra="onnx")
    options = dict(model.metadata_props)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.update({k: v for k, v in options.items() if k.startswith("session.")})
    proto = ir.to_proto(model)
    if proto.ByteSize() > PROTOBUF_LIMIT:
        raise ValueError(f"{path} would take {proto.ByteSize()} bytes; a single file ends at 2 GiB")
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _facts(proto: Any, path: Path, data: bytes) -> dict[str, Any]:
    return {
        "path": path,
        "bytes": len(data),
        "inputs": tuple(entry.name for entry in proto.graph.input),
        "outputs": tuple(entry.name for entry in proto.graph.output),
    }


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
