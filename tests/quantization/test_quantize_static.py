"""Post-training quantization on calibration data, corrected biases, equalized layers."""

import pytest
import torch
from torch import nn

from lightning_compress import (
    TargetError,
    compression_state,
    fake_quantized,
    quantize_dynamic,
    quantize_static,
    quantize_weights,
)
from lightning_compress.quantization.corrections import channel_means, equalize_layers


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False),
        nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 4),
    )  # fmt: skip
    net(torch.randn(64, 2, 9, 9))  # statistics
    return net.eval()


def pictures(count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 2, 9, 9, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse"])
def test_eight_bits_stay_near_the_float_network(observer):
    net, data = network(), pictures()
    x = data[0]
    before = net(x)
    net.train()
    report = quantize_static(net, data, observer=observer)
    assert net.training
    assert net[1].training
    net.eval()
    assert [row.path for row in report.activations if row.selected] == ["0", "3", "6"]
    activations = compression_state(net).activations
    assert [grids.output is not None for grids in activations.values()] == [False, False, True]
    assert int(activations["3"].input.zero_point) == 0
    with fake_quantized(net):
        after = net(x)
    assert after.unique().numel() <= 256
    noise = (after - before).square().mean() / before.square().mean()
    assert 0 < noise < 0.01


def test_ranges_are_those_of_the_data():
    net, data = network(), pictures()
    quantize_static(net, data)
    grids = compression_state(net).activations["0"].input
    everything = torch.cat(data)
    width = everything.max() - everything.min()
    assert grids.scale.item() == pytest.approx(width.item() / 255, rel=1e-5)


@pytest.mark.parametrize(
    "data",
    [
        torch.randn(4, 2, 9, 9),
        [(torch.randn(4, 2, 9, 9),)],
        [{"input": torch.randn(4, 2, 9, 9)}],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 2, 9, 9))),
        (torch.randn(1, 2, 9, 9) for _ in range(2)),
    ],
    ids=["tensor", "tuples", "dicts", "loader", "generator"],
)
def test_data_come_in_many_shapes(data):
    net = network()
    quantize_static(net, data)
    assert len(compression_state(net).activations) == 3


def test_dynamic_quantization_rounds_weights_and_forgets_ranges():
    net, twin = network(), network()
    quantize_static(net, pictures())
    report = quantize_dynamic(net, 4)
    assert not compression_state(net).activations
    quantize_weights(twin, 8)
    quantize_weights(twin, 4)
    for name, value in net.state_dict().items():
        if name.endswith("weight"):  # static quantization has rounded the biases
            assert torch.equal(value, twin.state_dict()[name]), name
    assert [row.path for row in report.activations] == ["0", "3", "6"]


def test_corrected_biases_give_back_the_mean_outputs():
    data = pictures()
    net, plain = network(), network()
    layers = {path: net.get_submodule(path) for path in ("0", "3", "6")}
    wanted = channel_means(net, layers, data)
    report = quantize_static(net, data, weight_bits=3, bias_correction=True, per_channel=False)
    quantize_static(plain, data, weight_bits=3, per_channel=False)
    where = {row.path: row.reason for row in report.corrected}
    assert where == {
        "0": "in its bias", "3": "in the running mean of 4", "6": "in its bias",
    }  # fmt: skip
    assert all(row.selected for row in report.corrected)

    def drift(module):
        # after the norm, since the middle layer is corrected there
        means = channel_means(module, {"6": module[6]}, data)
        return (means["6"] - wanted["6"]).abs().max()

    assert drift(net) < 1e-5
    assert drift(plain) > 100 * drift(net)


