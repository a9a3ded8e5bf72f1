"""Whether an ONNX file computes what its module computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.conversion.calibration import fake_quantizing
from lightning_compress.conversion.inputs import take_rows
from lightning_compress.conversion.int8 import Int8Model
from lightning_compress.conversion.parity import Parity, compare
from lightning_compress.conversion.runtime import PRECISE, make_session, measures_saturation
from lightning_compress.errors import require

__all__ = ["OnnxMismatchError", "check_float", "check_int8"]

Inputs = tuple[Tensor, ...]
MOST_ROWS = 32
LEVELS = 255  # steps of an output that is not rounded itself: its range in as many parts


class OnnxMismatchError(ValueError):
    """An exported file that does not compute what the PyTorch module computes."""


def outputs_of(module: nn.Module, batch: Inputs) -> list[Tensor]:
    """A module's output tensors, in the order that a file lists them."""
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(module(*batch)) if leaf is not None]


def _sizes(inputs: Inputs) -> list[int]:
    return sorted({len(inputs[0]), len(inputs[0]) + 1, 1})


def check_float(
    module: nn.Module, data: bytes, inputs: Inputs, tolerance: float, path: Path
) -> float:
    """Largest difference from PyTorch at the sample's batch size, one more, and one.

    Raises:
        OnnxMismatchError: when it is above `tolerance`, or a shape differs.
    """
    session = make_session(data, {})
    worst = 0.0
    for count in _sizes(inputs):
        batch = take_rows(inputs, count)
        results = [torch.from_numpy(value) for value in session.run(None, _feed(session, batch))]
        expected = outputs_of(module, batch)
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


def _feed(session: Any, batch: Inputs) -> dict[str, NDArray]:
    names = [entry.name for entry in session.get_inputs()]
    return {name: part.numpy() for name, part in zip(names, batch, strict=True)}


def check_int8(
    built: Int8Model,
    data: bytes,
    settings: dict[str, str],
    inputs: Inputs,
    more: Sequence[Inputs],
    path: Path,
) -> tuple[dict[str, Parity], dict[str, str]]:
    """Compare with the fake-quantized module; (runtime -> differences, session options).

    CPUs without VNNI add products in pairs of 16 bits, which may be cut off: when that shows, the
    options ask for the slower kernels that do not.

    Args:
        built: the model and its module.
        data: the file.
        settings: session options that the file asks for so far.
        inputs: the sample; checked at its batch size, one more, and one.
        more: further inputs, of which up to 32 rows are checked.
        path: for the message.

    Raises:
        OnnxMismatchError: when one number differs by more than a step under ONNX Runtime.
    """
    batches = [take_rows(inputs, count) for count in _sizes(inputs)]
    batches += [take_rows(batch, min(len(batch[0]), MOST_ROWS)) for batch in more]
    with fake_quantizing(built.plain):
        expected = [outputs_of(built.plain, batch) for batch in batches]
    steps = [
        step or _range(one[index] for one in expected) / LEVELS
        for index, step in enumerate(built.steps)
    ]

    def measured(options: dict[str, str]) -> Parity:
        return compare(_onnx_runner(data, options), batches, expected, steps)

    found = measured(settings)
    precise = {**settings, PRECISE: "1"}
    if built.whole and (found.more > 0 or not measures_saturation()):
        careful = measured(precise)
        if careful.more < found.more or not measures_saturation():
            found, settings = careful, precise
    if found.more > 0:
        raise OnnxMismatchError(
            f"{path}: {found.more:.2%} of {found.elements} numbers differ from the fake-quantized "
            f"module by more than one step, at most by {found.largest:.1f}; no file was written"
        )
    parity = {"onnxruntime": found}
    runner = _openvino_runner(data)
    if runner is not None:
        parity["openvino"] = compare(runner, batches, expected, steps)
    return parity, settings


def _range(outputs: Any) -> float:
    values = torch.cat([output.flatten().float() for output in outputs])
    return max(float(values.max() - values.min()), 1e-6)


def _onnx_runner(data: bytes, settings: dict[str, str]) -> Callable[[Inputs], Sequence[NDArray]]:
    session = make_session(data, settings)
    return lambda batch: session.run(None, _feed(session, batch))


def _openvino_runner(data: bytes) -> Callable[[Inputs], Sequence[NDArray]] | None:
    """The file under OpenVINO; None where that is not installed."""
    try:
        openvino = require("openvino", extra="openvino")
    except ImportError:
        return None
    core = openvino.Core()
    hints = {"INFERENCE_PRECISION_HINT": "f32"}  # bfloat16 would differ by itself
    compiled = core.compile_model(core.read_model(data), "CPU", hints)

    def run(batch: Inputs) -> Sequence[NDArray]:
        results = compiled(tuple(part.numpy() for part in batch))
        return [results[output] for output in compiled.outputs]

    return run
