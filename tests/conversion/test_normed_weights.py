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
