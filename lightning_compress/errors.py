"""Exceptions that this package raises."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["CorruptArtifactError", "MissingExtraError", "TargetError", "require"]


class TargetError(ValueError):
    """A pattern or layer class that selects nothing, or a target that cannot be compressed."""


class CorruptArtifactError(ValueError):
    """An `.lcz` file that is damaged, truncated, hostile, or does not belong to the module."""


class MissingExtraError(ImportError):
    """An optional dependency that is not installed; the message names the install line."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or say how to install it.

    Args:
        module: the module's import name, such as `"onnxruntime"`.
        extra: the extra of this package that brings it.

    Raises:
        MissingExtraError: when the module is not installed.

    >>> require("json", extra="onnx").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{module} is not installed: pip install 'lightning-compress[{extra}]'"
        ) from error
