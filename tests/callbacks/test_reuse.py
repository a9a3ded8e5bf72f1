"""The same callbacks for several fits: of one module they go on, of another they begin anew."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from tiny import TinyAutoencoder, batches, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress import (
    ChannelPruning,
    GradualPruning,
    KnowledgeDistillation,
    QuantizationAwareTraining,
    Ramp,
    ThresholdPruning,
    sparsity,
)


class Deeper(TinyAutoencoder):
    """With channels that may go."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())


def model(seed, scale=1.0):
    torch.manual_seed(seed)
    one = Deeper()
    with torch.no_grad():
        one.decoder.weight.mul_(scale)
    return one


MAKE = {
    "pruning": lambda: [GradualPruning(final_sparsity=0.8)],
    "threshold": lambda: [ThresholdPruning(threshold=0.1)],
    "rewinding": lambda: [GradualPruning(final_sparsity=0.5, begin=0.2, rewind=0.1)],
    "ranges": lambda: [QuantizationAwareTraining(weight_bits=4)],
    "learned steps": lambda: [QuantizationAwareTraining(weight_bits=4, scheme="learned_step")],
    "centres": lambda: [QuantizationAwareTraining(scheme="codebook", weight_bits=2)],
    "channels": lambda: [ChannelPruning(final_sparsity=0.5, round_to=2, fade=1, end=0.4)],
    "both": lambda: [
        GradualPruning(final_sparsity=0.8, end=0.5, regrow="straight_through"),
        QuantizationAwareTraining(weight_bits=4, scheme="entropy"),
    ],
}


@pytest.mark.parametrize("name", list(MAKE))
def test_another_module_finds_nothing_of_the_first(tmp_path, name):
    reused = MAKE[name]()
    quiet_trainer(tmp_path, *reused).fit(model(0, scale=20.0), batches(seed=1))
    second, fresh = model(3), model(3)
    quiet_trainer(tmp_path, *reused).fit(second, batches())
    quiet_trainer(tmp_path, *MAKE[name]()).fit(fresh, batches())
    for one, other in zip(second.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (second.encoder[0].out_features == 4) == (name == "channels")


def test_the_same_module_goes_on(tmp_path):
    one, pruning = model(0), GradualPruning(final_sparsity=0.75)
    quiet_trainer(tmp_path, pruning).fit(one, batches())
    masks = [parameter == 0 for parameter in one.parameters() if parameter.dim() > 1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*zeros that no mask keeps")
        quiet_trainer(tmp_path, pruning, QuantizationAwareTraining()).fit(one, batches())
    after = [parameter == 0 for parameter in one.parameters() if parameter.dim() > 1]
    assert all((new | ~old).all() for old, new in zip(masks, after, strict=True))


@pytest.mark.parametrize("make", [QuantizationAwareTraining, GradualPruning])
def test_zeros_that_nobody_keeps_are_told(tmp_path, make):
    one = model(0)
    quiet_trainer(tmp_path, GradualPruning(final_sparsity=0.75)).fit(one, batches())
    with pytest.warns(UserWarning, match=r"zeros that no mask keeps.*decoder.weight \(\d+%\)"):
        quiet_trainer(tmp_path, make()).fit(one, batches())


@pytest.mark.parametrize("first", [True, False])
def test_a_learning_rate_finder_comes_before_or_after(tmp_path, first):
    one, finder = model(0), LearningRateFinder(num_training_steps=5, update_attr=False)
    ours = [GradualPruning(final_sparsity=0.75), QuantizationAwareTraining(weight_bits=4)]
    order = [finder, *ours] if first else [*ours, finder]
    quiet_trainer(tmp_path, *order, enable_checkpointing=True).fit(one, batches())
    assert sparsity(one) >= 0.75
    assert all(len(row.unique()) <= 15 for row in one.decoder.weight)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(torch.randn(9, 4, 6).split(1))


@pytest.mark.parametrize(
    "make",
    [
        GradualPruning,
        QuantizationAwareTraining,
        lambda: KnowledgeDistillation(
            model(1), pairs=["decoder"], weight=Ramp(initial=1.0, final=0.0, end=0.5)
        ),
    ],
)
def test_data_without_a_length_are_named(tmp_path, make):
    data = DataLoader(Endless(), batch_size=None)
    with pytest.raises(ValueError, match=r"no length.*max_steps"):
        quiet_trainer(tmp_path, make()).fit(model(0), data)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"scheme": "learned_step"}, "the checkpoint has scheme 'symmetric', this run 'learned_st"),
        ({"weight_bits": 8}, "the checkpoint has weight_bits of decoder.weight 4, this run 8"),
    ],
)
def test_a_checkpoint_of_other_grids_is_refused(tmp_path, other, message):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    arguments = {"weight_bits": 4}
    quiet_trainer(
        tmp_path, QuantizationAwareTraining(**arguments), saver, enable_checkpointing=True
    ).fit(model(0), batches())
    callback = QuantizationAwareTraining(**{**arguments, **other})
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, callback, saver, max_epochs=3, enable_checkpointing=True).fit(
            model(0), batches(), ckpt_path=tmp_path / "last.ckpt"
        )
