"""The file is what docs/format.md says: a decoder written from it agrees; old files load."""

import hashlib
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress import (
    compression_state,
    inspect_compressed,
    load_compressed,
    read_tensors,
    save_compressed,
)
from lightning_compress.errors import CorruptArtifactError
from lightning_compress.grids import AffineGrid, CodebookGrid
from lightning_compress.lcz import context_model, raw_bits
from lightning_compress.lcz.codecs import CODECS, encode_symbols
from lightning_compress.lcz.raw_bits import (
    DTYPES,
    _code_plane,
    _entropy,
    pack_patterns,
    patterns,
    unpack_patterns,
)
from lightning_compress.quantization.ranges import affine_grid
from lightning_compress.quantization.rate_distortion import octave_steps
from lightning_compress.state import ActivationGrids, set_activation_grids, set_grid

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"

spec = importlib.util.spec_from_file_location("reference_decoder", HERE / "reference_decoder.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)


@pytest.mark.parametrize("codec", list(CODECS))
@given(
    shape=st.sampled_from([(0,), (1,), (40,), (30, 12), (9, 5, 3, 3), (27, 10), (2, 600)]),
    alphabet=st.sampled_from([1, 2, 16, 500, 4096]),
    sparsity=st.sampled_from([0.0, 0.8, 0.99]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=8, deadline=None)
def test_the_reference_decoder_reads_every_codec(codec, shape, alphabet, sparsity, seed):
    rng = np.random.default_rng(seed)
    symbols = (alphabet * rng.random(math.prod(shape)) ** 3).astype(np.uint16)
    symbols[rng.random(len(symbols)) < sparsity] = 0
    data = encode_symbols(symbols, codec, shape)[1]
    assert reference.decode(codec, data, list(shape)) == symbols.tolist()


@pytest.mark.parametrize("style", ["coded", "planes", "bytes"])
def test_the_reference_decoder_reads_every_packing(style):
    torch.manual_seed(0)
    values = {
        "coded": 1 + torch.randn(300) / 9,
        "planes": torch.rand(40).repeat(10),
        "bytes": torch.randint(-(1 << 31), 1 << 31, (40,)).int(),
    }
    bits = patterns(values[style])
    packing, data = pack_patterns(bits)
    assert packing == style
    assert reference.unpack(packing, data, len(bits), 4) == bits.tolist()


@given(
    steps=st.lists(st.integers(-126 * 16, 16 * 128 - 1), min_size=1, max_size=60),
    spread=st.sampled_from([1, 30, 255]),
)
@settings(max_examples=60, deadline=None)
def test_sixteenths_of_an_octave_are_a_byte_or_less_each(steps, spread):
    near = [max(steps[0], -126 * 16) + (step - steps[0]) % (spread + 1) for step in steps]
    near = [min(step, 16 * 128 - 1) for step in near]
    bits = np.exp2(np.array(near, np.float64) / 16).astype(np.float32).view("<u4")
    packing, data = pack_patterns(bits)
    assert packing == "octaves" or len(data) < len(near)
    data = raw_bits._pack_octaves(bits)
    assert len(data) <= 2 + (len(bits) > 1) * (1 + len(bits))
    assert unpack_patterns("octaves", data, len(bits), 4).tolist() == bits.tolist()
    assert reference.unpack("octaves", data, len(bits), 4) == bits.tolist()


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0\0", b"\xff\x7f", b"\x00\x80", b"\0\0\0\1\2\3"])
@pytest.mark.parametrize("count", [1, 2])
def test_damaged_octaves_are_refused(data, count):
    with pytest.raises(CorruptArtifactError):
        unpack_patterns("octaves", data, count, 4)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.1, math.inf, math.nan, 1e-40])
def test_what_is_no_sixteenth_of_an_octave_is_packed_as_it_is(value):
    bits = np.array([1.0, value], np.float32).view("<u4")
    packing, data = pack_patterns(bits)
    assert packing != "octaves"
    assert unpack_patterns(packing, data, 2, 4).tolist() == bits.tolist()


def test_the_steps_that_training_finds_are_such():
    scale = octave_steps(torch.rand(300) / 100)
    assert pack_patterns(patterns(scale))[0] == "octaves"


