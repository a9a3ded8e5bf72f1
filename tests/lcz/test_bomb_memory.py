"""Peak memory of readers on small files that ask for much, measured in a process of its own."""

import hashlib
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from lightning_compress.lcz import codecs, container
from lightning_compress.lcz.container import write_container
from lightning_compress.lcz.raw_bits import pack_patterns

MEBIBYTE = 1 << 20
MAX_BYTES = 8 * MEBIBYTE
COUNT = 1 << 20
LIMIT = MAX_BYTES + 96 * MEBIBYTE  # as much as any process may take, beside the result

READ = """
import resource, sys
from pathlib import Path
import lightning_compress.lcz.codecs
from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.arrays import inspect_compressed, onnx_model, read_arrays
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for path in sorted(Path(sys.argv[1]).glob("*.lcz")):
    before, results = peak(), []
    for call in (inspect_compressed, lambda path: read_arrays(path, max_bytes=int(sys.argv[2])),
                 lambda path: onnx_model(path, max_bytes=int(sys.argv[2]))):
        try:
            call(path)
        except (CorruptArtifactError, ValueError) as error:
            results.append(type(error).__name__)
        else:
            results.append("read")
    print(path.stem, peak() - before, *results)
"""


def symbols(codec):
    """A tensor of zeros as one codec's stream, whatever that codec is good for."""
    data = codecs.CODECS[codec].encode(np.zeros(COUNT, np.uint16), (COUNT,))
    row = {"n": "a", "s": [COUNT], "d": "bool", "k": "codebook", "c": codec, "a": 2}
    return {"tensors": [{**row, "l": len(data)}]}, b"\0\0" + data


def one_row(payload, size, dtype="uint8", packing="planes"):
    row = {"n": "a", "s": [size], "d": dtype, "p": packing, "a": len(payload)}
    return {"tensors": [row]}, payload


def many(count, payload=1, **more):
    rows = [{"n": str(at), "s": [], "d": "bool", "p": "bytes", "a": payload, **more}
            for at in range(count)]  # fmt: skip
    return {"tensors": rows}, bytes(payload * count)


def graph_of(size):
    data = zlib.compress(bytes(size), 9)
    row = {"n": "g", "l": len(data), "p": size, "i": [], "tensors": []}
    return {"tensors": [], "graphs": [row]}, data


