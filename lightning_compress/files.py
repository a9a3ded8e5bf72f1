"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_file", "write_atomically"]


def write_atomically(
    path: Path, content: str | bytes, *, what: str = "the file", parents: bool = False
) -> Path:
    """Write a file that appears as a whole or not at all.

    Args:
        path: of the file.
        content: its bytes; text becomes UTF-8.
        what: the file is, for the message of an error.
        parents: make the folders that are missing.

    Returns:
        The path.

    Raises:
        OSError: naming the path, when it cannot be written; an older file stays as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder, "a.txt"), "ab").read_bytes()
    b'ab'
    """
    with atomic_file(path, what=what, parents=parents) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
    return path


@contextlib.contextmanager
def atomic_file(path: Path, *, what: str = "the file", parents: bool = False) -> Iterator[BinaryIO]:
    """A stream whose bytes become the file when the block ends, and vanish when it raises.

    They go to a temporary file in the same folder, which is flushed to the disk and renamed. What
    a killed process leaves behind is that hidden file, never half of the one asked for.

    Raises:
        OSError: naming the path, when it cannot be written; an older file stays as it was.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        message = f"cannot write {what}: {error.strerror or error}"
        raise OSError(error.errno, message, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system opens folders; the rename itself is done
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
