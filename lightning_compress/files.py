"""Atomic file writes: a file is there in full or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: rests of killed processes stay there
    fcntl = None

__all__ = ["atomic_file", "check_writable", "write_atomically"]

LONGEST_NAME = 200  # bytes of the file's own name in that of its temporary one; systems allow 255
SUFFIX = ".tmp"


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
    a killed process leaves behind is that hidden file, never half of the one asked for; the next
    write of the same file removes it. A symbolic link is replaced, and what it leads to stays as it
    was: a link in a stranger's folder decides nothing.

    Raises:
        OSError: naming the path, when it cannot be written; an older file stays as it was.
    """
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode_before(path)
        _remove_rests(path)
        with _temporary(path, private=mode is not None) as temporary:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                if mode is not None and hasattr(os, "fchmod"):
                    os.fchmod(stream.fileno(), mode)
                os.fsync(stream.fileno())
            temporary.replace(path)
    except OSError as error:
        message = f"cannot write {what}: {error.strerror or error}"
        raise OSError(error.errno, message, str(path)) from error
    _sync_folder(path.parent)


def check_writable(folder: Path, *, hint: str = "") -> None:
    """Find out before the work that its files can be written; the folder is made if need be.

    Args:
        folder: to write to.
        hint: what to do otherwise, for the message of the error.

    Raises:
        OSError: naming the folder and the cause.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # nameless: processes do not meet
            probe.write(b"1")
    except OSError as error:
        message = f"cannot write to the folder {folder} ({error.strerror or error}){hint}"
        raise type(error)(message) from error


def _prefix(path: Path) -> str:
    # Cut as bytes: a name of few but long characters must not outgrow what a name may have.
    return f".{os.fsencode(path.name)[:LONGEST_NAME].decode('utf-8', 'ignore')}."


def _mode_before(path: Path) -> int | None:
    """The permissions of the file that will be replaced; None: there is none.

    Raises:
        OSError: for an empty path, a folder, or what is no file: a rename would put a file there.
    """
    if not path.name or path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{str(path)!r} names a folder, no file", str(path))
    if not path.exists():
        return None
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a device, pipe or socket, no regular file", str(path))
    return stat.S_IMODE(mode) & 0o777


@contextlib.contextmanager
def _temporary(path: Path, *, private: bool) -> Iterator[Path]:
    """A new file beside the path; it counts as nobody's rest while the block runs."""
    handle, temporary = _create(path, 0o600 if private else 0o666)
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _create(path: Path, mode: int) -> tuple[int | None, Path]:
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}{SUFFIX}")
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        if fcntl is None:
            os.close(handle)  # an open file could not be renamed there
            return None, temporary
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, temporary
        os.close(handle)  # another process took it for a rest before it was locked


def _remove_rests(path: Path) -> None:
    """Remove temporary files of the same path whose process is gone: nobody holds their lock.

    Their age would not tell: a clock may have been moved, and a large file takes its time.
    """
    if fcntl is None or not path.parent.is_dir():
        return
    prefix = _prefix(path)
    for rest in path.parent.iterdir():
        if not rest.name.startswith(prefix) or len(rest.name) != len(prefix) + 8 + len(SUFFIX):
            continue
        with contextlib.suppress(OSError):  # locked, so it is being written; or gone by now
            if not stat.S_ISREG(rest.lstat().st_mode):
                continue  # nobody's left-over; to open a pipe would wait for its reader
            handle = os.open(rest, os.O_WRONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                rest.unlink()
            finally:
                os.close(handle)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system opens folders; the rename itself is done
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
