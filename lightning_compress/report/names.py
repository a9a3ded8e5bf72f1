"""What runs are called: by their folders, relative to what was asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["common_root", "run_name"]


def common_root(run_dirs: Sequence[str | Path]) -> Path:
    """The folder that all given ones lie in; for one, itself.

    >>> common_root(["/a/b/c", "/a/b/d"]).as_posix()
    '/a/b'
    """
    return Path(os.path.commonpath([Path(folder).absolute() for folder in run_dirs]))


def run_name(folder: Path, root: Path) -> str:
    """A folder relative to the root; the root itself by its own name.

    >>> run_name(Path("/a/b/c"), Path("/a")), run_name(Path("/a"), Path("/a"))
    ('b/c', 'a')
    """
    relative = os.path.relpath(folder.absolute(), root)
    return folder.absolute().name if relative == "." else Path(relative).as_posix()
