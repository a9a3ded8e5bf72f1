"""Files that were made to do harm: re-signed headers, bombs, channel records that lie."""

import copy
import os
import time

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.channels.resize import match_channels, sizes_of_layers
from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz import context
from lightning_compress.lcz.artifact import (
    inspect_compressed,
    load_compressed,
    read_tensors,
    save_compressed,
    write_tensors,
)
from lightning_compress.lcz.bits import varint
from lightning_compress.lcz.container import read_container, write_container
from lightning_compress.lcz.raw_bits import unpack_patterns
from lightning_compress.state import RemovedChannels, note_removed, removed_channels


def net(width=8):
    """A module whose layers lose channels, and some that have none to lose."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.InstanceNorm2d(width),
        nn.Conv2d(width, 2, 3),
        nn.LayerNorm(6),
        nn.Embedding(6, 4),
    )


CUT = {
    "0.weight": (4, 1, 3, 3), "0.bias": (4,), "1.weight": (4,), "1.bias": (4,),
    "1.running_mean": (4,), "1.running_var": (4,), "3.weight": (2, 4, 3, 3),
}  # fmt: skip


@pytest.fixture
def cut(tmp_path):
    """A file of a module that lost half of its channels."""
    module = net()
    shapes = {name: tuple(module.state_dict()[name].shape) for name in CUT}
    match_channels(module, CUT)
    module[2].num_features = 4
    note_removed(module, RemovedChannels(shapes, {"2": 4}, {"0": (0, 2, 4, 6)}))
    save_compressed(module, tmp_path / "a.lcz", "raw")
    return tmp_path / "a.lcz"


def header_of(path):
    with read_container(path, verify=True) as container:
        return container.header, container.read(0, container.payload_bytes)


def resign(path, change):
    header, payload = header_of(path)
    change(header, {row["n"]: row for row in header["tensors"]})
    write_container(path, header, [payload])


def write_header(path, rows, payload=b"", **more):
    write_container(path, {"tensors": rows, **more}, [payload])


def refuse(path, module, **options):
    """The one error; shapes, values, gradients and what layers know of their sizes stay."""
    for one in module.parameters():
        one.grad = torch.ones_like(one)
    before, sizes = copy.deepcopy(module.state_dict()), sizes_of_layers(module)
    places = {name: one.data_ptr() for name, one in module.state_dict().items()}
    with pytest.raises(CorruptArtifactError) as caught:
        load_compressed(path, module, **options)
    assert sizes_of_layers(module) == sizes
    assert not removed_channels(module)
    for name, one in module.state_dict().items():
        assert torch.equal(one, before[name]), name
        assert one.data_ptr() == places[name], name
    assert all(one.grad is not None and one.grad.shape == one.shape for one in module.parameters())
    return str(caught.value)


def test_a_file_that_lost_channels_fills_a_module_of_full_size(cut):
    module = load_compressed(cut, net())
    assert tuple(module[0].weight.shape) == (4, 1, 3, 3)
    assert module[2].num_features == 4
    assert removed_channels(module).kept == {"0": (0, 2, 4, 6)}
    again = load_compressed(cut, module)  # which is small already
    assert again[1].num_features == 4


def entry(part, name, value):
    return lambda header, _: header["x-channels"][part].__setitem__(name, value)


def shape(name, size, full=None):
    def change(header, rows):
        rows[name]["s"] = list(size)
        if full is not None:
            header["x-channels"]["tensors"][name] = list(full)

    return change


def both(*changes):
    def change(header, rows):
        for one in changes:
            one(header, rows)

    return change


CHANNELS = {
    "a BatchNorm's features": (entry("layers", "1", 3), "'1', a BatchNorm2d"),
    "a Conv2d's features": (entry("layers", "0", 3), "'0', a Conv2d"),
    "the root's features": (entry("layers", "", 3), "'', a Sequential"),
    "more features than there are": (entry("layers", "2", 9), "9 channels"),
    "no feature": (entry("layers", "2", 0), "0 channels"),
    "a layer that is not there": (entry("layers", "7", 3), "no layer '7'"),
    "what stays of no layer": (entry("kept", "7.x", [0, 1]), "no layer '7.x'"),
    "more stays than there is": (entry("kept", "0", [0, 1 << 20]), "channels kept"),
    "more than any model has": (entry("kept", "0", [0, 1 << 25]), "more channels"),
    "a tensor that is not there": (entry("tensors", "7.weight", [8]), "no tensor '7.weight'"),
    "other axes": (entry("tensors", "0.bias", [8, 1]), "'0.bias' of (4,)"),
    "grown": (entry("tensors", "0.bias", [3]), "'0.bias' of (4,)"),
    "no shape": (entry("tensors", "0.bias", None), "x-channels"),
    "sizes that do not fit": (shape("0.bias", (2,)), "0: bias has 2 entries, not 4"),
    "sizes of two layers' own": (shape("1.weight", (2,)), "1: bias has 4 entries, not 2"),
    "a kernel's axis": (shape("3.weight", (2, 8, 3, 2), (2, 8, 3, 3)), "a Conv2d are no channels"),
    "rows of an embedding": (shape("5.weight", (3, 8), (6, 4)), "'5.weight'"),
    "an embedding's words": (shape("5.weight", (3, 4), (6, 4)), "rows of an Embedding"),
    "a layer without channels": (shape("4.weight", (3,), (6,)), "a LayerNorm loses no channels"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CHANNELS))
def test_channel_records_that_lie_are_refused_before_anything_is_cut(cut, case):
    change, why = CHANNELS[case]
    header, payload = header_of(cut)
    rows = {row["n"]: row for row in header["tensors"]}
    change(header, rows)
    fill(rows)
    payload = b"".join(bytes(row.get("a", 0) + row.get("l", 0)) for row in header["tensors"])
    write_container(cut, header, [payload])
    message = refuse(cut, net())
    assert why in message


NEIGHBOURS = {
    "outputs cut, the next layer's inputs not": (
        {"0.weight": (3, 1, 3, 3), "0.bias": (3,)}, "1 takes 4 channels, 0 makes 3"
    ),
    "inputs cut, the layer before not": ({"3.weight": (2, 3, 3, 3)}, "3 takes 3 channels, 0 makes"),
    "a norm's features": (
        {f"1.{name}": (2,) for name in ("weight", "bias", "running_mean", "running_var")},
        "1 takes 2 channels, 0 makes 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", list(NEIGHBOURS))
def test_channel_records_of_layers_that_do_not_fit_each_other_are_refused(cut, case, stream):
    shapes, why = NEIGHBOURS[case]
    header, _ = header_of(cut)
    rows = {row["n"]: row for row in header["tensors"]}
    for name, size in shapes.items():
        rows[name]["s"] = list(size)
    fill(rows)
    write_container(cut, header, [b"".join(bytes(row["a"]) for row in header["tensors"])])
    assert why in refuse(cut, net(), stream=stream)


def test_the_size_of_a_norm_without_tensors_is_compared_with_its_neighbours(cut):
    resign(cut, entry("layers", "2", 3))
    assert "2 takes 3 channels, 0 makes 4" in refuse(cut, net())


def fill(rows):
    """Plain bytes, as many as the changed shapes take: nothing else is wrong with the file."""
    for row in rows.values():
        elements = torch.Size(row["s"]).numel() if all(type(n) is int for n in row["s"]) else 0
        size = elements * (8 if row["d"] == "int64" else 4)
        for key in set(row) - {"n", "s", "d"}:
            del row[key]
        row.update(p="bytes", a=size)


def test_layers_that_fit_alone_and_not_together_leave_the_module_whole(cut):
    header, _ = header_of(cut)
    rows = {row["n"]: row for row in header["tensors"]}
    rows["0.bias"]["s"] = [3]  # a part of the shape it had, but not what the weight makes
    fill(rows)
    payload = b"".join(bytes(row["a"]) for row in header["tensors"])
    write_container(cut, header, [payload])
    for stream in (False, True):
        module = net()
        with pytest.raises(CorruptArtifactError, match="do not fit together"):
            load_compressed(cut, module, stream=stream)
        assert tuple(module[0].bias.shape) == (8,)
        assert module[0].out_channels == 8
        module[:2](torch.zeros(2, 1, 8, 8))


def test_what_stays_of_channels_is_not_expanded_by_who_only_looks(tmp_path):
    path = tmp_path / "a.lcz"
    kept = {str(layer): [0, 1 << 24] for layer in range(4)}
    write_header(path, [], **{"x-channels": {"tensors": {}, "layers": {}, "kept": kept}})
    start = time.process_time()
    with pytest.raises(CorruptArtifactError, match="more channels"):
        inspect_compressed(path)
    kept = {"0": [0, (1 << 24) - 1]}
    write_header(path, [], **{"x-channels": {"tensors": {}, "layers": {}, "kept": kept}})
    assert inspect_compressed(path).per_tensor == {}
    assert time.process_time() - start < 0.5


ZERO = {"d": "float32", "p": "bytes"}
SCALES = {"d": "float32", "k": "grid", "c": "raw", "p": "coded", "q": [4, 1, 0], "a": 9}
SHAPES = {
    "scales along another axis": ([1 << 45, 0], SCALES),
    "empty": ([1 << 45, 0], ZERO),
    "lengths that overflow": ([1 << 40, 0, 1 << 40], ZERO),
    "many axes": ([0] + [1 << 52] * 40, ZERO),
}


@pytest.mark.parametrize("case", list(SHAPES))
@pytest.mark.parametrize("call", [inspect_compressed, read_tensors])
def test_an_empty_axis_hides_no_bomb(tmp_path, case, call):
    size, rest = SHAPES[case]
    path = tmp_path / "a.lcz"
    write_header(path, [{"n": "a", "s": size, **rest}], bytes(rest.get("a", 0)))
    with pytest.raises(CorruptArtifactError, match=r"'a'.* elements in a file of"):
        call(path)


def test_many_tensors_count_together(tmp_path):
    path = tmp_path / "a.lcz"
    most = 1 << 31  # allowed of one tensor in a file of this size
    rows = [{"n": str(at), "s": [most], "d": "bool", "k": "mask", "c": "raw", "p": "bytes"}
            for at in range(400)]  # fmt: skip
    write_header(path, rows)
    with pytest.raises(CorruptArtifactError, match="all tensors: "):
        inspect_compressed(path)


def test_the_bound_on_what_is_read_counts_the_memory_of_decoding(tmp_path):
    path = tmp_path / "a.lcz"
    info = write_tensors({"a": torch.zeros(1 << 22, dtype=torch.bool)}, path, "context")
    assert info.bytes < 300
    with pytest.raises(CorruptArtifactError, match="bytes to decode them, above max_bytes=8388608"):
        read_tensors(path, max_bytes=1 << 23)
    assert len(read_tensors(path, max_bytes=1 << 30)["a"]) == 1 << 22


HEADS = {
    "counts of every pair of axes": varint(4) + varint(1 << 18) + bytes([11, *[63, *[1] * 6] * 24]),
    "one slab": varint(1 << 24) + varint(1) + bytes([11]),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_contexts_that_a_stream_asks_for_count(tmp_path, head):
    path, count, most = tmp_path / "a.lcz", 1 << 24, 1 << 30
    plain = context.encode(np.zeros(count, np.uint16), (count,))
    assert context.decode_memory(plain, (count,)) < most < context.decode_memory(head, (count,))
    row = {"n": "a", "s": [count], "d": "uint8", "k": "codebook", "c": "context", "a": 2}
    write_container(path, {"tensors": [{**row, "l": len(head)}]}, [bytes(2), head])
    with pytest.raises(CorruptArtifactError, match="to decode them, above max_bytes"):
        read_tensors(path, max_bytes=most)


def test_a_damaged_head_of_contexts_names_its_tensor(tmp_path):
    path, head = tmp_path / "a.lcz", varint(3) + varint(1) + bytes([0])
    row = {"n": "a.b", "s": [64], "d": "uint8", "k": "codebook", "c": "context", "a": 2}
    write_container(path, {"tensors": [{**row, "l": len(head)}]}, [bytes(2), head])
    with pytest.raises(CorruptArtifactError, match=r"'a\.b': 64 symbols in rows of 3 x 1"):
        read_tensors(path)


def test_a_coded_plane_has_one_axis():
    data = context.encode(np.ones(64, np.uint16), (4, 4, 4))
    with pytest.raises(CorruptArtifactError, match=r"64 symbols seen as \(4, 4, 4\)"):
        unpack_patterns("coded", varint(len(data)) + data, 64, 1)


def test_grids_of_very_many_layers_are_refused_at_once(tmp_path):
    path = tmp_path / "a.lcz"
    grid = {"i": [8, 1, 0, 1065353216]}
    write_header(path, [], activations={f"{at}": grid for at in range(1 << 17)})
    start = time.process_time()
    with pytest.raises(CorruptArtifactError, match="activations of 131072 layers"):
        inspect_compressed(path)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("call", [inspect_compressed, read_tensors])
def test_a_pipe_is_not_waited_for(tmp_path, call):
    os.mkfifo(tmp_path / "a.lcz")
    for path in (tmp_path / "a.lcz", "/dev/zero"):
        with pytest.raises(CorruptArtifactError, match="no regular file"):
            call(path)
