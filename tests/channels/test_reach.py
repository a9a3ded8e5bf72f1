"""Structures of whole projects lose half of their products: vocoders, speech and image U-Nets."""

import warnings
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from exact import randomize
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from lightning_compress.channels.graph import channel_graph
from lightning_compress.channels.plan import (
    ChannelPlan,
    exact_outputs,
    removal_fault,
    removed,
    zeroed_channels,
)
from lightning_compress.channels.selection import (
    Costs,
    Rounding,
    normalize_by_group,
    select_for_removal,
    sum_over_units,
)
from lightning_compress.targets import clean_path, select


class Fields(nn.Module):
    """Residual blocks of one receptive field."""

    def __init__(self, channels, kernel):
        super().__init__()
        self.convs = nn.ModuleList(
            weight_norm(
                nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2)
            )
            for d in (1, 3)
        )

    def forward(self, x):
        for conv in self.convs:
            x = x + conv(functional.leaky_relu(x, 0.1))
        return x


class Vocoder(nn.Module):
    """Upsampling, then the mean of several receptive fields, under weight norm."""

    def __init__(self):
        super().__init__()
        self.num_kernels, self.num_upsamples = 2, 2
        self.conv_pre = weight_norm(nn.Conv1d(20, 32, 7, padding=3))
        self.ups = nn.ModuleList(
            weight_norm(nn.ConvTranspose1d(32 >> i, 16 >> i, 4, 2, 1)) for i in range(2)
        )
        self.blocks = nn.ModuleList(Fields(16 >> i, k) for i in range(2) for k in (3, 5))
        self.conv_post = weight_norm(nn.Conv1d(8, 1, 7, padding=3))

    def forward(self, x):
        x = self.conv_pre(x)
        for i in range(self.num_upsamples):
            x = self.ups[i](functional.leaky_relu(x, 0.1))
            blocks = self.blocks[i * self.num_kernels : (i + 1) * self.num_kernels]
            x = sum(block(x) for block in blocks) / self.num_kernels
        return self.conv_post(functional.leaky_relu(x)).tanh()


class Snake(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)
        self.alpha, self.beta = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(hidden))

    def forward(self, x):
        x = self.proj(x)
        return x + (1.0 / (self.beta.exp() + 1e-9)) * torch.sin(x * self.alpha.exp()).pow(2)


