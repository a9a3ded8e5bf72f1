"""Parity checks of an ONNX file against its PyTorch module."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.conversion.axes import Axes
from lightning_compress.conversion.int8 import Int8Model
from lightning_compress.conversion.session import make_session
from lightning_compress.copies import copy_module
from lightning_compress.errors import require
from lightning_compress.grids import AffineGrid
from lightning_compress.quantization.fake_quantize import fake_quantized
from lightning_compress.state import activation_grids
from lightning_compress.terminal import html_table

__all__ = [
    "SAME",
    "OnnxMismatchError",
    "Parity",
    "check_batches",
    "check_float",
    "check_int8",
    "compare",
]
SAME = 0.02  # of a step: floats that differ in their last digits
Inputs = tuple[Tensor, ...]
MOST_ROWS = 64
DRAWN_ROWS = 32
PRODUCTS_PER_STEP = 2
MOST_BEYOND = 0.01  # share of numbers beyond a step, for each product
MOST_CUT_OFF = 0.001
RUNS_ALL = "1.27"  # the first ONNX Runtime with weights of several zero points
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
TOLERANCE = 1e-4
HALF = 0.01  # of the largest output: what float16 explains
USUAL = 98  # percent of the numbers that move by no more count
LEVELS = 255  # steps of an output that is not rounded itself: its range in as many parts


@dataclass(frozen=True)
class Parity:
    """Differences of single numbers, over all outputs and checked inputs.

    Args:
        equal: share that agree up to float rounding.
        one_step: share that differ by up to one step.
        more: share that differ by more.
        largest: largest difference, in steps.
        max_abs_error: the same in the output's own unit.
        elements: how many numbers were compared.
    """

    equal: float
    one_step: float
    more: float
    largest: float
    max_abs_error: float
    elements: int

    def _repr_html_(self, where: str = "") -> str:
        rows: list[tuple[str, object]] = [
            ("equal", f"{self.equal:.4%}"),
            ("one step apart", f"{self.one_step:.4%}"),
            ("further apart", f"{self.more:.4%}"),
            ("largest difference, in steps", f"{self.largest:.3g}"),
            ("largest difference", f"{self.max_abs_error:.3g}"),
            ("numbers compared", self.elements),
        ]
        return html_table(f"Parity with PyTorch{where}", ("", ""), rows)


def compare(
    run: Callable[[tuple[torch.Tensor, ...]], Sequence[NDArray]],
    batches: Sequence[tuple[torch.Tensor, ...]],
    expected: Sequence[Sequence[torch.Tensor]],
    steps: Sequence[float],
) -> Parity:
    """Compare a runtime's outputs with the expected ones.

    Args:
        run: inputs -> outputs.
        batches: inputs.
        expected: outputs of each batch.
        steps: the step of each output.
    """
    counts, largest, error = np.zeros(3, np.int64), 0.0, 0.0
    for batch, wanted in zip(batches, expected, strict=True):
        for got, want, step in zip(run(batch), wanted, steps, strict=True):
            if tuple(got.shape) != tuple(want.shape):
                return Parity(0.0, 0.0, 1.0, float("inf"), float("inf"), want.numel())
            value, aim = got.astype(np.float64), want.double().numpy()
            same = (value == aim) | (np.isnan(value) & np.isnan(aim))
            with np.errstate(invalid="ignore"):
                apart = np.where(same, 0.0, np.abs(value - aim))
            apart = np.where(np.isnan(apart), np.inf, apart)
            away = apart / step
            counts += [(away <= SAME).sum(), ((away > SAME) & (away <= 1 + SAME)).sum(), 0]
            counts[2] += (away > 1 + SAME).sum()
            largest = max(largest, float(away.max(initial=0)))
            error = max(error, float(apart.max(initial=0)))
    shares = counts / max(1, counts.sum())
    equal, one, more = (float(share) for share in shares)
    return Parity(equal, one, more, largest, error, int(counts.sum()))


class OnnxMismatchError(ValueError):
    """An exported file that does not compute what the PyTorch module computes."""


@contextlib.contextmanager
def _naming_version(path: Path) -> Iterator[None]:
    """Say which ONNX Runtime it is that lacks a kernel."""
    runtime = require("onnxruntime", extra="onnx")
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime."):
            raise
        reason = " ".join(str(error).split())
        raise RuntimeError(
            f"{path}: onnxruntime {runtime.__version__} cannot run the file, so that none was "
            f"written ({reason}); from {RUNS_ALL} on it runs all that export_onnx writes"
        ) from error


def outputs_of(module: nn.Module, batch: Inputs) -> list[Tensor]:
    """A module's output tensors, in the order that a file lists them."""
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(module(*batch)) if leaf is not None]


