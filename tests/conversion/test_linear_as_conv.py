"""A Linear layer with many outputs, exported for a runtime that is faster with a convolution."""

from functools import partial

import numpy as np
import pytest
import torch
from exported import run
from torch import nn

from lightning_compress import quantize_weights
from lightning_compress.conversion.export import export_onnx

OUTPUTS, INPUTS = 1600, 12


def decoder(*, bias=True, between=nn.ReLU, norm=True):
    """A latent vector that becomes 4 x 4 pictures, as in a VAE or a GAN."""
    torch.manual_seed(0)
    layers = [nn.Linear(INPUTS, OUTPUTS, bias=bias), nn.Unflatten(1, (100, 4, 4))]
    if norm:
        layers.append(nn.BatchNorm2d(100))
    module = nn.Sequential(*layers, between(), nn.ConvTranspose2d(100, 3, 4, 2, 1), nn.Tanh())
    for layer in module:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, -1.5, 1.5)
    return module.eval()


def exported(module, path, *, inputs=INPUTS, **settings):
    return export_onnx(
        module,
        path,
        torch.randn(4, inputs),
        int8=True,
        calibration=[torch.randn(64, inputs) for _ in range(4)],
        **settings,
    )


@pytest.mark.parametrize(
    ("module", "weights"),
    [
        (decoder(), {"bits": 8}),
        (decoder(bias=False), {"bits": 4}),
        (decoder(norm=False), {"bits": 8, "scheme": "affine"}),
        (decoder(between=partial(nn.LeakyReLU, 0.2)), {"bits": 8}),
        (decoder(between=nn.Identity), {"bits": 4}),
        (nn.Sequential(nn.Linear(INPUTS, OUTPUTS)).eval(), {"bits": 8}),
    ],
    ids=["norm", "no-bias", "no-norm", "leaky", "nothing-between", "alone"],
)
def test_both_runtimes_files_compute_the_same(module, weights, tmp_path):
    quantize_weights(module, **weights)
    torch.manual_seed(1)
    wide = exported(module, tmp_path / "wide.onnx")
    torch.manual_seed(1)
    plain = exported(module, tmp_path / "plain.onnx", runtime="openvino")
    assert "QGemm" not in wide.int8_ops
    assert "Gemm" not in wide.float_ops
    assert plain.int8_ops["QGemm"] == 1
    assert wide.int8_ops["QLinearConv"] == plain.int8_ops.get("QLinearConv", 0) + 1
    for rows in (1, 3, 40):
        inputs = (torch.randn(rows, INPUTS),)
        one, other = run(wide.path, inputs)[0], run(plain.path, inputs)[0]
        assert one.shape == other.shape
        step = np.diff(np.unique(other)).min()
        # Roundings of a layer in between may fall the other way; a wrong order of numbers would
        # show in most of them.
        off = np.abs(one - other) > step / 2
        assert off.mean() < 0.01
        assert np.abs(one - other).max() < 3 * step


def test_the_bias_is_stored_once_a_channel(tmp_path):
    torch.manual_seed(1)
    wide = exported(decoder(bias=False), tmp_path / "wide.onnx")
    plain = exported(decoder(bias=False), tmp_path / "plain.onnx", runtime="openvino")
    assert wide.bytes < plain.bytes + 2 * OUTPUTS  # one for each output takes 4 bytes


@pytest.mark.parametrize(
    ("outputs", "inputs", "per_channel"),
    [(64, 12, True), (1024, 512, True), (1024, 12, False)],
    ids=["few-outputs", "many-inputs", "one-step"],
)
def test_where_a_product_of_matrices_is_faster_it_stays(outputs, inputs, per_channel, tmp_path):
    module = nn.Sequential(nn.Linear(inputs, outputs)).eval()
    quantize_weights(module, bits=8, per_channel=per_channel)
    info = exported(module, tmp_path / "model.onnx", inputs=inputs)
    assert info.int8_ops["QGemm"] == 1
    assert "QLinearConv" not in info.int8_ops


def test_a_convolution_with_many_outputs_keeps_its_int8_kernel(tmp_path):
    module = nn.Sequential(nn.ConvTranspose2d(8, 320, 4, 2, 1), nn.ReLU(), nn.Conv2d(320, 2, 1))
    inputs = [torch.randn(8, 8, 5, 5) for _ in range(2)]
    info = export_onnx(
        module.eval(), tmp_path / "model.onnx", inputs[0], int8=True, calibration=inputs
    )
    assert info.int8_ops["QLinearConv"] == 2
    assert not {"Conv", "ConvTranspose"} & set(info.float_ops)
