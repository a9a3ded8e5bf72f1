"""The cosine of learning rates: PyTorch's curve, all optimizers, the same after a resume."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Callback
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer

from lightning_compress.lab.config import config_dir
from lightning_compress.lab.learning_rate import CosineAnnealing

EPOCHS = 3


class Rates(Callback):
    """The learning rates that each batch was trained with."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        groups = [group for one in trainer.optimizers for group in one.param_groups]
        self.seen.append([group["lr"] for group in groups])


def fit(folder, model, *, epochs=EPOCHS, ckpt_path=None, save=None, **options):
    rates = Rates()
    trainer = quiet_trainer(
        folder, CosineAnnealing(**options), rates, max_epochs=EPOCHS, limit_val_batches=0
    )
    if save is not None:
        trainer.callbacks.append(StopAfter(epochs))
    trainer.fit(model, batches(), ckpt_path=ckpt_path, weights_only=False)
    if save is not None:
        trainer.save_checkpoint(save)
    return rates.seen


class StopAfter(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, *_):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def test_the_curve_is_that_of_pytorchs_scheduler(tmp_path):
    model = TinyAutoencoder("SGD")
    seen = [rate for (rate,) in fit(tmp_path, model, last=0.1)]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=seen[0])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(seen), seen[0] * 0.1)
    expected = []
    for _ in seen:
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx(expected)


def test_the_lowest_rate_holds_for_a_flat_end(tmp_path):
    seen = [rate for (rate,) in fit(tmp_path, TinyAutoencoder("SGD"), last=0.1, flat=1 / 3)]
    third = len(seen) // EPOCHS
    assert seen[-third:] == pytest.approx([seen[0] * 0.1] * third)
    assert seen[-third - 1] > seen[-1]


def test_the_first_rate_holds_until_the_begin(tmp_path):
    seen = [rate for (rate,) in fit(tmp_path, TinyAutoencoder("SGD"), last=0.1, begin=1 / 3)]
    third = len(seen) // EPOCHS
    assert seen[: third + 1] == [seen[0]] * (third + 1)
    assert seen[third + 1 :] == sorted(set(seen[third + 1 :]), reverse=True)
    assert seen[third + 1] < seen[0]


def test_both_optimizers_of_a_gan_follow(tmp_path):
    first, *_, last = fit(tmp_path, TinyGAN(), last=0.5)
    assert len(first) == 2
    assert all(0.5 * a < b < 0.6 * a for a, b in zip(first, last, strict=True))


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path):
    whole = fit(tmp_path, TinyAutoencoder("SGD"), last=0.1)
    part = fit(tmp_path, TinyAutoencoder("SGD"), last=0.1, epochs=1, save=tmp_path / "part.ckpt")
    rest = fit(tmp_path, TinyAutoencoder("SGD"), last=0.1, ckpt_path=tmp_path / "part.ckpt")
    assert len(part) == len(whole) // EPOCHS
    assert part + rest == whole


@pytest.mark.parametrize("bad", [{"last": 0.0}, {"last": 2}, {"begin": 1.0}, {"flat": -0.1}])
def test_fractions_that_are_none_are_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"{name}={bad[name]!r}"):
        CosineAnnealing(**bad)


def test_fractions_that_leave_no_batch_are_refused():
    with pytest.raises(ValueError, match=r"begin=0.5 and flat=0.5"):
        CosineAnnealing(begin=0.5, flat=0.5)


def test_a_run_without_a_length_is_refused(tmp_path):
    trainer = quiet_trainer(tmp_path, CosineAnnealing(), max_epochs=-1, max_steps=2)
    with pytest.raises(ValueError, match="max_epochs"):
        trainer.fit(TinyAutoencoder("SGD"), batches())


def test_the_config_gives_it_to_both_runs_of_an_experiment():
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", ["callbacks=[cosine]", "callbacks.learning_rate.begin=0.25"])
    (made,) = instantiate(cfg.callbacks).values()
    assert (made.last, made.begin, made.flat) == (0.01, 0.25, 0.0)
