"""Aliases of moved modules: former names import with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["alias"]


def alias(old: str, new: str, submodules: Mapping[str, str]) -> Callable[[str], Any]:
    """Forward a package's attributes and submodules to where they are now.

    Args:
        old: the package's former name, whose `__getattr__` is returned.
        new: the package that its own attributes are taken from.
        submodules: former submodule names, each with the full name of the module that holds its
            contents now.
    """
    warnings.warn(
        f"{old} has moved to {new}: import from there", FutureWarning, stacklevel=_depth(old)
    )
    for short, full in submodules.items():
        sys.modules[f"{old}.{short}"] = importlib.import_module(full)

    def forward(name: str) -> Any:
        if name in submodules:
            return sys.modules[f"{old}.{name}"]
        return getattr(importlib.import_module(new), name)

    return forward


def _depth(old: str) -> int:
    """How many frames above `alias` the import statement of the user stands."""
    level, frame = 1, sys._getframe(1)
    while frame is not None and (
        (internal := "importlib" in frame.f_code.co_filename)
        or frame.f_globals.get("__name__") in (old, __name__)
    ):
        level, frame = level + (not internal), frame.f_back  # `warn` skips the import system's own
    return level
