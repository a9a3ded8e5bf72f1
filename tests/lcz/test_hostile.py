"""Damaged and hostile files: one error class, no change to the module, no allocation."""

import contextlib
import copy
import hashlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.arrays import inspect_compressed
from lightning_compress.lcz.artifact import load_compressed, save_compressed
from lightning_compress.lcz.container import read_container, write_container
from lightning_compress.lcz.raw_bits import patterns
from lightning_compress.quantization.ranges import affine_grid
from lightning_compress.state import compression_state, set_grid

PREFIX = 32


def build():
    """A tensor of each kind: grid, codebook, mask, plain, coded planes, tied."""
    torch.manual_seed(0)
    model = nn.Module()
    model.lin = nn.Linear(8, 6)
    model.lin.weight.data[model.lin.weight.abs() < 0.2] = 0
    grid = affine_grid(model.lin.weight, bits=3, symmetric=False, axis=0)
    model.lin.weight.data = grid.project(model.lin.weight.data)
    set_grid(model.lin, "weight", grid)
    model.again = model.lin
    model.register_buffer("few", torch.randint(0, 4, (30,)) * 0.3)
    model.register_buffer("sparse", torch.randn(90).masked_fill(torch.rand(90) < 0.9, 0))
    model.register_buffer("planes", 1 + torch.rand(60) / 50)
    return model


@pytest.fixture
def saved(tmp_path):
    model = build()
    path = tmp_path / "a.lcz"
    info = save_compressed(model, path)
    kinds = [tensor.kind for tensor in info.per_tensor.values()]
    assert kinds == ["codebook", "mask", "plain", "grid", "plain", "tied", "tied"]
    assert info.per_tensor["planes"].codec == "coded"
    return path, model, info


@contextlib.contextmanager
def bounded_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()


def refuse(path, module):
    """Loading must raise the one error and leave the module as it was."""
    before = copy.deepcopy(module)
    with pytest.raises(CorruptArtifactError) as caught:
        load_compressed(path, module)
    for one, other in zip(before.state_dict().values(), module.state_dict().values(), strict=True):
        assert (patterns(one) == patterns(other)).all()
    assert list(compression_state(before).grids) == list(compression_state(module).grids)
    return str(caught.value)


def test_every_truncation_is_refused(saved):
    path, model, _ = saved
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        for call in (inspect_compressed, lambda path: load_compressed(path, model)):
            with pytest.raises(CorruptArtifactError):
                call(path)
    path.write_bytes(data + b"\0")
    refuse(path, model)


def test_every_flipped_bit_is_refused(saved):
    path, model, info = saved
    data = bytearray(path.read_bytes())
    assert len(data) < 1200
    with path.open("r+b", buffering=0) as stream:
        for at in range(len(data)):
            for bit in range(8):
                stream.seek(at)
                stream.write(bytes([data[at] ^ 1 << bit]))
                with pytest.raises(CorruptArtifactError):
                    load_compressed(path, model)
            in_header = at < info.header_bytes - 32
            if in_header:
                with pytest.raises(CorruptArtifactError):
                    inspect_compressed(path)
            else:
                assert inspect_compressed(path) == info
            stream.seek(at)
            stream.write(bytes([data[at]]))
    load_compressed(path, model)


def sign(data, header_length):
    """Gives a changed file a right CRC-32 and SHA-256."""
    header = data[PREFIX : PREFIX + header_length]
    struct.pack_into("<I", data, 12, zlib.crc32(header))
    return bytes(data[:-32]) + hashlib.sha256(data[:-32]).digest()


def test_signed_damage_gives_the_one_error_or_a_whole_module(saved):
    path, model, info = saved
    data = path.read_bytes()
    header_length = info.header_bytes - PREFIX - 32
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for at in range(PREFIX, len(data) - 32):
        for value in (data[at] ^ 1 << int(rng.integers(8)), int(rng.integers(256))):
            changed = bytearray(data)
            changed[at] = value
            path.write_bytes(sign(changed, header_length))
            try:
                load_compressed(path, model)
            except CorruptArtifactError:
                outcomes[False] += 1
            else:
                outcomes[True] += 1
    assert min(outcomes.values()) > 100  # plain values may change, all else is mostly refused


