"""Fake quantization against torch's own, clipping that learns, and which layers are last."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress import compression_state, fake_quantized
from lightning_compress.grids import AffineGrid, grid_of_range
from lightning_compress.quantization.activation_ranges import ActivationQuantizer, LastLayers
from lightning_compress.quantization.fake_quantize import (
    activation_layers,
    clipped_fake_quantize,
    fake_quantize,
)
from lightning_compress.state import ActivationGrids, set_activation_grids
from lightning_compress.targets import select


def grid_over(low, high, bits=8):
    return grid_of_range(torch.tensor([low]), torch.tensor([high]), bits=bits, symmetric=False)


@settings(deadline=None)  # the first call waits for a busy machine
@given(
    st.integers(0, 10_000),
    st.integers(2, 8),
    st.floats(-3.0, 0.0, width=32),
    st.floats(0.5, 4.0, width=32),
)
def test_values_and_gradients_equal_torchs(seed, bits, low, high):
    grid = grid_over(low, high, bits)
    generator = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(60, generator=generator)).requires_grad_()
    upstream = torch.randn(60, generator=generator)
    found = fake_quantize(x, grid)
    (mine,) = torch.autograd.grad(found, x, upstream)
    limits = int(grid.zero_point), grid.qmin, grid.qmax
    expected = torch.fake_quantize_per_tensor_affine(x, grid.scale.item(), *limits)
    (theirs,) = torch.autograd.grad(expected, x, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(mine, theirs)


def test_half_precision_stays_what_it_is():
    x = torch.randn(50).bfloat16().requires_grad_()
    y = fake_quantize(x, grid_over(-1.0, 1.0))
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert (y.float() - x.detach().float().clamp(-1, 1)).abs().max() < 2 / 255


def test_clip_values_get_the_gradient_of_autograd():
    """PACT's own formula: y = 0.5 (|x| - |x - a| + a), quantized straight through."""
    x = (2 * torch.rand(400) ** 2).requires_grad_()
    clip = torch.tensor([1.3], requires_grad=True)
    upstream = torch.randn(400)
    y = clipped_fake_quantize(x, clip, 4)
    to_x, to_clip = torch.autograd.grad(y, (x, clip), upstream)
    plain = 0.5 * (x.abs() - (x - clip).abs() + clip)
    expected = torch.autograd.grad(plain, (x, clip), upstream)
    torch.testing.assert_close(to_x, expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(to_clip, expected[1], rtol=1e-4, atol=1e-4)
    step = 1.3 / 15
    assert (y - plain).abs().max() <= step / 2 + 1e-6


class Heads(nn.Module):
    """Two heads behind one body, a layer used twice, and a branch that is added."""

    def __init__(self):
        super().__init__()
        self.body, self.skip = nn.Linear(3, 4), nn.Linear(3, 4)
        self.again = nn.Linear(4, 4)
        self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        hidden = torch.relu(self.body(x)) + self.skip(x)
        hidden = self.again(torch.relu(self.again(hidden)))
        return self.one(hidden), self.two(input=hidden)


def test_the_last_layers_are_those_whose_output_reaches_no_other():
    net = Heads()
    layers = {name: one for name, one in net.named_modules() if isinstance(one, nn.Linear)}
    finder = LastLayers(layers)
    net(torch.randn(2, 3))
    assert finder.look()
    assert finder.found() == ["one", "two"]
    finder.stop()
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in layers.values())


class Forks(nn.Module):
    """Products that two others read: past a BatchNorm or a ReLU, and through it."""

    def __init__(self):
        super().__init__()
        self.normed, self.rectified, self.alone = (nn.Linear(3, 3) for _ in range(3))
        self.norm = nn.BatchNorm1d(3)
        self.reads = nn.ModuleList(nn.Linear(3, 3) for _ in range(5))

    def forward(self, x):
        a, b, c = self.normed(x), self.rectified(x), self.alone(x).relu()
        inputs = (self.norm(a).relu(), a, b.relu(), b, c)
        return sum(layer(one) for layer, one in zip(self.reads, inputs, strict=True))


def test_a_product_whose_readers_round_different_values_needs_a_grid_of_its_own():
    net = Forks()
    layers = {name: one for name, one in net.named_modules() if isinstance(one, nn.Linear)}
    finder = LastLayers(layers, norms={"norm": net.norm})
    net(torch.randn(2, 3))
    assert finder.look()
    assert finder.bare() == ["normed", "rectified"]
    finder.stop()


