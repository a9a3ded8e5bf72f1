"""The scan against one made by hand, and that it leaves no trace."""

import copy

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from lightning_compress import TargetError, quantize_weights
from lightning_compress.lab.evaluation.sensitivity import scan_sensitivity


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def score(module):
    data = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    return float(module(data).detach().square().sum())


def test_each_number_is_that_of_a_model_changed_by_hand(net):
    net.eval()
    found = scan_sensitivity(net, score, sparsities=[0.25, 0.5], bits=[3])
    assert [one.path for one in found.layers] == ["0.weight", "3.weight"]
    assert found.dense == score(net)
    for index, one in zip((0, 3), found.layers, strict=True):
        for sparsity, loss in zip(one.sparsities, one.sparse_loss, strict=True):
            twin = copy.deepcopy(net)
            nn.utils.prune.l1_unstructured(twin[index], "weight", amount=sparsity)
            assert loss == pytest.approx(score(twin) - found.dense, abs=1e-5)
        twin = copy.deepcopy(net)
        quantize_weights(twin, 3, per_channel=False, include=[f"{index}.weight"])
        assert one.bits_loss[0] == pytest.approx(score(twin) - found.dense, abs=1e-5)
        weight = net[index].weight.detach()
        steps = (weight / (weight.abs().max() / 3)).round().numpy()
        counts = np.unique(steps, return_counts=True)[1]
        bits = scipy.stats.entropy(counts, base=2) * weight.numel()
        assert one.bytes[0][0] == pytest.approx(bits / 8)
        assert one.weights == net[index].weight.numel()


def test_nothing_stays_changed_even_when_scoring_fails(net):
    net.train()
    before = copy.deepcopy(net.state_dict())
    calls = []

    def fragile(module):
        calls.append(module.training)
        if len(calls) == 5:
            raise RuntimeError("out of luck")
        return score(module)

    with pytest.raises(RuntimeError, match="out of luck"):
        scan_sensitivity(net, fragile)
    assert not any(calls)
    assert net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_higher_score_may_be_better(net):
    one = scan_sensitivity(net, score, sparsities=[0.5], bits=[2])
    other = scan_sensitivity(net, lambda m: -score(m), better="higher", sparsities=[0.5], bits=[2])
    assert one.layers == other.layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsities": [0.5, 0.2]}, "each above the last"),
        ({"sparsities": [1.0]}, "fractions in"),
        ({"bits": [9]}, "bits=9"),
        ({"better": "faster"}, "better='faster'"),
        ({"include": ["nowhere.*"]}, "matches no parameter"),
    ],
)
def test_mistakes_are_named(net, arguments, message):
    with pytest.raises((ValueError, TargetError), match=message):
        scan_sensitivity(net, score, **arguments)
