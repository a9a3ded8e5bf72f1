"""Which int8 files pass the check, which do not, and what the export says of float products."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from exported import run
from torch import nn

from lightning_compress import compression_state, fake_quantized, quantize_dynamic, quantize_static
from lightning_compress.conversion import int8 as int8_module
from lightning_compress.conversion.axes import axes_of
from lightning_compress.conversion.checks import (
    OnnxMismatchError,
    check_batches,
    check_float,
    compare,
)
from lightning_compress.conversion.export import export_onnx


class Softmax(nn.Module):
    """What follows the last grid magnifies its step."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 32),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Linear(32, 32),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )

    def forward(self, x):
        return (20 * self.net(x)).softmax(-1)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 16, 3, padding=1),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3, padding=1),
                nn.BatchNorm2d(16),
            )
            for _ in range(6)
        )

    def forward(self, x):
        x = self.first(x).relu()
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.last(x)


def mixed():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.InstanceNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, 2, 1),
        nn.ELU(),
        nn.Conv2d(4, 1, 3),
    )


def linear():
    return nn.Sequential(
        nn.Linear(16, 16), nn.LeakyReLU(0.1), nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 4)
    )


NETS = {
    "softmax": (Softmax, (64, 16), {"QGemm": 3}),
    "residual": (Residual, (8, 3, 8, 8), {"QLinearConv": 14}),
    "mixed": (mixed, (8, 3, 8, 8), {"QLinearConv": 5}),
    "linear": (linear, (64, 16), {"QGemm": 3}),
}


@pytest.mark.parametrize("name", NETS)
def test_grids_stand_where_the_next_product_reads_and_all_products_run_in_int8(name, tmp_path):
    torch.manual_seed(0)
    make, shape, ops = NETS[name]
    module, x = make(), torch.randn(shape)
    module(x)
    quantize_static(module.eval(), [x])
    info = export_onnx(module, tmp_path / "m.onnx", x[:4], int8=True)  # a warning would fail
    assert {op: info.int8_ops.get(op) for op in ops} == ops
    assert info.reasons == {}


def test_what_a_folded_norm_gives_has_the_grid_of_its_product():
    torch.manual_seed(0)
    module, x = mixed(), torch.randn(8, 3, 8, 8)
    module(x)
    quantize_static(module.eval(), [x])
    found = compression_state(module).activations
    gives = {path for path, grids in found.items() if grids.output is not None}
    assert gives == {"1", "3", "6", "9", "11"}
    assert found["1"].input is None


def test_a_product_without_a_rounded_output_is_counted_with_the_way_out(tmp_path):
    torch.manual_seed(0)
    module, x = linear().eval(), torch.randn(64, 16)
    quantize_static(module, [x])
    from lightning_compress.state import ActivationGrids, set_activation_grids

    for index in (0, 2):
        grids = compression_state(module).activations[str(index)]
        set_activation_grids(module[index], ActivationGrids(grids.input, None))
    with pytest.warns(UserWarning, match=r"2 of 3 products run as float.*calibration=") as said:
        info = export_onnx(module, tmp_path / "m.onnx", x, int8=True)
    assert said[0].filename == __file__
    assert set(info.reasons) == {"0", "2"}
    assert info.float_ops["FusedGemm"] == 2
    export_onnx(module, tmp_path / "m.onnx", x, int8=True, calibration=[x])


def test_a_module_that_answers_within_its_range_alone_is_compared(tmp_path):
    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(x.log())

    torch.manual_seed(0)
    x = torch.rand(4, 8) + 0.1
    drawn = check_batches((x,), axes_of(["x"], (x,), None, None))[-1][0]
    assert drawn.min() >= x.min()
    assert drawn.max() <= x.max()
    assert drawn.unique().numel() > 100
    info = export_onnx(Log(), tmp_path / "m.onnx", x, int8=True, calibration=[x])
    assert info.parity["onnxruntime"].elements > 0
    assert np.isfinite(info.max_abs_error)


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_nothing_to_compare_never_passes(int8, tmp_path):
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(x)[:, :0]

    x = torch.randn(4, 8)
    more = {"int8": True, "calibration": [x]} if int8 else {}
    with pytest.raises(OnnxMismatchError, match="nothing was compared"):
        export_onnx(Empty(), tmp_path / "m.onnx", x, **more)
    assert not list(tmp_path.iterdir())


