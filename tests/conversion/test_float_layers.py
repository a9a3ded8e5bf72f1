"""int8 files of modules that multiply elsewhere than in a Linear layer or a convolution."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_compress.conversion.export import export_onnx


class Sequences(nn.Module):
    """A layer that gives a tuple, then a Linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.out = inner, nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.inner(x)[0])


class Steps(nn.Module):
    """A cell along a sequence, then a Linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.out = inner, nn.Linear(8, 3)

    def forward(self, x):
        state = None
        for step in range(x.shape[1]):
            state = self.inner(x[:, step], state)
        return self.out(state[0] if isinstance(state, tuple) else state)


class TwoProducts(nn.Module):
    """Two products with a bias each, of numbers that the module does not read itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
        self.shift, self.other = (nn.Parameter(torch.randn(8)) for _ in range(2))

    def forward(self, x):
        x = functional.linear(10 * x, self.first, self.shift)
        return functional.linear(x.relu(), self.second, self.other)


class Scaled(nn.Linear):
    """Multiplies something else than it reads."""

    def forward(self, x):
        return functional.linear(100 * x.relu(), self.weight, self.bias)


class Added(nn.Linear):
    """Gives something else than its product."""

    def forward(self, x):
        return 100 * super().forward(x)


class Rectified(nn.Conv1d):
    """Pads what it reads and rectifies what it gives: both leave a grid's numbers on it."""

    def forward(self, x):
        return super().forward(functional.pad(x, (1, 1))).relu()


class Normed(nn.Module):
    """Computes a norm itself, and gives a tuple."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x):
        norm = self.norm
        return (
            functional.batch_norm(
                self.layer(x), norm.running_mean, norm.running_var, norm.weight, norm.bias
            ),
        )


NETS = {
    "rnn": (lambda: Sequences(nn.RNN(8, 8, batch_first=True)), "inner", "gates"),
    "lstm_cell": (lambda: Steps(nn.LSTMCell(8, 8)), "inner", "gates"),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        "self_attn",
        "attention",
    ),
    "functional": (lambda: nn.Sequential(TwoProducts(), nn.Linear(8, 3)), "0", "no linear layer"),
    "input": (lambda: nn.Sequential(Scaled(8, 8), nn.ReLU(), nn.Linear(8, 3)), "0", "its forward"),
    "output": (lambda: nn.Sequential(Added(8, 8), nn.ReLU(), nn.Linear(8, 3)), "0", "its forward"),
}


@pytest.mark.parametrize("calibrated", [False, True], ids=["stored", "calibrated"])
@pytest.mark.parametrize("name", NETS)
def test_a_product_of_another_module_is_stored_whole_and_multiplied_as_floats(
    name, calibrated, tmp_path
):
    torch.manual_seed(0)
    make, path, reason = NETS[name]
    module, x = make().eval(), torch.randn(32, 2, 8)
    calibration = [x] if calibrated else None
    info = export_onnx(module, tmp_path / "m.onnx", x, int8=True, calibration=calibration)
    assert reason in info.reasons[path]
    assert any(weight.startswith(f"{path}.") for weight in info.weights)
    others = [why for where, why in info.reasons.items() if not where.startswith(path)]
    assert bool(others) != calibrated
    assert all("give calibration inputs" in why for why in others)


def test_an_own_forward_that_leaves_the_numbers_on_their_grid_runs_in_int8(tmp_path):
    torch.manual_seed(0)
    module, x = nn.Sequential(Rectified(4, 4, 3), nn.Conv1d(4, 2, 1)).eval(), torch.randn(32, 4, 6)
    info = export_onnx(module, tmp_path / "m.onnx", x, int8=True, calibration=[x])
    assert info.reasons == {}
    assert info.int8_ops["QLinearConv"] == 2


def test_the_output_of_a_module_that_is_no_norm_gets_no_grid(tmp_path):
    torch.manual_seed(0)
    module, x = Normed().eval(), torch.randn(32, 4, 6)
    with pytest.warns(UserWarning, match=r"1 of 1 products run as float.*layer.*not rounded"):
        info = export_onnx(module, tmp_path / "m.onnx", x, int8=True, calibration=[x])
    assert "its output is not rounded" in info.reasons["layer"]
    assert info.max_abs_error < 0.1
