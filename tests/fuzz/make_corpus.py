"""Make the seeds of the fuzzer anew: a stream of each codec, files plain and signed.

python tests/fuzz/make_corpus.py
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
import target
import torch
from onnx import helper, numpy_helper

from lightning_compress.channels.resize import match_channels
from lightning_compress.grids import CodebookGrid
from lightning_compress.lcz.artifact import save_compressed
from lightning_compress.lcz.codecs import CODECS, encode_symbols
from lightning_compress.quantization.ranges import affine_grid
from lightning_compress.state import (
    ActivationGrids,
    RemovedChannels,
    note_removed,
    set_activation_grids,
    set_grid,
)

CORPUS = Path(__file__).parent / "corpus"


def streams():
    """By name: seeds of the codecs."""
    rng = np.random.default_rng(0)
    symbols = np.where(rng.random(20 * 5 * 2) < 0.7, 0, rng.integers(0, 15, 200))
    for index, codec in enumerate(CODECS):
        data = encode_symbols(symbols, codec, (20, 5, 2))[1]
        yield codec, bytes([index, 20, 64 + 4]) + data


def shrink(model):
    """Two of the four hidden channels are left; the file says what was lost."""
    cut = {"0.weight": (2, 6), "0.bias": (2,), "3.weight": (2, 2)}
    cut |= {f"1.{name}": (2,) for name in ("weight", "bias", "running_mean", "running_var")}
    full = {name: tuple(model.state_dict()[name].shape) for name in cut}
    match_channels(model, cut)
    note_removed(model, RemovedChannels(full, {}, {"0": (0, 2)}))


def files():
    """By name: seeds that are files, and their headers and payloads to be signed."""
    torch.manual_seed(0)
    model = target.tiny()
    grids = {
        "none": [None, None],
        "affine": [affine_grid(model[0].weight, bits=3, axis=0), None],
        "channels": [None, None],
        "codebook": [None, CodebookGrid(torch.tensor([-0.3, 0.0, 0.1, 0.4]))],
    }
    for name, pair in grids.items():
        for layer, grid in zip((model[0], model[3]), pair, strict=True):
            if grid is not None:
                layer.weight.data = grid.project(layer.weight.data)
                set_grid(layer, "weight", grid)
        if name == "channels":
            shrink(model)
        if name == "affine":
            grid = affine_grid(torch.tensor([-1.0, 2.0]), bits=8, symmetric=False)
            set_activation_grids(model[3], ActivationGrids(input=grid))
        yield from seeds(name, model)
    yield from seeds("graph", model, graph=graph_of(model))


def seeds(name, model, **options):
    """A module's file as it is, and its plain header and payloads, to be signed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.lcz")
        save_compressed(model, path, **options)
        data = path.read_bytes()
    yield f"file_{name}", bytes([len(CODECS) + 1]) + data
    *_, stored, plain = target.PREFIX.unpack_from(data)
    start = target.PREFIX.size + stored
    header = data[target.PREFIX.size : start]
    header = zlib.decompress(header) if stored < plain else header
    assert json.loads(header)
    size = len(header).to_bytes(2, "little")
    yield f"signed_{name}", bytes([len(CODECS)]) + size + header + data[start:-32]


def graph_of(model):
    """An ONNX model that holds the module's numbers transposed, and some of its own."""
    weight = model[0].weight.detach().numpy()
    own = np.random.default_rng(0).integers(0, 3, (64, 9)).astype(np.int8)
    tensors = [numpy_helper.from_array(weight.T.copy(), "w"), numpy_helper.from_array(own, "own")]
    nodes = [helper.make_node("Identity", [one.name], [one.name + "_"]) for one in tensors]
    outputs = [
        helper.make_tensor_value_info(one.name + "_", one.data_type, one.dims) for one in tensors
    ]
    graph = helper.make_graph(nodes, "g", [], outputs, tensors)
    return helper.make_model(graph).SerializeToString()


if __name__ == "__main__":
    CORPUS.mkdir(exist_ok=True)
    for name, data in [*streams(), *files()]:
        (CORPUS / name).write_bytes(data)
        print(name, len(data))
