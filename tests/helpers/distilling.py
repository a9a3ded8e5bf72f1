"""Students for the tests of distillation: with the callback, or adding the loss themselves."""

import copy

import torch
from lightning.pytorch import Callback, LightningModule
from tiny import TinyGAN, batches, quiet_trainer
from torch import nn
from torch.nn import functional


class Student(LightningModule):
    """Automatic or manual optimization; `teacher` is in a list, so that it is no child."""

    example_input_array = torch.zeros(2, 6)

    def __init__(self, *, optimizer="Adam", calls=1, manual=False, steps=1):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6))
        self.optimizer, self.calls, self.steps = optimizer, calls, steps
        self.automatic_optimization = not manual
        self.teacher, self.weight = [None], 0.0

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def loss(self, x):
        total = 0.0
        for call in range(self.calls):
            hidden = self.encoder(x + call)
            output = self.decoder(hidden)
            total = total + (output - x).square().mean()
            if self.teacher[0] is not None:
                with torch.no_grad():
                    theirs = self.teacher[0].decoder(hidden)
                total = total + self.weight * functional.mse_loss(output.float(), theirs.float())
        return total

    def training_step(self, batch, index):
        if self.automatic_optimization:
            return self.loss(batch[0])
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch[0]) / self.steps)
        if (index + 1) % self.steps == 0:
            optimizer.step()
            optimizer.zero_grad()
        return None

    def configure_optimizers(self):
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=0.01)


class WideStudent(Student):
    """A teacher whose decoder has 11 hidden units in place of 7."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.decoder = nn.Sequential(nn.Linear(8, 11), nn.Tanh(), nn.Linear(11, 6))


class TaughtGAN(TinyGAN):
    """A GAN that adds the loss to its generator's where it is given a teacher."""

    def __init__(self, critic_steps=1):
        super().__init__(critic_steps)
        self.teacher, self.weight = [None], 0.0

    def training_step(self, batch, index):
        if self.teacher[0] is None:
            return super().training_step(batch, index)
        g, d = self.optimizers()
        z = torch.randn(
            len(batch[0]),
            3,
            generator=torch.Generator().manual_seed(100 * self.current_epoch + index),
        )
        for _ in range(self.critic_steps):
            loss = self.discriminator(self.generator(z).detach()).mean()
            d.zero_grad()
            self.manual_backward(loss - self.discriminator(batch[0]).mean())
            d.step()
        output = self.generator(z)
        with torch.no_grad():
            theirs = self.teacher[0].generator(z)
        loss = -self.discriminator(output).mean()
        g.zero_grad()
        self.manual_backward(loss + self.weight * functional.mse_loss(output, theirs))
        g.step()
        return None


class Watch(Callback):
    """What injectors and teachers did, read before they are gone."""

    def __init__(self, kd):
        self.kd, self.adapters = kd, []

    def on_train_batch_end(self, *_):
        session = self.kd.session
        self.adapters.append(
            [copy.deepcopy(one.adapters.state_dict()) for one in session.paired_modules]
        )

    def on_train_end(self, *_):
        session = self.kd.session
        self.teacher_calls = [paired.teacher_calls for paired in session.paired_modules]
        self.calls = [injector.calls for injector in session.injectors]
        self.injections = [injector.injections for injector in session.injectors]
        self.steps = list(session.steps)


def make(kind=Student, seed=0, **arguments):
    torch.manual_seed(seed)
    return kind(**arguments)


def fit(tmp_path, model, *callbacks, loader=None, ckpt=None, **arguments):
    trainer = quiet_trainer(tmp_path, *callbacks, **arguments)
    trainer.fit(model, batches() if loader is None else loader, ckpt_path=ckpt)
    return trainer


def assert_equal(one, other, **tolerance):
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], **tolerance)


def hooks_of(module):
    """All hooks on a module and below it."""
    return [
        hook
        for one in module.modules()
        for table in (one._forward_hooks, one._forward_pre_hooks)
        for hook in table.values()
    ]
