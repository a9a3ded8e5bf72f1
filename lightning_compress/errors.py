"""Exceptions that this package raises."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from types import ModuleType
from typing import TypeVar

__all__ = [
    "CorruptArtifactError",
    "MissingExtraError",
    "TargetError",
    "check_choice",
    "require",
    "without_telemetry",
]


T = TypeVar("T")


class TargetError(ValueError):
    """A pattern or layer class that selects nothing, or a target that cannot be compressed."""


class CorruptArtifactError(ValueError):
    """An `.lcz` file that is damaged, truncated, hostile, or does not belong to the module."""


class MissingExtraError(ImportError):
    """An optional dependency that is not installed; the message names the install line."""


def without_telemetry() -> None:
    """Keep ONNX Runtime from looking up a host and writing a device id, unless the user wants it.

    It reads the variable when it is imported, so that every import comes after this.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def check_choice(name: str, value: T, choices: Iterable[object]) -> T:
    """Return an argument's value, which must be one of its choices.

    >>> check_choice("scope", "layer", ("global", "layer"))
    'layer'

    Raises:
        ValueError: with the name, the value and the choices.
    """
    valid = list(choices)
    if value not in valid:
        raise ValueError(f"{name}={value!r}: valid are {valid}")
    return value


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
    if module.split(".")[0] == "onnxruntime":
        without_telemetry()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{module} is not installed: pip install 'lightning-compress[{extra}]'"
        ) from error
