"""Moves laid out for ONNX Runtime give the very numbers of the plain ones."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lightning_compress import onnx_session
from lightning_compress.conversion.export import export_onnx


def drawing(*layers):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(5, 8 * 9), nn.BatchNorm1d(8 * 9), nn.ReLU(), nn.Unflatten(1, (8, 3, 3)), *layers
    )
    for norm in (layer for layer in module.modules() if hasattr(layer, "running_var")):
        norm.weight.data.uniform_(-1.5, 1.5)
        norm.bias.data.uniform_(-0.5, 0.5)
        norm.running_mean.uniform_(-0.5, 0.5)
    return module.eval()


def files(module, folder):
    """The file for each runtime, and what it gives under ONNX Runtime."""
    latents = [torch.randn(32, 5) for _ in range(2)]
    x = torch.randn(7, 5).numpy()
    found = {}
    for runtime in ("onnxruntime", "openvino"):
        path = folder / f"{runtime}.onnx"
        export_onnx(module, path, latents[0][:2], int8=True, calibration=latents, runtime=runtime)
        session = onnx_session(path, threads=1)
        kinds = {node.op_type for node in onnx.load(path).graph.node}
        found[runtime] = kinds, session.run(None, {session.get_inputs()[0].name: x})[0]
    return found


TRANSPOSED = [
    (4, 2, 1, 0, 1),
    (3, 2, 1, 1, 1),
    (5, 3, 1, 1, 1),
    (4, 2, 1, 0, 2),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "extra", "groups"), TRANSPOSED)
def test_a_transposed_convolution_with_its_norm(kernel, stride, padding, extra, groups, tmp_path):
    layers = [
        nn.ConvTranspose2d(8, 6, kernel, stride, padding, extra, groups=groups, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 2, kernel, stride, padding, extra, groups=groups),
        nn.Sigmoid(),
    ]
    found = files(drawing(*layers), tmp_path)
    (fast, ours), (_, plain) = found["onnxruntime"], found["openvino"]
    np.testing.assert_array_equal(ours, plain)
    assert np.unique(ours).size > 20
    assert ("DepthToSpace" in fast) == (groups > 1)


CONVOLUTIONS = [  # outputs, kernel, rows that come out, whether it is rewritten
    (1, 3, 6, True),
    (4, 5, 6, True),
    (5, 3, 6, False),  # 20 channels in blocks
]


@pytest.mark.parametrize("factor", [2, (3, 1)])
def test_enlarging_by_the_nearest_pixel(factor, tmp_path):
    layers = [nn.Upsample(scale_factor=factor), nn.Conv2d(8, 3, 1), nn.Sigmoid()]
    found = files(drawing(*layers), tmp_path)
    (fast, ours), (plain_kinds, plain) = found["onnxruntime"], found["openvino"]
    np.testing.assert_array_equal(ours, plain)
    assert np.unique(ours).size > 20
    assert "Resize" in plain_kinds
    assert "Resize" not in fast


@pytest.mark.parametrize("factor", [1.5])
def test_enlarging_by_a_part_of_a_pixel_stays_as_it_is(factor, tmp_path):
    layers = [nn.Upsample(scale_factor=factor), nn.Conv2d(8, 3, 3, padding=1), nn.Sigmoid()]
    kinds, ours = files(drawing(*layers), tmp_path)["onnxruntime"]
    assert "Resize" in kinds
    assert np.isfinite(ours).all()


@pytest.mark.parametrize(("outputs", "kernel", "side", "wider"), CONVOLUTIONS)
def test_few_outputs_are_made_in_blocks(outputs, kernel, side, wider, tmp_path):
    layers = [
        nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, outputs, kernel, padding=kernel // 2),
        nn.BatchNorm2d(outputs),
        nn.Sigmoid(),
    ]
    found = files(drawing(*layers), tmp_path)
    np.testing.assert_array_equal(found["onnxruntime"][1], found["openvino"][1])
    assert found["onnxruntime"][1].shape[2] == side
    graph = onnx.load(tmp_path / "onnxruntime.onnx").graph
    shapes = {one.name: list(one.dims) for one in graph.initializer}
    times = 4 if wider else 1
    assert [times * outputs, 8, kernel + wider, kernel + wider] in shapes.values()


def test_an_unknown_runtime_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"runtime='tensorrt': valid are \['onnxruntime'"):
        export_onnx(nn.Linear(2, 2), tmp_path / "a.onnx", torch.rand(2, 2), runtime="tensorrt")
