"""int8 files of layers whose weights a norm scales, in both forms that PyTorch has."""

import numpy as np
import pytest
import torch
from exported import run
from torch import nn
from torch.nn.utils import parametrizations

from lightning_compress import compression_state, quantize_static
from lightning_compress.conversion.export import export_onnx
from lightning_compress.quantization.fake_quantize import fake_quantized

FORMS = {"old": nn.utils, "new": parametrizations}


def network(form):
    """A spectral_norm after some power iterations, a channel without weights, a weight_norm."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        FORMS[form].spectral_norm(nn.Conv2d(8, 6, 3)),
        nn.ReLU(),
        FORMS[form].weight_norm(nn.Conv2d(6, 4, 1)),
    )
    free = dict(net.named_parameters())
    with torch.no_grad():
        free[{"old": "2.weight_orig", "new": "2.parametrizations.weight.original"}[form]][3] = 0
        for _ in range(20):
            net(torch.randn(8, 3, 8, 8))
    return net.eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_norm_scales_the_steps_of_its_weight(form, per_channel, tmp_path):
    torch.manual_seed(1)
    module, x = network(form), torch.randn(32, 3, 8, 8)
    quantize_static(module, [x], per_channel=per_channel)
    info = export_onnx(module, tmp_path / "m.onnx", x[:8], int8=True)
    assert info.reasons == {}
    assert info.int8_ops["QLinearConv"] == 3
    assert all("trained grid" in source for source in info.weights.values())
    assert ("per tensor" in info.weights["2.weight"]) is not per_channel
    assert set(info.weights) == {"0.weight", "2.weight", "4.weight"}
    with torch.no_grad(), fake_quantized(module):
        expected = module(x).numpy()
    away = np.abs(run(info.path, (x,))[0] - expected)
    step = compression_state(module).activations["4"].output.scale.item()
    assert (away <= 1.01 * step).mean() > 0.99


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_norm_along_another_axis_scales_the_steps_of_that_axis(form, tmp_path):
    """A transposed convolution's output channels are axis 1, and so is its norm's."""
    torch.manual_seed(1)
    up = FORMS[form].weight_norm(nn.ConvTranspose1d(6, 4, 8, 4, 2), dim=1)
    module, x = nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), up).eval(), torch.randn(32, 3, 20)
    with torch.no_grad():
        dict(module.named_parameters())[
            {"old": "2.weight_g", "new": "2.parametrizations.weight.original0"}[form]
        ].mul_(torch.tensor([1.0, 2.0, 0.5, 3.0])[:, None])
    quantize_static(module, [x], per_channel=False)
    info = export_onnx(module, tmp_path / "m.onnx", x[:8], int8=True)
    assert info.reasons == {}
    assert info.weights["2.weight"].startswith("trained grid, symmetric, per channel")
    assert info.int8_ops["QLinearConv"] == 2
    with torch.no_grad(), fake_quantized(module):
        expected = module(x).numpy()
    step = compression_state(module).activations["2"].output.scale.item()
    away = np.abs(run(info.path, (x,))[0] - expected)
    assert (away <= 1.01 * step).mean() > 0.99


@pytest.mark.filterwarnings("ignore:.*products run as float:UserWarning")
def test_a_weight_that_has_left_its_grid_is_told_from_one_that_has_none(tmp_path):
    torch.manual_seed(1)
    module, x = (
        nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3)),
        torch.randn(9, 3, 9),
    )
    quantize_static(module.eval(), [x])
    with torch.no_grad():
        module[2].weight.mul_(0.77)
    info = export_onnx(module, tmp_path / "m.onnx", x[:8], int8=True, tolerance=0.1)
    assert info.reasons["2.weight"].startswith("it has left its grid")
