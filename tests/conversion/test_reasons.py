"""Every product of an int8 file that runs as float has a reason."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_compress import quantize_weights
from lightning_compress.conversion.activation_grids import calibrate_layers
from lightning_compress.conversion.export import export_onnx
from lightning_compress.conversion.int8 import Int8Model
from lightning_compress.conversion.session import ExecutedOps

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class Forked(nn.Module):
    """A linear layer that is read through a norm and past it, and a sum of both."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 32), nn.BatchNorm2d(8)
        self.conv, self.skip = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.first(x).view(-1, 8, 2, 2)
        return self.conv(self.norm(x).relu()) + self.skip(x)


class Equalized(nn.Conv2d):
    """A scale of the initialization in the forward pass."""

    def forward(self, x):
        return self._conv_forward(x, 0.25 * self.weight * 0.5, self.bias)


class EqualizedLinear(nn.Linear):
    """The same of a matrix."""

    def forward(self, x):
        return functional.linear(x, self.weight * 0.125, self.bias)


class Modulated(nn.Module):
    """A weight that depends on what the module reads."""

    def __init__(self):
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x):
        weight = self.weight * self.style(x).view(-1, 1, 4)
        return torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1)


def normed(kind):
    return nn.utils.parametrizations.weight_norm(kind(4, 4, 4, 2, 1))


def image(*between):
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *between, nn.Conv2d(4, 4, 1))


VECTOR, IMAGE, WAVE = (4,), (4, 6, 6), (4, 8)
NETS = {
    "forked": (Forked, VECTOR),
    "leaky": (lambda: image(nn.LeakyReLU(0.2)), IMAGE),
    "group norm": (lambda: image(nn.GroupNorm(2, 4), nn.SiLU()), IMAGE),
    "instance norm": (lambda: image(nn.InstanceNorm2d(4), nn.ReLU()), IMAGE),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)), VECTOR),
    "vocoder": (lambda: nn.Sequential(normed(nn.ConvTranspose1d), nn.LeakyReLU(0.1),
                                      normed(nn.Conv1d)), WAVE),
    "modulated": (lambda: nn.Sequential(Modulated(), nn.ReLU(), nn.Linear(4, 4)), VECTOR),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_products_on_integers_and_reasons_are_all_products(name, tmp_path):
    torch.manual_seed(0)
    make, shape = NETS[name]
    module, x = make().eval(), torch.randn(8, *shape)
    quantize_weights(module)
    layers = [path for path, one in module.named_modules() if isinstance(one, LAYERS)]
    calibrate_layers(module, dict.fromkeys(layers, (True, False)), [x])  # as readers have them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        info = export_onnx(module, tmp_path / "m.onnx", x, int8=True)
    whole = sum(n for op, n in info.int8_ops.items() if op in ("QLinearConv", "QGemm"))
    named = {reason.removesuffix(".weight") for reason in info.reasons}
    assert whole + len(named & set(layers)) == len(layers)
    assert all(info.reasons.values())


@pytest.mark.parametrize(("make", "shape", "operator"), [
    (lambda: nn.Sequential(Equalized(4, 4, 3), nn.ReLU(), Equalized(4, 4, 1)), IMAGE,
     "QLinearConv"),
    (lambda: nn.Sequential(EqualizedLinear(4, 8), nn.ReLU(), EqualizedLinear(8, 4)), VECTOR,
     "QGemm"),
], ids=["conv", "linear"])  # fmt: skip
def test_a_weight_times_a_number_multiplies_integers(make, shape, operator, tmp_path):
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(8, *shape)
    quantize_weights(module)
    info = export_onnx(module, tmp_path / "m.onnx", x, int8=True, calibration=[x])
    assert info.int8_ops[operator] == 2
    assert info.reasons == {}


def test_a_product_that_the_runtime_leaves_in_float_is_named_with_what_is_missing():
    built = Int8Model([], nn.Identity(), products=3)
    built.parameters = {"up.weight": "up", "up.2.weight": "up.2", "out.weight": "out"}
    built.reasons = {"out": "known"}
    built.explain(ExecutedOps({}, {}, {"up.2.weight.quantized", "out.weight.around_128", "other"}))
    assert built.reasons["out"] == "known"
    assert list(built.reasons) == ["out", "up.2"]
    assert "2 of 3" in built.reasons["up.2"]
