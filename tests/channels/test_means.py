"""Means over channels: RMSNorm and pixel norm lose channels, and weights make up for it."""

import re

import pytest
import torch
from exact import check_exact, every_other, randomize
from lightning.pytorch import LightningModule
from tiny import quiet_trainer
from torch import nn
from torch.nn import functional

from lightning_compress import ChannelPruning, ProjectedEMA, rebuild_channels
from lightning_compress.channels.graph import channel_graph
from lightning_compress.channels.plan import removed, zeroed_channels


class Root(nn.Module):
    """RMSNorm as transformers write it."""

    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(dim) + 0.5), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Cast(Root):
    def forward(self, x):
        y = x.float()
        y = y / torch.sqrt(torch.mean(y * y, dim=-1, keepdim=True) + self.eps)
        return self.weight * y.type_as(x)


class Function(Root):
    def forward(self, x):
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Counted(Root):
    """The sum over the number of channels, which it reads from the shape."""

    def forward(self, x):
        return x / ((x**2).sum(-1, keepdim=True) / x.shape[-1]).sqrt() * self.weight


class Length(Root):
    """The length over the square root of a number that the module holds."""

    def __init__(self, dim):
        super().__init__(dim)
        self.scale = dim**0.5

    def forward(self, x):
        return functional.normalize(x, dim=-1) * self.scale * self.weight


class Reread(Root):
    def forward(self, x):
        return functional.normalize(x, dim=-1) * self.weight * x.shape[-1] ** 0.5


class Norm(Root):
    def forward(self, x):
        return x / x.norm(2, dim=-1, keepdim=True).clamp(min=1e-8) * self.weight


NORMS = {
    "torch": lambda dim: nn.RMSNorm(dim, eps=1e-3),
    "torch without eps": nn.RMSNorm,
    "by hand": Root,
    "large eps": lambda dim: Root(dim, 1e-2),
    "cast": Cast,
    "function": Function,
    "counted": Counted,
    "length": Length,
    "reread": Reread,
    "norm": Norm,
}


class Stream(nn.Module):
    """A residual stream that norms read, as in a transformer without heads."""

    def __init__(self, norm, width=16):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.norms = nn.ModuleList([norm(width) for _ in range(3)])
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)
        self.gate = nn.Linear(width, width)
        self.last = nn.Linear(width, 2)

    def forward(self, x):
        x = self.first(x)
        x = x + self.down(functional.silu(self.up(self.norms[0](x))))
        x = x + self.gate(self.norms[1](x))
        return self.last(self.norms[2](x))


@pytest.mark.parametrize("name", NORMS)
def test_a_stream_loses_channels_through_its_norms(name):
    torch.manual_seed(0)
    net = Stream(NORMS[name])
    randomize(net)
    graph, small = check_exact(net, (torch.rand(2, 5, 3),))
    stream = next(one for one in graph.groups if one.name == "first")
    assert len(stream.free) == 16
    assert small.last.in_features == small.gate.in_features == 8
    fresh = Stream(NORMS[name])
    rebuild_channels(fresh)
    fresh.load_state_dict(small.state_dict())
    x = torch.rand(2, 5, 3)
    torch.testing.assert_close(fresh(x), small(x))


class PixelNorm(nn.Module):
    def forward(self, x):
        return x / torch.sqrt(torch.mean(x**2, dim=1, keepdim=True) + 1e-8)


class Unit(nn.Module):
    def forward(self, x):
        return x * (x.square().mean(dim=1) + 1e-8).rsqrt()[:, None]


@pytest.mark.parametrize("norm", [PixelNorm, Unit])
def test_what_reads_a_pixel_norm_makes_up_for_it(norm):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ConvTranspose2d(3, 16, 4), nn.LeakyReLU(0.2), norm(), nn.Upsample(scale_factor=2),
        nn.Conv2d(16, 8, 3, padding=1), norm(), nn.LeakyReLU(0.2), nn.AvgPool2d(2),
        nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU(), norm(), nn.Flatten(), nn.Linear(8 * 64, 4),
    )  # fmt: skip
    graph, small = check_exact(net, (torch.rand(2, 3, 1, 1),))
    assert [len(one.free) for one in graph.groups] == [16, 8, 8, 0]
    torch.testing.assert_close(small[4].weight, net[4].weight[1::2, 1::2] * 2**0.5)


class EqualizedConv(nn.Conv2d):
    """Scaled by what it reads, as PGAN's convolution."""

    def forward(self, x):
        scale = (2 / self.weight[0].numel()) ** 0.5
        return self._conv_forward(x, self.weight * scale, self.bias)


