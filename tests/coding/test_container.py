import os
import struct
import zlib

import pytest

from lightning_compress.coding.container import (
    MAX_HEADER,
    container_parts,
    read_container,
    write_atomically,
)
from lightning_compress.coding.values import inflate
from lightning_compress.errors import CorruptArtifactError


def write(path, header, *payloads):
    path.write_bytes(b"".join(container_parts(header, payloads)))
    return path


@pytest.mark.parametrize("header", [{}, {"tensors": [{"n": "é\n\ud800"}] * 50}])
def test_header_and_payloads_come_back(tmp_path, header):
    path = write(tmp_path / "a.lcz", header, b"one", b"", b"three")
    with read_container(path, verify=True) as container:
        assert container.header == header
        assert container.size == path.stat().st_size
        assert container.payload_bytes == 8
        assert container.read(3, 5) == b"three"
        with pytest.raises(CorruptArtifactError, match="too early"):
            container.read(3, 5000)


def test_long_headers_are_deflated(tmp_path):
    header = {"tensors": [{"n": f"layer.{i}.weight"} for i in range(200)]}
    path = write(tmp_path / "a.lcz", header)
    assert path.stat().st_size < 1000


def test_an_oversized_header_is_refused_on_writing():
    with pytest.raises(ValueError, match=f"the format allows {MAX_HEADER}"):
        container_parts({"tensors": ["x" * MAX_HEADER]}, [])


@pytest.mark.parametrize(
    ("at", "layout", "value", "why"),
    [
        (0, "B", 0, "not an .lcz file"),
        (8, "<H", 2, "format version 2; this package reads 1"),
        (10, "<H", 2, "unknown flags 2"),
        (10, "<H", 1, "deflated bytes are damaged"),
        (12, "<I", 7, "CRC-32"),
        (16, "<Q", 2**63, "a header of 9223372036854775808 bytes in a file"),
        (24, "<Q", 2**40, "stored in"),
        (24, "<Q", 1, "stored in"),
    ],
)
def test_prefix_fields_are_checked_without_the_checksum(tmp_path, at, layout, value, why):
    path = write(tmp_path / "a.lcz", {}, b"payload")
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, at, value)
    path.write_bytes(data)
    with (
        pytest.raises(CorruptArtifactError, match=why),
        read_container(path, verify=False),
    ):
        pass


def raw_file(path, stored, *, deflated=False, plain=None):
    """A file with any header bytes and a right CRC-32."""
    size = len(stored) if plain is None else plain
    prefix = struct.pack(
        "<8sHHIQQ", b"\x89LCZ\r\n\x1a\n", 1, int(deflated), zlib.crc32(stored), len(stored), size
    )
    path.write_bytes(prefix + stored + bytes(32))
    return path


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b'{"a": 1, "a": 1}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1.0}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b'{"a":' * 100_000,
        b"[" * 1_000_000,
    ],
    ids=lambda text: text[:12],
)
def test_hostile_json_is_refused(tmp_path, text):
    path = raw_file(tmp_path / "a.lcz", text)
    with (
        pytest.raises(CorruptArtifactError, match="the header is no"),
        read_container(path, verify=False),
    ):
        pass


def test_a_bomb_in_the_header_is_not_inflated(tmp_path):
    bomb = zlib.compress(bytes(50 << 20))
    path = raw_file(tmp_path / "a.lcz", bomb, deflated=True, plain=len(bomb))
    with (
        pytest.raises(CorruptArtifactError, match="do not hold just"),
        read_container(path, verify=False),
    ):
        pass


@pytest.mark.parametrize("data", [b"", b"abc", zlib.compress(b"ab"), zlib.compress(b"abcd")])
def test_inflate_wants_the_exact_length(data):
    with pytest.raises(CorruptArtifactError, match="deflated bytes"):
        inflate(data, 3)
    with pytest.raises(CorruptArtifactError, match="deflated bytes"):
        inflate(zlib.compress(b"abc") + b"more", 3)


def test_writing_replaces_the_old_file(tmp_path):
    path = tmp_path / "a.lcz"
    path.write_bytes(b"old")
    write_atomically(path, [b"n", b"ew"])
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt(), ValueError()])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failure_leaves_the_old_file_alone(tmp_path, monkeypatch, call, error):
    def fail(*_):
        raise error

    path = tmp_path / "a.lcz"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        write_atomically(path, [b"new"])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none" / "a.lcz", tmp_path / "file" / "a.lcz", tmp_path / "folder"):
        with pytest.raises(OSError, match="cannot write the artifact") as caught:
            write_atomically(path, [b"new"])
        assert caught.value.filename == str(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
