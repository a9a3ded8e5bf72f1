"""Sizes of neighbouring layers: what does not fit together is refused before anything is cut."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate, relu

from lightning_compress.channels.resize import (
    CHANNELS,
    match_channels,
    rebuild_channels,
    sizes_of_layers,
)
from lightning_compress.errors import TargetError


class Net(nn.Module):
    """A forward pass of given lines over given layers."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        self.last = self.run(self, x)  # what is set while a stand-in runs stays with a copy
        return self.last


def chain(*layers):
    return nn.Sequential(*layers)


def unit(channels):
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())


NETS = {  # a module, the sizes that do not fit, the message, the rest that makes them fit
    "the next convolution": (
        lambda: chain(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)),
        {"0.weight": (3, 1, 3, 3), "0.bias": (3,)}, "2 takes 8 channels, 0 makes 3",
        {"2.weight": (2, 3, 3, 3)},
    ),
    "the convolution before": (
        lambda: chain(nn.Conv2d(1, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 2, 3)),
        {"2.weight": (2, 5, 3, 3)}, "2 takes 5 channels, 0 makes 8",
        {"0.weight": (5, 1, 3, 3), "0.bias": (5,)},
    ),
    "a BatchNorm": (
        lambda: chain(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)),
        {f"1.{name}": (5,) for name in ("weight", "bias", "running_mean", "running_var")},
        "1 takes 5 channels, 0 makes 8", {"0.weight": (5, 1, 3, 3), "0.bias": (5,)},
    ),
    "a GroupNorm": (
        lambda: chain(nn.Conv2d(1, 8, 3), nn.GroupNorm(4, 8)),
        {"1.weight": (4,), "1.bias": (4,)}, "1 takes 4 channels, 0 makes 8",
        {"0.weight": (4, 1, 3, 3), "0.bias": (4,)},
    ),
    "a transposed convolution": (
        lambda: chain(nn.ConvTranspose2d(4, 8, 2), nn.Tanh(), nn.ConvTranspose2d(8, 1, 2)),
        {"0.weight": (4, 6, 2, 2), "0.bias": (6,)}, "2 takes 8 channels, 0 makes 6",
        {"2.weight": (6, 1, 2, 2)},
    ),
    "behind a Flatten": (
        lambda: chain(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(72, 2)),
        {"0.weight": (3, 1, 3, 3), "0.bias": (3,)}, "2 takes 72 channels, 0 makes 3 of 9 values",
        {"2.weight": (2, 27)},
    ),
    "behind a view": (
        lambda: Net(lambda m, x: m.two(relu(m.one(x)).view(x.size(0), -1)),
                    one=nn.Conv2d(1, 8, 3), two=nn.Linear(72, 2)),
        {"two.weight": (2, 36)}, "two takes 36 channels, one makes 8 of 9 values",
        {"one.weight": (4, 1, 3, 3), "one.bias": (4,)},
    ),
    "before an Unflatten": (
        lambda: chain(nn.Linear(3, 32), nn.Unflatten(1, (8, 2, 2)), nn.Conv2d(8, 1, 1)),
        {"0.weight": (12, 3), "0.bias": (12,)}, "2 takes 8 channels, 0 makes 3",
        {"2.weight": (1, 3, 1, 1)},
    ),
    "no whole block before an Unflatten": (
        lambda: chain(nn.Linear(3, 32), nn.Unflatten(1, (8, 2, 2)), nn.Conv2d(8, 1, 1)),
        {"0.weight": (13, 3), "0.bias": (13,)}, "0 makes 13 channels, read in blocks of 4",
        {"0.weight": (12, 3), "0.bias": (12,), "2.weight": (1, 3, 1, 1)},
    ),
    "a sum": (
        lambda: Net(lambda m, x: m.one(x) + m.two(x),
                    one=nn.Conv2d(1, 8, 3), two=nn.Conv2d(1, 8, 3)),
        {"one.weight": (4, 1, 3, 3), "one.bias": (4,)},
        "one makes 4 channels, two 8: they are added",
        {"two.weight": (4, 1, 3, 3), "two.bias": (4,)},
    ),
    "a concatenation": (
        lambda: Net(lambda m, x: m.end(torch.cat([m.one(x), interpolate(m.two(x), (4, 4))], 1)),
                    one=nn.Conv2d(1, 8, 3), two=nn.Conv2d(1, 4, 3), end=nn.Conv2d(12, 1, 1)),
        {"two.weight": (2, 1, 3, 3), "two.bias": (2,)},
        "end takes 12 channels, one and two makes 10", {"end.weight": (1, 10, 1, 1)},
    ),
    "a recurrent layer": (
        lambda: Net(lambda m, x: m.head(m.rnn(m.words(x))[0]),
                    words=nn.Embedding(5, 4), rnn=nn.GRU(4, 6), head=nn.Linear(6, 5)),
        {"head.weight": (5, 3)}, "head takes 3 channels, rnn makes 6",
        {"rnn.weight_ih_l0": (9, 4), "rnn.weight_hh_l0": (9, 3), "rnn.bias_ih_l0": (9,),
         "rnn.bias_hh_l0": (9,)},
    ),
    "an embedding": (
        lambda: Net(lambda m, x: m.rnn(m.words(x))[0], words=nn.Embedding(5, 4), rnn=nn.GRU(4, 2)),
        {"words.weight": (5, 3)}, "rnn takes 4 channels, words makes 3",
        {"rnn.weight_ih_l0": (6, 3)},
    ),
    "part of a module that cannot be traced": (
        lambda: Net(lambda m, x: m.net(x) if x.sum() > 0 else x,
                    net=chain(chain(nn.Linear(2, 8), nn.ReLU()), nn.Linear(8, 1))),
        {"net.0.0.weight": (3, 2), "net.0.0.bias": (3,)}, "net.1 takes 8 channels, net.0.0 makes 3",
        {"net.1.weight": (1, 3)},
    ),
    "one of several parts": (
        lambda: Net(lambda m, x: m.one(x), one=chain(nn.Linear(2, 2)),
                    other=nn.ModuleList([chain(nn.Conv1d(1, 8, 1), nn.PReLU(8))])),
        {"other.0.1.weight": (4,)}, "other.0.1 takes 4 channels, other.0.0 makes 8",
        {"other.0.0.weight": (4, 1, 1), "other.0.0.bias": (4,)},
    ),
    "below torch.compile": (
        lambda: torch.compile(chain(nn.Linear(2, 8), nn.LayerNorm(8))),
        {"_orig_mod.0.weight": (4, 2), "_orig_mod.0.bias": (4,)},
        "1 takes 8 channels, _orig_mod.0 makes 4",
        {"_orig_mod.0.weight": (8, 2), "_orig_mod.0.bias": (8,)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(NETS))
def test_neighbours_that_do_not_fit_are_refused_and_those_that_fit_are_cut(case):
    build, wrong, why, rest = NETS[case]
    module = build()
    before, sizes = copy.deepcopy(module.state_dict()), sizes_of_layers(module)
    names = {key: set(vars(one)) for key, one in module.named_modules()}
    with pytest.raises(TargetError, match="do not fit together") as caught:
        match_channels(module, wrong)
    assert why in str(caught.value)
    assert sizes_of_layers(module) == sizes
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert {key: set(vars(one)) for key, one in module.named_modules()} == names
    match_channels(module, wrong | rest)
    for name, shape in (wrong | rest).items():
        assert tuple(module.state_dict()[name].shape) == shape


FINE = {  # sizes that are equal by chance, or whose meaning is not known
    "width, not channels": (
        lambda: chain(nn.Conv2d(1, 8, 3), nn.Linear(8, 8)),
        {"0.weight": (3, 1, 3, 3), "0.bias": (3,)},
    ),
    "two axes changed places": (
        lambda: Net(lambda m, x: m.two(m.one(x).transpose(1, 2)),
                    one=nn.Linear(2, 8), two=nn.Linear(8, 2)),
        {"one.weight": (4, 2), "one.bias": (4,)},
    ),
    "a broadcast sum": (
        lambda: Net(lambda m, x: m.one(x) * m.two(x),
                    one=nn.Conv2d(1, 8, 1), two=nn.Conv2d(1, 1, 1)),
        {"one.weight": (4, 1, 1, 1), "one.bias": (4,)},
    ),
    "a function of unknown effect": (
        lambda: Net(lambda m, x: m.two(m.one(x)[:, :8]), one=nn.Linear(2, 8), two=nn.Linear(8, 2)),
        {"one.weight": (9, 2), "one.bias": (9,)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(FINE))
def test_what_only_looks_like_a_neighbour_is_left_alone(case):
    build, cut = FINE[case]
    module = match_channels(build(), cut)
    assert all(tuple(module.state_dict()[name].shape) == shape for name, shape in cut.items())


def checkpoint(**sizes):
    state = {"0.weight": torch.zeros(4, 1, 3, 3), "0.bias": torch.zeros(4)}
    return {"state_dict": state, CHANNELS: {"shapes": {}, "sizes": sizes, "kept": {}}}


SIZES = {
    "1": (3, "1 takes 3 channels, 0 makes 4"),
    "7": (4, "no layer '7', of which a size of 4"),
    "": (4, "'', a Sequential, has the size of its tensors"),
    "0": (4, "'0', a Conv2d, has the size of its tensors"),
}


@pytest.mark.parametrize("path", list(SIZES))
def test_a_checkpoint_with_sizes_that_do_not_fit_leaves_the_module_whole(path):
    size, why = SIZES[path]
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8))
    with pytest.raises(TargetError) as caught:
        rebuild_channels(module, checkpoint(**{path: size}))
    assert why in str(caught.value)
    assert sizes_of_layers(module) == sizes_of_layers(
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8))
    )
    assert tuple(module.state_dict()["0.weight"].shape) == (8, 1, 3, 3)
    rebuild_channels(module, checkpoint(**{"1": 4}))
    assert (module[0].out_channels, module[1].num_features) == (4, 4)