class EqualizedUp(nn.ConvTranspose2d):
    def forward(self, x):
        weight = self.weight / self.weight.shape[0] ** 0.5
        return functional.conv_transpose2d(x, weight, self.bias, self.stride)


class EqualizedLinear(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight * self.in_features**-0.5, self.bias)


@pytest.mark.parametrize("norm", [nn.Identity, PixelNorm])
def test_layers_that_scale_their_weight_by_its_size_make_up_for_it(norm):
    torch.manual_seed(0)
    net = nn.Sequential(
        EqualizedConv(3, 16, 3, padding=1), nn.LeakyReLU(0.2), norm(),
        EqualizedUp(16, 8, 2, 2), nn.ReLU(), norm(),
        EqualizedConv(8, 8, 3), norm(), nn.Flatten(), EqualizedLinear(8 * 36, 4),
    )  # fmt: skip
    for one in net.parameters():
        nn.init.normal_(one)
    graph, _ = check_exact(net, (torch.rand(2, 3, 4, 4),))
    assert [len(one.free) for one in graph.groups] == [16, 8, 8, 0]


def test_a_scale_by_both_sizes_is_no_power_of_one():
    class Xavier(nn.Linear):
        def forward(self, x):
            return functional.linear(x, self.weight / sum(self.weight.shape) ** 0.5)

    graph = channel_graph(nn.Sequential(nn.Linear(3, 8), Xavier(8, 2)), (torch.rand(2, 3),))
    assert not graph.scales


class Between(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(3, 8), nn.Linear(8, 2), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def root(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: root(x) + x, "mean is taken"),
        (lambda x: root(x).tanh(), "mean is taken"),
        (lambda x: root(x) + 1, "mean is taken"),
        (lambda x: root(x.sigmoid()), "mean is taken"),
        (lambda x: x - x.mean(-1, keepdim=True), "mean is taken"),
        (lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1), "mean is taken"),
        (lambda x: x / x.std(-1, keepdim=True), "std is taken"),
        (lambda x: x * x.exp().sum(-1, keepdim=True), "sum is taken"),
        (lambda x: functional.layer_norm(root(x), (8,)), "layer_norm is taken|mean is taken"),
    ],
)
def test_what_cannot_be_made_up_for_keeps_the_channels(function, reason):
    group = channel_graph(Between(function), (torch.rand(2, 3),)).groups[0]
    assert not len(group.free)
    assert re.search(reason, " ".join(group.reasons))


def test_a_sum_over_channels_that_are_zero_is_the_same_without_them():
    check_exact(Between(lambda x: x * x.relu().sum(-1, keepdim=True)), (torch.rand(2, 3),))


def test_a_norm_whose_weight_serves_twice_keeps_its_channels():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
            self.norm = Root(8)

        def forward(self, x):
            return self.last(self.norm(self.norm(self.first(x))))

    graph = channel_graph(Twice(), (torch.rand(2, 3),))
    assert not len(graph.groups[0].free)


def test_eps_of_a_smaller_norm_grows_with_the_mean():
    net = nn.Sequential(nn.Linear(3, 8), nn.RMSNorm(8, eps=0.1), nn.Linear(8, 2))
    graph = channel_graph(net, (torch.rand(2, 3),))
    gone = every_other(graph)
    small = removed(zeroed_channels(net, graph, gone), graph, gone)
    assert small[1].normalized_shape == (4,)
    assert small[1].eps == pytest.approx(0.2)


class Trained(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(Stream(Root), nn.Linear(2, 3))
        self.pixels = nn.Sequential(nn.Linear(3, 16), Unit(), nn.Linear(16, 3))

    def training_step(self, batch, _):
        return (self.net(batch) + self.pixels(batch) - batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.rand(16, 3), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_a_run_ends_smaller_and_so_does_its_average(tmp_path):
    torch.manual_seed(0)
    model = Trained()
    pruning = ChannelPruning(final_sparsity=0.5, round_to=1, fade=1, on_miss="raise")
    trainer = quiet_trainer(tmp_path, pruning, ProjectedEMA(decay=0.5), max_epochs=5)
    trainer.fit(model)
    assert len(model.net[0].norms[0].weight) == model.net[0].first.out_features < 16
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = Trained()
    rebuild_channels(fresh)
    fresh.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    x = torch.rand(4, 3)
    torch.testing.assert_close(fresh.net(x), model.net(x))
