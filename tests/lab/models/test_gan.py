import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.lab.models import DCGAN, WGANGP

pytestmark = [
    # One loader process is right for data that lies in memory.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def loader():
    pictures = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(pictures, torch.zeros(8)), batch_size=4)


def trainer(**arguments):
    return Trainer(
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        **arguments,
    )


class Watch(Callback):
    """Records, around each optimizer step, which network moved and which could."""

    def __init__(self):
        self.moved = []
        self.trainable = []

    def on_train_start(self, trainer, pl_module):
        self.networks = {"G": pl_module.generator, "D": pl_module.discriminator}
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(self.before)
            optimizer.register_step_post_hook(self.after)
        self.last = self.values()  # nothing may move between the steps either

    def values(self):
        return {
            name: torch.cat([p.detach().flatten() for p in network.parameters()])
            for name, network in self.networks.items()
        }

    def before(self, *_):
        self.trainable.append(
            "".join(
                name
                for name, network in self.networks.items()
                if all(p.grad is not None and p.requires_grad for p in network.parameters())
            )
        )

    def after(self, *_):
        new = self.values()
        self.moved.append("".join(n for n in new if not torch.equal(new[n], self.last[n])))
        self.last = new


@pytest.mark.parametrize(
    ("model", "order"),
    [
        (lambda: DCGAN(image_size=16, width=8, discriminator_width=8), "DGDG"),
        (lambda: DCGAN(image_size=16, width=8, loss="hinge", spectral_norm=True), "DGDG"),
        (lambda: WGANGP(image_size=16, width=8, critic_steps=3), "DDDGDDDG"),
    ],
    ids=["dcgan", "hinge_spectral_norm", "wgan_gp"],
)
def test_each_step_moves_its_own_network(model, order):
    seed_everything(0, verbose=False)
    watch = Watch()
    model = model()
    trainer(callbacks=[watch]).fit(model, loader())
    assert watch.moved == list(order)
    assert watch.trainable == list(order)
    assert all(p.requires_grad for p in model.parameters())


def test_toggles_are_undone_when_a_step_fails():
    model = DCGAN(image_size=16, width=8)

    def fail(loss):
        raise RuntimeError("no step")

    model.manual_backward = fail
    with pytest.raises(RuntimeError, match="no step"):
        trainer().fit(model, loader())
    assert all(p.requires_grad for p in model.parameters())


def test_a_nan_in_the_data_shows_in_the_loss():
    model = DCGAN(image_size=16, width=8)
    data = DataLoader(TensorDataset(torch.full((4, 1, 16, 16), float("nan")), torch.zeros(4)), 4)
    fit = trainer()
    fit.fit(model, data)
    assert fit.callback_metrics["train/d_loss"].isnan()


def test_logs_and_repeatable_validation():
    model = WGANGP(image_size=16, width=8, critic_steps=1)
    fit = trainer()
    fit.fit(model, loader(), loader())
    assert set(fit.callback_metrics) == {
        "train/wasserstein", "train/gradient_penalty", "train/g_loss", "val/d_real", "val/d_fake",
    }  # fmt: skip
    model = DCGAN(image_size=16, width=8)
    fit = trainer()
    fit.fit(model, loader(), loader())
    assert set(fit.callback_metrics) == {
        "train/d_loss", "train/g_loss", "train/d_real", "train/d_fake", "val/d_real", "val/d_fake",
    }  # fmt: skip
    first = fit.validate(model, loader(), verbose=False)
    assert fit.validate(model, loader(), verbose=False) == first
    pictures = torch.cat([x for x, _ in loader()]) * 2 - 1
    expected = model.eval().discriminator(pictures).sigmoid().mean().item()
    assert first[0]["val/d_real"] == pytest.approx(expected, rel=1e-5)


def test_default_size_on_digits():
    model = DCGAN(image_size=16)
    assert 500_000 < sum(p.numel() for p in model.generator.parameters()) < 1_500_000
    half = DCGAN(image_size=16, width_multiplier=0.5)
    assert half.generator.up1.in_channels == model.generator.up1.in_channels // 2
    assert half.discriminator.down1.out_channels == model.discriminator.down1.out_channels