def check_float(
    module: nn.Module,
    data: bytes,
    batches: Sequence[Inputs],
    tolerance: float | None,
    path: Path,
    settings: Mapping[str, str] | None = None,
) -> float:
    """Largest difference from PyTorch over some inputs, which stand at several sizes.

    A module in float16 is compared as one in float32 with the same numbers.

    Raises:
        OnnxMismatchError: when it is above `tolerance`, a shape differs, or there is nothing to
            compare.
        RuntimeError: when the installed ONNX Runtime is too old for the file.
    """
    with _naming_version(path):
        session = make_session(data, settings or {})
    half = any(one.dtype == torch.float16 for one in (*module.parameters(), *batches[0]))
    worst, elements = 0.0, 0
    reference = copy_module(module).float() if half else module
    for batch in batches:
        with _naming_version(path):
            values = session.run(None, _feed(session, batch))
        results = [torch.from_numpy(value) for value in values]
        wide = tuple(one.float() if one.dtype == torch.float16 else one for one in batch)
        expected = outputs_of(reference, wide)
        allowed = _allowed(expected, half=half) if tolerance is None else tolerance
        for name, got, want in zip(session.get_outputs(), results, expected, strict=True):
            error = _difference(got, want)
            if not error <= allowed:  # also catches NaN
                raise OnnxMismatchError(
                    f"{path}: output {name.name!r} differs from PyTorch by {error:g} at "
                    f"{_sizes(batch)}, above the tolerance {allowed:g}; no file was written"
                )
            worst, elements = max(worst, error), elements + want.numel()
    _check_something(elements, path)
    return worst


def _allowed(expected: Sequence[Tensor], *, half: bool) -> float:
    """The default: 1e-4, or in float16 its rounding of the largest output."""
    if not half:
        return TOLERANCE
    finite = [one[one.isfinite()].abs() for one in expected if one.is_floating_point()]
    return HALF * max([1.0, *(float(one.max()) for one in finite if one.numel())])


def _check_something(elements: int, path: Path) -> None:
    if elements == 0:
        raise OnnxMismatchError(
            f"{path}: the outputs hold no numbers for the sample, so that nothing was compared; "
            "no file was written: give a sample that the module answers"
        )


def _sizes(batch: Inputs) -> str:
    shapes = " and ".join(str(tuple(one.shape)) for one in batch)
    return f"batch size {len(batch[0]) if batch[0].dim() else 1}, inputs of shape {shapes}"


def _difference(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())  # equal infinities would give NaN
    return float((got - want).abs().masked_fill(same, 0.0).max()) if got.numel() else 0.0


def _feed(session: Any, batch: Inputs) -> dict[str, NDArray]:
    names = [entry.name for entry in session.get_inputs()]
    return {name: part.numpy() for name, part in zip(names, batch, strict=True)}


def check_batches(inputs: Inputs, axes: Axes) -> list[Inputs]:
    """The sample at its batch size, one more and one, at other sizes, and rows of noise like it.

    A sample is often two rows, too few to meet the larger values: floats are drawn anew from a
    normal distribution of their own mean and spread, within their own range, which is where the
    module answers; other inputs repeat.
    """
    noise = torch.Generator().manual_seed(0)
    drawn = [
        _like(part, noise) if part.is_floating_point() and part.numel() > 1 else part
        for part in axes.rows(inputs, axes.fixed or DRAWN_ROWS)
    ]
    typed = tuple(new.to(old.dtype) for new, old in zip(drawn, inputs, strict=True))
    return [*axes.batches(inputs), typed]


def _like(part: Tensor, noise: torch.Generator) -> Tensor:
    values = part.float()
    known = values[values.isfinite()]
    if known.numel() < 2:
        return part
    drawn = known.mean() + known.std() * torch.randn(part.shape, generator=noise)
    return drawn.clamp(float(known.min()), float(known.max()))


