"""Averages that a module keeps by hand follow what is compressed; frozen teachers do not."""

import copy
import itertools

import pytest
import torch
from lightning.pytorch import LightningModule
from tiny import batches, quiet_trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_compress import (
    ChannelPruning,
    GradualPruning,
    Projector,
    QuantizationAwareTraining,
    apply_compression,
    compression_state,
    load_compressed,
    save_compressed,
    sparsity,
)
from lightning_compress.targets import select


def net(*sizes):
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(one for layer in layers for one in (layer, nn.ReLU())))[:-1]


class Averaging(LightningModule):
    """Keeps an average of its network as many projects do."""

    def __init__(self, how="lerp_", *, everything=False):
        super().__init__()
        self.how, self.everything, self.seen = how, everything, []
        self.net = net(6, 16, 16, 6)
        if how == "averaged_model":
            self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        else:
            self.average = copy.deepcopy(self.net).requires_grad_(requires_grad=False)

    @property
    def ema(self):
        return self.average.module if self.how == "averaged_model" else self.average

    def training_step(self, batch, _):
        return (self.net(batch[0]) - batch[0]).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.how == "teacher":
            return
        if self.how == "averaged_model":
            self.average.update_parameters(self.net)
            return
        with torch.no_grad():
            for mean, one in zip(self.average.parameters(), self.net.parameters(), strict=True):
                if self.how == "data":
                    mean.data.mul_(0.5).add_(one.data, alpha=0.5)
                else:
                    mean.lerp_(one, 0.5)

    def validation_step(self, batch, _):
        grids = compression_state(self.net).grids
        on = [
            torch.equal(grids[f"{i}.weight"].project(self.ema[i].weight), self.ema[i].weight)
            for i in (0, 2, 4)
            if grids
        ]
        self.seen.append((sparsity(self.ema, ["*"]), sparsity(self.net, ["*"]), all(on)))

    def configure_optimizers(self):
        trained = self if self.everything else self.net
        return torch.optim.Adam(trained.parameters(), lr=0.01)


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("how", ["lerp_", "data", "averaged_model"])
def test_an_average_has_the_zeros_of_what_it_averages(tmp_path, how, everything):
    model = Averaging(how, everything=everything)
    pruning = GradualPruning(final_sparsity=0.8, end=1.0)
    quiet_trainer(tmp_path, pruning).fit(model, batches(), batches(count=1))
    assert sparsity(model.net) == pytest.approx(0.8, abs=2e-3)
    for ours, theirs in zip(model.net.parameters(), model.ema.parameters(), strict=True):
        assert torch.equal(ours == 0, theirs == 0) or ours.dim() < 2
    assert all(of_average >= of_net for of_average, of_net, _ in model.seen[1:])
    reasons = {row.path: row.reason for row in pruning.coverage}
    name = "average.module.0.weight" if how == "averaged_model" else "average.0.weight"
    assert "a copy of net" in reasons[name]


def test_an_average_lies_on_grids_where_it_is_looked_at_and_goes_on_unrounded(tmp_path):
    model, plain = Averaging(), Averaging()
    plain.load_state_dict(model.state_dict())
    callbacks = GradualPruning(final_sparsity=0.5, end=0.5), QuantizationAwareTraining(
        weight_bits=4, activation_bits=None, freeze=0.5
    )  # fmt: skip
    quiet_trainer(tmp_path, *callbacks, max_epochs=4).fit(model, batches(), batches(count=1))
    assert all(on for _, _, on in model.seen[2:])
    state = compression_state(model)
    for index in (0, 2, 4):
        grid = state.grids[f"average.{index}.weight"]
        weight = model.average[index].weight
        assert torch.equal(grid.project(weight), weight)
    # It has followed training: an average that was rounded at each step would stand still.
    far = (model.average[2].weight - plain.average[2].weight).abs().max()
    near = (model.average[2].weight - model.net[2].weight).abs().max()
    assert near < far


def test_a_frozen_teacher_of_the_same_weights_is_left_alone(tmp_path):
    model = Averaging("teacher")
    before = copy.deepcopy(model.average)
    quiet_trainer(tmp_path, GradualPruning(final_sparsity=0.8)).fit(model, batches())
    for one, other in zip(model.average.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("how", ["lerp_", "averaged_model"])
def test_an_average_loses_the_channels_of_what_it_averages(tmp_path, how, everything):
    model = Averaging(how, everything=everything)
    pruning = ChannelPruning(final_sparsity=0.5, round_to=2, fade=1, end=0.7, include=["net.*"])
    quiet_trainer(tmp_path, pruning, max_epochs=4).fit(model, batches())
    assert (model.net[0].out_features, model.ema[0].out_features) == (8, 8) or (
        model.net[0].out_features + model.net[2].out_features == 16
    )
    assert [one.shape for one in model.net.parameters()] == [
        one.shape for one in model.ema.parameters()
    ]
    assert model.ema(torch.zeros(1, 6)).shape == (1, 6)
    save_compressed(model, tmp_path / "a.lcz")
    found = load_compressed(tmp_path / "a.lcz", Averaging(how))
    assert torch.equal(found.ema[2].weight, model.ema[2].weight)


def test_a_frozen_copy_that_nobody_writes_to_is_named(tmp_path):
    model = Averaging("teacher")
    pruning = ChannelPruning(final_sparsity=0.5, round_to=2, fade=1, end=0.7)
    with pytest.warns(UserWarning, match="average is a frozen copy of net"):
        quiet_trainer(tmp_path, pruning, max_epochs=3).fit(model, batches())
    assert model.average[0].out_features == 16


def test_an_average_outside_of_the_module_is_projected_in_one_call():
    model = net(6, 16, 6)
    average = AveragedModel(model)
    projector = Projector.of(model)
    for target in select(model).targets:
        projected = projector.add(target)
        projected.set_mask(projected.values().abs() > projected.values().abs().median())
    optimizer = torch.optim.Adam(model.parameters())
    projector.attach([optimizer])
    for _ in range(3):
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    projector.detach()
    apply_compression(average, compression_state(model))
    assert sparsity(average) == sparsity(model) == 0.5
