"""Rewritten files: the same function in eval mode, in a plain module."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress import load_compressed, save_compressed
from lightning_compress.lcz.module_state import layers_before_norms
from lightning_compress.quantization.ranges import affine_grid
from lightning_compress.state import compression_state, set_grid


def network():
    """Convolutions up and down, linear layers, norms with used statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.LeakyReLU(0.2), nn.ConvTranspose2d(6, 5, 2),
        nn.ReLU(), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1), nn.Flatten(),
        nn.Linear(2 * 49, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3),
    )  # fmt: skip
    with torch.no_grad():
        for layer in model:
            for name, value in layer.named_parameters():
                if value.dim() > 1:
                    value.mul_(torch.rand_like(value) > torch.rand(()))
                    grid = affine_grid(value, bits=4, axis=int(value.shape[0] > 5))
                    value.copy_(grid.project(value))
                    set_grid(layer, name, grid)
                else:
                    value.normal_()
            if hasattr(layer, "running_mean"):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.1, 3)
                layer.num_batches_tracked.fill_(77)
    return model.eval()


def test_the_loaded_module_gives_the_same_outputs(tmp_path):
    model, fresh = network(), copy.deepcopy(network())
    before = copy.deepcopy(model.state_dict())
    save_compressed(model, tmp_path / "a.lcz", fold_batchnorm=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    load_compressed(tmp_path / "a.lcz", fresh)
    x = torch.randn(7, 1, 8, 8)
    torch.testing.assert_close(fresh(x), model(x), atol=1e-5, rtol=1e-5)
    changed = {name for name, value in fresh.state_dict().items() if not value.equal(before[name])}
    assert changed
    grids = compression_state(fresh).grids
    assert set(grids) == set(compression_state(model).grids)
    for name, grid in grids.items():
        weight = fresh.get_parameter(name)
        assert torch.equal(grid.project(weight), weight)


def test_folded_statistics_are_constants_and_cost_nothing(tmp_path):
    model = network()
    plain = save_compressed(model, tmp_path / "a.lcz")
    folded = save_compressed(model, tmp_path / "b.lcz", fold_batchnorm=True)
    assert folded.bytes < plain.bytes
    fresh = load_compressed(tmp_path / "b.lcz", network())
    for name in ("1", "5", "9"):
        norm = fresh.get_submodule(name)
        assert (norm.running_mean == 0).all()
        assert (norm.running_var == 1).all()
        assert norm.num_batches_tracked == 0
        assert folded.per_tensor[f"{name}.running_var"].bytes < 10
    assert (fresh[0].bias == 0).all()  # right before a norm: it went into the shift
    assert torch.equal(fresh[3].bias, model[3].bias)  # an activation lies between


class Shared(nn.Module):
    """The layer before the norm is used a second time."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.again = self.net[0]

    def forward(self, x):
        return self.net(x) + self.again(x)


class Own(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + self[0](x)


def hooked():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].register_forward_hook(lambda module, args, output: output * torch.arange(4))
    return model


@pytest.mark.parametrize(
    "model",
    [
        Shared(),
        Own(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        hooked(),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)),
    ],
    ids=["shared", "own forward", "hook", "activation between"],
)
def test_a_bias_stays_where_it_may_not_go_into_the_norm(tmp_path, model):
    assert layers_before_norms(model) == {}
    model.eval()
    x = torch.randn(3, 4)
    expected, before = model(x), {n: v.clone() for n, v in model.state_dict().items()}
    save_compressed(model, tmp_path / "a.lcz", fold_batchnorm=True)
    load_compressed(tmp_path / "a.lcz", model)
    torch.testing.assert_close(model(x), expected)
    biases = [name for name in before if name.endswith("0.bias") or name == "again.bias"]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in biases)
