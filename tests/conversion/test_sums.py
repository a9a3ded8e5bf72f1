"""Residual sums in int8 files."""

import pytest
import torch
from torch import nn

from lightning_compress import quantize_static
from lightning_compress.conversion.export import export_onnx


class Residual(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.activation = activation

    def forward(self, x):
        return self.activation(x + self.second(torch.relu(self.first(x))))


def residual_network(blocks, activation):
    torch.manual_seed(0)
    inner = [Residual(activation) for _ in range(blocks)]
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(8, 2, 3))
    x = torch.randn(8, 3, 12, 12)
    quantize_static(net.eval(), [x])
    return net, x


@pytest.mark.parametrize("activation", [torch.relu, lambda x: x], ids=["relu", "none"])
def test_terms_and_a_sum_on_grids_are_added_as_integers(activation, tmp_path):
    net, x = residual_network(1, activation)
    info = export_onnx(net, tmp_path / "m.onnx", x[:2], int8=True)
    assert info.int8_ops["QLinearAdd"] == 1
    assert "Add" not in info.float_ops
    assert info.reasons == {}
    assert info.parity["onnxruntime"].equal > 0.999


def test_a_sum_that_the_module_does_not_round_stays_float(tmp_path):
    net, x = residual_network(2, torch.relu)
    info = export_onnx(net, tmp_path / "m.onnx", x[:2], int8=True)
    assert info.float_ops["Add"] == 2
    assert info.parity["onnxruntime"].equal > 0.99
