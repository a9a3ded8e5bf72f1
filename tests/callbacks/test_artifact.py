"""The file at the end of fit and beside checkpoints holds what the model and they hold."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer

from lightning_compress import (
    ArtifactCallback,
    Constant,
    GradualPruning,
    PostTrainingQuantization,
    ProjectedEMA,
    compression_state,
    load_compressed,
    read_tensors,
)


def same(tensors, state):
    return set(tensors) == set(state) and all(torch.equal(tensors[k], v) for k, v in state.items())


def test_the_file_holds_what_fit_leaves(tmp_path):
    model = TinyAutoencoder()
    artifact = ArtifactCallback(codec="fast")
    quantization = PostTrainingQuantization(weight_bits=4)
    quiet_trainer(tmp_path, quantization, artifact).fit(model, batches())
    fresh = load_compressed(tmp_path / "model.lcz", TinyAutoencoder())
    assert same(fresh.state_dict(), model.state_dict())
    assert set(compression_state(fresh).grids) == {"encoder.0.weight", "decoder.weight"}
    assert artifact.info.bytes == (tmp_path / "model.lcz").stat().st_size


def test_a_part_is_saved_where_asked_or_where_the_model_says(tmp_path):
    class Deployed(TinyGAN):
        def deployed_module(self):
            return self.generator

    for model, options in ((TinyGAN(), {"submodule": "generator"}), (Deployed(), {})):
        target = tmp_path / "sub" / "g.lcz"
        quiet_trainer(tmp_path, ArtifactCallback(target, **options)).fit(model, batches())
        assert same(read_tensors(target), model.generator.state_dict())
        target.unlink()


def test_files_beside_checkpoints_come_and_go_with_them(tmp_path):
    model = TinyAutoencoder()
    saver = ModelCheckpoint(tmp_path / "c", save_top_k=2, monitor="train/loss", save_last=True)
    pruning = GradualPruning(schedule=Constant(final_sparsity=0.75, begin=6, end=7), scope="layer")
    trainer = quiet_trainer(
        tmp_path,
        pruning,
        ProjectedEMA(decay=0.9),
        ArtifactCallback(beside_checkpoints=True, codec="fast"),
        saver,
        enable_checkpointing=True,
        max_epochs=4,
    )
    trainer.fit(model, batches())
    checkpoints = sorted((tmp_path / "c").glob("*.ckpt"))
    assert len(checkpoints) == 3
    assert [path.with_suffix(".lcz") for path in checkpoints] == sorted(
        (tmp_path / "c").glob("*.lcz")
    )
    for path in checkpoints:
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert same(read_tensors(path.with_suffix(".lcz")), saved)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert not (tmp_path / "after.lcz").exists()  # it listens during fit only


def test_an_exception_ends_the_listening(tmp_path):
    class Failing(TinyAutoencoder):
        def training_step(self, batch, index):
            raise RuntimeError("stop here")

    trainer = quiet_trainer(tmp_path, ArtifactCallback(beside_checkpoints=True))
    before = trainer.strategy.checkpoint_io
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(Failing(), batches())
    assert trainer.strategy.checkpoint_io is before
    assert not list(tmp_path.rglob("*.lcz"))


def test_mistakes_are_found_before_training(tmp_path):
    with pytest.raises(ValueError, match="codec='zip'"):
        ArtifactCallback(codec="zip")
    trainer = quiet_trainer(tmp_path, ArtifactCallback(submodule="nowhere"))
    with pytest.raises(AttributeError, match="nowhere"):
        trainer.fit(TinyAutoencoder(), batches())
