"""Arithmetic of real with complex tensors, as the ONNX exporter can follow it.

The exporter writes a complex tensor as pairs of real numbers. It knows sums and products of two
such tensors, but neither `real * complex` nor complex numbers of Python (`1j * y`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["ComplexOperands"]
_BINARY = frozenset(
    """
    __add__ __div__ __iadd__ __imul__ __isub__ __itruediv__ __mul__ __radd__ __rdiv__ __rmul__
    __rsub__ __rtruediv__ __sub__ __truediv__ add div divide mul multiply rsub sub subtract
    true_divide
    """.split()  # noqa: SIM905
)


class ComplexOperands(TorchFunctionMode):
    """Makes both operands of complex arithmetic complex tensors.

    >>> with ComplexOperands():
    ...     torch.ones(2) + 1j * torch.ones(2)
    tensor([1.+1.j, 1.+1.j])
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function, on complex operands where one of two is complex."""
        if len(args) > 1 and getattr(func, "__name__", "") in _BINARY:
            pair = args[:2]
            if any(map(_is_complex, pair)):
                dtype = torch.result_type(*pair).to_real()
                args = (*(_as_complex(one, dtype) for one in pair), *args[2:])
        return func(*args, **(kwargs or {}))


def _is_complex(value: Any) -> bool:
    return value.is_complex() if isinstance(value, Tensor) else isinstance(value, complex)


def _as_complex(value: Any, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        value = complex(value)
        parts = (torch.tensor(one, dtype=dtype) for one in (value.real, value.imag))
        return torch.complex(*parts)
    if value.is_complex():
        return value
    return torch.complex(value.to(dtype), torch.zeros_like(value, dtype=dtype))
