"""An average that is handed out projected, and goes on unprojected."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import TinyAutoencoder, batches, quiet_trainer

from lightning_compress import (
    Constant,
    GradualPruning,
    ProjectedEMA,
    Projector,
    QuantizationAwareTraining,
    sparsity,
)


def test_validation_checkpoint_and_end_are_projected(tmp_path):
    model = TinyAutoencoder()
    pruning = GradualPruning(schedule=Constant(final_sparsity=0.75, begin=6, end=7), scope="layer")
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer = quiet_trainer(
        tmp_path,
        pruning,
        ProjectedEMA(decay=0.9),
        saver,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, batches(), batches(count=1))
    assert model.seen == [0.75, 0.75]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (saved["state_dict"]["decoder.weight"] == 0).float().mean() == 0.75
    assert (saved["current_model_state"]["decoder.weight"] == 0).float().mean() == 0.75
    raw = saved["averaging_state"]["raw_average"]["decoder.weight"]
    assert (raw == 0).float().mean() == 0  # an average over steps before pruning
    assert sparsity(model) == 0.75


def test_the_average_is_the_textbook_one_on_what_stays(tmp_path):
    model = TinyAutoencoder()
    history = []

    class Record(ModelCheckpoint):
        def on_train_batch_end(self, trainer, pl_module, *args):
            history.append(pl_module.decoder.weight.detach().clone())

    pruning = GradualPruning(schedule=Constant(final_sparsity=0.5, begin=3, end=4), scope="layer")
    quiet_trainer(
        tmp_path, pruning, Record(), ProjectedEMA(decay=0.8), enable_checkpointing=True
    ).fit(model, batches())
    expected = history[0]
    for weight in history[1:]:
        expected = 0.8 * expected + 0.2 * weight
    torch.testing.assert_close(model.decoder.weight, expected * (history[-1] != 0))


def test_the_average_is_of_what_the_optimizer_moves(tmp_path):
    latents, visible = [], []

    class Record(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            projected = Projector.find(pl_module).projected_weights["decoder.weight"]
            latents.append(projected.values().clone())
            visible.append(projected.data.clone())

    model = TinyAutoencoder()
    coarse = QuantizationAwareTraining(weight_bits=2, activation_bits=None)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    quiet_trainer(
        tmp_path, coarse, ProjectedEMA(decay=0.8), Record(), saver, enable_checkpointing=True
    ).fit(model, batches())
    expected = latents[0]
    for weight in latents[1:]:
        expected = 0.8 * expected + 0.2 * weight
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    raw = saved["averaging_state"]["raw_average"]["decoder.weight"]
    torch.testing.assert_close(raw, expected)
    assert torch.equal(saved["current_model_state"]["decoder.weight"], visible[-1])
    assert not torch.equal(latents[-1], visible[-1])


def test_resume_goes_on_from_the_raw_average(tmp_path):
    def run(folder, epochs, ckpt_path=None):
        torch.manual_seed(3)
        model = TinyAutoencoder()
        pruning = GradualPruning(final_sparsity=0.6, begin=0, end=30)
        saver = ModelCheckpoint(folder, save_last=True)
        trainer = quiet_trainer(
            folder,
            pruning,
            ProjectedEMA(decay=0.9),
            saver,
            max_epochs=epochs,
            enable_checkpointing=True,
        )
        trainer.fit(model, batches(), ckpt_path=ckpt_path)
        return model

    whole = run(tmp_path / "whole", 4)
    with pytest.warns(UserWarning, match="ended at sparsity"):
        run(tmp_path / "parts", 2)
    resumed = run(tmp_path / "parts", 4, tmp_path / "parts" / "last.ckpt")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_decay_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"decay=1\.5"):
        ProjectedEMA(decay=1.5)