class Block(nn.Module):
    """Convolution with GroupNorm and time, then a transformer block."""

    def __init__(self, dim, out):
        super().__init__()
        self.time = nn.Sequential(nn.Mish(), nn.Linear(16, out))
        self.conv, self.norm = nn.Conv1d(dim, out, 3, padding=1), nn.GroupNorm(4, out)
        self.second, self.res = nn.Conv1d(out, out, 3, padding=1), nn.Conv1d(dim, out, 1)
        self.heads, self.norm1, self.norm2 = 4, nn.LayerNorm(out), nn.LayerNorm(out)
        self.to_q, self.to_k, self.to_v = (nn.Linear(out, 32, bias=False) for _ in range(3))
        self.to_out = nn.Linear(32, out)
        self.ff = nn.Sequential(Snake(out, 2 * out), nn.Linear(2 * out, out))

    def forward(self, x, mask, t):
        h = functional.mish(self.norm(self.conv(x * mask))) * mask + self.time(t)[..., None]
        x = ((self.second(h) + self.res(x * mask)) * mask).transpose(1, 2)
        y = self.norm1(x)
        q, k, v = (
            layer(y).view(len(y), -1, self.heads, layer(y).shape[-1] // self.heads).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.to_out(y)
        return (x + self.ff(self.norm2(x))).transpose(1, 2)


class Speech(nn.Module):
    """An estimator of flow matching: a U-Net over time with transformer blocks."""

    def __init__(self):
        super().__init__()
        self.down, self.mid, self.up = Block(8, 16), Block(16, 32), Block(48, 16)
        self.last = nn.Conv1d(16, 4, 1)

    def forward(self, x, mask, mu, t):
        t = torch.cat(
            [(t[:, None] * torch.arange(8)).sin(), (t[:, None] * torch.arange(8)).cos()], 1
        )
        skip = self.down(torch.cat([x, mu], 1), mask, t)
        x = self.mid(functional.avg_pool1d(skip, 2), mask[:, :, ::2], t)
        x = functional.interpolate(x, scale_factor=2.0)
        return self.last(self.up(torch.cat([x, skip], 1), mask, t)) * mask


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.channels, self.conv = channels, nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, x):
        assert x.shape[1] == self.channels
        return self.conv(x)


class Up(Down):
    def __init__(self, channels):
        super().__init__(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        assert x.shape[1] == self.channels
        return self.conv(functional.interpolate(x, scale_factor=2.0))


class Pictures(nn.Module):
    """An image U-Net: time, GroupNorm over concatenated skips, heads, modules that assert."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(1, 16)
        self.first, self.down = nn.Conv2d(3, 16, 3, padding=1), Down(16)
        self.norm, self.attend = nn.GroupNorm(4, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.norm2 = Up(16), nn.GroupNorm(8, 32)
        self.last = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 1))

    def forward(self, x, t):
        skip = self.first(x) + self.time(t[:, None]).sigmoid()[:, :, None, None]
        x = self.down(skip)
        y = self.norm(x).flatten(2).transpose(1, 2)
        x = x + self.attend(y, y, y)[0].transpose(1, 2).reshape(x.shape)
        return self.last(self.norm2(torch.cat([self.up(x), skip], 1)))


STRUCTURES = {
    "vocoder": (Vocoder, lambda: (torch.randn(2, 20, 6),)),
    "speech": (
        Speech,
        lambda: (torch.randn(2, 4, 8), torch.ones(2, 1, 8), torch.randn(2, 4, 8), torch.rand(2)),
    ),
    "pictures": (Pictures, lambda: (torch.randn(2, 3, 8, 8), torch.rand(2))),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_half_of_the_products_go(name):
    torch.manual_seed(0)
    make, inputs = STRUCTURES[name]
    net, given = make().eval(), inputs()
    if name != "vocoder":
        randomize(net)
    targets = [clean_path(one.path) for one in select(net).targets]
    plan = ChannelPlan(net, {"": given}, targets=targets)
    assert not plan.refused
    graph = plan.graph
    squares = {path: one.detach().square() for path, one in net.named_parameters()}
    scores = normalize_by_group(graph, np.sqrt(sum_over_units(graph, squares)))
    dense = {one.name: len(one.units) for one in graph.groups}
    costs = Costs(graph, "macs")
    before = costs.total()
    gone = select_for_removal(
        graph, scores, costs, before / 2, rounding=Rounding(1), dense=dense, overshoot=True
    )
    zeroed = zeroed_channels(net, graph, gone)
    small, expected = removed(zeroed, graph, gone), exact_outputs(zeroed, given)
    assert removal_fault(small, given, expected, graph, gone) == ""
    assert Costs(channel_graph(small, given), "macs").total() <= before / 2
    changed = zip(expected, exact_outputs(net, given), strict=True)
    assert all((one - other).abs().max() > 1e-3 for one, other in changed)


def test_channels_are_counted_and_not_their_groups():
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.GroupNorm(8, 16), nn.Conv2d(16, 1, 1))
    graph = channel_graph(net, (torch.rand(2, 1, 8, 8),))
    group = graph.groups[0]
    assert (len(group), group.width, graph.channels_of("0")) == (8, 2, 16)
    assert [Rounding(to).multiple(group) for to in (1, 2, 4, 8)] == [1, 1, 2, 4]
    assert Rounding(8).floor(group, 8) == 4


with warnings.catch_warnings():
    warnings.simplefilter("ignore")

    @torch.jit.script
    def scripted(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return x + (alpha * x).sin().square()


def test_a_scripted_function_is_followed():
    class Periodic(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv1d(2, 8, 1), nn.Conv1d(8, 1, 1)
            self.alpha = nn.Parameter(torch.ones(1, 8, 1))

        def forward(self, x):
            return self.last(scripted(self.first(x), self.alpha))

    graph = channel_graph(Periodic(), (torch.rand(2, 2, 4),))
    assert len(graph.groups[0].free) == 8
    assert len(graph.axes["alpha", 1]) == 8


class Result(OrderedDict):
    """What models of pythae and transformers give."""


@dataclass
class Parts:
    y: torch.Tensor


@pytest.mark.parametrize("kind", [Result, Parts])
def test_outputs_in_a_class_of_their_own_are_outputs(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 6)

        def forward(self, x):
            return kind(y=self.last(functional.relu(self.first(x))))

    plan = ChannelPlan(Net(), {"": (torch.rand(3, 4),)}, targets=["first.weight", "last.weight"])
    free = [len(group.free) for group in plan.graph.groups]
    assert sum(free) == 8
    ((made,),) = plan.outputs().values()
    assert made.shape == (3, 6)
