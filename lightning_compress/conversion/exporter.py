"""PyTorch's ONNX exporter, with a dynamic batch and nothing silently different."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.conversion.inputs import take_rows

__all__ = ["onnx_program"]

# What the exporter says of its own workings; everything else still reaches the user.
EXPORTER_WARNINGS = (
    ".*_check_is_size will be removed",  # its own use of an old check
    r"The tensor attributes? .*_flat_weights",  # recurrent layers list their weights anew
    "# The axis name: batch.* will not be used",  # all inputs share one batch axis, as meant
)


def onnx_program(
    module: nn.Module, inputs: tuple[Tensor, ...], opset: int | None, *, optimize: bool = True
) -> Any:
    """The exported program; the exporter would bake in a batch size of 1, so it gets 2 or more.

    Raises:
        ValueError: when the opset cannot be reached or the module fixes its batch size.
    """
    with _exporter_warnings_ignored(), torch.no_grad():
        program = torch.onnx.export(
            module,
            take_rows(inputs, max(2, len(inputs[0]))),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            optimize=optimize,
            dynamic_shapes=_dynamic_batch(module, len(inputs)),
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    _check_request(program.model, opset)
    return program


def _dynamic_batch(module: nn.Module, count: int) -> tuple[Any, ...]:
    """One batch axis for `count` inputs; those that `*inputs` takes in stand in a tuple."""
    axes = ({0: torch.export.Dim("batch", min=1)},) * count
    return tuple(inspect.signature(module.forward).bind(*axes).arguments.values())


@contextmanager
def _exporter_warnings_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in EXPORTER_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


def _check_request(model: Any, opset: int | None) -> None:
    """The exporter may give another opset or a fixed batch size without an error."""
    actual = model.opset_imports[""]
    if opset not in (None, actual):
        raise ValueError(f"opset {opset} cannot be reached, the exporter stays at opset {actual}")
    for entry in model.graph.inputs:
        if isinstance(entry.shape[0], int):
            raise ValueError(
                f"input {entry.name!r} has its batch size fixed at {entry.shape[0]} by the "
                "module's forward: use x.shape[0] there, not len(x) or a number"
            )
