"""The `.lcz` file format: encoder of modules, and a decoder that needs NumPy and constriction.

    from lightning_compress.lcz import inspect_compressed, onnx_model, read_arrays

imports neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_compress.errors import CorruptArtifactError
    from lightning_compress.lcz.arrays import inspect_compressed, onnx_model, read_arrays
    from lightning_compress.lcz.info import ArtifactInfo, GraphInfo, TensorInfo

__all__ = [
    "ArtifactInfo", "CorruptArtifactError", "GraphInfo", "TensorInfo", "inspect_compressed",
    "onnx_model", "read_arrays",
]  # fmt: skip

_HOMES = {
    "ArtifactInfo": "lightning_compress.lcz.info",
    "CorruptArtifactError": "lightning_compress.errors",
    "GraphInfo": "lightning_compress.lcz.info",
    "TensorInfo": "lightning_compress.lcz.info",
    "inspect_compressed": "lightning_compress.lcz.arrays",
    "onnx_model": "lightning_compress.lcz.arrays",
    "read_arrays": "lightning_compress.lcz.arrays",
}


if not TYPE_CHECKING:  # so that a mistyped name is still found where types are checked

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first asked for: the modules here import each other."""
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