def check_int8(
    built: Int8Model,
    files: Sequence[bytes],
    settings: Mapping[str, str],
    batches: Sequence[Inputs],
    path: Path,
    *,
    runtime: str,
    tolerance: float | None = None,
) -> tuple[bytes, dict[str, Parity]]:
    """The file to write, and how it differs from the fake-quantized module, by runtime.

    The first file is taken unless cut-off sums put more than 1 in 1,000 numbers off by more than
    a step.

    Args:
        built: the model and its module.
        files: the file, and the more careful one if there is one.
        settings: session options that the file asks for.
        batches: inputs, of which up to 64 rows each are checked.
        path: for the message.
        runtime: "openvino" where that has to run the file; else a warning says why it cannot.
        tolerance: differences up to it are right in any case; None: steps alone count.

    Raises:
        OnnxMismatchError: under ONNX Runtime, and under OpenVINO where that has to run the file,
            when more than 1 % of the numbers for each rounding on the way are off by more than a
            step, or one by more than 1 + roundings / 2 steps, or there is nothing to compare. A
            step is that of the last grid, as the output shows it behind what follows the grid.
            int8 kernels round biases to steps of input times weight: now and then an activation
            rounds the other way, which reaches many numbers later. With activations of fewer
            bits, such a step counts as many times more. OpenVINO leaves out the rounding of a
            convolution's output where a sum and another rounding follow.
        RuntimeError: when the installed ONNX Runtime is too old for the file, or a required
            OpenVINO cannot run it.
    """
    axes = built.axes
    batches = batches if axes is None else [axes.at_most(one, MOST_ROWS) for one in batches]
    with fake_quantized(built.plain):
        expected = [outputs_of(built.plain, batch) for batch in batches]
    steps = [
        step or max(_range(one[index] for one in expected) / LEVELS, reach)
        for index, (step, reach) in enumerate(
            zip(built.steps, _reach(built, batches, expected), strict=True)
        )
    ]
    allowed = _allowed_steps(built)

    def tried(data: bytes) -> Parity:
        with _naming_version(path):
            return compare(_onnx_runner(data, settings), batches, expected, steps)

    data, found = files[0], tried(files[0])
    if found.more > MOST_CUT_OFF or found.largest > allowed + SAME:
        data, found = files[-1], tried(files[-1])
    _check_something(found.elements, path)
    _refuse_apart(found, built, path, tolerance, "ONNX Runtime")
    parity = {"onnxruntime": found}
    try:
        if (runner := _openvino_runner(data)) is not None:
            parity["openvino"] = compare(runner, batches, expected, steps)
    except RuntimeError as error:
        reason = f"{path}: OpenVINO cannot run the file ({' '.join(str(error).split())})"
        if runtime == "openvino":
            raise RuntimeError(f"{reason}; none was written") from error
        warnings.warn(f"{reason}; ONNX Runtime can", stacklevel=4)  # the caller of export_onnx
    if runtime == "openvino" and runtime in parity:
        _refuse_apart(parity["openvino"], built, path, tolerance, "OpenVINO")
    return data, parity


def _allowed_steps(built: Int8Model) -> int:
    return (1 + -(-built.roundings // PRODUCTS_PER_STEP)) * built.coarsest


def _refuse_apart(
    found: Parity, built: Int8Model, path: Path, tolerance: float | None, engine: str
) -> None:
    """Refuse a file that computes something else, beyond what its roundings explain."""
    most = min(1.0, MOST_BEYOND * max(1, built.roundings))
    allowed = _allowed_steps(built)
    is_near = tolerance is not None and found.max_abs_error <= tolerance
    if (found.more > most or found.largest > allowed + SAME) and not is_near:
        raise OnnxMismatchError(
            f"{path}: {found.more:.2%} of {found.elements} numbers of {engine} differ from the "
            f"fake-quantized module by more than one step ({most:.0%} allowed), at most by "
            f"{found.largest:.1f} steps ({allowed} allowed), {found.max_abs_error:g} in the "
            f"output's own unit; no file was written{_way_out(built)}. A tolerance= of your own "
            "widens the check"
        )


def _reach(
    built: Int8Model, batches: Sequence[Inputs], expected: Sequence[Sequence[Tensor]]
) -> list[float]:
    """How far each output moves when the last roundings fall the other way, by one step.

    Behind the last grid there may be anything: a softmax times 20, a norm, an exponential.
    """
    last = [
        (layer, grids.output)
        for layer in built.plain.modules()
        if (grids := activation_grids(layer)) is not None and grids.output is not None
    ]
    noise = torch.Generator().manual_seed(1)

    def moved(grid: AffineGrid, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        sign = torch.randint(0, 3, output.shape, generator=noise) - 1
        return output + sign * float(grid.scale.reshape(-1)[0])

    with fake_quantized(built.plain):
        handles = [layer.register_forward_hook(partial(moved, grid)) for layer, grid in last]
        try:
            found = [outputs_of(built.plain, batch) for batch in batches]
        finally:
            for handle in handles:
                handle.remove()
    reach = [0.0] * len(built.steps)
    for one, other in zip(found, expected, strict=True):
        for index, (got, want) in enumerate(zip(one, other, strict=True)):
            away = (got.float() - want.float()).abs()
            away = away[away.isfinite()]
            if away.numel():  # not the largest: a norm of two equal numbers turns a step into all
                known = away.flatten().kthvalue(-(-away.numel() * USUAL // 100)).values
                reach[index] = max(reach[index], float(known))
    return reach


def _way_out(built: Int8Model) -> str:
    """What to do where a norm divides a difference of a step by a spread that is smaller."""
    names = {type(part).__name__ for part in built.plain.modules() if isinstance(part, NORMS)}
    if not names:
        return ""
    return (
        f". {', '.join(sorted(names))}: a norm by the spread of its own input can magnify a step "
        "in front of it. Export without calibration: weights alone are integers then"
    )


def _range(outputs: Any) -> float:
    values = torch.cat([output.flatten().float() for output in outputs])
    values = values[values.isfinite()]
    return max(float(values.max() - values.min()), 1e-6) if values.numel() else 1e-6


def _onnx_runner(data: bytes, settings: Mapping[str, str]) -> Callable[[Inputs], Sequence[NDArray]]:
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
