"""`onnx_session` on a stranger's file: nothing outside its folder is read, nothing is written."""

import os
import warnings

import numpy as np
import pytest

from lightning_compress import onnx_session
from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz import artifact
from lightning_compress.lcz.artifact import write_graph
from lightning_compress.lcz.graph_inlining import inline_tensors
from lightning_compress.lcz.protobuf import message

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
make, Kinds = onnx.helper, onnx.TensorProto


def model(weights, nodes=None, **metadata):
    """The bytes of a model that adds `w` to `x`."""
    nodes = nodes or [make.make_node("Add", ["x", "w"], ["y"])]
    ends = [make.make_tensor_value_info(name, Kinds.FLOAT, [4]) for name in "xy"]
    graph = make.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    proto = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key.replace("__", "."), value
    return proto.SerializeToString()


def weight(size=(4,), values=4):
    return Kinds(name="w", data_type=Kinds.FLOAT, dims=size, raw_data=bytes(4 * values))


def elsewhere(location, size=(4,), **more):
    """A tensor whose values lie in another file."""
    tensor = Kinds()
    tensor.name, tensor.data_type, tensor.data_location = "w", Kinds.FLOAT, Kinds.EXTERNAL
    tensor.dims.extend(size)
    for key, value in {"location": location, **more}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return tensor


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with weights of its own, beside a file that is nobody's business."""
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    (inside / "away").symlink_to(tmp_path)
    os.mkfifo(inside / "pipe")
    monkeypatch.chdir(inside)
    return inside


def opened(folder, data, name="a.onnx"):
    (folder / name).write_bytes(data)
    return onnx_session(folder / name)


def test_weights_in_the_folder_of_the_model_are_read(folder):
    session = opened(folder, model([elsewhere("w.bin")]))
    found = session.run(None, {"x": np.zeros(4, np.float32)})[0]
    assert found.tolist() == [0, 1, 2, 3]


PLACES = {
    "../secret.bin": "outside", "../../../../../../../../etc/passwd": "outside",
    "/etc/passwd": "outside", "/dev/zero": "outside", "link.bin": "outside",
    "away/secret.bin": "outside", "w.bin/../../secret.bin": "outside", "": "outside",
    ".": "outside", "*/_ORT_MEM_ADDR_/*": "No such file", "pipe": "no regular file",
    "a\x1b[2J.bin": "No such file",
}  # fmt: skip


@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("sparse", [False, True])
def test_weights_elsewhere_are_refused(folder, place, sparse):
    weights = [elsewhere(place, length=16)]
    data = model(weights)
    if sparse:
        graph = onnx.GraphProto()
        graph.sparse_initializer.add().values.CopyFrom(weights[0])
        data = model([]) + message(7, graph.SerializeToString())  # fields are merged
    with pytest.raises((ValueError, OSError), match=PLACES[place]) as caught:
        opened(folder, data)
    assert "\x1b" not in str(caught.value)


def test_weights_of_an_lcz_file_lie_in_it(folder, monkeypatch):
    monkeypatch.setattr(artifact, "inline_tensors", lambda data, _: data)
    write_graph(model([elsewhere("w.bin")]), folder / "a.lcz")
    with pytest.raises(CorruptArtifactError, match="lie in another file"):
        onnx_session(folder / "a.lcz")


SIZES = {
    "declared and not there": [weight((1 << 40,))],
    "negative": [weight((-1,))],
    "more than the other file": [elsewhere("w.bin", (1 << 40,))],
    "no values at all": [Kinds(name="w", data_type=Kinds.FLOAT, dims=[1 << 40])],
}


@pytest.mark.parametrize("case", list(SIZES))
def test_lengths_are_compared_with_what_is_there(folder, case):
    with pytest.raises(ValueError, match=r"tensor 'w' of shape .* holds"):
        opened(folder, model(SIZES[case]))


def nested(depth):
    """Graphs in attributes of nodes of graphs, which the reader must not follow for ever."""
    graph = b""
    for _ in range(depth):
        graph = message(1, message(5, message(6, graph)))
    return b"\x08\x08" + message(7, graph)


def test_depth_is_bounded_whatever_stands_before_it(folder):
    with pytest.raises(ValueError, match="nested too deep"):
        opened(folder, nested(5000))
    data = model([make.make_tensor("w", Kinds.FLOAT, [32], [0.0] * 32)]) + nested(5000)
    for call in (lambda: opened(folder, data), lambda: inline_tensors(data, folder)):
        with pytest.raises(ValueError, match="nested too deep"):
            call()


def test_of_options_in_a_file_those_that_read_or_write_files_are_left_out(folder):
    stats = folder.parent / "stats.csv"
    asked = {
        "session__collect_node_memory_stats_to_file": str(stats),
        "session__model_external_initializers_file_folder_path": str(folder.parent),
        "session__load_model_format": "ORT\x1b[2J",
    }
    with pytest.warns(UserWarning, match="session options of the file are not used") as caught:
        session = opened(folder, model([weight()], **asked))
    assert "\x1b" not in str(caught[0].message)
    session.run(None, {"x": np.zeros(4, np.float32)})
    assert not stats.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(folder, model([weight()], session__disable_quant_qdq="1", author="me"))


REFUSED = {
    "an operator of another domain": model(
        [], [make.make_node("Evil", ["x"], ["y"], domain="a\x1b[2J")]
    ),
    "shapes that do not fit": model([weight((5,), 5)]),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_onnx_runtime_refuses_is_one_kind_of_error(folder, case):
    with pytest.raises(ValueError, match=r"onnxruntime [\d.]+ does not open it") as caught:
        opened(folder, REFUSED[case])
    assert str(caught.value).isprintable()


def test_a_newer_model_is_named_without_the_functions_that_refused_it(folder):
    newer = onnx.load_from_string(model([weight()]))
    newer.ir_version = 99
    with pytest.raises(ValueError, match=r"does not open it: Unsupported model IR version: 99"):
        opened(folder, newer.SerializeToString())


def test_a_pipe_is_not_waited_for(folder):
    with pytest.raises(ValueError, match="no regular file"):
        onnx_session(folder / "pipe")
