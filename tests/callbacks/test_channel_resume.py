"""Smaller models are resumed, reloaded and exported; nothing but plain data says what they lost."""

import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from shrinking import FAST, Wide, run
from tiny import batches, quiet_trainer
from torch import nn

from lightning_compress import (
    ChannelPruning,
    CorruptArtifactError,
    GradualPruning,
    ProjectedEMA,
    QuantizationAwareTraining,
    TargetError,
    compression_state,
    load_compressed,
    match_channels,
    rebuild_channels,
    save_compressed,
)
from lightning_compress.lab.models import DCGAN, VAE, RecurrentVAE


class Own(Wide):
    """A project of one's own with the one line that `load_from_checkpoint` needs."""

    def on_load_checkpoint(self, checkpoint):
        rebuild_channels(self, checkpoint)


class Stop(Checkpoint):
    """Save after some epochs, and end there."""

    def __init__(self, path, epochs):
        self.path, self.epochs = path, epochs

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def callbacks(kind):
    made = [
        ChannelPruning(**FAST, end=0.8, criterion="taylor" if kind == "taylor" else "magnitude")
    ]
    if kind == "all":
        made += [
            GradualPruning(final_sparsity=0.5, frequency=3, end=0.9),
            QuantizationAwareTraining(weight_bits=4, scheme="learned_step"),
            ProjectedEMA(decay=0.8),
        ]
    return made


def state_of(model, trainer):
    found = [one.detach().clone() for one in [*model.parameters(), *model.buffers()]]
    for optimizer in trainer.optimizers:
        for parameter in model.parameters():
            found += [one.clone() for one in optimizer.state[parameter].values()]
    return found


