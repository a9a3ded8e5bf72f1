"""The runnable graph in a file: to the byte as it was packed, small, stored once, and bounded."""

import hashlib
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lightning_compress import (
    export_onnx,
    inspect_compressed,
    load_compressed,
    onnx_model,
    onnx_session,
    prune_weights,
    quantize_weights,
    read_arrays,
    save_compressed,
    write_graph,
)
from lightning_compress.errors import CorruptArtifactError, MissingExtraError
from lightning_compress.grids import channel_axis
from lightning_compress.lab.models import VAE
from lightning_compress.lcz.container import read_container, write_container
from lightning_compress.quantization.ranges import affine_grid
from lightning_compress.state import set_grid

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "graph"

spec = importlib.util.spec_from_file_location("reference_decoder", HERE / "reference_decoder.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)


def initializer(kind, shape, *, raw, seed=0):
    """A tensor of any kind, its values as raw bytes or in the field of their type."""
    rng = np.random.default_rng(seed)
    name = f"{TensorProto.DataType.Name(kind)}_{'raw' if raw else 'typed'}"
    values = rng.integers(0, 2, shape) * rng.integers(0, 7, shape)
    if kind == TensorProto.BOOL:
        values = values > 0
    if raw:
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        return numpy_helper.from_array(values.astype(dtype), name)
    return helper.make_tensor(name, kind, shape, values.reshape(-1).tolist())


def model_of(initializers, nodes=()):
    """A model that gives back all of its initializers."""
    outputs = []
    for one in initializers:
        nodes = [*nodes, helper.make_node("Identity", [one.name], [f"{one.name}_out"])]
        outputs.append(helper.make_tensor_value_info(f"{one.name}_out", one.data_type, one.dims))
    graph = helper.make_graph(list(nodes), "g", [], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def back(tmp_path, data):
    info = write_graph(data, tmp_path / "g.lcz")
    assert info.bytes == (tmp_path / "g.lcz").stat().st_size
    assert info == inspect_compressed(tmp_path / "g.lcz")
    parts = [info.header_bytes, *(one.bytes for one in info.graphs.values())]
    assert sum(parts) == info.bytes
    return info, onnx_model(tmp_path / "g.lcz")


KINDS = [
    *range(TensorProto.FLOAT, TensorProto.INT64 + 1),  # to 7; 8 is text
    *range(TensorProto.BOOL, TensorProto.COMPLEX64 + 1),
    *range(TensorProto.BFLOAT16, TensorProto.INT4 + 1),
]


@pytest.mark.parametrize("kind", KINDS, ids=TensorProto.DataType.Name)
@pytest.mark.parametrize("shape", [(41, 9), (4, 4, 40, 2), (3,), ()], ids=str)
def test_a_model_with_raw_values_comes_back_to_the_byte(tmp_path, kind, shape):
    data = model_of([initializer(kind, shape, raw=True)]).SerializeToString()
    info, found = back(tmp_path, data)
    assert found == data
    (graph,) = info.graphs.values()
    assert graph.onnx_bytes == len(data)
    assert bool(graph.per_tensor) == (math.prod(shape) > 100)


@pytest.mark.parametrize("kind", KINDS, ids=TensorProto.DataType.Name)
def test_typed_values_become_raw_ones_of_the_same_numbers(tmp_path, kind):
    tensor = initializer(kind, (31, 33), raw=False)
    info, found = back(tmp_path, model_of([tensor]).SerializeToString())
    (same,) = onnx.load_from_string(found).graph.initializer
    assert np.array_equal(numpy_helper.to_array(same), numpy_helper.to_array(tensor))
    assert list(next(iter(info.graphs.values())).per_tensor) == [tensor.name]


def test_constants_and_subgraphs_are_coded_too(tmp_path):
    values = np.random.default_rng(0).integers(0, 4, (64, 32)).astype(np.float32)
    weight = numpy_helper.from_array(values, "")
    constant = helper.make_node("Constant", [], ["inner"], value=weight)
    out = helper.make_tensor_value_info("inner", TensorProto.FLOAT, (64, 32))
    branch = helper.make_graph([constant], "branch", [], [out])
    flag = numpy_helper.from_array(np.array(True), "flag")
    node = helper.make_node("If", ["flag"], ["w"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph(
        [node], "g", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, (64, 32))], [flag]
    )
    data = helper.make_model(graph, ir_version=10).SerializeToString()
    info, found = back(tmp_path, data)
    assert found == data
    assert list(info.graphs[""].per_tensor) == ["constant", "constant (2)"]


def test_weights_in_another_file_come_into_this_one(tmp_path):
    model = model_of([initializer(TensorProto.FLOAT, (64, 32), raw=True)])
    plain = model.SerializeToString()
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    _, found = back(tmp_path, path)
    expected = onnx.load_from_string(plain).graph.initializer[0]
    (same,) = onnx.load_from_string(found).graph.initializer
    assert np.array_equal(numpy_helper.to_array(same), numpy_helper.to_array(expected))
    with pytest.raises(ValueError, match="give the path"):
        write_graph(path.read_bytes(), tmp_path / "x.lcz")
    away = path.read_bytes().replace(b"m.data", b"../m.d")
    (tmp_path / "sub" / "away.onnx").write_bytes(away)
    with pytest.raises(ValueError, match=r"outside the model's folder: \.\./m\.d"):
        write_graph(tmp_path / "sub" / "away.onnx", tmp_path / "x.lcz")
    (tmp_path / "sub" / "m.data").unlink()
    with pytest.raises(OSError, match=r"m\.data"):
        write_graph(path, tmp_path / "x.lcz")


def on_grids(module, *, bits=4, zeros=0.8):
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            weight = layer.weight.detach().clone()
            weight[torch.rand_like(weight) < zeros] = 0
            grid = affine_grid(weight, bits=bits, axis=channel_axis(layer))
            layer.weight.data = grid.project(weight)
            set_grid(layer, "weight", grid)
    return module.eval()


def generator():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 32 * 9, bias=False),
        nn.Unflatten(1, (32, 3, 3)),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(16, 16, 4, 2, 1, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 3, 3, padding=1),
        nn.Tanh(),
    )
    with torch.no_grad():
        net[2].weight[::2] *= -1
        net[5].weight[::3] *= -1
        net(torch.randn(16, 12))
    return on_grids(net)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A generator, and its int8 and fp32 ONNX files."""
    folder = tmp_path_factory.mktemp("exported")
    net, z = generator(), torch.randn(4, 12)
    export_onnx(net, folder / "m.int8.onnx", z, int8=True, calibration=[z])
    export_onnx(net, folder / "m.onnx", z)
    return net, folder


def outputs(session):
    z = np.random.default_rng(1).standard_normal((3, 12)).astype(np.float32)
    return session.run(None, {session.get_inputs()[0].name: z})


@pytest.mark.parametrize("name", ["m.int8.onnx", "m.onnx"])
@pytest.mark.parametrize("with_module", [True, False])
def test_a_packed_graph_gives_the_outputs_of_its_file_to_the_bit(
    exported, tmp_path, name, with_module
):
    net, folder = exported
    path = tmp_path / "m.lcz"
    if with_module:
        save_compressed(net, path, graph=folder / name)
    else:
        write_graph((folder / name).read_bytes(), path)
    assert onnx_model(path) == (folder / name).read_bytes()
    pairs = zip(outputs(onnx_session(path)), outputs(onnx_session(folder / name)), strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)
    if with_module:
        fresh = load_compressed(path, generator())
        for key, value in net.state_dict().items():
            assert torch.equal(fresh.state_dict()[key], value)
        assert list(read_arrays(path)) == list(net.state_dict())


def test_integers_that_are_the_modules_are_stored_once(exported, tmp_path):
    """Kernels cut into phases, groups, channels whose sign a negative gamma turned."""
    net, folder = exported
    alone = save_compressed(net, tmp_path / "a.lcz")
    graph = write_graph(folder / "m.int8.onnx", tmp_path / "b.lcz")
    both = save_compressed(net, tmp_path / "c.lcz", graph=folder / "m.int8.onnx")
    found = both.graphs[""]
    assert {"0.weight", "4.weight", "7.weight"} <= set(found.shared)
    # The last kernel stands at four positions of a larger one: more numbers than the module has.
    assert [name.split(".weight")[0] for name in found.twice] == ["9"]
    weights = sum(alone.per_tensor[name].bytes for name in ("0.weight", "4.weight"))
    assert both.bytes < alone.bytes + graph.bytes - 0.7 * weights


def test_integers_that_are_others_are_stored_again_and_named(exported, tmp_path):
    _, folder = exported
    other = generator()
    other[4].weight.data[0, 0, 0, 0] += compression_step(other[4])
    both = save_compressed(other, tmp_path / "c.lcz", graph=folder / "m.int8.onnx")
    found = both.graphs[""]
    assert "4.weight" not in found.shared
    assert {"0.weight", "7.weight"} <= set(found.shared)
    assert any(name.startswith("4.weight") for name in found.twice)
    assert onnx_model(tmp_path / "c.lcz") == (folder / "m.int8.onnx").read_bytes()


def compression_step(layer):
    """One step of a layer's first channel, towards zero or away from it within the grid."""
    grid = layer._compression_grids["weight"]
    value = layer.weight.data[0, 0, 0, 0]
    return -grid.scale[0] if value > 0 else grid.scale[0]


