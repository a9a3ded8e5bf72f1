"""Explanations of failed exports: the line of the user's code, and what to change."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["ExportError", "explained", "user_line"]

_MENTIONED = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.+)')
_MISSING = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")
_FIXED = re.compile(r"Constraints violated \(([^)]*)\)|Eq\(\w+, \d+\) is inconsistent")
_OTHERS = (
    Path(torch.__file__).parent,
    Path(__file__).parent,
    Path(sysconfig.get_paths()["stdlib"]),
)


class ExportError(ValueError):
    """A module that the exporter cannot follow; the message names the line and the way out."""


def user_line(error: BaseException) -> str:
    """The innermost line of the user's own code that an error names: `"file.py:3: code"`.

    Empty when there is none.
    """
    for one in _chain(error):
        frames = [
            (frame.filename, frame.lineno or 0, frame.line or "")
            for frame in traceback.extract_tb(one.__traceback__)
        ]
        frames += [(name, int(at), code) for name, at, _, code in _MENTIONED.findall(str(one))]
        for name, at, code in reversed(frames):
            if not _is_others(name):
                return f"{Path(name).name}:{at}: `{code.strip()}`"
    return ""


def explained(error: Exception, *, batch: str = "") -> ExportError:
    r"""What the exporter's pages of output come down to.

    Args:
        error: as the exporter raised it.
        batch: what to say where a free axis is fixed by the forward.

    >>> print(explained(RuntimeError("no reason\n\nand much more")))
    the module cannot be exported: no reason
    """
    text = "\n".join(str(one) for one in _chain(error))
    line = user_line(error)
    where = f"{line}: " if line else ""
    if found := _MISSING.search(text):
        return ExportError(
            f"{where}ONNX has no operator for {found[1]}: compute it outside of the exported module"
        )
    if "data-dependent" in text or "DataDependent" in text:
        return ExportError(
            f"{where}what runs here depends on the values of a tensor, which no ONNX file can "
            "decide: use torch.where or shapes, or decide outside of the exported module"
        )
    if found := _FIXED.search(text):
        axes = f" {found[1]}" if found[1] else ""
        return ExportError(
            f"{where}forward fixes the size of the axis{axes}: take sizes from x.shape in place "
            f"of numbers{batch}"
        )
    if "Unsupported attribute type" in text:
        return ExportError(
            f"{where}a setting of an operator, such as the groups of a convolution, depends on a "
            f"free size, and a file fixes it: take it from no x.shape{batch}"
        )
    innermost = list(_chain(error))[-1]
    reason = str(innermost).strip().split("\n")[0] or type(innermost).__name__
    return ExportError(f"{where}the module cannot be exported: {reason}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_others(name: str) -> bool:
    path = Path(name)
    return (
        name.startswith("<")
        or any(path.is_relative_to(one) for one in _OTHERS)
        or bool({"onnxscript", "onnx_ir", "onnx"} & set(path.parts))
    )
