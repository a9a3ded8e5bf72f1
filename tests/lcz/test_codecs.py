import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import entropy

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.bits import varint
from lightning_compress.lcz.codecs import (
    CHOICES,
    CODECS,
    ESCAPE,
    check_codec,
    decode_symbols,
    encode_symbols,
    entropy_bits,
    join_runs,
    max_runs,
    split_runs,
)
from lightning_compress.lcz.huffman import encode


@st.composite
def symbol_arrays(draw):
    """Any alphabet; few values, one value, and long runs of zeros as well."""
    alphabet = draw(st.sampled_from([1, 2, 3, 16, 300, 4096]))
    count = draw(st.sampled_from([0, 1, 2, 50, 1023, 1024, 1025, 4000]))
    sparsity = draw(st.sampled_from([0.0, 0.5, 0.99, 0.9995, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    symbols = (alphabet * rng.random(count) ** draw(st.sampled_from([1, 4]))).astype(np.int64)
    symbols[rng.random(count) < sparsity] = 0
    return symbols


def shapes(count):
    """Any shape of so many elements: vectors, matrices, kernels."""
    divisors = [n for n in range(1, count + 1) if count % n == 0] or [0]
    return st.sampled_from(divisors).flatmap(
        lambda a: st.sampled_from([d for d in divisors if a and count // a % d == 0] or [1]).map(
            lambda b: (a, b, count // max(a * b, 1)) if count else (3, 0)
        )
    )


@pytest.mark.parametrize("codec", [*CODECS, "auto", "fast"])
@given(symbols=symbol_arrays(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_symbols_come_back(codec, symbols, data):
    shape = data.draw(shapes(len(symbols)))
    name, coded = encode_symbols(symbols, codec, shape)
    limit = int(symbols.max(initial=0)) + 1
    assert (decode_symbols(name, coded, shape, limit=limit) == symbols).all()
    assert name in CHOICES[codec]
    if limit > 1:
        with pytest.raises(CorruptArtifactError, match=f"not below {limit - 1}"):
            decode_symbols(name, coded, shape, limit=limit - 1)


@given(symbol_arrays())
@settings(max_examples=30, deadline=None)
def test_auto_is_the_smallest(symbols):
    sizes = {name: len(encode_symbols(symbols, name)[1]) for name in CHOICES["auto"]}
    name, data = encode_symbols(symbols, "auto")
    assert len(data) == sizes[name] == min(sizes.values())


def test_fast_is_the_smallest_of_those_that_are_fast_for_so_many():
    few = np.zeros(1000, np.uint16)
    few[::50] = np.arange(1, 21)
    sizes = {name: len(encode_symbols(few, name)[1]) for name in CHOICES["fast"]}
    assert min(sizes, key=sizes.__getitem__) == "rle_huffman"
    assert encode_symbols(few, "fast")[0] == "arithmetic"
    many = np.tile(few, 300)
    assert encode_symbols(many, "fast")[0] == "rle_huffman"


@pytest.mark.parametrize("codec", list(CODECS))
@given(data=st.binary(max_size=60), count=st.integers(0, 3000))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_symbols_or_the_one_error(codec, data, count):
    try:
        symbols = decode_symbols(codec, data, (count,), limit=16)
    except CorruptArtifactError:
        return
    assert len(symbols) == count


@given(hnp.arrays(np.int64, st.integers(1, 200), elements=st.integers(0, 20)))
def test_entropy_equals_scipy(symbols):
    reference = entropy(np.bincount(symbols), base=2) * len(symbols)
    assert entropy_bits(symbols) == pytest.approx(reference, abs=1e-9)


def test_entropy_of_nothing():
    assert entropy_bits(np.zeros(0, np.int64)) == 0


def test_sparse_weights_come_near_the_entropy():
    rng = np.random.default_rng(0)
    symbols = np.minimum(np.abs(rng.normal(0, 5, 400_000)), 13).astype(np.int64) + 1
    symbols[rng.random(len(symbols)) < 0.9] = 0
    _, data = encode_symbols(symbols, "rle_huffman")
    assert 1 < 8 * len(data) / entropy_bits(symbols) < 1.03


@pytest.mark.parametrize("codec", ["zip", "cabac", "", None])
def test_unknown_codecs_name_the_valid_ones(codec):
    with pytest.raises(ValueError, match="'auto', 'fast', 'raw', 'arithmetic', 'rle_huffman'"):
        check_codec(codec)


@pytest.mark.parametrize("symbols", [[-1], [4096]])
def test_symbols_out_of_range(symbols):
    with pytest.raises(ValueError, match="not 0 to 4095"):
        encode_symbols(np.array(symbols))


@pytest.mark.parametrize("gap", [0, 1, ESCAPE - 1, ESCAPE, ESCAPE + 1, 2 * ESCAPE, 5000])
def test_runs_around_the_escape(gap):
    symbols = np.array([0] * gap + [3] + [0] * gap + [1] + [0] * gap, np.uint16)
    runs, values = split_runs(symbols)
    assert runs.tolist() == ([ESCAPE] * (gap // ESCAPE) + [gap % ESCAPE]) * 2
    assert values.tolist() == [3, 1]
    assert len(runs) <= max_runs(2, len(symbols))
    assert (join_runs(runs, values, len(symbols)) == symbols).all()


@pytest.mark.parametrize(
    ("runs", "values", "why"),
    [
        ([1, 1], [1], "do not fit"),
        ([1], [1, 1], "do not fit"),
        ([1, ESCAPE], [1], "do not fit"),
        ([1, 8], [1, 1], "past the end"),
        ([ESCAPE, 0], [1], "past the end"),
        ([ESCAPE + 1], [1], "above 255"),
    ],
)
def test_hostile_runs_are_refused(runs, values, why):
    with pytest.raises(CorruptArtifactError, match=why):
        join_runs(np.array(runs, np.uint16), np.array(values, np.uint16), 10)


def test_hostile_run_counts_are_refused_unallocated():
    ones = encode(np.ones(1, np.uint16))
    for head in (varint(1 << 50), varint(3) + varint(1 << 50), varint(3) + varint(3) + varint(999)):
        with pytest.raises(CorruptArtifactError, match="above the possible"):
            decode_symbols("rle_huffman", head + ones, (10,), limit=9)
    with pytest.raises(CorruptArtifactError, match="after the end"):
        decode_symbols("rle_huffman", varint(0) + b"x", (10,), limit=9)