def rewrite(path, change, payload=None):
    """Changes the header (and the payloads) and signs the file anew."""
    with read_container(path, verify=True) as container:
        header, payloads = container.header, container.read(0, container.payload_bytes)
    rows = {row["n"]: row for row in header["tensors"]}
    change(header, rows)
    write_container(path, header, [payloads if payload is None else payload(payloads)])


def field(name, **values):
    def change(_, rows):
        rows[name].update(values)

    return change


def without(name, *keys):
    def change(_, rows):
        for key in keys:
            del rows[name][key]

    return change


HUGE = 1 << 40
HEADERS = {
    "no list": (lambda header, _: header.update(tensors={}), "does not list"),
    "more keys": (lambda header, _: header.update(more=1), "unknown keys"),
    "row of text": (lambda header, _: header["tensors"].append("few"), "holds no tensor"),
    "unknown field": (field("few", x=1), "holds no tensor"),
    "no name": (without("few", "n"), "holds no tensor"),
    "twice": (lambda header, _: header["tensors"].append(header["tensors"][0]), "twice"),
    "negative shape": (field("few", s=[-30]), "shape"),
    "shape of text": (field("few", s="30"), "shape"),
    "shape of bool": (field("few", s=[True]), "shape"),
    "nested shape": (field("few", s=[[30]]), "shape"),
    "65 axes": (field("few", s=[1] * 65), "shape"),
    "huge axis": (field("few", s=[1 << 60]), "shape"),
    "huge shape": (field("few", s=[HUGE, HUGE]), "elements in a file of"),
    "bomb": (field("few", s=[HUGE]), "elements in a file of"),
    "other shape": (field("few", s=[31]), "does not fit the module"),
    "large shape": (field("few", s=[1 << 30]), "does not fit the module"),
    "dtype": (field("few", d="object"), "unknown dtype"),
    "dtype of number": (field("few", d=3), "dtype"),
    "stored": (field("few", f="pickle"), "unknown dtype"),
    "stored as whole": (field("few", f="int8"), "cannot be stored as int8"),
    "kind": (field("few", k="pickle"), "unknown kind"),
    "codec": (field("few", c="zip"), "do not fit kind 'codebook'"),
    "packing": (field("planes", p="gzip"), "do not fit kind 'plain'"),
    "no packing": (without("sparse", "p"), "do not fit kind 'mask'"),
    "plain with codec": (field("planes", c="raw"), "do not fit kind 'plain'"),
    "grid on a codebook": (field("few", q=[3, 0]), "do not fit kind 'codebook'"),
    "no grid": (without("lin.weight", "q"), "do not fit kind 'grid'"),
    "grid of 9 bits": (field("lin.weight", q=[9, 0, 0]), "grid"),
    "grid symmetry": (field("lin.weight", q=[3, 2, 0]), "grid"),
    "grid axis": (field("lin.weight", q=[3, 0, 2]), "axis 2 of 2"),
    "grid of 4 numbers": (field("lin.weight", q=[3, 0, 0, 0]), "grid"),
    "grid without axis": (field("lin.weight", q=[3, 0]), "lin.weight"),
    "grid of fewer bits": (field("lin.weight", q=[2, 0, 0]), "outside it"),
    "zeros": (field("few", z=31), "31 zeros among 30"),
    "entropy": (field("few", e=HUGE), "do not fit kind 'codebook'"),
    "negative length": (field("few", l=-1), "symbol_bytes"),
    "huge length": (field("few", l=1 << 52), "payloads of"),
    "tied to none": (field("again.weight", t="none"), "no stored tensor"),
    "tied to itself": (field("again.weight", t="again.weight"), "no stored tensor"),
    "tied to tied": (field("again.weight", t="again.bias"), "no stored tensor"),
    "tied to other": (field("again.weight", t="few"), "tied to 'few', which is float32"),
    "tied grid": (field("again.weight", q=[4, 0, 0]), "a payload or grid of its own"),
    "tied plain": (field("planes", t="few"), "unknown kind"),
    "extra tensor": (
        lambda header, _: header["tensors"].append(
            {"n": "\ud800", "s": [0], "d": "bool", "p": "bytes"}
        ),
        "unexpected in the file: '\\ud800'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(HEADERS))
def test_hostile_headers_are_refused(saved, case):
    path, model, _ = saved
    change, why = HEADERS[case]
    rewrite(path, change)
    with bounded_memory():
        message = refuse(path, model)
    assert why in message
    assert str(path) in message


def test_inspect_refuses_a_bomb_too(saved):
    path, _, _ = saved
    rewrite(path, field("few", s=[HUGE]))
    with pytest.raises(CorruptArtifactError, match="above 16777216 a byte"):
        inspect_compressed(path)


def test_payload_lengths_must_fill_the_file(saved):
    path, model, _ = saved
    whole = path.read_bytes()
    for payload in (lambda data: data + b"x", lambda data: data[:-1]):
        path.write_bytes(whole)
        rewrite(path, lambda *_: None, payload)
        assert "payloads of" in refuse(path, model)
        with pytest.raises(CorruptArtifactError):
            inspect_compressed(path)


def scale_at(info):
    """Where the grid's payload starts: after those of few, sparse and planes."""
    return sum(info.per_tensor[name].bytes for name in ("few", "sparse", "planes"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 0.0])
def test_scales_must_be_finite_and_positive(saved, value):
    path, model, info = saved

    def payload(data):
        start = scale_at(info) + 6  # behind six zero points
        return data[:start] + struct.pack("<f", value) + data[start + 4 :]

    rewrite(path, lambda *_: None, payload)
    assert "'lin.weight': a grid with a scale" in refuse(path, model)


def test_zero_points_must_lie_on_the_grid(saved):
    path, model, info = saved

    def payload(data):
        start = scale_at(info)
        return data[:start] + b"\xff" + data[start + 1 :]

    rewrite(path, lambda *_: None, payload)
    assert "'lin.weight': a grid with a zero point outside it" in refuse(path, model)


def test_symbols_must_lie_on_the_grid(tmp_path):
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[-3.0, 0.0, 1.0, 3.0]])
    set_grid(model, "weight", affine_grid(model.weight, bits=3))
    save_compressed(model, tmp_path / "a.lcz", "raw")
    for bits, why in ((4, None), (2, "a symbol outside its grid of 2 bits")):
        rewrite(tmp_path / "a.lcz", field("weight", q=[bits, 1]))
        if why is None:
            load_compressed(tmp_path / "a.lcz", model)
        else:
            assert why in refuse(tmp_path / "a.lcz", model)


