"""What a fit ends with is the same wherever Lightning looks next."""

import json

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import TinyAutoencoder, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    ChannelPruning,
    GradualPruning,
    KnowledgeDistillation,
    ProjectedEMA,
    QualityBudget,
    QuantizationAwareTraining,
    TargetError,
    compression_state,
    export_onnx,
    fake_quantized,
    load_compressed,
    restore_compression,
    save_compressed,
    sparsity,
)
from lightning_compress.lab.commands import run_command

# Lightning's own, of the checkpoint callback that a fresh Trainer does not have.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Wide(TinyAutoencoder):
    """Wide enough that the outputs show whether activations are rounded."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.decoder = nn.Linear(32, 6)

    def loss(self, batch):
        return (self(batch[0]) - batch[0]).square().mean()

    def validation_step(self, batch, _):
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch):
        self.log("test/loss", self.loss(batch))

    def predict_step(self, batch, _):
        return self(batch[0])


def rounding(**arguments):
    return QuantizationAwareTraining(**{"weight_bits": 3, "activation_bits": 3, **arguments})


def trained(folder, *callbacks, make=Wide, **arguments):
    seed_everything(0, verbose=False)
    model, saver = make(), ModelCheckpoint(folder, save_last=True)
    trainer = quiet_trainer(folder, *callbacks, saver, enable_checkpointing=True, **arguments)
    trainer.fit(model, batches(), batches(seed=1))
    return model, trainer


def score(trainer, model, **arguments):
    (found,) = trainer.validate(model, batches(seed=1), verbose=False, **arguments)
    return found["val/loss"]


def on_grids(model):
    model.eval()
    with fake_quantized(model), torch.no_grad():
        losses = [model.loss(batch).item() for batch in batches(seed=1)]
    return sum(losses) / len(losses)


def same_state(one, other):
    one, other = compression_state(one), compression_state(other)
    assert one.grids
    assert one.activations
    assert str(one) == str(other)


def test_every_stage_after_a_fit_computes_on_the_grids(tmp_path):
    model, trainer = trained(tmp_path, rounding())
    inside = trainer.callback_metrics["val/loss"].item()
    expected = on_grids(model)
    assert score(trainer, model) == pytest.approx(expected, rel=1e-6)
    assert inside == pytest.approx(expected, rel=1e-6)
    (found,) = trainer.test(model, batches(seed=1), verbose=False)
    assert found["test/loss"] == pytest.approx(expected, rel=1e-6)
    outputs = torch.cat(trainer.predict(model, batches(seed=1)))
    with fake_quantized(model), torch.no_grad():
        assert torch.equal(outputs, torch.cat([model(batch[0]) for batch in batches(seed=1)]))
    # Without the callback, and in a forward pass of the user's own, it is the plain module.
    plain = score(quiet_trainer(tmp_path), model)
    assert abs(plain / expected - 1) > 1e-3
    assert not model.decoder._forward_pre_hooks


@pytest.mark.parametrize("both", [False, True])
def test_a_fresh_callback_evaluates_a_checkpoint_on_its_grids(tmp_path, both):
    model, _ = trained(tmp_path, rounding())
    fresh = quiet_trainer(tmp_path, rounding(), *([rounding(name="other")] if both else []))
    other = Wide()
    path = tmp_path / "last.ckpt"
    assert score(fresh, other, ckpt_path=path) == pytest.approx(on_grids(model), rel=1e-6)
    same_state(other, model)
    again = quiet_trainer(tmp_path, rounding())  # no checkpoint: the module knows
    assert score(again, other) == pytest.approx(on_grids(model), rel=1e-6)


@pytest.mark.parametrize("scheme", ["symmetric", "codebook", "entropy"])
@pytest.mark.parametrize("averaged", [False, True])
def test_a_checkpoint_brings_everything_back(tmp_path, scheme, averaged):
    average = [ProjectedEMA(decay=0.5)] if averaged else []
    pruning = GradualPruning(final_sparsity=0.5, end=0.5)
    model, _ = trained(
        tmp_path, *average, pruning, rounding(scheme=scheme, weight_bits=5, freeze=0.5)
    )
    path = tmp_path / "last.ckpt"
    content = torch.load(path, weights_only=True)  # tensors and plain types only
    json.dumps(content["compression_state"], default=lambda tensor: tensor.tolist())
    loaded = Wide.load_from_checkpoint(path, weights_only=True)
    for one in (loaded, Wide()):
        assert restore_compression(one, content if one is loaded else path) is one
        same_state(one, model)
        for name, value in one.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
    small = save_compressed(model, tmp_path / "live.lcz").bytes
    assert save_compressed(loaded, tmp_path / "loaded.lcz").bytes == small
    assert run_command(["pack", str(path), "--out", str(tmp_path / "packed.lcz")]) == 0
    packed = load_compressed(tmp_path / "packed.lcz", Wide())
    same_state(packed, load_compressed(tmp_path / "live.lcz", Wide()))
    assert (tmp_path / "packed.lcz").stat().st_size == small


STATES = {
    "fisher": lambda: [GradualPruning(criterion="fisher", end=1.0)],
    "rigl": lambda: [GradualPruning(regrow="gradient", end=1.0)],
    "movement": lambda: [GradualPruning(criterion="movement", regrow="straight_through")],
    "rewinding": lambda: [GradualPruning(final_sparsity=0.5, begin=0.2, rewind=0.1)],
    "pact": lambda: [rounding(pact=True, scheme="learned_step")],
    "codebook": lambda: [rounding(scheme="codebook", freeze=0.3)],
    "budget": lambda: [
        GradualPruning(final_sparsity=0.5),
        QualityBudget("val/loss", 0.5, begin=0.3, search={"patience": 1}, on_miss="warn"),
    ],
    "distilling": lambda: [KnowledgeDistillation(Wide(), pairs=["decoder"])],
    "channels": lambda: [ChannelPruning(final_sparsity=0.5, round_to=4, fade=1, end=0.5)],
}


@pytest.mark.filterwarnings("ignore:.*(no model was within|ended at|ended .* worse)")
@pytest.mark.parametrize("name", STATES)
def test_states_of_callbacks_are_tensors_and_plain_types(tmp_path, name):
    trained(tmp_path, *STATES[name](), make=Narrowing)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert len(content["callbacks"]) > 1
    if name != "distilling":  # it compresses nothing
        restore_compression(Narrowing(), tmp_path / "last.ckpt")
    # It resumes so, too: this is how Lightning reads what it does not trust.
    resumed = quiet_trainer(tmp_path, *STATES[name](), max_epochs=3)
    resumed.fit(
        Narrowing(),
        batches(),
        batches(seed=1),
        ckpt_path=tmp_path / "last.ckpt",
        weights_only=True,
    )


def test_the_export_has_the_trained_ranges(tmp_path):
    model, _ = trained(tmp_path, rounding())
    loaded = Wide.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    restore_compression(loaded, tmp_path / "last.ckpt")
    sample = torch.randn(4, 6)
    files = [tmp_path / "live.onnx", tmp_path / "loaded.onnx"]
    infos = [
        export_onnx(one, file, sample, int8=True)
        for one, file in zip((model, loaded), files, strict=True)
    ]
    assert infos[0].int8_ops == infos[1].int8_ops
    assert infos[0].int8_ops
    assert files[0].stat().st_size == files[1].stat().st_size


def test_a_part_of_the_model_is_restored_by_itself(tmp_path):
    model, _ = trained(tmp_path, GradualPruning(final_sparsity=0.5), rounding())
    part = restore_compression(nn.Linear(32, 6), tmp_path / "last.ckpt")
    same_state(part, model.decoder)
    assert torch.equal(part.weight, model.decoder.weight)


def test_a_second_fit_keeps_restored_zeros(tmp_path):
    model, _ = trained(tmp_path, GradualPruning(final_sparsity=0.75), rounding())
    again = restore_compression(Wide(), tmp_path / "last.ckpt")
    masks = compression_state(model).masks
    quiet_trainer(tmp_path, rounding()).fit(again, batches())
    for path, mask in masks.items():
        assert not again.get_parameter(path)[~mask].any(), path
    assert sparsity(again) >= 0.75
    # A checkpoint of that run still knows them: no callback of it makes masks.
    saver = ModelCheckpoint(tmp_path / "second", save_last=True)
    quiet_trainer(tmp_path, rounding(), saver, enable_checkpointing=True).fit(again, batches())
    third = restore_compression(Wide(), tmp_path / "second" / "last.ckpt")
    quiet_trainer(tmp_path, rounding()).fit(third, batches())
    assert all(not third.get_parameter(path)[~mask].any() for path, mask in masks.items())


@pytest.mark.filterwarnings("ignore:.*has made no step")
@pytest.mark.parametrize("scheme", ["symmetric", "affine", "learned_step", "codebook"])
def test_a_second_fit_begins_on_the_restored_grids(tmp_path, scheme):
    class Watch(Wide):
        def on_train_batch_start(self, batch, batch_idx):
            self.first = [one.detach().clone() for one in self.parameters()]
            return -1  # end the epoch

    model, _ = trained(tmp_path, rounding(scheme=scheme))
    again = restore_compression(Watch(), tmp_path / "last.ckpt")
    second = rounding(scheme=scheme)
    quiet_trainer(tmp_path, second, max_epochs=1).fit(again, batches())
    for one, other in zip(again.first, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.detach(), atol=1e-6, rtol=1e-5)
    before, after = compression_state(model).activations, compression_state(again).activations
    assert set(before) == set(after)
    for path, pair in before.items():
        torch.testing.assert_close(after[path].input.scale, pair.input.scale)


def test_restored_zeros_that_were_overwritten_are_no_mask(tmp_path):
    trained(tmp_path, GradualPruning(final_sparsity=0.75))
    again = restore_compression(Wide(), tmp_path / "last.ckpt")
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.normal_()
    quiet_trainer(tmp_path, rounding(weight_bits=8)).fit(again, batches())
    assert sparsity(again) < 0.2


@pytest.mark.parametrize("averaged", [False, True])
def test_resuming_a_finished_run_keeps_its_state(tmp_path, averaged):
    def callbacks():
        average = [ProjectedEMA(decay=0.5)] if averaged else []
        return [GradualPruning(final_sparsity=0.5), rounding(), *average]

    model, _ = trained(tmp_path, *callbacks())
    ours = callbacks()
    other = Wide()
    quiet_trainer(tmp_path, *ours).fit(other, batches(), ckpt_path=tmp_path / "last.ckpt")
    same_state(other, model)
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert ours[0].sparsity == pytest.approx(0.5, abs=0.01)
    assert not other.decoder._forward_pre_hooks


class Narrowing(Wide):
    def __init__(self):
        super().__init__()
        self.deployed = ("encoder", "decoder")
        self.example_input_array = torch.zeros(2, 6)


def test_smaller_layers_come_back(tmp_path):
    channels = ChannelPruning(final_sparsity=0.5, round_to=4, fade=1, end=0.5)
    model, trainer = trained(tmp_path, channels, rounding(), make=Narrowing, max_epochs=3)
    assert model.encoder[0].out_features == 16
    other = restore_compression(Narrowing(), tmp_path / "last.ckpt")
    assert other.encoder[0].out_features == 16
    same_state(other, model)
    assert compression_state(other).channels.shapes == compression_state(model).channels.shapes
    expected = on_grids(model)
    again = ChannelPruning(final_sparsity=0.5, round_to=4, fade=1, end=0.5)
    fresh = quiet_trainer(tmp_path, again, rounding())
    third = Narrowing()
    found = score(fresh, third, ckpt_path=tmp_path / "last.ckpt")
    assert found == pytest.approx(expected, rel=1e-5)
    assert run_command(["pack", str(tmp_path / "last.ckpt")]) == 0
    packed = load_compressed(tmp_path / "last.lcz", Narrowing())
    assert packed.encoder[0].out_features == 16
    same_state(packed, model)
    assert score(trainer, model) == pytest.approx(expected, rel=1e-5)


def test_lost_grids_are_told_with_the_way_back(tmp_path):
    trained(tmp_path, rounding())
    loaded = Wide.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    with pytest.warns(UserWarning, match="carry no grid.*restore_compression"):
        score(quiet_trainer(tmp_path, rounding()), loaded)
    with pytest.warns(UserWarning, match="carry no grid.*restore_compression"):
        save_compressed(loaded, tmp_path / "model.lcz")
    with pytest.warns(UserWarning, match="carry no grid.*restore_compression"):
        export_onnx(loaded, tmp_path / "model.onnx", torch.randn(4, 6), int8=True)
    restore_compression(loaded, tmp_path / "last.ckpt")
    score(quiet_trainer(tmp_path, rounding()), loaded)
    save_compressed(loaded, tmp_path / "model.lcz")


def test_other_weights_on_the_grids_of_before_are_told(tmp_path):
    model, _ = trained(tmp_path, rounding())
    seed_everything(5, verbose=False)
    model.load_state_dict(Wide().state_dict())
    with pytest.warns(UserWarning, match="not lie on the grid.*restore_compression"):
        score(quiet_trainer(tmp_path, rounding()), model)


def test_checkpoints_that_cannot_help_say_why(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_weights_only=True, filename="weights")
    quiet_trainer(tmp_path, rounding(), saver, enable_checkpointing=True).fit(Wide(), batches())
    with pytest.raises(ValueError, match=r"no compression state.*save_weights_only"):
        restore_compression(Wide(), tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="no 'state_dict'"):
        restore_compression(Wide(), {})
    with pytest.raises(OSError, match="nowhere"):
        restore_compression(Wide(), tmp_path / "nowhere.ckpt")
    trained(tmp_path, rounding())
    with pytest.raises(TargetError, match="does not fit"):
        restore_compression(nn.GRU(3, 3), tmp_path / "last.ckpt")
    with pytest.raises(TargetError, match=r"encoder.0.*restore the whole LightningModule"):
        restore_compression(nn.Linear(3, 3), tmp_path / "last.ckpt")
