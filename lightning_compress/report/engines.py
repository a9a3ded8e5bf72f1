"""Which operators of the int8 files run on whole numbers, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_compress.report.formats import DASH, count, number, scalar
from lightning_compress.report.wording import Results, section

__all__ = ["INT8_HEADER", "int8_rows"]

INT8_HEADER = ("Part", "Model", "On whole numbers", "In floating point", "Why not", "Largest error")


def int8_rows(results: Results) -> list[tuple[str, ...]]:
    """Return one row a part and side, cells in the order of `INT8_HEADER`."""
    return [
        _row(part, side, ops)
        for side in ("dense", "compressed")
        for part, ops in section(results[side], "int8_ops").items()
        if isinstance(ops, Mapping)
    ]


def _row(part: str, side: str, ops: Mapping[str, Any]) -> tuple[str, ...]:
    if ops.get("refused"):
        return (part, side, DASH, DASH, f"no file: {ops['refused']}", DASH)
    reasons = [f"{name}: {reason}" for name, reason in section(ops, "reasons").items()]
    return (
        part,
        side,
        _counts(section(ops, "int8_ops")),
        _counts(section(ops, "float_ops")),
        "; ".join(reasons) or DASH,
        _error(section(ops, "parity")),
    )


def _counts(ops: Mapping[str, Any]) -> str:
    """Format operators with how often they occur.

    >>> _counts({"QLinearConv": 3, "QGemm": 1})
    '3 QLinearConv, 1 QGemm'
    """
    return ", ".join(f"{count(scalar(times))} {name}" for name, times in ops.items()) or DASH


def _error(parity: Mapping[str, Any]) -> str:
    found = [
        f"{number(error, 2)} ({runtime})"
        for runtime, values in parity.items()
        if isinstance(values, Mapping)
        and (error := scalar(values.get("max_abs_error"))) is not None
    ]
    return ", ".join(found) or DASH
