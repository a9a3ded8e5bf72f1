"""Callbacks in `import pytorch_lightning as pl`, the other name of Lightning."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import callbacks as newer
from torch import nn

from lightning_compress import (
    ArtifactCallback,
    ChannelPruning,
    CompressedCheckpoint,
    CompressedEarlyStopping,
    CompressionSummary,
    EMATeacher,
    GradualPruning,
    KnowledgeDistillation,
    OnlineTeacher,
    PostTrainingQuantization,
    ProjectedEMA,
    QualityBudget,
    QuantizationAwareTraining,
    TargetError,
    ThresholdPruning,
    sparsity,
)
from lightning_compress.callbacks.base import builds_layers_later
from lightning_compress.callbacks.namespaces import averages_weights, overrides
from tests.helpers.tiny import batches

pl = pytest.importorskip("pytorch_lightning")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*num_workers"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]


class Autoencoder(pl.LightningModule):
    """Of the older name; a network with channels to remove."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        loss = (self(batch[0]) - batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("val", (self(batch[0]) - batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Later(Autoencoder):
    def configure_model(self):
        pass


def trainer(tmp_path, *callbacks, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "max_epochs": 2, "accelerator": "cpu"}
    return pl.Trainer(
        **{**quiet, **arguments}, default_root_dir=tmp_path, callbacks=list(callbacks)
    )


def _run(tmp_path, make, **arguments):
    module = Autoencoder()
    run = trainer(tmp_path, *make(), **arguments)
    run.fit(module, batches(), batches())
    return run, module


@pytest.mark.parametrize(
    "make",
    [
        lambda: [GradualPruning(final_sparsity=0.5), ProjectedEMA(decay=0.9)],
        lambda: [ThresholdPruning(threshold=0.05)],
        lambda: [QuantizationAwareTraining(), CompressionSummary()],
        lambda: [PostTrainingQuantization()],
        lambda: [KnowledgeDistillation(Autoencoder())],
        lambda: [KnowledgeDistillation(EMATeacher())],
        lambda: [KnowledgeDistillation(OnlineTeacher(Autoencoder()))],
        lambda: [QualityBudget(monitor="val", max_degradation=9.0), GradualPruning()],
    ],
)
def test_every_callback_runs_and_resumes(make, tmp_path, recwarn):
    run, module = _run(tmp_path, make)
    run.save_checkpoint(tmp_path / "a.ckpt")
    run.validate(module, batches(), verbose=False)
    again = trainer(tmp_path, *make(), max_epochs=3)
    again.fit(Autoencoder(), batches(), batches(), ckpt_path=tmp_path / "a.ckpt")
    assert again.current_epoch == 3
    assert not [one for one in recwarn if "mixed" in str(one.message)]


def test_zeros_are_written_and_channels_go(tmp_path):
    pruning = GradualPruning(final_sparsity=0.75, on_miss="raise")
    file = ArtifactCallback(tmp_path / "m.lcz")
    _, module = _run(tmp_path, lambda: [pruning, file])
    assert sparsity(module) == 0.75
    assert file.path.is_file()
    channels = ChannelPruning(final_sparsity=0.5, round_to=1, fade=1, on_miss="raise")
    _, module = _run(tmp_path, lambda: [channels])
    assert module.net[0].weight.shape == (8, 6)


@pytest.mark.parametrize("home", [newer, pl.callbacks])
def test_plain_averages_of_either_name_are_refused(home, tmp_path):
    for average in (home.StochasticWeightAveraging(0.1), home.EMAWeightAveraging()):
        assert averages_weights(average)
    assert not averages_weights(home.EarlyStopping("val"))
    if home is pl.callbacks:
        with pytest.raises(TargetError, match="EMAWeightAveraging averages weights away"):
            _run(tmp_path, lambda: [GradualPruning(), home.EMAWeightAveraging()])


def test_best_is_that_of_the_compressed_checkpoint(tmp_path):
    """The Trainer looks for its own classes: it finds these, and makes no checkpoint beside."""
    checkpoint = CompressedCheckpoint(tmp_path, monitor="val")
    stopping = CompressedEarlyStopping("val")
    pruning = GradualPruning(final_sparsity=0.5, end=0.5)
    run, module = _run(tmp_path, lambda: [checkpoint, stopping, pruning], enable_checkpointing=True)
    assert run.checkpoint_callback is checkpoint
    assert run.early_stopping_callbacks == [stopping]
    run.validate(module, batches(), ckpt_path="best", verbose=False)
    assert sparsity(module) == 0.5
    for one in (checkpoint, stopping):
        assert type(pickle.loads(pickle.dumps(one))) is type(one)
        assert copy.deepcopy(one).state_key == one.state_key


def test_hooks_are_seen_in_modules_of_either_name():
    assert not builds_layers_later(Autoencoder())
    assert overrides("configure_model", Later())
    assert builds_layers_later(Later())
    assert not overrides("no_such_hook", Later())