def test_several_graphs_have_names(exported, tmp_path):
    _, folder = exported
    path = tmp_path / "two.lcz"
    files = {"small": folder / "m.int8.onnx", "exact": folder / "m.onnx"}
    info = write_graph(files, path)
    assert list(info.graphs) == ["small", "exact"]
    for name, file in files.items():
        assert onnx_model(path, name) == file.read_bytes()
        assert onnx_session(path, graph=name).get_inputs()
    with pytest.raises(ValueError, match="'small', 'exact'"):
        onnx_model(path)
    with pytest.raises(ValueError, match=r"'large'.*'small', 'exact'"):
        onnx_session(path, graph="large")


def test_a_graph_alone_is_hardly_larger_than_the_weights_alone(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 128 * 49, bias=False),
        nn.Unflatten(1, (128, 7, 7)),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 1, 4, 2, 1),
    )
    for layer in net:
        if hasattr(layer, "weight") and layer.weight.dim() > 1:
            weight = layer.weight.detach() * (torch.rand_like(layer.weight) < 0.2)
            grid = affine_grid(weight, bits=4)
            layer.weight.data = grid.project(weight)
            set_grid(layer, "weight", grid)
    z = torch.randn(4, 64)
    export_onnx(net.eval(), tmp_path / "m.onnx", z, int8=True, calibration=[z])
    weights = save_compressed(net, tmp_path / "w.lcz")
    graph = write_graph(tmp_path / "m.onnx", tmp_path / "g.lcz")
    assert graph.bytes <= 1.03 * weights.bytes
    assert graph.ratio == pytest.approx((tmp_path / "m.onnx").stat().st_size / graph.bytes)


