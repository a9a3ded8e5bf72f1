"""Biases on the steps of int8 sums."""

import pytest
import torch
from torch import nn

from lightning_compress import compression_state, fake_quantized, quantize_static
from lightning_compress.quantization import bias_rounding
from lightning_compress.quantization.bias_rounding import bias_changes, bias_step, round_bias


def calibrated(net, x, **settings):
    with torch.no_grad():
        net.train()(x)
    return quantize_static(net.eval(), [x], **settings)


def parts_of_a_step(net, path, total):
    """What a bias is in steps of what its layer reads times its weight."""
    state = compression_state(net)
    step = state.activations[path].input.scale * state.grids[f"{path}.weight"].scale.flatten()
    return total.detach() / step


def test_a_bias_is_whole_in_steps_of_input_times_weight():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 3, 10)
    before = net[0].bias.detach().clone()
    report = calibrated(net, x)
    assert [(row.path, row.selected) for row in report.rounded] == [("0", True), ("2", True)]
    parts = parts_of_a_step(net, "0", net[0].bias)
    assert (parts - parts.round()).abs().max() < 0.01
    step = net[0].bias.detach() / parts
    assert ((net[0].bias - before).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("bias", [True, False])
def test_with_a_norm_behind_it_the_folded_bias_is_whole(bias):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 4, 3, bias=bias), nn.BatchNorm1d(4), nn.ReLU())
    nn.init.normal_(net[1].bias)
    nn.init.normal_(net[1].weight)  # some negative
    norm, x = net[1], torch.randn(4, 3, 10)
    calibrated(net, x)
    own = net[0].bias if bias else 0.0
    sigma = (norm.running_var + norm.eps).sqrt()
    parts = parts_of_a_step(net, "0", own - norm.running_mean + norm.bias * sigma / norm.weight)
    assert (parts - parts.round()).abs().max() < 0.01


def test_few_bits_leave_finer_steps():
    layer, x = nn.Linear(4, 2), torch.randn(16, 4)
    calibrated(nn.Sequential(layer), x, weight_bits=3, activation_bits=4)
    state = compression_state(nn.Sequential(layer))
    read, weight = state.activations["0"].input, state.grids["0.weight"].scale
    step = bias_step(layer, read, weight)
    assert torch.allclose(step, (read.scale * weight.flatten()).double() / 16 / 16)


def test_what_cannot_be_rounded_is_named():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    net[3].bias = net[2].bias
    report = calibrated(net, torch.randn(8, 4))
    reasons = {row.path: row.reason for row in report.rounded if not row.selected}
    assert reasons["0"] == "it has no bias"
    assert "shares its bias" in reasons["2"]
    assert "shares its bias" in reasons["3"]
    large = nn.Linear(1, 1)
    large.bias.data.fill_(1e9)
    assert "int32" in round_bias(large, None, torch.tensor([0.1]))
    assert large.bias.item() == 1e9


class Branching(nn.Module):
    """Cannot be traced as a whole; its parts can."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(
            nn.Linear(3, 8, bias=False), nn.Unflatten(1, (2, -1)), nn.BatchNorm1d(2), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4))

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if x.sum() > -1 else x


def unrounded(net, x):
    """With grids, and biases that training moved since."""
    calibrated(net, x)
    with torch.no_grad():
        net.second[0].bias.uniform_(-1, 1)
        net.first[2].running_mean.uniform_(-1, 1)
    return net


def test_biases_count_as_integers_on_the_grids_and_stay_as_they_are():
    torch.manual_seed(0)
    x = torch.randn(16, 3)
    net = unrounded(Branching(), x)
    before = {name: one.clone() for name, one in net.state_dict().items()}
    drawn = torch.random.get_rng_state()
    changes = bias_changes(net)
    assert {path: tuple(one.shape) for path, one in changes.items()} == {
        "first.0": (8,),
        "second.0": (4, 1),
    }
    for path, norm in (("first.0", net.first[2]), ("second.0", net.second[1])):
        layer = net.get_submodule(path)
        added = norm.bias * (norm.running_var + norm.eps).sqrt() / norm.weight - norm.running_mean
        total = added.repeat_interleave(len(layer.weight) // len(added)) + changes[path].flatten()
        total = total if layer.bias is None else total + layer.bias
        parts = parts_of_a_step(net, path, total)
        assert (parts - parts.round()).abs().max() < 0.01
    with torch.no_grad(), fake_quantized(net):
        rounded = net(x)
    with torch.no_grad():
        net.second[0].bias += changes["second.0"].flatten()
        net.first[0].bias = nn.Parameter(changes["first.0"])
    assert bias_changes(net) == {}
    with torch.no_grad(), fake_quantized(net):
        assert torch.allclose(net(x), rounded, atol=1e-6)
    net.first[0].bias = None
    assert torch.equal(torch.random.get_rng_state(), drawn)
    kept = net.state_dict()
    assert all(torch.equal(kept[name], one) for name, one in before.items() if "bias" not in name)


@pytest.mark.parametrize("split", ["view", "reshape", "unflatten", "transposed"])
def test_outputs_that_share_a_channel_of_a_norm_are_followed_through_a_reshape(split):
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 6, bias=False), nn.BatchNorm1d(2)

        def forward(self, x):
            y = self.layer(x)
            if split == "view":
                return self.norm(y.view(-1, 2, 3))
            if split == "reshape":
                return self.norm(y.reshape((x.shape[0], 2, 3)))
            return self.norm(y.unflatten(1, (2, 3)) if split == "unflatten" else y.view(-1, 2))

    torch.manual_seed(0)
    net, x = Split(), torch.randn(16, 3)
    quantize_static(net.eval(), [x])
    net.norm.running_mean.uniform_(-1, 1)
    # Whose channel an output is, nobody can tell where rows are split.
    assert set(bias_changes(net)) == (set() if split == "transposed" else {"layer"})


def test_a_module_without_grids_is_not_traced(monkeypatch):
    def traced(_):
        raise AssertionError("its forward ran")

    monkeypatch.setattr(bias_rounding.Dataflow, "of", traced)
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4))
    assert bias_changes(net) == {}
    with fake_quantized(net):
        pass
