"""Budgets: what is removed, in which order, and what it costs."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_compress.channels.graph import channel_graph
from lightning_compress.channels.plan import removed
from lightning_compress.channels.selection import (
    Costs,
    Rounding,
    lowest_cost,
    norm_scales,
    select_for_removal,
    sum_over_units,
)
from lightning_compress.lab.evaluation.cost import macs, parameter_counts
from lightning_compress.lab.models import DCGAN, VAE, RecurrentVAE, ResNet18

MODELS = {
    "dcgan": lambda: DCGAN(image_size=16, width=16, latent_dim=6).parts()["generator"],
    "encoder": lambda: VAE(image_size=16, width=16, latent_dim=6).parts()["encoder"],
    "recurrent": lambda: RecurrentVAE(steps=5, features=3, hidden=16).parts()["encoder"],
    "resnet": lambda: ResNet18(image_size=16, channels=1, num_classes=3, width=8).parts()["net"],
    "separable": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3, groups=16), nn.Conv2d(32, 16, 1, groups=4),
            nn.Conv2d(16, 1, 1),
        ),
        (torch.rand(2, 1, 8, 8),),
    ),
}  # fmt: skip


def cut(graph, kind, target, *, scores=None, rounding=None, **options):
    scores = np.ones(graph.count) if scores is None else scores
    dense = {group.name: len(group.units) for group in graph.groups}
    options = {"overshoot": True, **options}
    rounding = rounding or Rounding(2)
    costs = Costs(graph, kind)
    return select_for_removal(
        graph, scores, costs, target, rounding=rounding, dense=dense, **options
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_costs_are_those_that_are_measured(name, kind):
    module, inputs = MODELS[name]()
    measure = {
        "macs": lambda m: macs(m, inputs),
        "params": lambda m: parameter_counts(m)["params"],
    }[kind]
    graph = channel_graph(module, inputs)
    total = Costs(graph, kind).total()
    assert total == pytest.approx(measure(module))
    gone = cut(graph, kind, 0.5 * total)
    small = removed(module, graph, gone)
    after = channel_graph(small, inputs)
    assert Costs(after, kind).total() == pytest.approx(measure(small))
    assert 0.3 * total < measure(small) <= 0.5 * total


def network(*widths):
    layers = [nn.Linear(one, two) for one, two in pairwise(widths)]
    return channel_graph(nn.Sequential(*layers), (torch.rand(2, widths[0]),))


def left(graph, gone):
    return [int((~gone[one.units]).sum()) for one in graph.groups if len(one.free)]


def test_the_least_worth_go_first():
    graph = network(2, 8, 1)
    scores = np.zeros(graph.count)
    scores[graph.groups[0].units] = [5, 1, 7, 2, 8, 3, 6, 4]
    gone = cut(graph, "channels", 4, scores=scores)
    assert np.flatnonzero(gone[graph.groups[0].units]).tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize(("kind", "share"), [("channels", 0.5), ("macs", 0.25), ("params", 0.25)])
def test_layers_whose_channels_are_alike_shrink_alike(kind, share):
    """A layer of few and costly channels is not stripped for the sake of a wide one."""
    graph = network(4, 128, 64, 32, 4)
    gone = cut(graph, kind, share * Costs(graph, kind).total(), rounding=Rounding(4))
    fractions = np.array(left(graph, gone)) / np.array([128, 64, 32])
    assert fractions.min() > 0.3
    if kind == "channels":
        assert np.all(np.abs(fractions - 0.5) < 0.13)
    else:
        assert fractions[:2].max() < 0.6


@given(
    widths=st.lists(st.sampled_from([16, 24, 64, 96, 128]), min_size=2, max_size=4),
    kind=st.sampled_from(["channels", "macs", "params"]),
    share=st.floats(0.1, 0.9),
    seed=st.integers(0, 99),
)
def test_equal_fractions_go_whatever_the_scores_say(widths, kind, share, seed):
    graph = network(4, *widths, 4)
    scores = np.random.default_rng(seed).lognormal(sigma=3, size=graph.count)
    target = share * Costs(graph, kind).total()
    gone = cut(graph, kind, target, scores=scores, rounding=Rounding(8), compare="fraction")
    kept = np.array(left(graph, gone))
    # no block went where more would have been left had it gone elsewhere
    after = ((kept - 8) / widths)[kept > 8].max(initial=0.0)
    assert (kept / widths)[kept < widths].min(initial=1.0) >= after
    for group in graph.groups:
        own, out = scores[group.units], gone[group.units]
        if len(group.free) and out.any():
            assert own[out].max() <= own[~out].min()


def test_of_groups_with_as_much_left_the_least_worth_for_its_cost_goes():
    graph = network(4, 16, 16, 4)
    scores = np.ones(graph.count)
    scores[graph.groups[0].units[:8]] = 0.1
    for one, expected in ((scores, [8, 16]), (scores[::-1].copy(), [16, 8])):
        gone = cut(graph, "channels", 24, scores=one, rounding=Rounding(8), compare="fraction")
        assert left(graph, gone) == expected


def test_rounding_and_floors():
    graph = network(4, 20, 64, 4)
    gone = cut(graph, "channels", 0, rounding=Rounding(8))
    assert left(graph, gone) == [8, 8]
    gone = cut(graph, "channels", 0, rounding=Rounding(8, 0.5))
    assert left(graph, gone) == [16, 32]
    assert left(graph, cut(graph, "channels", 82, rounding=Rounding(8))) == [16, 64]
    dense = {group.name: len(group.units) for group in graph.groups}
    assert lowest_cost(graph, "channels", rounding=Rounding(8), dense=dense) == 16


def test_without_overshoot_nothing_goes_below_the_target():
    graph = network(4, 20, 64, 4)
    gone = cut(graph, "channels", 75, rounding=Rounding(8), overshoot=False)
    assert left(graph, gone) == [16, 64]
    assert left(graph, cut(graph, "channels", 75, rounding=Rounding(8))) in ([16, 56], [8, 64])


def test_small_steps_end_where_one_large_step_does():
    """A cheap layer is not stripped because only its blocks fit between two events."""
    module, inputs = VAE(image_size=28, width=64, latent_dim=32).parts()["encoder"]
    graph = channel_graph(module, inputs)
    total = Costs(graph, "macs").total()
    at_once = left(graph, cut(graph, "macs", 0.25 * total, rounding=Rounding(8)))
    dense = {group.name: len(group.units) for group in graph.groups}
    for fraction in np.linspace(1, 0.25, 21)[1:]:
        gone = select_for_removal(
            graph, np.ones(graph.count), Costs(graph, "macs"), fraction * total,
            rounding=Rounding(8), dense=dense, overshoot=bool(fraction == 0.25),
        )  # fmt: skip
        module = removed(module, graph, gone)
        graph = channel_graph(module, inputs)
    by_steps = left(graph, np.zeros(graph.count, dtype=bool))
    assert np.abs(np.array(by_steps) - at_once).max() <= 8


def test_a_cheap_layer_does_not_fill_a_gap_that_is_too_small_for_others():
    module, inputs = VAE(image_size=28, width=64, latent_dim=32).parts()["encoder"]
    graph = channel_graph(module, inputs)
    dense = {group.name: len(group.units) for group in graph.groups}
    gone = cut(graph, "macs", 0.25 * Costs(graph, "macs").total(), rounding=Rounding(8))
    module = removed(module, graph, gone)
    graph = channel_graph(module, inputs)
    costs = Costs(graph, "macs")
    groups = [(index, one) for index, one in enumerate(graph.groups) if len(one.free)]
    target = costs.total() - 1.1 * min(costs.saving(at, one.free[:8]) for at, one in groups)
    for overshoot in (False, True):
        gone = select_for_removal(
            graph, np.ones(graph.count), Costs(graph, "macs"), target,
            rounding=Rounding(8), dense=dense, overshoot=overshoot,
        )  # fmt: skip
        assert gone.any() == overshoot  # at the end it has to be met


def test_group_norms_add_up_all_that_make_or_read_a_unit():
    module = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    graph = channel_graph(module, (torch.rand(2, 2),))
    squares = {path: one.detach().square() for path, one in module.named_parameters()}
    scores = sum_over_units(graph, squares)
    expected = squares["0.weight"].sum(1) + squares["2.weight"].sum(0)
    torch.testing.assert_close(torch.from_numpy(scores[graph.groups[0].units]).float(), expected)


def test_scales_of_norms_count_where_there_are_some():
    module = nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)
    )
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([4.0, -1.0, 2.0, -3.0]))
    graph = channel_graph(module, (torch.rand(2, 2),))
    scores = norm_scales(graph, {"1.weight": module[1].weight}, np.arange(graph.count) + 1.0)
    first, second, _ = graph.groups
    assert np.argsort(scores[first.units]).tolist() == [1, 2, 3, 0]
    assert np.argsort(scores[second.units]).tolist() == [0, 1, 2, 3]
