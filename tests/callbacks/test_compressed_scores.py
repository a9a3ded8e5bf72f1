"""The best model is a compressed one, and a trial run leaves what is good alone."""

import sys

import pytest
import torch
import yaml
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    ArtifactCallback,
    ChannelPruning,
    CompressedCheckpoint,
    CompressedEarlyStopping,
    GradualPruning,
    QuantizationAwareTraining,
    ThresholdPruning,
    compression_state,
    fake_quantized,
    restore_compression,
)

# Lightning's own, of callbacks that a fresh Trainer does not have.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Worsening(TinyAutoencoder):
    """Its score is best in the first epoch, and its zeros are logged."""

    scores = (1.0, 2.0, 5.0, 4.0, 4.5, 6.0)

    def validation_step(self, batch, _):
        super().validation_step(batch, _)
        self.log("val/score", self.scores[min(self.current_epoch, 5)])

    def test_step(self, batch):
        self.log("test/loss", (self(batch[0]) - batch[0]).square().mean())


def fit(folder, *callbacks, epochs=6, model=None, **arguments):
    seed_everything(0, verbose=False)
    model = model or Worsening()
    trainer = quiet_trainer(
        folder, *callbacks, max_epochs=epochs, enable_checkpointing=True, **arguments
    )
    trainer.fit(model, batches(), batches(seed=1))
    return model, trainer


def zeros_in(path):
    weight = torch.load(path, weights_only=True)["state_dict"]["decoder.weight"]
    return (weight == 0).float().mean().item()


COMPRESSORS = {
    "prune": lambda: [GradualPruning(final_sparsity=0.75, end=0.5)],
    "threshold": lambda: [ThresholdPruning(threshold=0.2, end=0.5)],
    "both": lambda: [
        QuantizationAwareTraining(weight_bits=4, freeze=0.5),
        GradualPruning(final_sparsity=0.75, end=0.3),
    ],
}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_best_checkpoint_is_of_the_compressed_model(tmp_path, name):
    keeper = CompressedCheckpoint(tmp_path, monitor="val/score", filename="best", save_last=True)
    model, trainer = fit(tmp_path, *COMPRESSORS[name](), keeper)
    assert keeper.best_model_score == 4.0  # epochs 0 and 1 had better ones
    assert torch.load(keeper.best_model_path, weights_only=True)["epoch"] == 3
    if name != "threshold":
        assert zeros_in(keeper.best_model_path) > 0.6
    (found,) = trainer.test(model, batches(seed=1), ckpt_path="best", verbose=False)
    best = restore_compression(Worsening(), keeper.best_model_path).eval()
    with fake_quantized(best), torch.no_grad():
        losses = [(best(batch[0]) - batch[0]).square().mean() for batch in batches(seed=1)]
    assert found["test/loss"] == pytest.approx(sum(losses).item() / len(losses), rel=1e-5)
    plain = ModelCheckpoint(tmp_path, monitor="val/score", filename="plain")
    fit(tmp_path, *COMPRESSORS[name](), plain)
    assert plain.best_model_score == 1.0


