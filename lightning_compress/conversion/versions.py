"""Operator sets and file formats that each ONNX Runtime version reads."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["RuntimeTarget", "runtime_target"]

# First ONNX Runtime, opset, IR version: https://onnxruntime.ai/docs/reference/compatibility.html
TABLE = (
    ((1, 11), 16, 8),
    ((1, 12), 17, 8),
    ((1, 14), 18, 8),
    ((1, 15), 19, 8),
    ((1, 16), 19, 9),
    ((1, 17), 20, 9),
    ((1, 18), 21, 10),
    ((1, 21), 22, 10),
    ((1, 22), 23, 11),
)
FOUR_BITS = (1, 23)  # from here on a Cast from int4 runs
SEVERAL_ZERO_POINTS = (1, 27)  # and the least of two uint8
INT8_OPSET = 21  # the first with 4-bit integers
INT8_OPSET_BEFORE = 20


@dataclass(frozen=True)
class RuntimeTarget:
    """What a file may hold.

    Args:
        opset: the largest; None: the exporter's own choice, for int8 21.
        ir: the largest IR version; None: that of the exporter.
        four_bits: whether weights of 2 to 4 bits may be packed.
        several_zero_points: whether one weight may have several.
        name: of the ONNX Runtime; empty for the newest.

    >>> runtime_target("1.17", None, int8=True)
    RuntimeTarget(opset=20, ir=9, four_bits=False, several_zero_points=False, name='1.17')
    """

    opset: int | None
    ir: int | None
    four_bits: bool
    several_zero_points: bool
    name: str = ""


def runtime_target(version: str | None, opset: int | None, *, int8: bool) -> RuntimeTarget:
    """The target of an ONNX Runtime version and an opset.

    Raises:
        ValueError: for a version that is none or too old, or an opset that it cannot read.
    """
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int)):
        raise ValueError(f"opset={opset!r}: give an integer, such as 18, or None")
    if version is None:
        chosen = opset or (INT8_OPSET if int8 else None)
        return RuntimeTarget(chosen, None, not int8 or (chosen or 0) >= INT8_OPSET, True)
    found = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)*", version) if isinstance(version, str) else None
    if found is None:
        raise ValueError(f"for_onnxruntime={version!r}: give a version, such as '1.17'")
    key = (int(found[1]), int(found[2]))
    if key < TABLE[0][0]:
        oldest = ".".join(map(str, TABLE[0][0]))
        raise ValueError(f"for_onnxruntime={version!r}: the oldest that files run in is {oldest}")
    most, ir = next((most, ir) for first, most, ir in reversed(TABLE) if first <= key)
    if opset is not None and opset > most:
        raise ValueError(
            f"opset={opset}: ONNX Runtime {version} reads up to opset {most}: leave opset to it"
        )
    if opset is None:
        best = INT8_OPSET if key >= FOUR_BITS else INT8_OPSET_BEFORE
        opset = min(most, best if int8 else 18)
    four_bits = key >= FOUR_BITS and opset >= INT8_OPSET
    return RuntimeTarget(opset, ir, four_bits, key >= SEVERAL_ZERO_POINTS, version)
