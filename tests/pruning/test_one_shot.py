"""Pruning of trained modules in one call, and zeros that outlive a merge."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_compress import (
    CompressionState,
    apply_compression,
    compression_state,
    prune_weights,
    sparsity,
)
from lightning_compress.errors import TargetError


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 10)
    )


def weights(module):
    return [module[0].weight, module[4].weight]


def pictures(count=3):
    return [torch.randn(5, 1, 6, 6) for _ in range(count)]


def test_the_lowest_magnitudes_of_all_weights_go():
    module, before = net(), net()
    assert prune_weights(module, sparsity=0.75) is module
    values = torch.cat([one.flatten() for one in weights(before)])
    kept = torch.cat([one.flatten() for one in weights(module)])
    order = values.abs().argsort()
    assert (kept[order[: round(0.75 * len(values))]] == 0).all()
    assert torch.equal(kept[order[round(0.75 * len(values)) :]], values[order[507:]])
    assert torch.equal(module[4].bias, before[4].bias)


def test_what_is_below_a_threshold_goes_as_torch_would_mask_it():
    module, before = net(), net()
    prune_weights(module, threshold=0.1)
    for one, other in zip(weights(module), weights(before), strict=True):
        assert torch.equal(one, torch.where(other.abs() >= 0.1, other, 0.0))


@pytest.mark.parametrize(
    "criterion", ["magnitude", "random", "activation", "output_activation", "obs", torch.abs]
)
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_sparsity_is_exact_by_every_criterion_and_the_module_is_as_it_was(criterion, scope):
    module = net().train().requires_grad_(False)
    module[4].eval()
    buffers = copy.deepcopy(dict(module.named_buffers()))
    prune_weights(module, sparsity=0.8, criterion=criterion, scope=scope, data=pictures())
    total = sum(one.numel() for one in weights(module))
    assert abs(sparsity(module) * total - 0.8 * total) <= 1
    assert module.training
    assert not module[4].training
    assert not any(one.requires_grad for one in module.parameters())
    assert all(torch.equal(one, buffers[name]) for name, one in module.named_buffers())
    assert not any(layer._forward_hooks for layer in module.modules())


def test_zeros_count_first_and_never_compound():
    module = net()
    prune_weights(module, 0.5)
    zeros = [one == 0 for one in weights(module)]
    prune_weights(module, 0.8, criterion="random")
    assert sparsity(module) == pytest.approx(0.8, abs=1e-3)
    assert all((one[where] == 0).all() for one, where in zip(weights(module), zeros, strict=True))
    prune_weights(module, 0.3)
    assert sparsity(module) == pytest.approx(0.8, abs=1e-3)


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, y):
        return nn.functional.cross_entropy(self.net(x), y)


def test_criteria_of_gradients_take_a_module_that_returns_its_loss():
    module, reference = Loss(), Loss()
    data = [(x, torch.randint(0, 10, (5,))) for x in pictures(1)]
    reference.eval()
    reference(*data[0]).backward()
    scores = [one * one.grad for one in weights(reference.net)]
    prune_weights(module, 0.5, criterion="taylor", data=data)
    order = torch.cat([one.abs().flatten() for one in scores]).argsort()
    flat = torch.cat([one.flatten() for one in weights(module.net)])
    assert (flat[order[: len(flat) // 2]] == 0).all()
    assert all(one.grad is None for one in module.parameters())
    with pytest.raises(ValueError, match=r"returns a tensor of shape \(5, 10\)"):
        prune_weights(net(), 0.5, criterion="taylor", data=pictures())


def test_include_exclude_units_and_loaders():
    module = net()
    prune_weights(module, 0.5, include="4", granularity="row")
    assert (module[4].weight == 0).all(dim=1).sum() == 5
    assert (module[0].weight != 0).all()
    loader = [{"image": x, "label": torch.zeros(5)} for x in pictures()]
    prune_weights(
        module, 0.5, criterion="activation", data=loader, batch_to_args=lambda b: b["image"]
    )
    with pytest.raises(ValueError, match=r"'label': float32\[5\]\}.*batch_to_args"):
        prune_weights(module, 0.5, criterion="activation", data=loader)
    prune_weights(net(), 0.5, granularity="2:4", exclude="0")
    normed = parametrizations.weight_norm(nn.Linear(4, 3))
    prune_weights(normed, threshold=1e9)
    assert torch.isfinite(normed(torch.ones(1, 4))).all()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({}, "give one of the two"),
        ({"sparsity": 0.5, "threshold": 0.1}, "give one of the two"),
        ({"sparsity": 1.0}, r"sparsity=1.0 must lie in \[0, 1\)"),
        ({"threshold": 0.0}, "threshold=0.0 must be above 0"),
        ({"sparsity": 0.5, "scope": "all"}, "scope='all': valid are"),
        ({"sparsity": 0.5, "criterion": "magic"}, "criterion='magic': valid are"),
        ({"sparsity": 0.5, "criterion": "activation"}, "give data="),
        ({"sparsity": 0.5, "criterion": "obs", "data": []}, "empty"),
    ],
)
def test_bad_input_is_told(arguments, word):
    with pytest.raises(ValueError, match=word):
        prune_weights(net(), **arguments)


def test_zeros_of_a_base_outlive_the_merge_of_its_adapters():
    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base.requires_grad_(False)
            self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    model = nn.ModuleDict({"model": nn.Sequential(Lora(nn.Linear(6, 6)), Lora(nn.Linear(6, 6)))})
    prune_weights(model, 0.5, include=["*.base_layer"])
    masks = compression_state(model).masks
    merged = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    for layer, lora in zip(merged, model["model"], strict=True):
        layer.weight.data = lora.base_layer.weight + lora.b.weight @ lora.a.weight
    filled = copy.deepcopy(merged)
    apply_compression(merged, compression_state(model))
    for index in range(2):
        mask = masks[f"model.{index}.base_layer.weight"]
        assert torch.equal(merged[index].weight, filled[index].weight * mask)
    strange = CompressionState(masks={"elsewhere.kernel": torch.ones(6, 6, dtype=torch.bool)})
    with pytest.raises(TargetError, match="no parameter answers to"):
        apply_compression(merged, strange)
    strange.masks["0.weight"] = masks["model.0.base_layer.weight"]
    with pytest.warns(UserWarning, match="elsewhere.kernel"):
        apply_compression(merged, strange)
