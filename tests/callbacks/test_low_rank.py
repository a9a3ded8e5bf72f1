"""LowRank: two factors in a weight's place, trained, resumed, and in a file."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import TinyAutoencoder, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    ChannelPruning,
    GradualPruning,
    LowRank,
    QuantizationAwareTraining,
    TargetError,
    compression_state,
    load_compressed,
    match_factors,
    read_tensors,
    save_compressed,
    sparsity,
)
from lightning_compress.channels.low_rank import factorize


class Wide(TinyAutoencoder):
    def __init__(self):
        super().__init__("Adam")
        self.encoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.decoder = nn.Linear(32, 6)


@given(st.integers(1, 6), st.integers(0, 1000))
def test_factors_are_the_best_of_their_rank(rank, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(9, 7)
    first, second = factorize(layer, rank)
    left = (second.weight @ first.weight - layer.weight).detach().square().sum()
    least = torch.linalg.svdvals(layer.weight.detach())[rank:].square().sum()
    assert torch.allclose(left, least, atol=1e-5)  # Eckart and Young: no rank r comes nearer
    assert second.bias is layer.bias


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(9, 7),
        nn.Conv1d(4, 7, 3, stride=2),
        nn.Conv2d(3, 7, (3, 5), padding=(1, 2), dilation=(2, 1), padding_mode="reflect"),
        nn.Conv3d(2, 5, 2, bias=False),
    ],
)
def test_full_rank_changes_no_output(layer):
    shape = {nn.Linear: (2, 9), nn.Conv1d: (2, 4, 9), nn.Conv2d: (2, 3, 9, 9)}
    inputs = torch.randn(shape.get(type(layer), (2, 2, 5, 5, 5)))
    assert torch.allclose(factorize(layer, 99)(inputs), layer(inputs), atol=1e-5)


def test_energy_chooses_the_rank():
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.1]))
    assert [factorize(layer, part)[0].out_features for part in (0.6, 0.7, 0.95, 0.9999)] == [
        1, 2, 3, 4,
    ]  # fmt: skip


class StopAfter(Callback):
    def on_train_epoch_start(self, trainer, _):
        if trainer.current_epoch == 2:
            raise ConnectionError("preempted")


@pytest.mark.parametrize("begin", [0.0, 0.3, 0.7, 5])
@pytest.mark.parametrize("beside", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, begin, beside):
    def run(folder, *others, ckpt_path=None):
        seed_everything(7, verbose=False)
        model, low = Wide(), LowRank(rank=4, begin=begin, include=["encoder.2.*"])
        more = [
            QuantizationAwareTraining(
                activation_bits=None, scheme="rate_distortion", lmbda=0.05, name="q"
            ),
            GradualPruning(final_sparsity=0.5, end=0.95),
        ]
        saver = ModelCheckpoint(folder, save_last=True, every_n_epochs=1)
        callbacks = [saver, low, *(more if beside else []), *others]
        trainer = quiet_trainer(folder, *callbacks, max_epochs=4, enable_checkpointing=True)
        trainer.fit(model, batches(), ckpt_path=ckpt_path)
        return model, trainer

    whole, trainer = run(tmp_path / "whole")
    assert whole.encoder[2][0].weight.shape == (4, 32)
    owned = {id(one) for group in trainer.optimizers[0].param_groups for one in group["params"]}
    assert owned == {id(one) for one in whole.parameters()}
    with pytest.raises(ConnectionError):
        run(tmp_path / "parts", StopAfter())
    resumed, _ = run(tmp_path / "parts", ckpt_path=tmp_path / "parts" / "last.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    if beside:
        assert {"encoder.2.0.weight", "encoder.2.1.weight"} <= set(compression_state(whole).grids)
        assert sparsity(whole) >= 0.45


def test_a_file_holds_two_layers_and_loads_into_a_fresh_module(tmp_path):
    model, low = Wide(), LowRank(rank=3, begin=4)
    quiet_trainer(tmp_path, low).fit(model, batches())
    save_compressed(model, tmp_path / "m.lcz")
    fresh = match_factors(Wide(), read_tensors(tmp_path / "m.lcz"))
    load_compressed(tmp_path / "m.lcz", fresh)
    inputs = torch.randn(5, 6)
    assert torch.equal(fresh.encoder(inputs), model.encoder(inputs))
    rows = {row.path: row.selected for row in low.coverage}
    assert rows["encoder.2.weight"]


def test_what_gets_no_smaller_stays_with_a_reason(tmp_path):
    low = LowRank(rank=6)
    model = Wide()
    quiet_trainer(tmp_path, low).fit(model, batches())
    assert isinstance(model.encoder[0], nn.Linear)
    (row,) = (row for row in low.coverage if row.path == "encoder.0.weight")
    assert "rank 6 hold no fewer" in row.reason
    with pytest.raises(TargetError, match="no weight becomes smaller"):
        quiet_trainer(tmp_path, LowRank(rank=30)).fit(Wide(), batches())


def test_channels_want_the_factors_first(tmp_path):
    pruning = ChannelPruning(final_sparsity=0.5)
    trainer = quiet_trainer(tmp_path, LowRank(rank=4, begin=0.5), pruning)
    with pytest.raises(TargetError, match="begin=0"):
        trainer.fit(Wide(), batches())


@pytest.mark.parametrize("rank", [0, -1, 1.5, 0.0, 1.0, True])
def test_bad_ranks_are_named(rank):
    with pytest.raises(ValueError, match=f"rank={rank}"):
        LowRank(rank=rank)
