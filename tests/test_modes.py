import pytest
import torch
from torch import nn

from lightning_compress.modes import evaluating


@pytest.mark.parametrize("failing", [False, True])
def test_every_submodule_gets_its_own_mode_back_also_after_an_error(failing):
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    net.train()
    net[1].eval()
    net[1][1].train()
    before = [part.training for part in net.modules()]
    try:
        with evaluating(net):
            assert not any(part.training for part in net.modules())
            assert not torch.is_grad_enabled()
            if failing:
                raise KeyError
    except KeyError:
        assert failing
    assert [part.training for part in net.modules()] == before
    assert torch.is_grad_enabled()


def test_gradients_stay_where_they_are_wanted():
    net = nn.Linear(1, 1)
    with evaluating(net, gradients=True):
        assert torch.is_grad_enabled()
        assert not net.training
