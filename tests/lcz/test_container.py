import struct
import zlib

import pytest

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.container import MAX_HEADER, read_container, write_container
from lightning_compress.lcz.raw_bits import inflate


def write(path, header, *payloads):
    assert write_container(path, header, payloads) == path.stat().st_size
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


def test_an_oversized_header_is_refused_on_writing(tmp_path):
    with pytest.raises(ValueError, match=f"the format allows {MAX_HEADER}"):
        write_container(tmp_path / "a.lcz", {"tensors": ["x" * MAX_HEADER]}, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("at", "layout", "value", "why"),
    [
        (0, "B", 0, "not an .lcz file"),
        (8, "<H", 1, "format version 1; this package reads 2"),
        (8, "<H", 3, "format version 3; this package reads 2"),
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
        "<8sHHIQQ", b"\x89LCZ\r\n\x1a\n", 2, int(deflated), zlib.crc32(stored), len(stored), size
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