@pytest.mark.parametrize("name", ["m.int8.onnx", "m.onnx"])
def test_the_reference_decoder_puts_the_graph_together(exported, tmp_path, name):
    net, folder = exported
    save_compressed(net, tmp_path / "m.lcz", graph={name: folder / name})
    rows = reference.read_file((tmp_path / "m.lcz").read_bytes())
    assert rows["graph", name] == (folder / name).read_bytes()


def test_the_golden_file_gives_its_graph():
    """Made once by `python tests/lcz/test_graph.py`, never again."""
    data = onnx_model(GOLDEN / "v2_graph.lcz")
    digest = hashlib.sha256(data).hexdigest()
    assert digest == json.loads((GOLDEN / "v2_graph.json").read_text())["sha256"]
    assert reference.read_file((GOLDEN / "v2_graph.lcz").read_bytes())["graph", ""] == data
    assert inspect_compressed(GOLDEN / "v2_graph.lcz").graphs[""].shared == ("up", "kernel")


@pytest.mark.parametrize(
    "data", [b"", b"no model", b"\x08\x0a", b"\x3a\xff\xff\x03x", bytes(range(200))], ids=repr
)
def test_what_is_no_onnx_model_is_refused(tmp_path, data):
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ValueError, match=r"m\.onnx.*no ONNX model"):
        write_graph(tmp_path / "m.onnx", tmp_path / "g.lcz")
    assert not (tmp_path / "g.lcz").exists()


def test_files_without_a_graph_or_without_tensors_say_what_they_are_for(exported, tmp_path):
    net, folder = exported
    save_compressed(net, tmp_path / "w.lcz")
    write_graph(folder / "m.int8.onnx", tmp_path / "g.lcz")
    with pytest.raises(ValueError, match=r"holds no graph.*load_compressed"):
        onnx_session(tmp_path / "w.lcz")
    with pytest.raises(CorruptArtifactError, match="onnx_session"):
        load_compressed(tmp_path / "g.lcz", generator())
    assert read_arrays(tmp_path / "g.lcz") == {}
    with pytest.raises(ValueError, match=r"'x'.*holds one graph"):
        onnx_session(folder / "m.onnx", graph="x")
    (tmp_path / "text.lcz").write_bytes(b"text")
    with pytest.raises(CorruptArtifactError, match=r"text\.lcz.*not an \.lcz file"):
        onnx_session(tmp_path / "text.lcz")
    with pytest.raises(TypeError, match="bytes or a path"):
        save_compressed(net, tmp_path / "x.lcz", graph=onnx.load(folder / "m.onnx"))


