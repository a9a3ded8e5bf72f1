"""Small LightningModules of other people's making, and a quiet Trainer."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def batches(count=8, size=4, features=6, seed=0):
    data = torch.randn(count * size, features, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(data), batch_size=size)


def quiet_trainer(tmp_path, *callbacks, **arguments):
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**defaults, **arguments}, callbacks=list(callbacks))


class TinyAutoencoder(LightningModule):
    """Automatic optimization; a norm layer and a bias beside the weights."""

    def __init__(self, optimizer="Adam", lr=0.01):
        super().__init__()
        self.optimizer, self.lr = optimizer, lr
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.decoder = nn.Linear(8, 6)
        self.seen = []

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, _):
        loss = (self(batch[0]) - batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, _):
        zeros = (self.decoder.weight == 0).float().mean()
        self.seen.append(zeros.item())
        self.log("val/zeros", zeros)

    def configure_optimizers(self):
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=self.lr)


class TinyGAN(LightningModule):
    """Manual optimization, raw or wrapped optimizers, several discriminator steps a batch."""

    def __init__(self, critic_steps=1, raw=False):
        super().__init__()
        self.automatic_optimization = False
        self.critic_steps, self.raw = critic_steps, raw
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, index):
        g, d = self.optimizers(use_pl_optimizer=not self.raw)
        noise = torch.Generator().manual_seed(100 * self.current_epoch + index)
        z = torch.randn(len(batch[0]), 3, generator=noise)
        for _ in range(self.critic_steps):
            loss = self.discriminator(self.generator(z).detach()).mean()
            loss = loss - self.discriminator(batch[0]).mean()
            d.zero_grad()
            self.manual_backward(loss)
            d.step()
        loss = -self.discriminator(self.generator(z)).mean()
        g.zero_grad()
        self.manual_backward(loss)
        g.step()

    def configure_optimizers(self):
        generator = torch.optim.Adam(self.generator.parameters(), lr=0.01, betas=(0.5, 0.9))
        return generator, torch.optim.Adam(self.discriminator.parameters(), lr=0.01)


def randomize(module, *, seed, low, spread):
    """Values that no two channels share, with the statistics of a trained norm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            if value.is_floating_point():
                value.copy_(low + spread * torch.rand(value.shape, generator=generator))
