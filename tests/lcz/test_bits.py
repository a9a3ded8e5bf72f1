import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.bits import ByteReader, append_codes, pack_fixed, unpack_fixed, varint


@given(st.integers(0, 2**63 - 1), st.binary(max_size=4))
def test_varint_comes_back(value, rest):
    reader = ByteReader(varint(value) + rest)
    assert reader.varint(limit=2**63, what="n") == value
    assert reader.rest() == rest


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 20])
def test_damaged_varint_is_refused(data):
    with pytest.raises(CorruptArtifactError):
        ByteReader(data).varint(limit=2**80, what="n")


def test_reader_stays_inside():
    reader = ByteReader(b"abc")
    assert reader.take(2, "x") == b"ab"
    with pytest.raises(CorruptArtifactError, match="width needs 2 bytes where 1 are left"):
        reader.take(2, "width")
    with pytest.raises(CorruptArtifactError, match="above the possible 9"):
        ByteReader(varint(10)).varint(limit=9, what="n")


@given(st.lists(st.tuples(st.integers(1, 32), st.integers(0, 2**32 - 1)), min_size=1), st.data())
def test_append_codes_equals_a_string_of_bits(fields, data):
    sizes = np.array([size for size, _ in fields])
    codes = np.array([value & (1 << size) - 1 for size, value in fields])
    text = "".join(f"{code:0{size}b}" for code, size in zip(codes, sizes, strict=True))
    words = np.zeros(len(text) // 64 + 2, np.int64)
    cut = data.draw(st.integers(0, len(codes)))  # the stream may be written in two goes
    offset = 0
    for part in (slice(0, cut), slice(cut, None)):
        if len(codes[part]):
            offset = append_codes(words, offset, codes[part], sizes[part])
    assert offset == len(text)
    assert int.from_bytes(words.astype(">i8").tobytes(), "big") == int(
        text.ljust(64 * len(words), "0"), 2
    )


@given(st.integers(0, 12), st.data())
def test_fixed_fields_come_back(width, data):
    values = data.draw(st.lists(st.integers(0, (1 << width) - 1), max_size=40))
    packed = pack_fixed(np.array(values, np.uint16), width)
    text = "".join(f"{value:0{width}b}" for value in values) if width else ""
    assert packed == int(text.ljust(8 * len(packed), "0") or "0", 2).to_bytes(len(packed), "big")
    assert unpack_fixed(packed, width, len(values)).tolist() == values


def test_fixed_fields_must_fill_their_bytes():
    with pytest.raises(CorruptArtifactError, match="do not hold 3 fields of 2 bits"):
        unpack_fixed(b"\0\0", 2, 3)
    with pytest.raises(CorruptArtifactError, match="not zero"):
        unpack_fixed(b"\x01", 2, 3)
