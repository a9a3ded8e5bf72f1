"""What a file carries beside values: codebooks, activation grids, other states; streaming."""

import io
import struct
import tracemalloc

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_compress import (
    CorruptArtifactError,
    fake_quantized,
    load_compressed,
    quantize_dynamic,
    read_tensors,
    restore_compression,
    save_compressed,
    write_tensors,
)
from lightning_compress.grids import CodebookGrid
from lightning_compress.lcz import context_model, parallel
from lightning_compress.lcz.container import read_container, write_container
from lightning_compress.lcz.header import TensorRecord, read_records, write_records
from lightning_compress.lcz.restoring import STATE, pack_state
from lightning_compress.quantization.ranges import affine_grid
from lightning_compress.state import (
    ActivationGrids,
    compression_state,
    rounds_dynamically,
    set_activation_grids,
    set_grid,
)


def on_codebook(layer, centres):
    grid = CodebookGrid(torch.tensor(centres))
    layer.weight.data = grid.project(layer.weight.data)
    set_grid(layer, "weight", grid)
    return grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("centres", [[0.0, 0.5], [-0.75, -0.5, 0.0, 0.25], [-1.0, 0.0]])
def test_codebooks_come_back(tmp_path, dtype, centres):
    model = nn.Linear(20, 30).to(dtype)
    grid = on_codebook(model, centres)
    info = save_compressed(model, tmp_path / "a.lcz").per_tensor["weight"]
    assert (info.kind, info.bits) == ("grid", grid.bits)
    fresh = load_compressed(tmp_path / "a.lcz", nn.Linear(20, 30).to(dtype))
    assert torch.equal(fresh.weight, model.weight)
    assert torch.equal(compression_state(fresh).grids["weight"].centres, grid.centres)


def test_a_codebook_of_256_centres_with_0_at_either_end(tmp_path):
    for centres in (torch.arange(256.0), torch.arange(-255.0, 1.0)):
        model = nn.Linear(16, 16, bias=False)
        model.weight.data = centres[torch.randperm(256)].reshape(16, 16)
        set_grid(model, "weight", CodebookGrid(centres))
        save_compressed(model, tmp_path / "a.lcz")
        fresh = load_compressed(tmp_path / "a.lcz", nn.Linear(16, 16, bias=False))
        assert torch.equal(fresh.weight, model.weight)
        assert "weight" in compression_state(fresh).grids


@pytest.mark.parametrize("centres", [[0.5, 0.0], [0.0, float("inf")], [0.1, 0.2], [-0.0, 1.0]])
def test_codebooks_that_make_no_sense_are_not_stored(tmp_path, centres):
    model = nn.Linear(3, 3)
    model.weight.data.zero_()
    set_grid(model, "weight", CodebookGrid(torch.tensor(centres)))
    with pytest.warns(UserWarning, match="not bit for bit on its grid"):
        save_compressed(model, tmp_path / "a.lcz")


