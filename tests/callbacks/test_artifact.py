"""The file at the end of fit and beside checkpoints holds what the model and they hold."""

import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer

from lightning_compress import (
    ArtifactCallback,
    Constant,
    GradualPruning,
    MissingExtraError,
    PostTrainingQuantization,
    ProjectedEMA,
    compression_state,
    inspect_compressed,
    load_compressed,
    onnx_session,
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


def runs_as(path, module, x, graph=None):
    session = onnx_session(path, graph=graph)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        return torch.allclose(torch.from_numpy(found), module.eval()(x), atol=1e-4)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_file_runs_by_itself(tmp_path, bits):
    model = TinyAutoencoder()
    callbacks = [PostTrainingQuantization(weight_bits=bits)] if bits else []
    artifact = ArtifactCallback(graph=True)
    quiet_trainer(tmp_path, *callbacks, artifact, max_epochs=1).fit(model, batches())
    assert runs_as(tmp_path / "model.lcz", model, torch.randn(5, 6))
    assert inspect_compressed(tmp_path / "model.lcz") == artifact.info
    assert same(load_compressed(tmp_path / "model.lcz", TinyAutoencoder()).state_dict(),
                model.state_dict())  # fmt: skip
    assert not model._forward_pre_hooks


def test_parts_have_a_graph_each_and_a_part_called_in_training_has_its_own(tmp_path):
    class Parts(TinyAutoencoder):
        def parts(self):
            samples = {"decoder": torch.randn(2, 8), "encoder": torch.randn(2, 6)}
            return {name: (getattr(self, name), (x,)) for name, x in samples.items()}

    model = Parts()
    quiet_trainer(tmp_path, ArtifactCallback(graph=True), max_epochs=1).fit(model, batches())
    assert list(inspect_compressed(tmp_path / "model.lcz").graphs) == ["decoder", "encoder"]
    assert runs_as(tmp_path / "model.lcz", model.decoder, torch.randn(3, 8), "decoder")
    gan = TinyGAN()
    artifact = ArtifactCallback("g.lcz", graph=True, submodule="generator")
    quiet_trainer(tmp_path, artifact, max_epochs=1).fit(gan, batches())
    assert runs_as(tmp_path / "g.lcz", gan.generator, torch.randn(3, 3))


def test_where_nothing_can_be_exported_the_weights_are_there_and_a_warning_says_why(tmp_path):
    gan = TinyGAN()
    with pytest.warns(UserWarning, match=r"model\.lcz holds no graph: TinyGAN.*submodule="):
        quiet_trainer(tmp_path, ArtifactCallback(graph=True), max_epochs=1).fit(gan, batches())
    assert same(read_tensors(tmp_path / "model.lcz"), gan.state_dict())


def test_a_missing_extra_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    model = TinyAutoencoder()
    with pytest.raises(MissingExtraError, match=r"lightning-compress\[onnx\]"):
        quiet_trainer(tmp_path, ArtifactCallback(graph=True)).fit(model, batches())
    assert not model.seen
