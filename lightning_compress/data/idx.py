"""Reading IDX files, the format of MNIST: yann.lecun.com/exdb/mnist.

Two zero bytes, a type code, the number of axes, the length of each axis as a big-endian
32-bit number, then the values in C order. Here: unsigned bytes (type 8), gzipped or not.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["read_idx"]

GZIP_MAGIC = b"\x1f\x8b"
UNSIGNED_BYTE = 8


def read_idx(path: str | Path, axes: int) -> Tensor:
    """Read unsigned bytes, uint8 with `axes` axes: (N, H, W) images or (N,) labels.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file, when it is damaged, truncated, too long, or not of this form.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = Path(file.name).write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    ...     read_idx(file.name, axes=1)
    tensor([7, 9], dtype=torch.uint8)
    """
    path = Path(path)
    content = _unzipped(path)
    start = 4 + 4 * axes
    magic = bytes([0, 0, UNSIGNED_BYTE, axes])
    if content[:4] != magic:
        raise ValueError(
            f"{path}: no IDX file of unsigned bytes with {axes} axes:"
            f" starts with 0x{content[:4].hex()}, expected 0x{magic.hex()}"
        )
    if len(content) < start:
        raise ValueError(f"{path}: truncated in its header: {len(content)} of {start} bytes")
    shape = struct.unpack(f">{axes}I", content[4:start])
    expected = math.prod(shape)
    if not expected == len(content) - start > 0:
        state = "too long" if len(content) - start > expected else "truncated"
        state = state if expected else "empty"
        raise ValueError(
            f"{path}: {state}: its header says {'x'.join(map(str, shape))} = {expected} values,"
            f" it holds {len(content) - start}"
        )
    # bytearray: torch wants memory that may be written to
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return values[start:].reshape(shape)


def _unzipped(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated gzip file: {error}") from error