def test_activation_grids_come_back_also_from_compiled_modules(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    signed = affine_grid(torch.tensor([-0.3, 1.7]), bits=8)
    unsigned = affine_grid(torch.tensor([-0.3, 1.7]), bits=5, symmetric=False)
    set_activation_grids(model[0], ActivationGrids(input=signed, output=unsigned))
    set_activation_grids(model[1][0], ActivationGrids(output=signed))
    set_activation_grids(model, ActivationGrids(input=unsigned))
    save_compressed(torch.compile(model), tmp_path / "a.lcz")
    fresh = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    set_activation_grids(fresh[1], ActivationGrids(input=signed))  # goes: the file has none there
    load_compressed(tmp_path / "a.lcz", fresh)
    found = compression_state(fresh).activations
    assert set(found) == {"", "0", "1.0"}
    for path, pair in compression_state(model).activations.items():
        for side in ("input", "output"):
            one, other = getattr(pair, side), getattr(found[path], side)
            assert (one is None) == (other is None)
            if one is not None:
                assert vars(one).keys() == vars(other).keys()
                assert torch.equal(one.scale, other.scale)
                assert torch.equal(one.zero_point, other.zero_point)
                assert (one.bits, one.symmetric, one.axis) == (other.bits, other.symmetric, None)


def test_activation_grids_need_their_layer(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    set_activation_grids(model[1], ActivationGrids(output=affine_grid(torch.ones(1))))
    save_compressed(model, tmp_path / "a.lcz")
    with pytest.raises(CorruptArtifactError, match="does not fit the module: no layer '1'"):
        load_compressed(tmp_path / "a.lcz", nn.Sequential(nn.Linear(2, 2)))
    set_activation_grids(model[1], ActivationGrids(output=affine_grid(torch.ones(2, 2), axis=0)))
    with pytest.raises(ValueError, match="activation grid of '1' has an axis"):
        save_compressed(model, tmp_path / "a.lcz")


SCALE = struct.unpack("<I", struct.pack("<f", 0.5))[0]


@pytest.mark.parametrize(
    "entry",
    [
        [], {"0": 1}, {"0": {"x": []}}, {"0": {"i": [8, 1, 0]}}, {"0": {"i": [8, 1, 0, 0]}},
        {"0": {"i": [9, 1, 0, SCALE]}}, {"0": {"i": [8, 2, 0, SCALE]}},
        {"0": {"i": [8, 1, 5, SCALE]}}, {"0": {"i": [4, 0, 16, SCALE]}},
        {"0": {"i": [8, 0, 0, 1 << 32]}}, {"0": {"i": [8, 0, 0, 0x7F800000]}},
        {"0": {"d": 0}}, {"0": {"d": True}}, {"0": {"d": 1, "i": [8, 1, 0, SCALE]}},
        {"0": {"i": [8, 0, True, SCALE]}}, {"0": {"i": ["8", 0, 0, SCALE]}},
    ],
    ids=str,
)  # fmt: skip
def test_hostile_activations_are_refused(tmp_path, entry):
    path = tmp_path / "a.lcz"
    save_compressed(nn.Sequential(nn.Linear(2, 2)), path)
    with read_container(path, verify=True) as container:
        rows, payloads = container.header, container.read(0, container.payload_bytes)
    write_container(path, {**rows, "activations": entry}, [payloads])
    with pytest.raises(CorruptArtifactError, match="activations"):
        load_compressed(path, nn.Sequential(nn.Linear(2, 2)))


def test_keys_from_the_future_are_passed_over_only_if_they_say_so(tmp_path):
    path, model = tmp_path / "a.lcz", nn.Linear(2, 2)
    save_compressed(model, path)
    with read_container(path, verify=True) as container:
        header, payloads = container.header, container.read(0, container.payload_bytes)
    header["x-author"] = {"name": ["someone"]}
    header["tensors"][0]["x-note"] = [[1]]
    write_container(path, header, [payloads])
    assert torch.equal(load_compressed(path, nn.Linear(2, 2)).weight, model.weight)
    for change in ({"author": 1}, {"X-author": 1}):
        write_container(path, {**header, **change}, [payloads])
        with pytest.raises(CorruptArtifactError, match="unknown keys in the header"):
            load_compressed(path, model)


def test_another_state_is_stored_in_place_of_the_modules_own(tmp_path):
    model = nn.Linear(3, 2)
    save_compressed(model, tmp_path / "a.lcz", state={"bias": torch.tensor([5.0, 6.0])})
    found = read_tensors(tmp_path / "a.lcz")
    assert found["bias"].tolist() == [5, 6]
    assert torch.equal(found["weight"], model.weight)
    with pytest.raises(KeyError, match="'other' is no entry"):
        save_compressed(model, tmp_path / "a.lcz", state={"other": torch.ones(2)})


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_workers_and_streams_make_no_difference(tmp_path, workers, stream):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(6)), nn.BatchNorm1d(30))
    model[3].weight = model[1].weight
    model[2].weight.data = model[1].weight.data  # one memory, two parameters
    save_compressed(model, tmp_path / "one.lcz")
    save_compressed(model, tmp_path / "a.lcz", workers=workers)
    assert (tmp_path / "a.lcz").read_bytes() == (tmp_path / "one.lcz").read_bytes()
    fresh = nn.Sequential(*(nn.Linear(30, 30) for _ in range(6)), nn.BatchNorm1d(30))
    load_compressed(tmp_path / "a.lcz", fresh, stream=stream, workers=workers)
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])
    with pytest.raises(ValueError, match="workers=0"):
        save_compressed(model, tmp_path / "a.lcz", workers=0)