def test_nan_on_both_sides_is_equal_and_on_one_side_is_not():
    want = torch.tensor([torch.nan, torch.inf, 1.0])
    found = compare(lambda _: [want.numpy()], [()], [[want]], [0.1])
    assert (found.equal, found.elements, found.largest) == (1.0, 3, 0.0)
    other = np.array([0.0, np.inf, np.nan], np.float32)
    found = compare(lambda _: [other], [()], [[want]], [0.1])
    assert found.more == pytest.approx(2 / 3)
    assert found.largest == np.inf


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("tolerance", [None, 1e6])
def test_a_float_file_that_gives_no_number_is_refused(monkeypatch, tmp_path, value, tolerance):
    module, x = nn.Linear(3, 2).eval(), torch.ones(4, 3)
    wrong = module(x).detach().numpy()
    wrong[1, 0] = value  # at one place: all others agree

    class Session:
        def get_inputs(self):
            return [SimpleNamespace(name="x")]

        def get_outputs(self):
            return [SimpleNamespace(name="y")]

        def run(self, _, feed):
            return [np.where(feed["x"].sum() == 12, wrong, 0)]

    monkeypatch.setattr("lightning_compress.conversion.checks.make_session", lambda *_: Session())
    with pytest.raises(OnnxMismatchError, match=r"'y' differs from PyTorch by (nan|inf)"):
        check_float(module, b"", [(x,)], tolerance, tmp_path / "m.onnx")


def test_a_tolerance_of_ones_own_widens_the_check(tmp_path, monkeypatch):
    monkeypatch.setattr(int8_module, "fold_batch_norm", lambda *_: None)  # a wrong file
    monkeypatch.setattr("lightning_compress.conversion.weight_storage.place_bias", lambda *_: None)
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 6)
    for layer in (module[0], module[2]):
        nn.init.constant_(layer.bias, 0.5)
    monkeypatch.setattr("lightning_compress.conversion.nodes._bias", no_bias)
    more = {"int8": True, "calibration": [x]}
    with pytest.raises(OnnxMismatchError, match="tolerance="):
        export_onnx(module, tmp_path / "m.onnx", x, **more)
    info = export_onnx(module, tmp_path / "m.onnx", x, **more, tolerance=10.0)
    assert 0.1 < info.max_abs_error < 10


def no_bias(node, _shape):
    """The product's output with its bias lost."""
    if len(node.inputs) > 2:
        node.resize_inputs(2)
    return None, node.outputs[0]


DYNAMIC = {
    "linear": (
        lambda: nn.Sequential(
            nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4, bias=False)
        ),
        (16, 16),
        {"MatMulInteger": 2},
    ),
    "sequences": (
        lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)),
        (16, 3, 16),
        {"MatMulInteger": 2},
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 4, 2, 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(4, 2, 3, dilation=2, groups=2),
        ),
        (4, 3, 8, 8),
        {"ConvInteger": 3},
    ),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_quantization_multiplies_integers_over_each_calls_own_range(name, bits, tmp_path):
    torch.manual_seed(0)
    make, shape, products = DYNAMIC[name]
    module, x = make(), torch.randn(shape)
    module(x)
    quantize_dynamic(module.eval(), bits)
    info = export_onnx(module, tmp_path / "m.onnx", x, int8=True)
    kinds = [node.op_type for node in onnx.load(info.path).graph.node]
    assert kinds.count("DynamicQuantizeLinear") == sum(products.values())
    assert {op: kinds.count(op) for op in products} == products
    assert info.reasons == {}
    large = 7 * x  # another range than any that was seen
    with torch.no_grad(), fake_quantized(module):
        expected = module(large).numpy()
    np.testing.assert_allclose(run(info.path, (large,))[0], expected, atol=1e-3)
