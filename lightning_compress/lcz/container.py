"""Container of an `.lcz` file: prefix, JSON header, payloads, SHA-256.

    magic (8) · version (2) · flags (2) · CRC-32 of the stored header (4) ·
    stored header length (8) · plain header length (8) · header · payloads · SHA-256 of all before

Integers are little-endian. Flag 1: the header is deflated. The payloads follow each other
without gaps; the header holds their lengths.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.files import atomic_file
from lightning_compress.lcz.raw_bits import inflate

__all__ = [
    "MAX_HEADER", "MIN_SIZE", "Container", "container_bytes", "read_container", "read_stream",
    "write_container",
]  # fmt: skip

MAGIC = b"\x89LCZ\r\n\x1a\n"  # like PNG's: a transfer in text mode breaks it
VERSION = 2  # 1 was never published
MAX_HEADER = 1 << 23  # bytes of JSON, some 80,000 tensors
_PREFIX = struct.Struct("<8sHHIQQ")
_DEFLATED = 1
_DIGEST = hashlib.sha256().digest_size
MIN_SIZE = _PREFIX.size + _DIGEST  # bytes of any file


@dataclass(frozen=True)
class Container:
    """An open `.lcz` file whose prefix and header have been checked."""

    stream: BinaryIO
    header: dict[str, Any]
    size: int
    payload_start: int

    @property
    def payload_bytes(self) -> int:
        """Bytes between the header and the checksum."""
        return self.size - _DIGEST - self.payload_start

    def read(self, offset: int, length: int) -> bytes:
        """A slice of the payloads.

        Raises:
            CorruptArtifactError: when the file ends before it.
        """
        self.stream.seek(self.payload_start + offset)
        return _read_exactly(self.stream, length)


def write_container(path: Path, header: dict[str, Any], payloads: Iterable[bytes]) -> int:
    """Write a file atomically.

    Args:
        path: of the file.
        header: a mapping that JSON can hold.
        payloads: chunks of bytes, which follow each other without gaps.

    Returns:
        The size of the file.

    Raises:
        ValueError: when the header is above `MAX_HEADER` bytes.
        OSError: naming the path, when it cannot be written.
    """
    digest = hashlib.sha256()
    with atomic_file(path, what="the artifact") as stream:
        for part in itertools.chain([_header_bytes(header)], payloads):
            digest.update(part)
            stream.write(part)
        stream.write(digest.digest())
        return stream.tell()


def container_bytes(header: dict[str, Any], payloads: bytes) -> bytes:
    """The bytes of the file that `write_container` writes.

    Raises:
        ValueError: when the header is above `MAX_HEADER` bytes.
    """
    content = _header_bytes(header) + payloads
    return content + hashlib.sha256(content).digest()


def _header_bytes(header: dict[str, Any]) -> bytes:
    plain = json.dumps(header, separators=(",", ":")).encode()
    if len(plain) > MAX_HEADER:
        raise ValueError(f"the header takes {len(plain)} bytes, the format allows {MAX_HEADER}")
    deflated = zlib.compress(plain, 9)
    stored, flags = (deflated, _DEFLATED) if len(deflated) < len(plain) else (plain, 0)
    prefix = _PREFIX.pack(MAGIC, VERSION, flags, zlib.crc32(stored), len(stored), len(plain))
    return prefix + stored


@contextlib.contextmanager
def read_container(path: Path, *, verify: bool) -> Iterator[Container]:
    """Open a file and checks its prefix, its checksum if `verify` is set, and its header.

    Raises:
        CorruptArtifactError: when any of them is wrong.
        OSError: when the file cannot be read.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # to open a pipe would wait
        raise CorruptArtifactError("this is a device, pipe or socket, no regular file")
    with path.open("rb") as stream:
        yield read_stream(stream, verify=verify)


def read_stream(stream: BinaryIO, *, verify: bool) -> Container:
    """The container in an open file or in memory, checked as `read_container` does.

    Raises:
        CorruptArtifactError: when its prefix, checksum or header is wrong.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    stored, flags, crc, plain = _read_prefix(stream, size)
    if verify:
        _check_digest(stream, size)
        stream.seek(_PREFIX.size)
    data = _read_exactly(stream, stored)
    if zlib.crc32(data) != crc:
        raise CorruptArtifactError("the header does not match its CRC-32")
    header = _parse(inflate(data, plain) if flags & _DEFLATED else data)
    return Container(stream, header, size, _PREFIX.size + stored)


def _read_exactly(stream: BinaryIO, length: int) -> bytes:
    data = stream.read(length)
    if len(data) != length:
        raise CorruptArtifactError(f"the file ends {length - len(data)} bytes too early")
    return data


def _read_prefix(stream: BinaryIO, size: int) -> tuple[int, int, int, int]:
    start = stream.read(_PREFIX.size)
    if start[: len(MAGIC)] != MAGIC:
        raise CorruptArtifactError("this is not an .lcz file: its first bytes differ")
    if size < MIN_SIZE:
        raise CorruptArtifactError(f"the file ends after {size} bytes, within its prefix")
    _, version, flags, crc, stored, plain = _PREFIX.unpack(start)
    if version != VERSION:
        raise CorruptArtifactError(f"format version {version}; this package reads {VERSION}")
    if flags not in (0, _DEFLATED):
        raise CorruptArtifactError(f"unknown flags {flags}")
    if stored > size - MIN_SIZE:
        raise CorruptArtifactError(f"a header of {stored} bytes in a file of {size}")
    if plain > MAX_HEADER or stored > plain or (not flags and stored != plain):
        raise CorruptArtifactError(f"a header of {plain} bytes, stored in {stored}")
    return stored, flags, crc, plain


def _check_digest(stream: BinaryIO, size: int) -> None:
    stream.seek(0)
    digest, left = hashlib.sha256(), size - _DIGEST
    while left:
        chunk = _read_exactly(stream, min(left, 1 << 20))
        digest.update(chunk)
        left -= len(chunk)
    if digest.digest() != _read_exactly(stream, _DIGEST):
        raise CorruptArtifactError("the file does not match its SHA-256")


def _reject(text: str) -> NoReturn:
    raise ValueError(f"{text} in the header")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        _reject("a key twice")
    return found


def _parse(text: bytes) -> dict[str, Any]:
    try:  # the header holds integers and text only
        header = json.loads(
            text.decode(),
            object_pairs_hook=_unique_keys,
            parse_constant=_reject,
            parse_float=_reject,
        )
    except (ValueError, RecursionError) as error:
        raise CorruptArtifactError(f"the header is no valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise CorruptArtifactError("the header is no JSON object")
    return header