def test_last_is_written_all_along_and_its_run_goes_on(tmp_path):
    def callbacks():
        keeper = CompressedCheckpoint(tmp_path, monitor="val/score", save_last=True)
        return [GradualPruning(final_sparsity=0.75, end=0.5), keeper]

    class Stop(TinyAutoencoder):
        pass

    class Broken(Worsening):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                raise ConnectionError

    with pytest.raises(ConnectionError):
        fit(tmp_path, *callbacks(), model=Broken())
    assert (tmp_path / "last.ckpt").exists()
    assert [one.name for one in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
    ours = callbacks()
    trainer = quiet_trainer(tmp_path, *ours, max_epochs=6, enable_checkpointing=True)
    trainer.fit(Worsening(), batches(), batches(seed=1), ckpt_path="last")
    assert ours[1].best_model_score == 4.0


@pytest.mark.filterwarnings("ignore:.*ended at sparsity")
def test_a_run_that_ends_before_its_schedule_has_a_best_model_and_says_so(tmp_path):
    keeper = CompressedCheckpoint(tmp_path, monitor="val/score")
    pruning = GradualPruning(final_sparsity=0.75, end=1000)
    with pytest.warns(UserWarning, match=r"val/score.*GradualPruning\[prune\] had not ended"):
        model, trainer = fit(tmp_path, pruning, keeper, epochs=2)
    trainer.test(model, batches(), ckpt_path="best", verbose=False)


def test_without_compression_it_is_lightnings_own(tmp_path):
    keeper = CompressedCheckpoint(tmp_path, monitor="val/score")
    stopper = CompressedEarlyStopping(monitor="val/score", patience=2)
    _, trainer = fit(tmp_path, keeper, stopper)
    assert keeper.best_model_score == 1.0
    assert trainer.current_epoch == 3


def test_channels_end_their_schedule_too(tmp_path):
    class Deeper(Worsening):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
            self.example_input_array = torch.zeros(2, 6)

    cutting = ChannelPruning(final_sparsity=0.5, round_to=2, fade=2, end=0.5)
    keeper = CompressedCheckpoint(tmp_path, monitor="val/score", filename="best")
    fit(tmp_path, cutting, keeper, model=Deeper())
    best = restore_compression(Deeper(), keeper.best_model_path)
    assert best.encoder[0].out_features == 4
    trainer = quiet_trainer(tmp_path, ChannelPruning(final_sparsity=0.5, round_to=2))
    trainer.test(Deeper(), batches(), ckpt_path=keeper.best_model_path, verbose=False)


def test_patience_begins_when_the_schedules_have_ended(tmp_path):
    pruning = GradualPruning(final_sparsity=0.75, end=0.5)
    stopper = CompressedEarlyStopping(monitor="val/score", patience=1)
    _, trainer = fit(tmp_path, pruning, stopper)
    assert trainer.current_epoch == 5  # 4.5 in epoch 4 after 4.0 in epoch 3
    assert pruning.sparsity == pytest.approx(0.75, abs=0.02)
    plain = EarlyStopping(monitor="val/score", patience=1)
    with pytest.warns(UserWarning, match="ended at sparsity"):
        _, trainer = fit(tmp_path, GradualPruning(final_sparsity=0.75, end=0.5), plain)
    assert trainer.current_epoch == 2


def test_a_score_that_is_no_number_stops_at_once(tmp_path):
    class Diverged(Worsening):
        scores = (1.0, float("nan"), 1.0, 1.0, 1.0, 1.0)

    stopper = CompressedEarlyStopping(monitor="val/score", patience=3)
    with pytest.warns(UserWarning, match="ended at sparsity"):
        _, trainer = fit(tmp_path, GradualPruning(), stopper, model=Diverged())
    assert trainer.current_epoch == 2


class Project(Worsening):
    def train_dataloader(self):
        return batches()

    def val_dataloader(self):
        return batches(seed=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, in Lightning's use
def test_yaml_of_the_lightning_cli_makes_them(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    path = {"class_path": "lightning_compress.CompressedCheckpoint"}
    kept = {"dirpath": str(tmp_path), "monitor": "val/score", "filename": "best"}
    callbacks = [
        {"class_path": "lightning_compress.GradualPruning", "init_args": {"end": 0.5}},
        {"class_path": "lightning_compress.QuantizationAwareTraining"},
        {**path, "init_args": kept},
        {
            "class_path": "lightning_compress.CompressedEarlyStopping",
            "init_args": {"monitor": "val/score", "patience": 5},
        },
    ]
    trainer = {"max_epochs": 4, "logger": False, "accelerator": "cpu", "callbacks": callbacks}
    trainer |= {"enable_progress_bar": False, "default_root_dir": str(tmp_path)}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": trainer}))
    monkeypatch.setattr(sys, "argv", ["main.py"])
    cli = LightningCLI(
        Project,
        args=["fit", "--config", str(config)],
        save_config_callback=None,
        seed_everything_default=0,
    )
    for kind in (CompressedCheckpoint, CompressedEarlyStopping):
        assert any(isinstance(one, kind) for one in cli.trainer.callbacks)
    assert zeros_in(cli.trainer.checkpoint_callback.best_model_path) > 0.5


# -- fast_dev_run


def test_a_trial_run_leaves_a_good_artifact_and_raises_nothing(tmp_path):
    def callbacks():
        return [
            GradualPruning(final_sparsity=0.8, begin=5, end=50, on_miss="raise"),
            QuantizationAwareTraining(weight_bits=4, begin=0.5),
            ArtifactCallback(tmp_path / "model.lcz", submodule="decoder"),
        ]

    fit(tmp_path, *callbacks()[1:])
    before = (tmp_path / "model.lcz").read_bytes()
    ours = callbacks()
    fit(tmp_path, *ours, fast_dev_run=True)
    assert (tmp_path / "model.lcz").read_bytes() == before
    assert ours[2].info.bytes > 0
    assert [one.name for one in tmp_path.glob("*.lcz*")] == ["model.lcz"]


def test_a_trial_run_still_finds_what_cannot_be_written(tmp_path):
    class Odd(Worsening):
        def __init__(self):
            super().__init__()
            self.register_buffer("odd", torch.zeros(2).to_sparse())

    with pytest.raises(TypeError, match="odd"):
        fit(tmp_path, ArtifactCallback(tmp_path / "model.lcz"), model=Odd(), fast_dev_run=True)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: GradualPruning(begin=10, end=20, on_miss="raise"),
        lambda: ChannelPruning(final_sparsity=0.5, round_to=2, begin=10, end=20, on_miss="raise"),
        lambda: ThresholdPruning(threshold=0.5, begin=10, end=20),
        lambda: CompressedCheckpoint(monitor="val/score"),
    ],
)
def test_a_trial_run_misses_nothing(tmp_path, callback):
    seed_everything(0, verbose=False)
    model = TinyGAN()
    quiet_trainer(tmp_path, callback(), fast_dev_run=2, enable_checkpointing=True).fit(
        model, batches()
    )
    assert not compression_state(model).grids
