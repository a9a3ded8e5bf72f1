"""Layers that lost channels and have them again."""

import copy

import pytest
import torch
from tiny import randomize
from torch import nn

from lightning_compress.channels.graph import channel_graph
from lightning_compress.channels.plan import sizes_after
from lightning_compress.channels.resize import (
    check_sizes,
    compose,
    grow,
    overlay,
    shrink,
    sizes_of_layers,
    structure_of,
)
from lightning_compress.removed import RemovedChannels
from lightning_compress.state import note_removed, removed_channels


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.gru(x)[0])


IMAGE, ROW = torch.rand(2, 3, 6, 6), torch.rand(2, 3)
NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 8), nn.PReLU(8), nn.Linear(8, 2)), ROW),
    "norms": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.GroupNorm(4, 8),
            nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8), nn.ConvTranspose2d(8, 2, 2),
        ),
        IMAGE,
    ),
    # With half of its channels this looks like a depthwise convolution.
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 2, 1)
        ),
        IMAGE,
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1)
        ),
        IMAGE,
    ),
    "recurrent": (Recurrent, torch.rand(2, 5, 3)),
    "weight_norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 8)), nn.ReLU(), nn.Linear(8, 2)
        ),
        ROW,
    ),
}  # fmt: skip


def halve(net, x):
    """Remove every other channel, as the callback does; what stays by path and axis."""
    graph = channel_graph(net, (x,))
    gone = graph.flags(torch.cat([torch.from_numpy(g.free[::2]) for g in graph.groups]).numpy())
    kept, sized = graph.kept(gone), sizes_after(graph, gone)
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    lost = RemovedChannels({path: tuple(tensors[path].shape) for path in kept}, sized, {})
    shrink(net, kept, sized=sized)
    note_removed(net, lost)
    return kept


@pytest.mark.parametrize("name", NETS)
def test_what_was_removed_comes_back(name):
    make, x = NETS[name]
    net = make().eval()
    randomize(net, seed=0, low=0.2, spread=0.5)
    whole, structure, expected = copy.deepcopy(net), structure_of(net), net(x)
    objects = {path: id(one) for path, one in net.named_parameters()}
    kept = halve(net, x)
    assert kept
    assert sizes_of_layers(net) != sizes_of_layers(whole)
    small = {path: one.clone() for path, one in net.state_dict().items()}
    full = whole.state_dict()
    grow(net, {path: full[path] for path in kept}, structure)
    assert sizes_of_layers(net) == sizes_of_layers(whole)
    assert check_sizes(net) == []
    assert not removed_channels(net)
    assert net(x).equal(expected)
    assert {path: id(one) for path, one in net.named_parameters()} == objects
    net(x).sum().backward()  # gradients have the sizes of now
    assert all(one.grad.shape == one.shape for one in net.parameters())
    for path, dims in kept.items():  # the entries that stayed are where the removal left them from
        merged = overlay(torch.full_like(full[path], -1.0), small[path], dims)
        assert int((merged != -1).sum()) == small[path].numel()
        stayed = merged != -1
        if name != "weight_norm":  # whose magnitudes follow
            assert merged[stayed].equal(full[path][stayed])


def test_two_removals_are_one():
    make, x = NETS["norms"]
    net = make().eval()
    randomize(net, seed=0, low=0.2, spread=0.5)
    full = {path: one.clone() for path, one in net.state_dict().items()}
    both = compose(halve(net, x), halve(net, x))
    for path, dims in both.items():
        rows = full[path]
        for dim, index in dims.items():
            rows = rows.index_select(dim, index)
        assert rows.equal(net.state_dict()[path])
    assert len(net[0].weight) == 2