def test_each_network_that_ships_has_last_layers_of_its_own():
    model = nn.ModuleDict({"encoder": nn.Linear(3, 2), "decoder": nn.Linear(2, 3)})
    finder = LastLayers(dict(model.items()), ("encoder", "decoder"))
    model["decoder"](model["encoder"](torch.randn(2, 3)))
    assert finder.look()
    assert finder.found() == ["encoder", "decoder"]
    whole = LastLayers(dict(model.items()))
    model["decoder"](model["encoder"](torch.randn(2, 3)))
    assert whole.look()
    assert whole.found() == ["decoder"]


def test_a_pass_without_gradients_tells_nothing_and_a_later_one_does():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    finder = LastLayers({"0": net[0], "1": net[1]})
    with torch.no_grad():
        net(torch.zeros(1, 2))
    assert not finder.look()
    net(torch.zeros(1, 2))
    assert finder.look()
    assert finder.found() == ["1"]


def test_layers_that_stay_float_say_why():
    net = nn.ModuleDict(
        {
            "conv": nn.ConvTranspose2d(2, 2, 2),
            "gru": nn.GRU(2, 2),
            "cell": nn.LSTMCell(2, 2),
            "words": nn.Embedding(4, 2),
            "attention": nn.MultiheadAttention(2, 1),
            "pair": nn.Bilinear(2, 2, 2),
            "normed": nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)),
        }
    )
    layers, coverage = activation_layers(net, select(net, include=["*", "words"]).targets)
    assert list(layers) == ["conv", "normed"]
    reasons = {row.path: row.reason for row in coverage if not row.selected}
    assert set(reasons) == {
        "gru", "cell", "words", "attention", "attention.out_proj", "pair",
    }  # fmt: skip
    assert all(reason.startswith("weights only, ") for reason in reasons.values())


def test_all_layers_of_a_tied_weight_get_a_grid():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    net[2].weight = net[0].weight
    layers, coverage = activation_layers(net, select(net).targets)
    assert list(layers) == ["0", "2"]
    assert [row.path for row in coverage if row.selected] == ["0", "2"]


def test_training_sees_one_range_a_step_and_evaluation_moves_nothing():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    side = ActivationQuantizer({"0": net[0], "2": net[2]}, bits=4)
    side.attach()
    x = torch.randn(30, 2)
    first = net(x)
    assert torch.equal(first, net[2](torch.relu(net[0](x))))  # nothing is known yet
    side.step()
    ranges = {path: one.observer.range for path, one in side.inputs.items()}
    net(10 * x)
    assert {path: one.observer.range for path, one in side.inputs.items()} == ranges
    assert net(x).unique().numel() <= 16
    side.step()
    assert side.inputs["0"].observer.range[1] == pytest.approx(10 * x.max().item())
    net.eval()
    net(100 * x)
    side.step()
    assert side.inputs["0"].observer.range[1] == pytest.approx(10 * x.max().item())
    side.freeze()
    side.leave_grids()
    side.detach()
    expected = net(x)
    with fake_quantized(net) as quantized:
        assert quantized is net
        assert net(x).unique().numel() <= 16
    assert torch.equal(net(x), expected)
    after_relu = compression_state(net).activations["2"].input
    assert (after_relu.qmin, int(after_relu.zero_point)) == (0, 0)


def test_grids_follow_copies_and_hooks_do_not():
    net = nn.Sequential(nn.Linear(2, 2))
    set_activation_grids(net[0], ActivationGrids(input=grid_over(0.0, 1.0, 2)))
    with fake_quantized(net):
        twin = copy.deepcopy(net)
    x = torch.rand(5, 2)
    assert torch.equal(twin(x), net(x))
    with fake_quantized(twin):
        assert torch.equal(twin(x), net((3 * x).round() / 3))


def test_hooks_go_away_when_the_pass_fails():
    net = nn.Sequential(nn.Linear(2, 2))
    set_activation_grids(net[0], ActivationGrids(input=grid_over(0.0, 1.0)))
    with pytest.raises(RuntimeError), fake_quantized(net):
        net(torch.rand(5, 3))
    assert not net[0]._forward_pre_hooks


def test_a_state_of_other_layers_is_refused():
    state = ActivationQuantizer({"0": nn.Linear(1, 1)}).state_dict()
    with pytest.raises(ValueError, match=r"inputs of \['0'\], this run those of \['1'\]"):
        ActivationQuantizer({"1": nn.Linear(1, 1)}).load_state_dict(state)


def test_a_grid_of_zero_point_above_zero_is_exact():
    grid = AffineGrid(torch.tensor([0.5]), torch.tensor([3]), 3, False, None)
    x = torch.tensor([-9.0, -1.5, -0.3, 0.0, 0.3, 2.0, 9.0])
    assert fake_quantize(x, grid).tolist() == [-1.5, -1.5, -0.5, 0.0, 0.5, 2.0, 2.0]