@given(
    style=st.sampled_from(["steps", "floats", "near one", "runs", "bytes"]),
    count=st.sampled_from([1, 40, 3000]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_forms_that_are_not_tried_would_not_have_been_the_smallest(style, count, seed):
    rng = np.random.default_rng(seed)
    values = {
        "steps": rng.integers(-3, 4, count) * (rng.random(count) < 0.2) / 8,
        "floats": rng.standard_normal(count),
        "near one": 1 + rng.standard_normal(count) / 99,
        "runs": np.repeat(rng.standard_normal(count), 5),
        "bytes": rng.integers(0, 9, count),
    }[style]
    bits = patterns(torch.from_numpy(values.astype(np.float32)))
    planes = bits.view(np.uint8).reshape(-1, 4).T
    coded = b"".join(_code_plane(plane, _entropy(plane)) for plane in planes)
    packing, data = pack_patterns(bits)
    assert len(data) <= len(coded)
    assert pack_patterns(bits, most=len(data) + 1) == (packing, data)


def test_no_entry_of_the_rounded_tables_is_near_a_half():
    fractions = 256 * np.log2(1 + np.arange(1024) / 1024)
    chances = (1 << 20) / (1 + np.exp2(-np.arange(-4096, 4097) / 256))
    for values in (fractions, chances):
        assert np.abs(values % 1 - 0.5).min() > 1e-6
    assert (context_model.probability(np.arange(-4096, 4097)) * (1 << 20) == np.rint(chances)).all()
    numbers = [1, 2, 3, 1023, 1024, 1025, 2047, 4095, 4097, (1 << 52) - 1, 1 << 52]
    assert context_model.log2_256(np.array(numbers)).tolist() == [reference.log(n) for n in numbers]


def everything():
    """Every kind, codec choice and dtype that the format has."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(18, 6))
    model.append(nn.Linear(6, 6, bias=False))
    model.append(model[4])
    with torch.no_grad():
        model[0].weight.mul_(torch.rand_like(model[0].weight) < 0.5)
        grids = {
            0: affine_grid(model[0].weight, bits=4, axis=0),
            3: affine_grid(model[3].weight, bits=3, symmetric=False),
            4: CodebookGrid(torch.tensor([-0.25, -0.125, 0.0, 0.375])),
        }
        for index, grid in grids.items():
            model[index].weight.copy_(grid.project(model[index].weight))
            set_grid(model[index], "weight", grid)
    unsigned = affine_grid(torch.tensor([-1.0, 2.0]), symmetric=False)
    set_activation_grids(model[3], ActivationGrids(unsigned, affine_grid(torch.tensor([2.0]))))
    for name, dtype in ((name, getattr(torch, name)) for name in DTYPES):
        bits = torch.randint(0, 2 if name == "bool" else 256, (6 * dtype.itemsize,))
        model.register_buffer(f"of_{name}", bits.to(torch.uint8).view(dtype))
    model.register_buffer("few", torch.randint(-2, 3, (50,)) / 4)
    model.register_buffer("sparse", torch.randn(99).masked_fill(torch.rand(99) < 0.8, -0.0))
    model.register_buffer("empty", torch.zeros(3, 0))
    model.register_buffer("scalar", torch.tensor(3.5))
    return model


def blank():
    model = everything()
    for value in model.state_dict().values():
        value.zero_()
    return model


def digests(model):
    """What a golden file's module must look like, as text that is kept beside it."""
    state = {name: patterns(value).tobytes() for name, value in model.state_dict().items()}
    known = compression_state(model)
    for name, grid in known.grids.items():
        parts = [grid.scale, grid.zero_point] if isinstance(grid, AffineGrid) else [grid.centres]
        state[f"grid of {name}"] = b"".join(patterns(part).tobytes() for part in parts)
    for path, pair in known.activations.items():
        for side in (pair.input, pair.output):
            state[f"{path} {side.bits} {side.symmetric}"] = patterns(side.scale).tobytes()
    return {name: hashlib.sha256(data).hexdigest()[:16] for name, data in state.items()}


@pytest.mark.parametrize("codec", ["auto", "fast", *CODECS])
def test_the_reference_decoder_reads_whole_files(tmp_path, codec):
    model = everything()
    save_compressed(model, tmp_path / "a.lcz", codec)
    rows = reference.read_file((tmp_path / "a.lcz").read_bytes())
    found = read_tensors(tmp_path / "a.lcz")
    assert set(rows) == set(found) == set(model.state_dict())
    for name, row in rows.items():
        if "words" in row:
            assert row["words"] == patterns(found[name]).tolist(), name
        elif "steps" in row:
            value = found[name].reshape(-1)
            middle = row["floats"].index(0.0) if len(row["q"]) == 1 else 0
            along = math.prod(row["s"][1:]) if len(row["q"]) == 3 else math.inf
            for at, step in enumerate(row["steps"]):
                scale = row["floats"][int(at // along)]
                right = row["floats"][middle + step] if len(row["q"]) == 1 else step * scale
                assert np.float32(right) == value[at]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.lcz")), ids=lambda path: path.stem)
def test_golden_files_stay_readable(path):
    model = load_compressed(path, blank())
    assert digests(model) == json.loads(path.with_suffix(".json").read_text())


def test_a_golden_file_of_octaves_stays_readable():
    """Made once, when the packing came."""
    found = read_tensors(GOLDEN / "packings" / "octaves.lcz")["weight"]
    scale = octave_steps(torch.exp(torch.linspace(-6, -4, 24)))
    steps = torch.arange(24 * 7).reshape(24, 7) % 5 - 2
    assert torch.equal(found, steps * scale[:, None])
    assert inspect_compressed(GOLDEN / "packings" / "octaves.lcz").per_tensor["weight"].bytes < 120


def test_there_are_golden_files_of_this_version():
    assert {path.stem.split("_")[0] for path in GOLDEN.glob("*.lcz")} == {"v2"}
    assert {path.stem.split("_", 1)[1] for path in GOLDEN.glob("v2_*.lcz")} == {"auto", *CODECS}


if __name__ == "__main__":  # made once for each version, never again
    GOLDEN.mkdir(exist_ok=True)
    for choice in ("auto", *CODECS):
        made = everything()
        save_compressed(made, GOLDEN / f"v2_{choice}.lcz", choice)
        text = json.dumps(digests(made), indent=1)
        (GOLDEN / f"v2_{choice}.json").write_text(text + "\n")