def test_a_bool_is_0_or_1(tmp_path):
    model = nn.Module()
    model.register_buffer("flag", torch.tensor([True, False, True]))
    save_compressed(model, tmp_path / "a.lcz", "raw")
    row = {"n": "flag", "s": [3], "d": "bool", "p": "bytes", "a": 3}
    write_container(tmp_path / "a.lcz", {"tensors": [row]}, [b"\1\2\0"])
    assert "'flag': a bool of 2" in refuse(tmp_path / "a.lcz", model)


def test_a_bomb_in_a_payload_is_not_inflated(tmp_path):
    model = nn.Linear(30, 30, bias=False)
    bomb = zlib.compress(bytes(200 << 20))
    row = {"n": "weight", "s": [30, 30], "d": "float32", "p": "planes", "a": len(bomb)}
    write_container(tmp_path / "a.lcz", {"tensors": [row]}, [bomb])
    with bounded_memory():
        assert "do not hold just 3600 bytes" in refuse(tmp_path / "a.lcz", model)


def test_other_files_are_refused(tmp_path):
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "a.pt")
    for call in (inspect_compressed, lambda path: load_compressed(path, nn.Linear(1, 1))):
        with pytest.raises(CorruptArtifactError, match="its first bytes differ"):
            call(tmp_path / "a.pt")
