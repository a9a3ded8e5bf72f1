"""PyTorch's ONNX exporter, with free axes and nothing silently different."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm

from lightning_compress.conversion.axes import Axes
from lightning_compress.conversion.blame import explained, user_line
from lightning_compress.conversion.complex_values import ComplexOperands
from lightning_compress.copies import copy_module

__all__ = [
    "onnx_program",
    "plain_copy",
    "with_next_sizes",
    "without_argument_checks",
]

# What the exporter says of its own workings; everything else still reaches the user.
EXPORTER_WARNINGS = (
    ".*_check_is_size will be removed",  # its own use of an old check
    r"The tensor attributes? .*_flat_weights",  # recurrent layers list their weights anew
    "# The axis name: .* will not be used",  # all inputs share one batch axis, as meant
)
DRAWS = ("Bernoulli", "Multinomial", "RandomNormal", "RandomUniform")
STEPS = (1, 2, 4, 8, 16, 32, 64)
FACTOR = re.compile(r"^\s*(\w+) = (\d+)\*_", re.MULTILINE)
CONSTANT = re.compile(r"^\s*(\w+) = \d+\s*$", re.MULTILINE)


def onnx_program(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    opset: int | None,
    axes: Axes,
    *,
    optimize: bool = True,
) -> tuple[Any, Axes]:
    """The exported program, and the axes with what their sizes are multiples of.

    The exporter would bake in a free batch size of 1, so it gets 2 or more.

    Raises:
        ValueError: when the opset cannot be reached, the module fixes a free size, draws random
            numbers or cannot be followed.
    """
    rows = axes.rows(inputs, axes.fixed or max(2, axes.count(inputs)))
    _check_runs(module, rows, inputs, axes)
    shapes = _shapes(module, axes, rows)
    with _quiet(), torch.no_grad(), without_argument_checks():
        try:
            program = _exported(module, rows, opset, shapes, optimize=optimize)
        except Exception as error:
            found = {name: int(factor) for name, factor in FACTOR.findall(str(error))}
            if not found or CONSTANT.search(str(error)):
                raise _why(error) from error
            axes = axes.with_steps(found)
            shapes = refine_dynamic_shapes_from_suggested_fixes(str(error), shapes)
            try:
                program = _exported(module, rows, opset, shapes, optimize=optimize)
            except Exception as second:
                raise _why(second) from second
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    _check_request(program.model, opset, axes)
    _check_draws(program.model)
    return program, with_next_sizes(module, rows, axes)


def with_next_sizes(module: nn.Module, rows: tuple[Tensor, ...], axes: Axes) -> Axes:
    """The axes with steps to sizes that the module itself takes, to check the file there."""
    for step in STEPS if axes.named() else ():
        steps = {name: max(step, (axes.steps or {}).get(name, 1)) for name in axes.named()}
        larger = axes.with_steps(steps)
        try:
            with torch.no_grad():
                module(*larger.resized(rows))
        except Exception:  # a size that forward refuses: the next may do
            continue
        return larger
    return axes


def _exported(
    module: nn.Module, rows: tuple[Tensor, ...], opset: int | None, shapes: Any, *, optimize: bool
) -> Any:
    with ComplexOperands():
        return torch.onnx.export(
            module,
            rows,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            optimize=optimize,
            dynamic_shapes=shapes,
        )


def _why(error: Exception) -> Exception:
    return explained(error, batch=", or fix the batch with batch=1")


def _check_runs(
    module: nn.Module, rows: tuple[Tensor, ...], inputs: tuple[Tensor, ...], axes: Axes
) -> None:
    """The module on what the exporter gets: an error here names the user's own line."""
    try:
        with torch.no_grad(), _seeded():
            module(*rows)
    except Exception as error:
        if axes.fixed is not None or axes.count(rows) == 1:
            raise
        try:
            with torch.no_grad(), _seeded():
                module(*axes.rows(inputs, 1))
        except Exception:
            raise error from None
        line = user_line(error)
        raise ValueError(
            f"{line}: forward takes a batch of 1, and fails at {axes.count(rows)} "
            f"({str(error).splitlines()[0]}): a size is fixed there, as by view(1, ...); use "
            "x.view(len(x), ...) or x.flatten(1), or export with batch=1"
        ) from error


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def without_argument_checks() -> Iterator[None]:
    """`torch.distributions` without validation, which looks at values that a trace has not."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _shapes(module: nn.Module, axes: Axes, rows: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Named free axes for all inputs; those that `*inputs` takes in stand in a tuple."""
    dims: dict[str, Any] = {}
    found = []
    for one, free in zip(rows, axes.free, strict=True):
        for axis, name in free.items():
            if one.shape[axis] == 1:
                raise ValueError(
                    f"axis {name!r} has the size 1 in the sample: give one where it is 2 or more, "
                    "the exporter takes a 1 for fixed"
                )
        found.append(
            {
                axis: dims.setdefault(name, torch.export.Dim(name, min=1))
                for axis, name in free.items()
            }
        )
    return tuple(inspect.signature(module.forward).bind(*found).arguments.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own pages of logs: what fails is raised."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        for message in EXPORTER_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        logging.disable(logging.CRITICAL)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                yield
        finally:
            logging.disable(before)


def _check_request(model: Any, opset: int | None, axes: Axes) -> None:
    """The exporter may give another opset or a fixed size without an error."""
    actual = model.opset_imports[""]
    if opset not in (None, actual):
        raise ValueError(f"opset {opset} cannot be reached, the exporter stays at opset {actual}")
    for entry, free in zip(model.graph.inputs, axes.free, strict=True):
        for axis, name in free.items():
            if isinstance(entry.shape[axis], int):
                what = "batch size" if name == "batch" else f"axis {name!r}"
                raise ValueError(
                    f"input {entry.name!r} has its {what} fixed at {entry.shape[axis]} by the "
                    f"module's forward: use x.shape[{axis}] there, not len(x) or a number"
                )


def _check_draws(model: Any) -> None:
    """No file draws as PyTorch does, and none can be checked that draws."""
    drawing = [node for node in model.graph if node.op_type.startswith(DRAWS)]
    if drawing:
        node = drawing[0]
        traced = node.metadata_props.get("pkg.torch.onnx.stack_trace", "")
        line = user_line(RuntimeError(traced))
        raise ValueError(
            f"{line + ': ' if line else ''}forward draws random numbers (node {node.name!r}, "
            f"{node.op_type}): give them as an input, so that the file computes what the module "
            "computes"
        )


def plain_copy(module: nn.Module) -> nn.Module:
    """An eval-mode CPU copy with ordinary, frozen parameters; the module stays as it is.

    spectral_norm, weight_norm and any other parametrization are folded into their weights, in the
    new (`torch.nn.utils.parametrizations`) and in the older form (`torch.nn.utils`).

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> sorted(plain_copy(layer).state_dict())
    ['bias', 'weight']
    """
    plain = copy_module(module).cpu().eval()
    for part in list(plain.modules()):
        _remove_parametrizations(part)
        _remove_old_norms(part)
    return plain.requires_grad_(False)


def _remove_parametrizations(part: nn.Module) -> None:
    if not parametrize.is_parametrized(part):
        return
    # A copy shares its class with the original, and removal deletes the class's property.
    shared = type(part)
    body = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    own = type(shared.__name__, shared.__bases__, body)
    part.__class__ = own  # pyright: ignore[reportAttributeAccessIssue]
    for name in list(part.parametrizations):  # pyright: ignore[reportArgumentType]
        parametrize.remove_parametrizations(part, name)


def _remove_old_norms(part: nn.Module) -> None:
    removers = {"SpectralNorm": remove_spectral_norm, "WeightNorm": remove_weight_norm}
    for hook in list(part._forward_pre_hooks.values()):
        remove = removers.get(type(hook).__name__)
        if remove is not None and type(hook).__module__.startswith("torch.nn.utils"):
            remove(part, hook.name)  # pyright: ignore[reportFunctionMemberAccess]
