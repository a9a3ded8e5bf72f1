"""Zeros that weights have from elsewhere: kept by `keep_zeros`, told of where nobody keeps them."""

import warnings

import pytest
import torch
from tiny import TinyAutoencoder, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    GradualPruning,
    QuantizationAwareTraining,
    load_compressed,
    prune_weights,
    save_compressed,
    sparsity,
)
from lightning_compress.quantization.post_training import quantize_weights


class Larger(TinyAutoencoder):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.fixture
def loaded(tmp_path):
    """A pruned and quantized model, from a file."""
    torch.manual_seed(0)
    model = prune_weights(Larger(), 0.8)
    quantize_weights(model, 4)
    save_compressed(model, tmp_path / "a.lcz")
    return load_compressed(tmp_path / "a.lcz", Larger())


def test_a_second_fit_that_loses_zeros_of_a_loaded_file_is_told(tmp_path, loaded):
    assert sparsity(loaded) == pytest.approx(0.8, abs=2e-3)
    quantization = QuantizationAwareTraining(weight_bits=4, activation_bits=None)
    with pytest.warns(UserWarning, match=r"zeros that no mask keeps.*keep_zeros=True"):
        quiet_trainer(tmp_path, quantization).fit(loaded, batches())
    assert sparsity(loaded) < 0.6


@pytest.mark.parametrize("first", [True, False])
def test_masks_begin_with_the_zeros_that_are_there(tmp_path, loaded, first):
    where = {n: p == 0 for n, p in loaded.named_parameters() if p.dim() > 1}
    both = [
        GradualPruning(keep_zeros=True, final_sparsity=0.0),
        QuantizationAwareTraining(weight_bits=4, activation_bits=None),
    ]
    quiet_trainer(tmp_path, *(both if first else both[::-1])).fit(loaded, batches())
    for name, parameter in loaded.named_parameters():
        assert name not in where or (parameter[where[name]] == 0).all()
    assert both[0].sparsity == pytest.approx(0.8, abs=2e-3)


def test_and_they_may_go_on(tmp_path, loaded):
    where = {n: p == 0 for n, p in loaded.named_parameters() if p.dim() > 1}
    pruning = GradualPruning(keep_zeros=True, final_sparsity=0.9)
    quiet_trainer(tmp_path, pruning).fit(loaded, batches())
    assert sparsity(loaded) == pytest.approx(0.9, abs=2e-3)
    for name, parameter in loaded.named_parameters():
        assert name not in where or (parameter[where[name]] == 0).all()


def test_a_tensor_of_zeros_alone_is_an_initialization(tmp_path):
    model = Larger()
    nn.init.zeros_(model.decoder.weight)
    quiet_trainer(tmp_path, GradualPruning(keep_zeros=True, final_sparsity=0.0)).fit(
        model, batches()
    )
    assert (model.decoder.weight != 0).any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zeros_of_rounding_are_no_pruned_ones(tmp_path, bits):
    torch.manual_seed(0)
    model = Larger()
    nn.init.normal_(model.encoder[0].weight)
    quantize_weights(model, bits)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*zeros that no mask keeps")
        quantization = QuantizationAwareTraining(weight_bits=bits, activation_bits=None)
        quiet_trainer(tmp_path, quantization).fit(model, batches())


def test_a_resumed_run_has_the_masks_of_its_state(tmp_path):
    pruning = GradualPruning(keep_zeros=True, final_sparsity=0.5, end=0.9)
    trainer = quiet_trainer(tmp_path, pruning, max_epochs=1)
    trainer.fit(Larger(), batches())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again, model = GradualPruning(keep_zeros=True, final_sparsity=0.5, end=0.9), Larger()
    quiet_trainer(tmp_path, again, max_epochs=2).fit(
        model, batches(), ckpt_path=tmp_path / "last.ckpt"
    )
    assert sparsity(model) == pytest.approx(0.5, abs=2e-3)
