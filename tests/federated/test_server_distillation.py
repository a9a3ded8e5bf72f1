"""The server's student learns what the clients' generators know, from latents alone."""

import pytest
import torch
from torch import nn

from lightning_compress.federated.distillation import (
    TeacherSamples,
    distill_outputs,
    distill_samples,
)
from lightning_compress.lab.evaluation.likelihood import likelihood
from lightning_compress.lab.models import DCGAN, VAE


class Pattern(nn.Module):
    """A generator that always draws one image of two levels."""

    latent_dim = 4

    def __init__(self, left, right):
        super().__init__()
        self.image = torch.full((1, 16, 16), left)
        self.image[:, :, 8:] = right

    def images(self, z):
        return self.image.expand(len(z), 1, 16, 16)


ONE, OTHER = Pattern(0.9, 0.1), Pattern(0.1, 0.9)


def test_rows_come_from_teachers_as_they_weigh_and_repeat_by_the_seed():
    def mean(weights, seed=0):
        samples = TeacherSamples([ONE, OTHER], weights=weights, steps=4, batch_size=200, seed=seed)
        return (
            torch.cat([samples[place][0] for place in range(4)])[:, 0, 0, 0]
            .gt(0.5)
            .float()
            .mean()
            .item()
        )

    assert mean([3.0, 1.0]) == pytest.approx(0.75, abs=0.06)
    assert mean([0.0, 1.0]) == 0.0
    assert mean(None) == mean(None) != mean(None, seed=1)


def test_a_vae_learns_the_mixture_of_what_its_teachers_draw():
    torch.manual_seed(0)
    student = VAE(image_size=16, width=8, latent_dim=4, lr=1e-2)
    rows = torch.cat([ONE.images(torch.zeros(8, 4)), OTHER.images(torch.zeros(8, 4))])
    before = likelihood(student.eval(), rows)["neg_elbo"]
    distill_samples(student, [ONE, OTHER], steps=100, batch_size=32, accelerator="cpu")
    after = likelihood(student.eval(), rows)["neg_elbo"]
    assert after < 0.65 * before
    drawn = student.images(student.latents(64, seed=0))
    left, right = drawn[..., :8].mean((1, 2, 3)), drawn[..., 8:].mean((1, 2, 3))
    assert (left - right).abs().mean() > 0.5  # images of one teacher or the other, no blur of both


def test_a_gan_trains_on_what_its_teachers_draw():
    torch.manual_seed(0)
    student = DCGAN(image_size=16, width=8, discriminator_width=8)
    first = {name: one.clone() for name, one in student.generator.state_dict().items()}
    distill_samples(student, [ONE], steps=3, batch_size=8, accelerator="cpu")
    assert any(not first[name].equal(one) for name, one in student.generator.state_dict().items())


def decoder(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 6))


@pytest.mark.parametrize("loss", ["bernoulli_kl", "mse"])
def test_a_wide_and_a_narrow_student_learn_the_mean_of_their_teachers(loss):
    teachers = [decoder(12, 1), decoder(20, 2)]
    z = torch.randn(500, 4, generator=torch.Generator().manual_seed(9))

    def apart(student):
        with torch.no_grad():
            if loss == "mse":
                return (student(z) - sum(one(z) for one in teachers) / 2).square().mean().item()
            mean = sum(one(z).sigmoid() for one in teachers) / 2
            return (student(z).sigmoid() - mean).square().mean().item()

    for width in (8, 64):
        student = decoder(width, 3)
        before = apart(student)
        distill_outputs(student, teachers, latent_dim=4, loss=loss, steps=120, lr=2e-2)
        assert apart(student) < 0.15 * before


def test_features_of_other_widths_are_matched_too():
    teacher, student = decoder(12, 1), decoder(8, 2)
    teacher = nn.Sequential(*teacher[:2], nn.Unflatten(1, (12, 1)), nn.Flatten(), teacher[2])
    student = nn.Sequential(*student[:2], nn.Unflatten(1, (8, 1)), nn.Flatten(), student[2])
    distill_outputs(student, [teacher], latent_dim=4, loss="mse", features=["2"], steps=5)
    assert not student[2]._forward_hooks
    assert not teacher[2]._forward_hooks


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TeacherSamples([], steps=1), "no teachers"),
        (lambda: TeacherSamples([ONE], steps=1, weights=[1.0, 2.0]), "weights="),
        (lambda: TeacherSamples([ONE], steps=1, weights=[-1.0]), "weights="),
        (lambda: distill_outputs(decoder(4, 0), [], latent_dim=4), "no teachers"),
        (lambda: distill_outputs(decoder(4, 0), [decoder(4, 0)], latent_dim=4, loss="kl"),
         "loss='kl'.*mse"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
