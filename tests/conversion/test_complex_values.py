"""ONNX files of modules that compute with complex numbers, as the ends of vocoders do."""

import pytest
import torch
from torch import nn

from lightning_compress import export_onnx, quantize_static
from lightning_compress.conversion.complex_values import ComplexOperands


class InverseFourier(nn.Module):
    """Magnitudes and phases to a wave, one frame a step."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 18))

    def forward(self, x):
        magnitude, phase = self.body(x).chunk(2, dim=-1)
        spectrum = magnitude.exp().clip(max=10) * (phase.cos() + 1j * phase.sin())
        return torch.fft.irfft((spectrum + 1) / 2.0, 16, dim=-1).flatten(1)


@pytest.mark.parametrize("int8", [False, True])
def test_a_spectrum_is_exported(int8, tmp_path):
    torch.manual_seed(0)
    module, x = InverseFourier().eval(), torch.randn(8, 5, 6)
    if int8:
        quantize_static(module, [x])
    info = export_onnx(module, tmp_path / "m.onnx", x, int8=int8)
    assert all(one.elements for one in info.parity.values())
    assert info.max_abs_error < (0.1 if int8 else 1e-5)
    assert not int8 or sum(info.int8_ops.values()) >= 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x, z: 1j * x,
        lambda x, z: x * z,
        lambda x, z: z - x,
        lambda x, z: 1 - z,
        lambda x, z: z / 2,
        lambda x, z: x.long() * z,
        lambda x, z: x + 2,
    ],
)
def test_values_are_those_without_it(function):
    x, z = torch.rand(3) + 1, torch.randn(3, dtype=torch.complex64)
    expected = function(x, z)
    with ComplexOperands():
        torch.testing.assert_close(function(x, z), expected)