@pytest.mark.filterwarnings("ignore:.*the run ended before end=")  # the half run does
@pytest.mark.parametrize("kind", ["alone", "taylor", "all"])
@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind, stop):
    torch.manual_seed(0)
    whole = Wide()
    start = {name: one.clone() for name, one in whole.state_dict().items()}
    trainer = run(tmp_path / "whole", whole, *callbacks(kind), epochs=6)
    expected = state_of(whole, trainer)
    half = Wide()
    half.load_state_dict(start)
    trainer = quiet_trainer(
        tmp_path / "half",
        *callbacks(kind),
        Stop(tmp_path / "half.ckpt", stop),
        max_epochs=6,
        enable_checkpointing=True,
    )
    trainer.fit(half, batches(), batches(count=2))
    assert half.encoder[0].out_features + half.decoder[0].out_features < 32
    resumed = Wide()
    trainer = quiet_trainer(tmp_path / "resumed", *callbacks(kind), max_epochs=6)
    trainer.fit(
        resumed, batches(), batches(count=2), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    for one, two in zip(expected, state_of(resumed, trainer), strict=True):
        assert one.equal(two)


class Called(Wide):
    """What runs is known from its `training_step` alone."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(self.encoder, self.decoder)
        self.deployed = ("",)
        self.forward = self.net.forward


def test_networks_that_a_batch_has_shown_are_known_when_a_run_goes_on(tmp_path):
    def callback():
        return ChannelPruning(**FAST, end=0.8)

    torch.manual_seed(0)
    whole = Called()
    start = {name: one.clone() for name, one in whole.state_dict().items()}
    expected = state_of(whole, run(tmp_path / "whole", whole, callback(), epochs=4))
    half = Called()
    half.load_state_dict(start)
    trainer = quiet_trainer(
        tmp_path / "half",
        callback(),
        Stop(tmp_path / "half.ckpt", 2),
        max_epochs=4,
        enable_checkpointing=True,
    )
    with pytest.warns(UserWarning, match="the run ended before end="):
        trainer.fit(half, batches(), batches(count=2))
    resumed = Called()
    trainer = quiet_trainer(tmp_path / "resumed", callback(), max_epochs=4)
    trainer.fit(
        resumed, batches(), batches(count=2), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    for one, two in zip(expected, state_of(resumed, trainer), strict=True):
        assert one.equal(two)


def test_a_checkpoint_rebuilds_the_small_model(tmp_path):
    torch.manual_seed(0)
    model = Own()
    trainer = run(tmp_path, model, ChannelPruning(**FAST))
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    loaded = Own.load_from_checkpoint(tmp_path / "small.ckpt", weights_only=True)
    assert loaded.encoder[0].out_features == model.encoder[0].out_features < 16
    x = torch.rand(3, 6)
    assert loaded.eval()(x).equal(model.eval()(x))
    plain = torch.load(tmp_path / "small.ckpt", weights_only=True)
    kept = plain["removed_channels"]["kept"]["encoder.0"]
    assert len(kept) == model.encoder[0].out_features
    assert sorted(set(kept)) == list(kept)
    fresh = match_channels(Wide(), plain["state_dict"])
    fresh.load_state_dict(plain["state_dict"])
    assert fresh.eval()(x).equal(model(x))


def test_validation_of_a_checkpoint_from_before(tmp_path):
    torch.manual_seed(0)
    dense, channels = Wide(), ChannelPruning(**FAST)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(dense, batches())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    model = Wide()
    trainer = run(tmp_path, model, channels)
    with pytest.warns(UserWarning, match="of a larger model"):
        trainer.validate(model, batches(), ckpt_path=tmp_path / "dense.ckpt", verbose=False)
    assert model.encoder[0].out_features == 16


MODELS = {
    "dcgan": lambda: DCGAN(image_size=16, width=16, latent_dim=6),
    "vae": lambda: VAE(image_size=16, width=16, latent_dim=6),
    "recurrent": lambda: RecurrentVAE(steps=5, features=3, hidden=16),
    "tokens": lambda: RecurrentVAE(steps=5, vocab_size=9, hidden=16, embedding=16),
}


def small_model(name):
    """A model without half of its channels, as the callback leaves it."""
    from lightning_compress.channels.plan import ChannelPlan
    from lightning_compress.channels.resize import shrink
    from lightning_compress.removed import RemovedChannels
    from lightning_compress.state import note_removed

    torch.manual_seed(0)
    model = MODELS[name]()
    inputs = {root: model.parts()[root][1] for root in model.deployed}
    names = [path for path, _ in model.named_parameters()]
    plan = ChannelPlan(model, inputs, targets=names)
    gone = plan.graph.flags(
        torch.cat([torch.from_numpy(group.free[::2]) for group in plan.graph.groups]).numpy()
    )
    kept, sized = plan.kept(gone)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    lost = RemovedChannels({path: tuple(tensors[path].shape) for path in kept}, sized, {})
    shrink(model, kept, sized=sized)
    note_removed(model, lost)
    return model.eval()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_an_artifact_fills_a_fresh_model_of_full_size(tmp_path, name, stream):
    model = small_model(name)
    save_compressed(model.deployed_module(), tmp_path / "model.lcz")
    fresh = MODELS[name]().eval()
    load_compressed(tmp_path / "model.lcz", fresh.deployed_module(), stream=stream)
    for path, (part, inputs) in model.parts().items():
        ours, theirs = fresh.parts()[path][0](*inputs), part(*inputs)
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        assert all(one.equal(two) for one, two in pairs)
    again = tmp_path / "again.lcz"
    save_compressed(fresh.deployed_module(), again)
    assert again.read_bytes() == (tmp_path / "model.lcz").read_bytes()
    load_compressed(again, fresh.deployed_module())  # into the small one too


def test_an_artifact_does_not_cut_another_model(tmp_path):
    model = small_model("vae")
    save_compressed(model.deployed_module(), tmp_path / "model.lcz")
    other = VAE(image_size=16, width=32, latent_dim=6)
    before = [one.clone() for one in other.parameters()]
    with pytest.raises(CorruptArtifactError, match="mismatched"):
        load_compressed(tmp_path / "model.lcz", other.deployed_module())
    assert all(one.equal(two) for one, two in zip(before, other.parameters(), strict=True))
    narrow = VAE(image_size=16, width=8, latent_dim=6)  # a small model that nothing was cut from
    save_compressed(narrow.deployed_module(), tmp_path / "narrow.lcz")
    with pytest.raises(CorruptArtifactError, match="mismatched"):
        load_compressed(tmp_path / "narrow.lcz", MODELS["vae"]().deployed_module())


def test_another_model_is_not_matched():
    with pytest.raises(TargetError, match="cannot become"):
        match_channels(nn.Linear(4, 4), {"weight": (4, 4, 1)})
    with pytest.raises(TargetError, match=r"weight_ih_l0 .*9 rows.*12"):
        match_channels(nn.GRU(4, 4), {"weight_ih_l0": (9, 4)})
    with pytest.raises(TargetError, match=r"bias .*3 entries.*4"):
        match_channels(nn.Linear(4, 4), {"bias": (3,)})


def test_what_was_removed_is_known(tmp_path):
    torch.manual_seed(0)
    model, channels = Wide(), ChannelPruning(**FAST)
    run(tmp_path, model, channels)
    lost = compression_state(model).channels
    assert lost.shapes["encoder.0.weight"] == (16, 6)
    assert lost.shapes["decoder.2.weight"] == (6, 16)
    assert len(lost.kept["encoder.0"]) == model.encoder[0].out_features
