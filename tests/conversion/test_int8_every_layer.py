"""int8 files of layers over one to three axes, at older opsets, and what tools need of a file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported import run
from torch import nn

from lightning_compress import compression_state, fake_quantized, quantize_static, quantize_weights
from lightning_compress.conversion.export import export_onnx
from lightning_compress.grids import CodebookGrid
from lightning_compress.state import set_grid


def vocoder():
    return nn.Sequential(
        nn.ConvTranspose1d(20, 16, 8, 4, 2),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose1d(16, 8, 4, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Conv1d(8, 1, 7, padding=3),
    )


NETS = {  # what reads integers with an int8 kernel, and the shape of an input
    "vocoder": (vocoder, 3, (20, 32)),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv1d(8, 16, 3, padding=1, groups=4),
            nn.ReLU(),
            nn.ConvTranspose1d(16, 16, 5, 3, 1, 1, groups=2),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 4, 3, stride=2),
        ),
        3,
        (8, 30),
    ),
    "volumes": (
        lambda: nn.Sequential(
            nn.ConvTranspose3d(4, 8, 4, 2, 1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 2, 3)
        ),
        2,
        (4, 4, 4, 4),
    ),
    "unequal_strides": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 8, (3, 4), (1, 2), 1), nn.ReLU(), nn.Conv2d(8, 2, 3)
        ),
        2,
        (4, 8, 8),
    ),
    "dilated": (  # no int8 kernel, and right all the same
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 8, 3, 2, 1, dilation=2), nn.ReLU(), nn.Conv2d(8, 2, 3)
        ),
        1,
        (4, 8, 8),
    ),
}


@pytest.mark.filterwarnings("ignore:.*products run as float")
@pytest.mark.parametrize("name", NETS)
def test_layers_over_any_axes_give_the_fake_quantized_module(name, tmp_path):
    torch.manual_seed(0)
    make, whole, shape = NETS[name]
    module, x = make(), torch.randn(8, *shape)
    module(x)
    quantize_static(module.eval(), [x])
    info = export_onnx(module, tmp_path / "m.onnx", x[:2], int8=True)
    assert info.int8_ops["QLinearConv"] == whole
    grid = compression_state(module[-1]).activations[""].output
    with torch.no_grad(), fake_quantized(module):
        expected = module(x).numpy()
    away = np.abs(run(info.path, (x,))[0] - expected) / float(grid.scale)
    # 0.98 where biases lie between the steps of int8 kernels, 0.75 to 0.9 where a float weight is
    # quantized anew
    assert (away < 0.02).mean() > 0.9999
    assert away.max() < 1.02


@pytest.mark.filterwarnings("ignore:.*products run as float")
@pytest.mark.parametrize("name", NETS)
def test_calibration_rounds_biases_as_int8_kernels_hold_them(name, tmp_path):
    torch.manual_seed(0)
    make, _, shape = NETS[name]
    module, x = make(), torch.randn(8, *shape)
    module(x)
    before = {key: value.clone() for key, value in module.eval().state_dict().items()}
    info = export_onnx(module, tmp_path / "m.onnx", x[:2], int8=True, calibration=[x])
    assert info.parity["onnxruntime"].equal > 0.9999
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Linear], ids=["conv", "linear"])
def test_a_codebook_between_roundings_is_not_quantized_anew(kind, tmp_path):
    torch.manual_seed(0)
    size = (8, 16, 3) if kind is nn.Conv1d else (8, 16)
    module = nn.Sequential(kind(*size), nn.ReLU(), kind(16, 4, *size[2:])).eval()
    grid = CodebookGrid(torch.tensor([-0.2, -0.05, 0.0, 0.03, 0.1, 0.3]))
    with torch.no_grad():
        module[0].weight.copy_(grid.project(module[0].weight))
    set_grid(module[0], "weight", grid)
    x = torch.randn(64, 8, 32) if kind is nn.Conv1d else torch.randn(256, 8)
    info = export_onnx(module, tmp_path / "m.onnx", x, int8=True, calibration=[x])
    assert "codebook" in info.reasons["0"]
    assert info.parity["onnxruntime"].equal > 0.99
    assert sum(info.int8_ops.get(op, 0) for op in ("QLinearConv", "QGemm")) == 1


@pytest.mark.parametrize("opset", [16, 17, 18, 20])
def test_older_opsets_hold_int8_products_and_no_4_bit_numbers(opset, tmp_path):
    module, x = (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)),
        torch.rand(4, 1, 8, 8),
    )
    quantize_weights(module, 4)
    info = export_onnx(
        module.eval(), tmp_path / "m.onnx", x, int8=True, calibration=[x], opset=opset
    )
    proto = onnx.load(info.path)
    assert proto.opset_import[0].version == opset
    assert info.int8_ops["QLinearConv"] == 2
    small = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
    assert not small & {one.data_type for one in proto.graph.initializer}


@pytest.mark.parametrize(
    ("version", "opset", "ir", "small"),
    [("1.12", 17, 8, False), ("1.17", 20, 9, False), ("1.23", 21, 10, True)],
)
def test_a_file_for_an_older_onnx_runtime(version, opset, ir, small, tmp_path):
    module, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(8, 8)
    quantize_weights(module, 4)
    info = export_onnx(
        module, tmp_path / "m.onnx", x, int8=True, calibration=[x], for_onnxruntime=version
    )
    proto = onnx.load(info.path)
    assert (proto.opset_import[0].version, proto.ir_version) == (opset, ir)
    four = onnx.TensorProto.INT4 in {one.data_type for one in proto.graph.initializer}
    assert four == small
    plain = export_onnx(module, tmp_path / "f.onnx", x, for_onnxruntime=version)
    assert onnx.load(plain.path).opset_import[0].version <= opset


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"for_onnxruntime": "0.9"}, r"'0\.9'.*oldest.*1\.11"),
        ({"for_onnxruntime": "new"}, "'new'.*version"),
        ({"for_onnxruntime": "1.17", "opset": 21}, r"opset=21.*1\.17.*opset 20"),
    ],
)
def test_versions_that_cannot_be_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(nn.Linear(3, 2), tmp_path / "m.onnx", torch.randn(2, 3), **arguments)


def test_channels_with_zero_points_of_their_own_need_a_newer_runtime(tmp_path):
    module, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(8, 8)
    quantize_weights(module, 8, scheme="affine")
    with pytest.raises(ValueError, match=r"1\.20.*0\.weight.*symmetric"):
        export_onnx(
            module, tmp_path / "m.onnx", x, int8=True, calibration=[x], for_onnxruntime="1.20"
        )


def test_all_nodes_have_names_and_onnx_runtime_converts_the_file(tmp_path):
    torch.manual_seed(0)
    module, x = vocoder().eval(), torch.randn(4, 20, 8)
    info = export_onnx(module, tmp_path / "m.onnx", x, int8=True, calibration=[x])
    names = [node.name for node in onnx.load(info.path).graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    folder = tmp_path / "ort"
    folder.mkdir()
    shutil.copy(info.path, folder)
    tool = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(folder)]
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(tool, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert (folder / "m.with_runtime_opt.ort").exists()


def test_onnx_runtime_is_imported_without_its_telemetry():
    package = Path(__file__).parents[2] / "lightning_compress"
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert "import onnxruntime" not in text, path
        assert "from onnxruntime" not in text, path
    code = (
        "import os; os.environ.pop('ORT_DISABLE_TELEMETRY', None)\n"
        "from lightning_compress.errors import require\n"
        "require('onnxruntime', extra='onnx'); print(os.environ['ORT_DISABLE_TELEMETRY'])\n"
        "os.environ['ORT_DISABLE_TELEMETRY'] = '0'\n"
        "require('onnxruntime', extra='onnx'); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0"]


@pytest.mark.parametrize("per_channel", [True, False])
def test_steps_of_a_bias_are_products_of_steps_that_are_there(tmp_path, per_channel):
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 4, 1)).eval()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    quantize_static(net, [x], weight_bits=8, per_channel=per_channel)
    info = export_onnx(net, tmp_path / "net.onnx", (x,), int8=True)
    assert info.parity["onnxruntime"].more == 0
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    values = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node}
    (bias,) = [node for node in model.graph.node if node.input[0] == "0.Conv.bias.quantized"]
    product = made[bias.input[1]]
    assert product.op_type == "Mul"
    steps = values[product.input[0]] * values[product.input[1]]
    assert steps.dtype == np.float32
    (conv,) = [node for node in model.graph.node if bias.output[0] in node.input]
    read, weight = (values[made[name].input[1]] for name in conv.input[:2])
    assert np.array_equal(steps, read * weight)
    assert steps.shape == ((32,) if per_channel else ())
    assert not [name for name in values if name == "0.Conv.bias.scale"]
