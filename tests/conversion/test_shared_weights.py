"""int8 files of modules with one weight in several places."""

import numpy as np
import pytest
import torch
from exported import run
from torch import nn

from lightning_compress import quantize_static
from lightning_compress.conversion.export import export_onnx
from lightning_compress.quantization.fake_quantize import fake_quantized


class Twice(nn.Module):
    """Calls a layer twice by one path, each time with a norm of its own behind it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        for norm in self.norms:
            x = norm(self.layer(x)).relu()
        return x


class Inside(nn.Module):
    """Holds a layer that others hold as well."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).relu()


class Elsewhere(nn.Module):
    """Multiplies by a layer's weight outside of that layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.layer(x), self.layer.weight)


def last_twice():
    layer = nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), layer, nn.ReLU(), layer)


def first_twice():
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(8, 8, bias=False))


def in_two_blocks():
    layer = nn.Linear(8, 8)
    return nn.Sequential(Inside(layer), Inside(layer), nn.Linear(8, 4))


def tied():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[4].weight = net[0].weight
    return net


NETS = {
    "last_twice": (last_twice, (8,), 3),
    # ONNX Runtime leaves a product float where a ReLU and a grid that does not rest at 0 follow.
    "first_twice": (first_twice, (8,), 2),
    "in_two_blocks": (in_two_blocks, (8,), 2),
    "tied": (tied, (8,), 3),
    "by_one_path": (Twice, (4, 6, 6), 1),
}


FLOATS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


@pytest.mark.parametrize("calibrated", [False, True], ids=["trained", "calibrated"])
@pytest.mark.parametrize("name", NETS)
def test_each_product_of_a_weight_is_rounded_as_in_its_layer(name, calibrated, tmp_path):
    torch.manual_seed(0)
    make, shape, products = NETS[name]
    module, x = make().eval(), torch.randn(64, *shape)
    if calibrated:
        info = export_onnx(module, tmp_path / "m.onnx", x[:8], int8=True, calibration=[x])
    else:
        quantize_static(module, [x])
        info = export_onnx(module, tmp_path / "m.onnx", x[:8], int8=True)
        with fake_quantized(module), torch.no_grad():
            expected = module(x).numpy()
        away = np.abs(run(info.path, (x,))[0] - expected)
        assert (away < 1e-5).mean() > 0.98
    whole = sum(info.int8_ops.get(op, 0) for op in ("QGemm", "QLinearConv"))
    assert whole >= products
    assert bool(info.reasons) == bool(FLOATS.intersection(info.float_ops))
    assert info.parity["onnxruntime"].more < 0.01


def test_a_product_outside_its_layer_does_not_take_the_layers_grids(tmp_path):
    torch.manual_seed(0)
    module, x = Elsewhere().eval(), torch.randn(64, 8)
    quantize_static(module, [x])
    info = export_onnx(module, tmp_path / "m.onnx", x[:8], int8=True)
    assert "no product of a layer" in info.reasons["layer"]
    assert info.parity["onnxruntime"].equal >= 0.98
    assert info.parity["onnxruntime"].more == 0


def test_a_lookup_in_a_weight_that_also_multiplies_reads_the_same_numbers(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 30))
    module[3].weight = module[0].weight
    words = torch.randint(0, 30, (64, 5))
    report = quantize_static(module, [words], include="*")
    assert {row.path for row in report.activations if row.selected} == {"1", "3"}
    info = export_onnx(module, tmp_path / "m.onnx", words, int8=True)
    assert "lookup" in info.reasons["3"]
    assert any("MatMul" in op for op in info.int8_ops)
    assert info.parity["onnxruntime"].more == 0
