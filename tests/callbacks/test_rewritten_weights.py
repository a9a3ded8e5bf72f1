"""User code that writes into weights after each step, beside masks and grids."""

import pytest
import torch
from lightning.pytorch import seed_everything
from tiny import TinyAutoencoder, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    GradualPruning,
    QuantizationAwareTraining,
    compression_state,
    sparsity,
)


class Rewriting(TinyAutoencoder):
    """Normalises or clamps its output layer when a batch is over."""

    def __init__(self, write, lr=0.003):
        super().__init__(lr=lr)
        self.encoder, self.write = nn.Identity(), write
        self.decoder = nn.Linear(6, 6, bias=False)
        self.grids_validated = []

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        weight = self.decoder.weight
        if self.write == "normalise":
            weight.mul_(6**0.5 / weight.norm())
        elif self.write == "clamp":
            weight.clamp_(-0.31, 0.31)
        elif self.write == "positive":
            weight.clamp_(min=1e-3)

    def loss(self):
        with torch.no_grad():
            return torch.cat([self(b[0]) - b[0] for b in batches()]).square().mean().item()

    def validation_step(self, batch, _):
        grid = compression_state(self).grids.get("decoder.weight")
        if grid is not None:
            weight = self.decoder.weight
            self.grids_validated.append(torch.equal(grid.project(weight), weight))


def run(folder, write, *callbacks, epochs=12, **arguments):
    seed_everything(0, verbose=False)
    model = Rewriting(write, **arguments)
    trainer = quiet_trainer(folder, *callbacks, max_epochs=epochs)
    trainer.fit(model, batches(), batches(seed=1))
    return model


@pytest.mark.parametrize("scheme", ["symmetric", "learned_step", "codebook"])
def test_training_goes_on_under_normalisation(tmp_path, scheme):
    dense = run(tmp_path, "normalise").loss()
    untrained = run(tmp_path, "normalise", lr=0.0).loss()
    rounding = QuantizationAwareTraining(weight_bits=4, activation_bits=None, scheme=scheme)
    model = run(tmp_path, "normalise", rounding)
    # A tenth of the dense model's way was made where each step began from the grid.
    assert untrained - model.loss() > 0.6 * (untrained - dense)
    assert model.grids_validated
    assert all(model.grids_validated)
    grid = compression_state(model).grids["decoder.weight"]
    assert torch.equal(grid.project(model.decoder.weight), model.decoder.weight)


def test_clamped_weights_stay_near_their_bound_and_train(tmp_path):
    rounding = QuantizationAwareTraining(weight_bits=4, activation_bits=None, scheme="entropy")
    dense, model = run(tmp_path, "clamp"), run(tmp_path, "clamp", rounding)
    assert model.decoder.weight.abs().max() <= 0.31 * 1.3
    assert model.loss() < dense.loss() * 1.3


def test_what_is_clamped_above_zero_is_pruned_where_it_is_shown(tmp_path):
    model = run(tmp_path, "positive", GradualPruning(final_sparsity=0.75), epochs=3)
    assert sparsity(model) == pytest.approx(0.75, abs=0.02)
