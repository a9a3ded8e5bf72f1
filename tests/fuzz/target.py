"""What the fuzzer runs: any bytes give a module's worth of tensors, or the one error."""

import contextlib
import hashlib
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lightning_compress.channels.resize import sizes_of_layers
from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.arrays import inspect_compressed, onnx_model, read_arrays
from lightning_compress.lcz.artifact import load_compressed, read_tensors
from lightning_compress.lcz.codecs import CODECS, decode_symbols, encode_symbols
from lightning_compress.lcz.raw_bits import patterns

PREFIX = struct.Struct("<8sHHIQQ")
MAGIC, VERSION = b"\x89LCZ\r\n\x1a\n", 2
MOST = 1 << 22  # bytes of tensors that a run may decode


def tiny():
    """The module that files are loaded into; the seeds hold it."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    model.register_buffer("flag", torch.zeros(3, dtype=torch.bool))
    return model


def sign(header, payload):
    """A whole file around a plain header, with a right CRC-32 and SHA-256."""
    prefix = PREFIX.pack(MAGIC, VERSION, 0, zlib.crc32(header), len(header), len(header))
    body = prefix + header + payload
    return body + hashlib.sha256(body).digest()


def run(data):
    """The first byte chooses what the others are: a codec's stream, a signed or a plain file."""
    if not data:
        return
    kind, rest = data[0] % (len(CODECS) + 2), data[1:]
    with contextlib.suppress(CorruptArtifactError):
        if kind < len(CODECS):
            run_codec(list(CODECS)[kind], rest)
        elif kind == len(CODECS):
            length = int.from_bytes(rest[:2], "little")
            run_file(sign(rest[2 : 2 + length], rest[2 + length :]))
        else:
            run_file(rest)


def run_codec(codec, data):
    """Two bytes of shape, then a stream; what it decodes to must encode and decode again."""
    if len(data) < 2:
        return
    shape = (data[0] % 64, 1 + data[1] % 16, 1 + data[1] // 64)
    symbols = decode_symbols(codec, data[2:], shape, limit=4096)
    assert len(symbols) == np.prod(shape)
    again = encode_symbols(symbols, codec, shape)[1]
    assert (decode_symbols(codec, again, shape, limit=4096) == symbols).all()


def outcome(read, path):
    """What a reader gives, or the text of its error."""
    try:
        return read(path, max_bytes=MOST)
    except CorruptArtifactError as error:
        return str(error)


def check_arrays(path):
    """The two readers give the same bits, or the same error."""
    tensors, arrays = outcome(read_tensors, path), outcome(read_arrays, path)
    if isinstance(tensors, str):
        assert tensors == arrays or "holds a graph" in tensors
        return
    assert list(arrays) == list(tensors)
    for name, tensor in tensors.items():
        words = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
        if not (tensor.is_floating_point() and tensor.isnan().any()):  # casts keep no NaN's bits
            assert (words == patterns(tensor).view(np.uint8)).all(), name


def check_graphs(path):
    """A graph that is read has the size that the header says."""
    with contextlib.suppress(CorruptArtifactError):
        for name, graph in inspect_compressed(path).graphs.items():
            with contextlib.suppress(CorruptArtifactError):
                assert len(onnx_model(path, name, max_bytes=MOST)) == graph.onnx_bytes


def run_file(data):
    """Inspect, read and load a file; a module that is refused stays as it was."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.lcz")
        path.write_bytes(data)
        with contextlib.suppress(CorruptArtifactError):
            inspect_compressed(path)
        check_arrays(path)
        check_graphs(path)
        model = tiny()
        sizes = sizes_of_layers(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            load_compressed(path, model)
        except CorruptArtifactError:
            for name, value in model.state_dict().items():
                assert torch.equal(value, before[name]), name
            assert sizes_of_layers(model) == sizes
