import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz import huffman
from lightning_compress.lcz.bits import ByteReader, varint
from lightning_compress.lcz.huffman import (
    BLOCK,
    MAX_ALPHABET,
    MAX_LENGTH,
    canonical,
    code_lengths,
    pack_lengths,
    read_lengths,
)

counts_of = st.lists(st.integers(0, 10_000), min_size=1, max_size=60).filter(any)


def heap_cost(counts):
    """Total bits of an optimal prefix code: the sum of all merged weights (Huffman 1952)."""
    heap = [count for count in counts if count]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    return cost


@given(counts_of)
def test_lengths_are_optimal(counts):
    counts = np.array(counts)
    lengths = code_lengths(counts, limit=60)
    assert ((lengths > 0) == (counts > 0)).all()
    assert counts @ lengths == heap_cost(counts.tolist())


def limited_cost(counts, limit):
    """Least cost of a prefix code of bounded length, by trying every sorted set of lengths."""
    counts = sorted(counts, reverse=True)

    def best(at, shortest, space):
        if at == len(counts):
            return 0 if space >= 0 else np.inf
        return min(
            (
                counts[at] * length + best(at + 1, length, space - 2.0**-length)
                for length in range(shortest, limit + 1)
                if space >= 2.0**-length
            ),
            default=np.inf,
        )

    return best(0, 1, 1.0)


@given(st.lists(st.integers(1, 2000), min_size=2, max_size=6), st.integers(3, 4))
@settings(max_examples=40, deadline=None)
def test_limited_lengths_are_optimal(counts, limit):
    lengths = code_lengths(np.array(counts), limit)
    assert lengths.max() <= limit
    assert sum(2.0**-lengths) == 1
    assert np.array(counts) @ lengths == limited_cost(counts, limit)


def test_fibonacci_counts_hit_the_limit():
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])
    lengths = code_lengths(np.array(counts))
    assert code_lengths(np.array(counts), 60).max() == 29
    assert lengths.max() == MAX_LENGTH
    assert sum(2.0**-lengths) == 1
    symbols = np.repeat(np.arange(30), np.minimum(counts, 5000)).astype(np.uint16)
    assert (huffman.decode(huffman.encode(symbols), len(symbols)) == symbols).all()


def test_too_many_symbols_for_the_limit():
    with pytest.raises(ValueError, match="5 symbols do not fit in codes of 2 bits"):
        code_lengths(np.ones(5, np.int64), 2)


@given(counts_of)
def test_codes_are_prefix_free(counts):
    lengths = code_lengths(np.array(counts))
    order, slots, width = canonical(lengths)
    codes = (np.cumsum(slots) - slots) >> (width - lengths[order])
    texts = [f"{code:0{length}b}" for code, length in zip(codes, lengths[order], strict=True)]
    pairs = itertools.pairwise(texts)  # in sorted order a prefix comes just before
    assert texts == sorted(texts)
    assert not any(later.startswith(earlier) for earlier, later in pairs)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 1)), min_size=1, max_size=8))
def test_tables_come_back(stretches):
    used = np.concatenate([np.full(run, on) for run, on in stretches])
    used[-1] = 1
    lengths = code_lengths(used)
    reader = ByteReader(pack_lengths(lengths) + b"rest")
    assert (read_lengths(reader) == lengths).all()
    assert reader.rest() == b"rest"


@pytest.mark.parametrize("count", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK + 7])
@pytest.mark.parametrize("alphabet", [1, 2, 3, 16, 511, MAX_ALPHABET])
def test_streams_come_back(count, alphabet):
    rng = np.random.default_rng(count * alphabet)
    symbols = (alphabet * rng.random(count) ** 3).astype(np.uint16)
    symbols[-1] = alphabet - 1
    data = huffman.encode(symbols)
    assert (huffman.decode(data, count) == symbols).all()


def test_more_lanes_than_one_group(monkeypatch):
    symbols = np.random.default_rng(0).geometric(0.3, 20 * BLOCK + 5).astype(np.uint16)
    whole = huffman.encode(symbols)
    monkeypatch.setattr(huffman, "_BLOCKS_AT_ONCE", 3)
    assert huffman.encode(symbols) == whole
    assert (huffman.decode(whole, len(symbols)) == symbols).all()