BOMBS = {
    **{codec: lambda codec=codec: symbols(codec) for codec in codecs.CODECS},
    "coded-floats": lambda: one_row(
        pack_patterns(np.zeros(COUNT, "<u4"), coded=True)[1], COUNT, "float32", "coded"
    ),
    "deflated-more-than-said": lambda: one_row(zlib.compress(bytes(1 << 27), 9), 1 << 10),
    "deflated": lambda: one_row(zlib.compress(bytes(1 << 27), 9), 1 << 27),
    "many-tiny-tensors": lambda: many(100_000),
    "long-names": lambda: ({"tensors": [{"n": "a" * (1 << 20) + str(at), "s": [0], "d": "bool",
                                         "p": "bytes"} for at in range(7)]}, b""),
    "deflated-graph": lambda: graph_of(1 << 27),
    "channels": lambda: (
        {"tensors": [],
         "x-channels": {"tensors": {}, "layers": {}, "kept": {"a": [0, (1 << 24) - 1]}}}, b""
    ),
    "many-channels": lambda: (
        {"tensors": [], "x-channels": {"tensors": {}, "layers": {}, "kept": {
            str(at): [0, 1 << 30] for at in range(1000)}}}, b""
    ),
}  # fmt: skip
HEADERS = {
    "deep-lists": b'{"tensors":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep-and-unknown": b'{"tensors":[],"x-a":' + b"[" * 900 + b"]" * 900 + b"}",
    "long-list": b'{"tensors":[],"x-a":[' + b"0," * (3 << 20) + b"0]}",
    "list-of-lists": b'{"tensors":[],"x-a":[' + b"[]," * (2 << 20) + b"0]}",
    "long-number": b'{"tensors":[],"x-a":' + b"9" * (7 << 20) + b"}",
    "longer-than-allowed": b'{"tensors":[],"x-a":[' + b"0," * (1 << 26) + b"0]}",
}


def write_header(path: Path, text: bytes) -> None:
    """A file with a header that `write_container` would not write."""
    stored = zlib.compress(text, 9)
    check = zlib.crc32(stored)
    start = container._PREFIX.pack(
        container.MAGIC, container.VERSION, 1, check, len(stored), len(text)
    )
    path.write_bytes(start + stored + hashlib.sha256(start + stored).digest())


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """By file: how far the peak rose, what `inspect`, `read` and `onnx_model` said."""
    folder = tmp_path_factory.mktemp("bombs")
    for name, build in BOMBS.items():
        header, payload = build()
        write_container(folder / f"{name}.lcz", header, [payload])
    for name, text in HEADERS.items():
        write_header(folder / f"{name}.lcz", text)
    job = subprocess.run(
        [sys.executable, "-c", READ, str(folder), str(MAX_BYTES)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    rows = (line.split() for line in job.stdout.splitlines())
    return {name: (int(rise), said) for name, rise, *said in rows}


@pytest.mark.parametrize("name", [*BOMBS, *HEADERS])
def test_a_small_file_takes_no_more_memory_than_max_bytes_allows(peaks, name):
    rise, said = peaks[name]
    assert rise < LIMIT, (rise, said)


def test_all_are_refused_that_decode_to_more(peaks):
    refused = {name for name, (_, said) in peaks.items() if said[1] == "CorruptArtifactError"}
    assert {"context", "coded-floats", "deflated", "deflated-more-than-said"} <= refused
    graphs = {name for name, (_, said) in peaks.items() if said[2] == "CorruptArtifactError"}
    assert "deflated-graph" in graphs
    assert {"many-channels", "deep-lists", "long-number", "longer-than-allowed"} <= refused


LARGE = 1 << 23
DECODE = """
import os, resource, sys
from pathlib import Path
from lightning_compress.lcz.arrays import read_arrays
for path in sorted(Path(sys.argv[1]).glob("*.lcz")):
    if os.fork():  # a process of its own, whose peak begins at what is imported
        assert os.wait()[1] == 0
        continue
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = peak()
    read_arrays(path, max_bytes=int(sys.argv[2]))
    print(path.stem, peak() - before, flush=True)
    os._exit(0)
"""


def large(kind, codec):
    """A float32 tensor of `LARGE` elements, an eighth of them not 0."""
    symbols = (np.arange(LARGE) % 8 == 0).astype(np.uint16)
    data = codecs.CODECS[codec].encode(symbols, (LARGE,))
    row = {"n": "a", "s": [LARGE], "d": "float32", "k": kind, "c": codec, "l": len(data)}
    if kind == "codebook":
        aux = b"\1" + np.arange(2, dtype="<f4").tobytes()
    else:
        aux = np.ones(1 if kind == "grid" else LARGE // 8, "<f4").tobytes()
        row["p"] = "bytes"
    row |= {"q": [8, 1]} if kind == "grid" else {}
    return {"tensors": [{**row, "a": len(aux)}]}, aux + data


FORMS = {
    **{f"grid-{codec}": lambda codec=codec: large("grid", codec)
       for codec in ("raw", "arithmetic", "huffman", "rle_huffman", "relative_index")},
    "codebook": lambda: large("codebook", "raw"),
    "mask": lambda: large("mask", "raw"),
    "planes": lambda: one_row(zlib.compress(bytes(4 * LARGE), 1), LARGE, "float32"),
}  # fmt: skip


@pytest.fixture(scope="module")
def rises(tmp_path_factory):
    """By form: how far the peak rose while a large tensor was read."""
    folder = tmp_path_factory.mktemp("large")
    for name, build in FORMS.items():
        header, payload = build()
        write_container(folder / f"{name}.lcz", header, [payload])
    words = [sys.executable, "-c", DECODE, str(folder), str(16 * LARGE)]
    job = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    return {name: int(rise) for name, rise in map(str.split, job.stdout.splitlines())}


@pytest.mark.parametrize("form", FORMS)
def test_a_large_tensor_is_decoded_in_pieces(rises, form):
    result, symbols_and_levels = 4 * LARGE, 5 * LARGE
    assert rises[form] < result + symbols_and_levels + 16 * MEBIBYTE
