"""Checkpoints of smaller models: the best one, and those that another process loads."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import batches, quiet_trainer
from torch import nn

from lightning_compress import ChannelPruning, CompressedCheckpoint, rebuild_channels

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Plain(LightningModule):
    """As a project's own: its first epoch scores best."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 6))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return (self(batch[0]) - batch[0]).square().mean()

    def validation_step(self, batch, _):
        self.log("val", torch.tensor(float(self.current_epoch)))

    def test_step(self, batch, batch_idx):
        self.log("test", (self(batch[0]) - batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class OneLine(Plain):
    def __init__(self):
        super().__init__()
        rebuild_channels(self)


class Later(Plain):
    def __init__(self):
        super().__init__()
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 6))
        rebuild_channels(self)


def fit(tmp_path, model, checkpoint):
    pruning = ChannelPruning(final_sparsity=0.5, round_to=1, fade=1, on_miss="raise")
    trainer = quiet_trainer(tmp_path, pruning, checkpoint, max_epochs=4, enable_checkpointing=True)
    trainer.fit(model, batches(), batches())
    return trainer


def test_an_early_best_grows_the_model_back_with_a_word(tmp_path):
    model = Plain()
    trainer = fit(tmp_path, model, ModelCheckpoint(tmp_path, monitor="val"))
    assert model.net[0].out_features == 16
    with pytest.warns(UserWarning, match=r"larger model: net.0.weight has .* CompressedCheckpoint"):
        trainer.test(model, batches(), ckpt_path="best", verbose=False)


@pytest.mark.parametrize("kind", [OneLine, Later])
def test_the_best_of_the_finished_sizes_loads_everywhere(tmp_path, kind):
    trainer = fit(tmp_path, model := kind(), CompressedCheckpoint(tmp_path, monitor="val"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*larger model")
        trainer.test(model, batches(), ckpt_path="best", verbose=False)
    best, score = trainer.checkpoint_callback.best_model_path, trainer.callback_metrics["test"]
    fresh = kind()
    other = quiet_trainer(tmp_path)
    other.test(fresh, batches(), ckpt_path=best, verbose=False)
    assert fresh.net[0].out_features == 16
    torch.testing.assert_close(other.callback_metrics["test"], score)
    if kind is OneLine:
        assert kind.load_from_checkpoint(best, weights_only=True).net[2].in_features == 16


def test_one_line_registers_one_hook():
    model = Later()
    model.configure_model()
    model.configure_model()
    assert len(model._load_state_dict_pre_hooks) == 1