@pytest.mark.parametrize("few", [0, 10**6])
def test_streams_side_by_side_are_as_each_by_itself(monkeypatch, few):
    """In lockstep and one by one, over groups that end within a stream."""
    monkeypatch.setattr(huffman, "_FEW", few)
    monkeypatch.setattr(huffman, "_BLOCKS_AT_ONCE", 5)
    rng = np.random.default_rng(2)
    counts = (7 * BLOCK + 3, 0, 40, 2 * BLOCK, 4 * BLOCK + 1)
    parts = [rng.geometric(0.1 + i / 6, n).astype(np.uint16) for i, n in enumerate(counts)]
    parts.append(np.full(3 * BLOCK, 6, np.uint16))
    streams = [(huffman.encode(part), len(part)) for part in parts]
    for found, part in zip(huffman.decode_streams(streams), parts, strict=True):
        assert np.array_equal(found, part)
    short = streams[4][0][:-3]
    with pytest.raises(CorruptArtifactError):
        huffman.decode_streams([*streams[:4], (short, counts[4])])


def test_a_small_stream_has_no_block_table():
    symbols = np.arange(16, dtype=np.uint16).repeat(8)
    assert len(huffman.encode(symbols)) == 1 + 8 + 128 * 4 // 8


@pytest.mark.parametrize("count", [40, 3 * BLOCK + 11])
def test_damage_is_refused_or_changes_the_symbols(count):
    symbols = np.random.default_rng(1).geometric(0.4, count).astype(np.uint16)
    data = huffman.encode(symbols)
    for at in range(min(len(data), 400)):
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]):
            try:
                result = huffman.decode(damaged, count)
            except CorruptArtifactError:
                continue
            assert len(result) == count
            assert (result != symbols).any()
    for wrong in (data + b"\0", data[:-1], b""):
        with pytest.raises(CorruptArtifactError):
            huffman.decode(wrong, count)


def test_a_block_must_end_where_the_table_says():
    symbols = np.random.default_rng(1).geometric(0.4, 2 * BLOCK + 9).astype(np.uint16)
    data = huffman.encode(symbols)
    reader = ByteReader(data)
    read_lengths(reader)
    rest = reader.rest()
    table = data[: len(data) - len(rest)]
    sizes = np.frombuffer(rest, "<u2", 2).astype(np.int64)
    for change in ([1, -1], [-1, 1], [1, 0], [0, -1], [-sizes[0], sizes[0]]):
        moved = (sizes + change).astype("<u2").tobytes()
        with pytest.raises(CorruptArtifactError, match="a block of Huffman codes does not end"):
            huffman.decode(table + moved + rest[4:], len(symbols))


def nibbles(*values):
    return bytes(a << 4 | b for a, b in zip(values[::2], values[1::2], strict=True))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (varint(MAX_ALPHABET + 1), "above the possible"),
        (varint(0), "does not end"),
        (varint(3) + nibbles(1, 2), "needs 1 bytes"),
        (varint(2) + nibbles(1, 2), "not complete"),
        (varint(3) + nibbles(1, 1, 1, 0), "not complete"),
        (varint(1) + nibbles(2, 0), "not complete"),
        (varint(1) + nibbles(1, 1), "does not end"),
        (varint(2) + nibbles(1, 0, 0, 0), "does not end"),
        (varint(3) + nibbles(1, 0, 15, 0), "does not end"),
        (varint(1) + nibbles(1, 0) + b"x", "1 bytes after the end"),
        (varint(2) + nibbles(1, 1), "cannot hold"),
        (varint(2) + nibbles(1, 1) + b"\0\0\0", "does not end where its bytes end"),
    ],
)
def test_hostile_tables_are_refused(data, why):
    with pytest.raises(CorruptArtifactError, match=why):
        huffman.decode(data, 10)


def test_a_huge_count_is_refused_before_it_is_allocated():
    data = huffman.encode(np.arange(4, dtype=np.uint16))
    with pytest.raises(CorruptArtifactError, match="block table"):
        huffman.decode(data, 1 << 45)


def test_empty_blocks_are_refused():
    table = pack_lengths(code_lengths(np.ones(2, np.int64)))
    with pytest.raises(CorruptArtifactError):
        huffman.decode(table + bytes(2 * 8) + bytes(BLOCK + 1), 8 * BLOCK + 1)


def test_symbols_above_the_alphabet():
    with pytest.raises(ValueError, match="4096 is not below 4096"):
        huffman.encode(np.array([MAX_ALPHABET], np.uint16))
