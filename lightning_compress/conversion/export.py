"""Export to ONNX, checked against PyTorch under ONNX Runtime."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.conversion.axes import Axes, axes_of
from lightning_compress.conversion.checks import (
    OnnxMismatchError,
    Parity,
    check_batches,
    check_float,
    check_int8,
)
from lightning_compress.conversion.int8 import RUNTIMES, int8_model
from lightning_compress.conversion.naming import check_names, rename
from lightning_compress.conversion.program import onnx_program, plain_copy, with_next_sizes
from lightning_compress.conversion.session import executed_ops, session_options
from lightning_compress.conversion.signature import Signature, over_tensors, signature_of
from lightning_compress.conversion.versions import RuntimeTarget, runtime_target
from lightning_compress.errors import check_choice, require
from lightning_compress.files import write_atomically
from lightning_compress.lcz.lost_grids import lost_grids
from lightning_compress.terminal import html_table

__all__ = [
    "OnnxInfo",
    "OnnxMismatchError",
    "export_onnx",
    "refuse_unsupported",
]
INT8 = "an int8 file is made from float32"
BFLOAT16 = "ONNX Runtime's CPU kernels lack it"
PROTOBUF_LIMIT = 2**31 - 1
CHECKED_BATCHES = 4  # of the calibration inputs
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def refuse_unsupported(module: nn.Module, inputs: tuple[Tensor, ...], *, int8: bool) -> None:
    """Check numbers and layers.

    Args:
        module: to be exported.
        inputs: of the module.
        int8: whether weights and activations are to be integers, in steps of float32.

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
        int8_ops: operators that run on integers in ONNX Runtime, type -> count.
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

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [
            ("bytes", self.bytes),
            ("inputs", ", ".join(self.inputs)),
            ("outputs", ", ".join(self.outputs)),
            ("operators on integers", _counted(self.int8_ops)),
            ("operators in floating point", _counted(self.float_ops)),
            ("largest difference from PyTorch", f"{self.max_abs_error:.3g}"),
            *((f"stays in floating point: {name}", why) for name, why in self.reasons.items()),
        ]
        parity = "".join(one._repr_html_(f", in {name}") for name, one in self.parity.items())
        return html_table(self.path.name, ("", ""), rows) + parity


def _counted(operators: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in operators.items())


