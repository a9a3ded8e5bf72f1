"""Files for phones: ExecuTorch, Core ML and LiteRT, each checked by running where it can run."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.conversion.checks import MOST_BEYOND, TOLERANCE, Parity, compare
from lightning_compress.conversion.program import plain_copy
from lightning_compress.conversion.quantized_program import quantized_program
from lightning_compress.conversion.signature import output_tensors, signature_of
from lightning_compress.errors import require
from lightning_compress.files import write_atomically
from lightning_compress.state import compression_state
from lightning_compress.terminal import html_table

__all__ = ["MobileInfo", "MobileMismatchError", "export_mobile"]

LEVELS = 255  # steps of an output: its range in as many parts
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class MobileMismatchError(ValueError):
    """A mobile file that does not compute what the program computes."""


@dataclass(frozen=True)
class MobileInfo:
    """A file for phones.

    Args:
        path: where it lies.
        bytes: its size; of a Core ML package, of all files in it.
        runtime: "executorch", "coreml" or "litert".
        quantized: whether it computes on the trained grids.
        parity: how outputs differ from the program's, in 255th parts of their range; None where
            the runtime cannot run here (Core ML outside macOS).
    """

    path: Path
    bytes: int
    runtime: str
    quantized: bool
    parity: Parity | None

    def _repr_html_(self) -> str:
        rows = [("bytes", self.bytes), ("runtime", self.runtime), ("quantized", self.quantized)]
        checked = "" if self.parity is None else self.parity._repr_html_()
        return html_table(self.path.name, ("", ""), rows) + checked


def export_mobile(
    module: nn.Module, path: str | Path, sample: Any, *, tolerance: float | None = None
) -> MobileInfo:
    """Write a module as a file for phones, run it where it can run here, and compare.

    A `.pte` file is for ExecuTorch with XNNPACK, an `.mlpackage` for Core ML (iOS 17, float32
    arithmetic), both on the trained grids of `quantized_program`; without grids they compute in
    float. A `.tflite` file for LiteRT always does, with the trained weights: its converter reads no
    integers with a step a channel.

    Args:
        module: as for `quantized_program`, with or without grids.
        path: its suffix says which file it is.
        sample: as for `quantized_program`; the file has the sample's shapes.
        tolerance: largest absolute difference of an output from the program's. None: of a
            quantized file 1 % of the numbers a product may be off by more than a 255th part of the
            range, where a rounding fell the other way; of a float one 1e-4.

    Raises:
        MobileMismatchError: when the runtime's outputs differ by more; no file is written.
        MissingExtraError: when the converter is not installed.
        ValueError: for another suffix, a tolerance below 0, or what `quantized_program` refuses.
        OSError: when the file cannot be written.
    """
    target = Path(path)
    if target.suffix not in _WRITERS:
        raise ValueError(f"path={str(path)!r}: valid suffixes are {sorted(_WRITERS)}")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance!r} must be 0 or more")
    runtime, packages, write = _WRITERS[target.suffix]
    for package in packages:
        require(package, extra=runtime)
    state = compression_state(module, masks=False)
    quantized = runtime != "litert" and bool(state.grids or state.activations)
    plain = plain_copy(module)
    signature, leaves = signature_of(plain, sample)
    arguments = signature.rebuilt(tuple(one.detach().cpu() for one in leaves))
    computed = quantized_program(module, sample).module() if quantized else plain
    with torch.no_grad():
        expected = output_tensors(computed(*arguments[0], **arguments[1]))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        with _quiet():
            run = write(computed, arguments, made)
        parity = None if run is None else _compared(run, expected)
        if parity is not None:
            _check(parity, computed, target, tolerance, quantized=quantized)
        _move(made, target)
    return MobileInfo(target, _size(target), runtime, quantized, parity)


def _move(made: Path, target: Path) -> None:
    if made.is_dir():
        if target.is_dir():
            shutil.rmtree(target)
        made.rename(target)
    else:
        write_atomically(target, made.read_bytes(), what="the mobile file")


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(one.stat().st_size for one in files if one.is_file())


def _compared(run: Callable[[], Sequence[NDArray]], expected: Sequence[Tensor]) -> Parity:
    steps = [max(float(one.max() - one.min()), 1e-12) / LEVELS for one in expected]
    return compare(lambda _: run(), [()], [expected], steps)


def _check(
    parity: Parity, program: nn.Module, path: Path, tolerance: float | None, *, quantized: bool
) -> None:
    if not parity.elements:
        raise MobileMismatchError(f"{path}: the outputs hold no numbers to compare")
    if tolerance is None and quantized:
        products = sum(
            node.op == "call_function" and str(node.target).startswith(("aten.linear", "aten.conv"))
            for node in program.graph.nodes  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
        )
        wrong = parity.more > MOST_BEYOND * max(1, products)
    else:
        wrong = not parity.max_abs_error <= (TOLERANCE if tolerance is None else tolerance)
    if wrong:
        raise MobileMismatchError(
            f"{path}: outputs differ from the program's by up to {parity.max_abs_error:.3g}, and "
            f"{parity.more:.2%} of the numbers by more than a 255th part of the range: the "
            "runtime computes something else; give tolerance= where that is good enough"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the converters' progress bars, logs and warnings of their own."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _write_executorch(computed: nn.Module, arguments: Arguments, path: Path) -> Any:
    exir = require("executorch.exir", extra="executorch")
    xnnpack = require(
        "executorch.backends.xnnpack.partition.xnnpack_partitioner", extra="executorch"
    )
    require("executorch.kernels.quantized", extra="executorch")  # its operators, into the runtime
    with torch.no_grad():
        program = torch.export.export(computed, *arguments, strict=False)
    lowered = exir.to_edge_transform_and_lower(
        program, partitioner=[xnnpack.XnnpackPartitioner()]
    ).to_executorch()
    path.write_bytes(lowered.buffer)
    data = lowered.buffer

    def run() -> list[NDArray]:
        return [one.numpy() for one in executorch_outputs(data, pytree.tree_leaves(arguments))]

    return run


def executorch_outputs(file: bytes | str | Path, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The outputs of a `.pte` file under ExecuTorch's own runtime."""
    return executorch_method(file).execute(list(inputs))