@pytest.fixture
def packed(exported, tmp_path):
    net, folder = exported
    path = tmp_path / "m.lcz"
    save_compressed(net, path, graph=folder / "m.int8.onnx")
    return path


def rewrite(path, change, payload=lambda data: data):
    """Changes the header and the payloads, and signs the file anew."""
    with read_container(path, verify=True) as container:
        header, payloads = container.header, container.read(0, container.payload_bytes)
    (graph,) = header["graphs"]
    change(graph)
    write_container(path, header, [payload(payloads)])


def gap_of(graph, source):
    return next(gap for gap in graph["i"] if gap.get("t") == source)


def set_gap(source, **values):
    return lambda graph: gap_of(graph, source).update(values)


HOSTILE = {
    "no list": lambda graph: graph.update(i={}),
    "no gap": lambda graph: graph["i"].append([]),
    "no name": lambda graph: graph.update(n=3),
    "a key that is new": lambda graph: graph.update(z=1),
    "a gap's key that is new": set_gap("0.weight", q=1),
    "integers that are new": set_gap("0.weight", d="int5"),
    "floats as integers": lambda graph: gap_of(graph, "0.weight").update(t="2.weight", b=[]),
    "no such row": set_gap("0.weight", t="10.weight"),
    "a gap too many": lambda graph: graph["i"].append({"a": 0}),
    "a row too many": lambda graph: graph["i"].remove(next(g for g in graph["i"] if "t" not in g)),
    "a gap beyond the end": lambda graph: graph["i"][-1].update(a=10**6),
    "a gap elsewhere": lambda graph: graph["i"][0].update(a=graph["i"][0]["a"] + 1),
    "a negative gap": lambda graph: graph["i"][0].update(a=-1),
    "another box": set_gap("4.weight", b=[2, 3]),
    "a box of a huge size": set_gap("4.weight", b=[1 << 40, 1 << 40]),
    "axes twice": lambda graph: gap_of(graph, "4.weight").update(
        x=[0] * len(gap_of(graph, "4.weight")["x"])
    ),
    "axes that are none": set_gap("4.weight", f=[40]),
    "another type": set_gap("4.weight", d="int8"),
    "numbers beyond the type": set_gap("4.weight", m=1000),
    "numbers beyond any type": set_gap("4.weight", m=1 << 50),
    "signs of an axis that is none": set_gap("4.weight", s=[7, 0]),
    "signs of channels that are none": set_gap("4.weight", s=[1, 900]),
    "fractions of a model": lambda graph: graph.update(p=graph["p"] - 1),
    "a huge model": lambda graph: graph.update(p=1 << 50),
    "a longer model": lambda graph: graph.update(l=graph["l"] + 1),
    "a row that is tied": lambda graph: graph["tensors"][0].update(k="tied", t="x"),
    "a shape that is another": lambda graph: graph["tensors"][0].update(s=[3]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_rows_that_do_not_match_the_graph_are_refused(packed, change):
    rewrite(packed, change)
    with pytest.raises(CorruptArtifactError, match=r"m\.lcz: ") as caught:
        onnx_model(packed)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "change", [HOSTILE["a key that is new"], HOSTILE["a gap's key that is new"]]
)
def test_what_a_newer_package_wrote_is_named(packed, change):
    rewrite(packed, change)
    with pytest.raises(CorruptArtifactError, match=r"unknown key '[zq]'.*newer"):
        inspect_compressed(packed)


def test_keys_that_may_be_passed_over_are(packed, exported):
    rewrite(packed, lambda graph: (graph.update({"x-by": "me"}), graph["i"][0].update({"x-a": 1})))
    assert onnx_model(packed) == (exported[1] / "m.int8.onnx").read_bytes()


def test_a_model_that_is_none_is_refused(packed):
    with read_container(packed, verify=True) as container:
        (graph,), size = container.header["graphs"], container.payload_bytes
    rows = sum(row.get("a", 0) + row.get("l", 0) for row in graph["tensors"])
    start = size - rows - graph["l"]
    rewrite(packed, lambda graph: None, lambda data: data[:start] + bytes(len(data) - start))
    with pytest.raises(CorruptArtifactError, match="graph ''"):
        onnx_model(packed)


def test_every_truncation_and_many_flips_are_refused(packed):
    data = packed.read_bytes()
    for length in range(0, len(data), 37):
        packed.write_bytes(data[:length])
        with pytest.raises(CorruptArtifactError):
            onnx_session(packed)
    for at in range(0, len(data), 41):
        packed.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(CorruptArtifactError):
            onnx_model(packed)


def test_a_model_above_the_limit_is_refused(packed):
    size = inspect_compressed(packed).graphs[""].onnx_bytes
    assert len(onnx_model(packed, max_bytes=size)) == size
    with pytest.raises(CorruptArtifactError, match=f"{size}.*max_bytes={size - 1}"):
        onnx_model(packed, max_bytes=size - 1)


def test_a_missing_runtime_names_its_extra(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"lightning-compress\[onnx\]"):
        onnx_session(packed)


def golden():
    """A module and a model that takes its numbers in every way, and has some of its own."""
    torch.manual_seed(3)
    module = nn.Module()
    weights = {"up": torch.randn(6, 4, 4, 4), "kernel": torch.randn(8, 3, 3, 3)}
    for name, weight in weights.items():
        grid = affine_grid(weight, bits=4, symmetric=name == "up", axis=1)
        module.register_parameter(name, nn.Parameter(grid.project(weight)))
        set_grid(module, name, grid)
        weights[name] = grid.quantize(weight).numpy()
    phases = weights["up"].reshape(6, 4, 2, 2, 2, 2).transpose(3, 5, 1, 0, 2, 4)[..., ::-1, ::-1]
    signs = np.array([1, -1, 1])[:, None, None]
    rng = np.random.default_rng(0)
    tensors = {
        "phases": (phases * 8 + 128).astype(np.uint8).reshape(16, 6, 2, 2),
        "turned": (weights["kernel"] * signs).transpose(1, 0, 2, 3).astype(np.int8),
        "values": module.kernel.detach().numpy().reshape(8, 27).T.copy(),
        "own": rng.integers(0, 3, (40, 10)).astype(np.float16),
    }
    kinds = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    small = rng.integers(-1, 2, (37, 29)).astype(helper.tensor_dtype_to_np_dtype(TensorProto.INT4))
    kinds.append(numpy_helper.from_array(small, "nibbles"))
    return module, model_of(kinds).SerializeToString()


def test_every_way_to_take_numbers_is_found(tmp_path):
    module, data = golden()
    info = save_compressed(module, tmp_path / "g.lcz", graph=data)
    assert info.graphs[""].shared == ("up", "kernel")
    assert list(info.graphs[""].per_tensor) == ["own", "nibbles"]
    assert onnx_model(tmp_path / "g.lcz") == data
    assert reference.read_file((tmp_path / "g.lcz").read_bytes())["graph", ""] == data


if __name__ == "__main__":  # made once for each version, never again
    GOLDEN.mkdir(exist_ok=True)
    made, model = golden()
    save_compressed(made, GOLDEN / "v2_graph.lcz", graph=model)
    text = json.dumps({"sha256": hashlib.sha256(model).hexdigest()})
    (GOLDEN / "v2_graph.json").write_text(text + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [False, True], ids=["one-scale", "per-channel"])
def test_the_graph_of_a_vae_costs_little_beside_its_weights(per_channel, tmp_path):
    """A decoder by 3 % of its file; the encoder's is so small that its graph's nodes count."""
    torch.manual_seed(0)
    model = VAE(image_size=28, width=32).eval()
    prune_weights(model, sparsity=0.9)
    quantize_weights(model, 4, per_channel=per_channel)
    more = {}
    for part, (module, sample) in model.parts().items():
        path = tmp_path / f"{part}.onnx"
        export_onnx(module, path, sample, int8=True, calibration=[sample])
        weights = save_compressed(module, tmp_path / "w.lcz").bytes
        more[part] = write_graph(path, tmp_path / "g.lcz").bytes - weights
        if part == "decoder":
            assert more[part] <= 0.03 * weights
    assert max(more.values()) < 2400
