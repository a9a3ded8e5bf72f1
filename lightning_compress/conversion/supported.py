"""What no ONNX file holds: refused by name before the exporter fails on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["refuse_unsupported"]

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