def executorch_method(file: bytes | str | Path) -> Any:
    """The loaded forward of a `.pte` file."""
    require("executorch.kernels.quantized", extra="executorch")
    runtime = require("executorch.runtime", extra="executorch").Runtime.get()
    return runtime.load_program(file).load_method("forward")


def _write_coreml(computed: nn.Module, arguments: Arguments, path: Path) -> Any:
    tools = require("coremltools", extra="coreml")
    with torch.no_grad():
        program = torch.export.export(computed, *arguments, strict=False).run_decompositions({})
    model = tools.convert(
        program,
        minimum_deployment_target=tools.target.iOS17,
        compute_precision=tools.precision.FLOAT32,  # half a number has too few digits for a grid
    )
    model.save(str(path))
    if sys.platform != "darwin":
        return None
    description = model.get_spec().description
    names = [one.name for one in description.input]
    given = {
        name: one.numpy() for name, one in zip(names, pytree.tree_leaves(arguments), strict=True)
    }

    def run() -> list[NDArray]:
        found = model.predict(given)
        return [np.asarray(found[one.name]) for one in description.output]

    return run


def _write_litert(computed: nn.Module, arguments: Arguments, path: Path) -> Any:
    litert = require("litert_torch", extra="litert")
    edge = litert.convert(computed, *arguments)
    edge.export(str(path))
    args, kwargs = arguments

    def run() -> list[NDArray]:
        return [np.asarray(one) for one in pytree.tree_leaves(edge(*args, **kwargs))]

    return run


_WRITERS: dict[str, tuple[str, tuple[str, ...], Callable[[nn.Module, Arguments, Path], Any]]] = {
    ".pte": ("executorch", ("executorch", "torchao"), _write_executorch),
    ".mlpackage": ("coreml", ("coremltools",), _write_coreml),
    ".tflite": ("litert", ("litert_torch",), _write_litert),
}