def test_a_stream_needs_the_memory_of_one_tensor(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(200, 200, bias=False) for _ in range(12)))
    for layer in model:
        layer.weight.data = layer.weight.data.mul(200).round()  # so few values need no time
    save_compressed(model, tmp_path / "a.lcz", "raw")
    one = 200 * 200 * 4
    peaks = {}
    for stream in (True, False):
        tracemalloc.start()
        load_compressed(tmp_path / "a.lcz", model, stream=stream)
        peaks[stream] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[True] < 10 * one  # decoding itself works on 64-bit numbers
    assert peaks[False] > peaks[True] + 8 * one


def test_tensors_without_a_module(tmp_path):
    tensors = {"a": torch.arange(10), "_orig_mod.b": torch.randn(3).half()}
    write_tensors(tensors, tmp_path / "a.lcz", "fast")
    found = read_tensors(tmp_path / "a.lcz")
    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with pytest.raises(TypeError, match="'s' is no dense tensor"):
        write_tensors({"s": torch.ones(2).to_sparse()}, tmp_path / "a.lcz")


def test_lengths_past_32_bits_are_whole_numbers_like_any_other():
    shape = (3, 1 << 31)
    payload = (1 << 33) + 5
    record = TensorRecord("huge", shape, "float32", packing="bytes", aux_bytes=payload)
    read = read_records(write_records([record]), payload, payload + 100)
    assert read[0].elements == 3 << 31
    assert read[0].payload_bytes == payload
    view = context_model.View(3, 1 << 16, 1 << 15)
    assert list(view.slabs()) == [(i << 31, (i + 1) << 31) for i in range(3)]
    keys = list(context_model.View(2, 1 << 31, 1).keys(torch.tensor([(1 << 32) - 1]).numpy(), [0]))
    assert keys[0].tolist() == [1]


def test_a_sparse_file_past_4_gib_is_read_where_it_should_be(tmp_path):
    path, far = tmp_path / "a.lcz", (1 << 32) + 7
    write_container(path, {"tensors": []}, [])
    with read_container(path, verify=False) as container:
        start = container.payload_start
    with path.open("r+b") as stream:
        stream.seek(start + far)
        stream.write(b"here" + bytes(32))
    with read_container(path, verify=False) as container:
        assert container.payload_bytes == far + 4
        assert container.read(far, 4) == b"here"


def test_large_tensors_are_coded_slab_by_slab(tmp_path, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randint(-3, 4, (50, 30, 3)) * (torch.rand(50, 1, 1) < 0.4)
    sizes = {}
    for slab in (1 << 22, 1500):
        monkeypatch.setattr(context_model, "SLAB", slab)
        sizes[slab] = write_tensors({"w": weight}, tmp_path / "a.lcz", "context").bytes
        assert torch.equal(read_tensors(tmp_path / "a.lcz")["w"], weight)
    assert sizes[1 << 22] < sizes[1500] * 1.05


def test_a_bar_shows_only_past_a_second(monkeypatch):
    for patience, drawn in ((1.0, False), (0.0, True)):
        monkeypatch.setattr(parallel, "PROGRESS_DELAY", patience)
        stream = io.StringIO()
        screen = Console(file=stream, force_terminal=True, width=60)
        assert list(parallel.with_progress("abc", [1, 2, 3], "encoding", screen)) == ["a", "b", "c"]
        assert ("encoding" in stream.getvalue()) is drawn


def test_a_dynamically_rounding_layer_is_one_again(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    quantize_dynamic(model, exclude="2")
    save_compressed(model, tmp_path / "a.lcz")
    fresh = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    quantize_dynamic(fresh)  # what it was before is no longer said
    load_compressed(tmp_path / "a.lcz", fresh)
    checkpoint = {"state_dict": model.state_dict(), STATE: pack_state(compression_state(model))}
    other = restore_compression(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), checkpoint
    )
    x = torch.randn(3, 4)
    for found in (fresh, other):
        assert [rounds_dynamically(layer) for layer in found] == [True, False, False]
        with fake_quantized(model), fake_quantized(found):
            assert torch.equal(model(x), found(x))