def test_a_layer_without_a_bias_or_norm_says_so():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))
    report = quantize_static(net, torch.randn(9, 3), bias_correction=True)
    assert [(row.path, row.selected) for row in report.corrected] == [("0", False), ("2", True)]
    assert "no bias" in report.corrected[0].reason


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4), nn.LeakyReLU(), nn.Linear(4, 2)),
        nn.Sequential(nn.Conv1d(5, 7, 1), nn.ReLU(), nn.MaxPool1d(1), nn.Conv1d(7, 2, 1)),
        nn.Sequential(nn.ConvTranspose1d(5, 7, 2), nn.ReLU(), nn.ConvTranspose1d(7, 2, 2)),
        nn.Sequential(nn.Conv1d(5, 7, 1, bias=False), nn.ReLU(), nn.ConvTranspose1d(7, 2, 2)),
    ],
    ids=["linear", "conv", "transposed", "mixed"],
)
def test_equalized_layers_have_equal_ranges_and_the_same_function(net):
    with torch.no_grad():
        net[0].weight.mul_(torch.rand_like(net[0].weight) ** 3)
        net[0].weight[torch.rand_like(net[0].weight) < 0.3] = 0.0
    zeros = net[0].weight == 0
    x = torch.randn(8, 5) if isinstance(net[0], nn.Linear) else torch.randn(8, 5, 6)
    before = net.double()(x.double())
    rows = equalize_layers(net)
    assert rows[0].selected
    torch.testing.assert_close(net(x.double()), before, rtol=1e-6, atol=1e-8)
    assert torch.equal(net[0].weight == 0, zeros)
    if len(net) == 5:
        return  # a chain only comes near
    first, second = net[0].weight, net[-1].weight
    out = first.abs().amax((1, 2) if first.shape[0] == 7 else (0, 2))
    into = second.abs().amax((0, 2) if second.shape[1] == 7 else (1, 2))
    torch.testing.assert_close(out, into, rtol=1e-5, atol=1e-8)


class Branched(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        hidden = self.a(x).relu()
        return self.c(torch.relu(self.b(hidden))) + hidden


class Wild(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else -self.a(x)


def test_what_cannot_be_equalized_says_why():
    rows = {row.path: row for row in equalize_layers(Branched())}
    assert rows["b"].selected
    assert rows["a"].reason == "relu lets no factor pass"  # a method, whatever it does
    assert not rows["c"].selected
    assert "cannot be traced" in equalize_layers(Wild())[0].reason
    norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    assert equalize_layers(norm)[0].reason == "BatchNorm1d lets no factor pass"
    grouped = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.ReLU(), nn.Conv1d(4, 1, 1))
    assert equalize_layers(grouped)[0].reason == "grouped convolution"
    shared = nn.Linear(3, 3)
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    assert not any(row.selected for row in equalize_layers(twice))
    tied = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    tied[2].weight = tied[0].weight
    assert "shares its weight" in equalize_layers(tied)[0].reason


def test_equalization_helps_where_channels_differ():
    torch.manual_seed(0)
    data, errors = torch.randn(200, 6), {}
    for equalize in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
        with torch.no_grad():
            spread = torch.logspace(-2, 1, 32)
            net[0].weight.mul_(spread[:, None])
            net[0].bias.mul_(spread)
            net[2].weight.div_(spread)
        before = net(data)
        quantize_dynamic(net, 6, per_channel=False, equalize=equalize)
        errors[equalize] = (net(data) - before).square().mean().item()
    assert errors[True] < 0.2 * errors[False]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "calibration data are empty"),
        ([torch.empty(0, 2, 9, 9)], "calibration data are empty"),
        ([torch.full((1, 2, 9, 9), float("nan"))], "batch 0 of the calibration data holds NaN"),
        ([torch.zeros(3, 2, 9, 9)], r"no range .* 0: always 0: the layer before is dead"),
    ],
)
def test_bad_data_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        quantize_static(network(), data)


def test_bad_arguments_are_named_and_nothing_changes():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for arguments, message in (
        ({"weight_bits": 9}, "weight_bits=9"),
        ({"activation_bits": 1}, "activation_bits=1"),
        ({"scheme": "magic"}, "scheme='magic': valid are"),
        ({"observer": "eye"}, "observer='eye': valid are"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_static(net, pictures(), equalize=True, **arguments)
    with pytest.raises(ValueError, match="bits=1: valid are"):
        quantize_dynamic(net, 1)
    with pytest.raises(TargetError, match="matches no parameter"):
        quantize_static(net, pictures(), include="nowhere.*")
    with pytest.raises(ValueError, match=r"step=0\.0"):
        quantize_weights(net, scheme="entropy", step=0.0)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not net[0]._forward_pre_hooks


def test_a_layer_that_no_batch_meets_is_named():
    net = Branched()
    net.forward = lambda x: net.a(x)
    with pytest.raises(ValueError, match="b: never seen in training mode; c: never seen"):
        quantize_static(net, torch.randn(4, 3))


@pytest.mark.parametrize("scheme", ["codebook", "entropy"])
def test_weights_go_onto_shared_values_and_entropy_grids(scheme):
    net = network()
    quantize_weights(net, 4, scheme=scheme)
    for path, grid in compression_state(net).grids.items():
        weight = net.get_parameter(path)
        assert torch.equal(grid.project(weight), weight)
        assert weight.unique().numel() <= 16
