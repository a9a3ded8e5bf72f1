"""Pruning over every model that ships, under each way of training that Lightning offers."""

import pytest
import torch
from tiny import quiet_trainer

from lightning_compress import GradualPruning, ProjectedEMA, RandomState, sparsity
from lightning_compress.callbacks import EpochCheckpoint
from lightning_compress.lab.data import DigitRows, Digits
from lightning_compress.lab.models import DCGAN, VAE, WGANGP, RecurrentVAE, ResNet18, SimpleNet

MODELS = {
    "dcgan": lambda: DCGAN(image_size=16, width=8, discriminator_width=8),
    "wgan_gp": lambda: WGANGP(image_size=16, width=8, discriminator_width=8, critic_steps=2),
    "vae": lambda: VAE(image_size=16, width=8),
    "recurrent_vae": lambda: RecurrentVAE(steps=8, features=8, hidden=16),
    "tokens": lambda: RecurrentVAE(steps=8, vocab_size=20, hidden=16, word_dropout=0.3),
    "simple_net": lambda: SimpleNet(image_size=16, num_classes=10, width=8),
    "resnet18": lambda: ResNet18(image_size=16, channels=1, num_classes=10, width=8),
}
MANUAL = {"dcgan", "wgan_gp"}


class Sentences(DigitRows):
    """Token rows made of the digits: start, six shades of grey, end."""

    def build(self):
        from lightning_compress.lab.data.base import TensorSplit

        def tokens(split):
            shades = (split.tensors[0][:, 3, 1:7] * 10).long() + 4
            edge = torch.ones(len(shades), 1, dtype=torch.long)
            return TensorSplit(torch.cat([edge, shades, 2 * edge], 1), split.tensors[1])

        return type(super().build())(*(tokens(split) for split in super().build()))


def data_of(name):
    kinds = {"recurrent_vae": DigitRows, "tokens": Sentences}
    return kinds.get(name, Digits)(batch_size=16)


def fit(tmp_path, name, *callbacks, ckpt_path=None, **arguments):
    torch.manual_seed(0)
    model = MODELS[name]()
    settings = {
        "max_epochs": 2,
        "limit_train_batches": 4,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
    }
    trainer = quiet_trainer(tmp_path, *callbacks, **{**settings, **arguments})
    trainer.fit(model, data_of(name), ckpt_path=ckpt_path)
    return model


def asked(model, fraction):
    total = sum(p.numel() for p in model.parameters())
    return pytest.approx(fraction, abs=1 / total + 1e-4)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_exact_sparsity(tmp_path, name, precision, scope):
    pruning = GradualPruning(final_sparsity=0.8, end=1.0, scope=scope)
    model = fit(tmp_path, name, pruning, precision=precision)
    if scope == "global":
        assert sparsity(model) == asked(model, 0.8)
    for projected in pruning.projected_weights:
        assert torch.equal(projected.parameter == 0, projected.pruned)
        if scope == "layer":
            assert int(projected.pruned.sum()) == round(0.8 * projected.target.numel)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in MANUAL])
def test_accumulation_and_clipping(tmp_path, name):
    model = fit(
        tmp_path,
        name,
        GradualPruning(final_sparsity=0.8, end=1.0),
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
    )
    assert sparsity(model) == asked(model, 0.8)


@pytest.mark.parametrize("name", list(MODELS))
def test_averaged_weights_are_as_sparse(tmp_path, name):
    model = fit(
        tmp_path, name, GradualPruning(final_sparsity=0.8, end=1.0), ProjectedEMA(decay=0.5)
    )
    assert sparsity(model) == asked(model, 0.8)


class Preempted(EpochCheckpoint):
    """Saves each epoch, and dies in the third."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise ConnectionError("preempted")


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("averaged", [False, True])
def test_a_resumed_run_is_the_same_run(tmp_path, name, averaged):
    def callbacks():
        extra = [ProjectedEMA(decay=0.5)] if averaged else []
        return [GradualPruning(final_sparsity=0.8, end=0.9), *extra, RandomState()]

    whole = fit(tmp_path / "whole", name, *callbacks(), max_epochs=4)
    saver = Preempted(tmp_path / "last.ckpt", tmp_path / "broken.ckpt")
    with pytest.raises(ConnectionError):
        fit(tmp_path / "cut", name, *callbacks(), saver, max_epochs=4, enable_checkpointing=True)
    resumed = fit(
        tmp_path / "rest", name, *callbacks(), max_epochs=4, ckpt_path=tmp_path / "last.ckpt"
    )
    other = resumed.state_dict()
    for key, value in whole.state_dict().items():
        assert torch.equal(value, other[key]), key