def export_onnx(
    module: nn.Module,
    path: str | Path,
    sample: Any,
    *,
    int8: bool = False,
    calibration: Iterable[Any] | None = None,
    percentile: float = 100.0,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    batch: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dtype: str | None = None,
    tolerance: float | None = None,
    opset: int | None = None,
    for_onnxruntime: str | None = None,
    runtime: str = RUNTIMES[0],
) -> OnnxInfo:
    """Write a module as one ONNX file and check it against PyTorch.

    The module is exported in eval mode from a copy and stays as it is. BatchNorm right behind a
    layer is folded into it, parametrizations (spectral_norm, weight_norm) into their weights.

    With `int8`, weights are stored as integers on the grids that training left; a weight
    without one gets 8 bits over its min/max range, unless other weights have grids and there is no
    calibration. Layers with an input grid, trained or calibrated, multiply in int8: transposed
    convolutions as convolutions (for ONNX Runtime also linear layers with many outputs of few
    inputs), and one behind nearest-neighbour upsampling in front of it, where sums of its weights
    fit. Others store integers and multiply as floats, see `OnnxInfo.reasons`; a warning
    counts those that need not. Of a module after `quantize_dynamic`, products round what they
    read as they run. Open such a file with `onnx_session`.

    Args:
        module: gives tensors, or tuples, dicts, dataclasses or distributions of them; the file's
            outputs have their keys and fields as names.
        path: of the file; it appears only when the check has passed.
        sample: a tensor, a tuple of arguments, a dict of keyword arguments, or a tuple that ends
            with one; an argument may be a dict of tensors. Axis 0 is the batch and is dynamic in
            the file; tensors without axes have none.
        int8: store and multiply integers where that can be.
        calibration: for `int8`, inputs that show the range of activations without a grid.
        percentile: share of those activations, in percent, that a range holds at either end.
        dynamic: input -> axis -> name, of further axes that may have any size; checked at a second
            size. `{"table": {}}` says that axis 0 of this input is no batch.
        batch: the batch size that the file is to have; None: any.
        input_names: in place of the names of forward's parameters.
        output_names: in place of keys, fields and the exporter's own names.
        dtype: "float32" or "float16": what the file computes in; None: what the module does.
        tolerance: largest absolute difference from PyTorch, at the sample's and at other batch
            sizes; None: 1e-4, in float16 1 % of the largest output. Where activations are
            rounded, the measure is a step of the output's grid, and what lies within a given
            tolerance is right in any case.
        opset: ONNX operator set version; None leaves the choice to the exporter (int8: 21). Below
            21 weights of 2 to 4 bits take a byte each.
        for_onnxruntime: the oldest ONNX Runtime that has to read the file, such as "1.17": its
            opset, its IR version, and int4 only where it runs (from 1.23 on).
        runtime: "onnxruntime" or "openvino": which one an int8 file is to be fastest in. Both
            run either file; where OpenVINO, if it is installed, cannot and was not asked for, a
            warning says why and `OnnxInfo.parity` leaves it out.

    Raises:
        OnnxMismatchError: when the file's outputs differ by more than `tolerance`, or by more than
            a step, or there is nothing to compare.
        ValueError: when the inputs do not share a batch size or the module fixes it, draws random
            numbers or cannot be followed, the opset cannot be reached, the calibration is empty,
            not finite or given without `int8`, the file would exceed 2 GiB, or numbers or a layer
            have no place in it (bfloat16; with `int8` all but float32; an LSTM with a projection).
        MissingExtraError: when onnx, onnxscript or onnxruntime is not installed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name, extra="onnx")
    check_choice("runtime", runtime, RUNTIMES)
    if calibration is not None and not int8:
        raise ValueError("calibration is for int8=True: an fp32 file has no ranges to find")
    if isinstance(calibration, Tensor):
        raise ValueError("calibration is one tensor: give a list of inputs, [tensor]")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance!r} must be 0 or more")
    target = runtime_target(for_onnxruntime, opset, int8=int8)
    plain = plain_copy(module)
    signature, leaves = signature_of(plain, sample)
    inputs = tuple(part.detach().cpu() for part in leaves)
    check_names("input_names", input_names, len(inputs))
    plain, inputs = _in_dtype(plain, inputs, dtype, int8=int8)
    refuse_unsupported(plain, inputs, int8=int8)
    axes = axes_of(signature.names, inputs, dynamic, batch)
    names = over_tensors(plain, signature, inputs)
    axes = with_next_sizes(plain, inputs, axes)
    check_names("output_names", output_names, len(names) if names else len(output_names or ()))
    given = tuple(input_names or signature.names)
    if both := set(given) & set(output_names or ()):
        raise ValueError(f"output_names: {sorted(both)} are names of inputs already")
    job = _Job(
        Path(path),
        inputs,
        axes,
        given,
        # An output with the key of an input needs a name of its own in a graph.
        tuple(output_names or (f"{one}_out" if one in given else one for one in names)),
        target,
        tolerance,
    )
    if int8:
        if text := lost_grids(module):
            warnings.warn(f"stored on new grids of 8 bits: {text}", stacklevel=2)
        batches = None if calibration is None else _tensors_of(calibration, signature, module)
        return _export_int8(
            module, plain, job, calibration=batches, percentile=percentile, runtime=runtime
        )
    program, axes = onnx_program(plain, inputs, target.opset, axes)
    proto = _proto(program.model, replace(job, axes=axes))
    data = proto.SerializeToString()
    error = check_float(plain, data, axes.batches(inputs), tolerance, job.path)
    write_atomically(job.path, data, what="the ONNX file", parents=True)
    return OnnxInfo(
        **_facts(proto, job.path, data), max_abs_error=error, float_ops=_float_ops(proto)
    )


@dataclass(frozen=True)
class _Job:
    """Settings of an export."""

    path: Path
    inputs: tuple[Tensor, ...]
    axes: Axes
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    target: RuntimeTarget
    tolerance: float | None


def _in_dtype(
    plain: nn.Module, inputs: tuple[Tensor, ...], dtype: str | None, *, int8: bool
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    if dtype is None:
        return plain, inputs
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: valid are {list(DTYPES)}, or None as the module is")
    if int8 and dtype != "float32":
        raise ValueError(f"dtype={dtype!r}: int8=True computes in integers and float32")
    to = DTYPES[dtype]
    return plain.to(to), tuple(one.to(to) if one.is_floating_point() else one for one in inputs)


def _tensors_of(
    calibration: Iterable[Any], signature: Signature, module: nn.Module
) -> Iterator[tuple[Tensor, ...]]:
    for one in calibration:
        found = tuple(one) if isinstance(one, list) else one
        yield tuple(part.detach().cpu() for part in signature.flat(found, module))


def _export_int8(
    module: nn.Module,
    plain: nn.Module,
    job: _Job,
    *,
    calibration: Iterable[tuple[Tensor, ...]] | None,
    percentile: float,
    runtime: str,
) -> OnnxInfo:
    inputs, path = job.inputs, job.path
    shown: list[tuple[Tensor, ...]] = []
    if calibration is not None:
        batches = iter(calibration)
        first = list(islice(batches, CHECKED_BATCHES))
        shown, calibration = first, chain(first, batches)
    shown = [*check_batches(inputs, job.axes), *shown]
    built = int8_model(
        module,
        plain,
        inputs,
        job.axes,
        target=job.target,
        calibration=calibration,
        percentile=percentile,
        shown=shown,
        runtime=runtime,
    )
    job = replace(job, axes=built.axes)
    shown = [*check_batches(inputs, job.axes), *shown[-CHECKED_BATCHES:]]
    protos = [_proto(model, job) for model in built.models]
    settings = session_options({entry.key: entry.value for entry in protos[0].metadata_props})
    files = [proto.SerializeToString() for proto in protos]
    parity: dict[str, Parity] = {}
    data = files[0]
    if built.rounds:
        data, parity = check_int8(
            built, files, settings, shown, path, runtime=runtime, tolerance=job.tolerance
        )
        error = parity["onnxruntime"].max_abs_error
    else:
        error = check_float(plain, data, job.axes.batches(inputs), job.tolerance, path, settings)
    executed = executed_ops(data, settings)
    built.explain(executed)
    write_atomically(path, data, what="the ONNX file", parents=True)
    if built.warning:
        warnings.warn(f"{path}: {built.warning}", stacklevel=3)
    return OnnxInfo(
        **_facts(protos[0], path, data),
        max_abs_error=error,
        float_ops=executed.floats,
        int8_ops=executed.whole,
        reasons=built.reasons,
        weights=built.weights,
        parity=parity,
        session=settings,
    )


def _proto(model: Any, job: _Job) -> Any:
    """The model as it is written: checked, small enough, without traces of where it was made."""
    onnx, ir = require("onnx", extra="onnx"), require("onnx_ir", extra="onnx")
    common = require("onnx_ir.passes.common", extra="onnx")
    options = dict(model.metadata_props)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.update({k: v for k, v in options.items() if k.startswith("session.")})
    proto = ir.to_proto(model)
    if proto.ByteSize() > PROTOBUF_LIMIT:
        size = proto.ByteSize()
        raise ValueError(f"{job.path} would take {size} bytes; a single file holds at most 2 GiB")
    proto = _in_version(proto, job.target)
    _drop_known_shapes(proto.graph)
    check_names("output_names", job.output_names or None, len(proto.graph.output))
    rename(
        proto, job.input_names, job.output_names or [""] * len(proto.graph.output), job.axes.free
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _drop_known_shapes(graph: Any) -> None:
    """Initializers say their shapes themselves; said twice, they are a third of a small graph."""
    known = {one.name for one in graph.initializer}
    kept = [one for one in graph.value_info if one.name not in known]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _in_version(proto: Any, target: RuntimeTarget) -> Any:
    """The model in an older opset, and marked as of an older format, where one is given."""
    onnx = require("onnx", extra="onnx")
    actual = next(one.version for one in proto.opset_import if one.domain == "")
    if target.opset is not None and target.opset < actual:
        try:
            proto = onnx.version_converter.convert_version(proto, target.opset)
        except Exception as error:
            reason = str(error).splitlines()[0].rpartition("failed: ")[2]
            raise ValueError(
                f"opset {target.opset} cannot be reached from opset {actual}: {reason}"
            ) from error
    if target.ir is not None:
        proto.ir_version = min(proto.ir_version, target.ir)
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
