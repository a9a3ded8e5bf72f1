"""Outputs of other people's modules: distributions, dataclasses, mappings of their own class."""

import dataclasses
from collections import OrderedDict

import pytest
import torch
from distilling import Student, fit, make
from torch import nn
from torch.distributions import Independent, Laplace, Normal, kl_divergence

from lightning_compress import KnowledgeDistillation
from lightning_compress.distillation.losses import gaussian_kl
from lightning_compress.errors import TargetError
from lightning_compress.outputs import flatten


@dataclasses.dataclass(frozen=True)
class Result:
    value: torch.Tensor
    note: str = ""


class ModelOutput(OrderedDict):
    """As of transformers and diffusers: items are attributes too."""

    def __getattr__(self, name):
        return self[name]


class Moments:
    def __init__(self, mean, logvar):
        self.mean, self.logvar, self.std = mean, logvar, (0.5 * logvar).exp()


def normal(mean, raw):
    return Normal(mean, raw.exp())


MAKERS = {
    "normal": normal,
    "independent": lambda mean, raw: Independent(normal(mean, raw), 1),
    "own class": lambda mean, raw: Moments(mean, 2 * raw),
    "inside": lambda mean, raw: Result(normal(mean, raw)),
}


class Posterior(Student):
    example_input_array = None
    make = None

    def __init__(self, made):
        super().__init__()
        self.encoder = Encoder(made)
        self.decoder = nn.Linear(6, 6)

    def loss(self, x):
        given = getattr(given := self.encoder(x), "value", given)
        given = getattr(given, "base_dist", given)
        mean = given.loc if isinstance(given, Normal) else given.mean
        return (self.decoder(mean) - x).square().mean()


class Encoder(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.heads, self.kind = nn.Linear(6, 12), kind

    def forward(self, x):
        return MAKERS[self.kind](*self.heads(x).chunk(2, 1))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_posterior_is_taught_by_the_gaussian_kl(tmp_path, kind):
    teacher, student = make(Posterior, seed=1, made=kind), make(Posterior, made=kind)
    x = torch.randn(64, 6)

    def distance():
        with torch.no_grad():
            ours, theirs = (normal(*one.encoder.heads(x).chunk(2, 1)) for one in (student, teacher))
            return kl_divergence(theirs, ours).sum(1).mean().item()

    before = distance()
    kd = KnowledgeDistillation(teacher, pairs=["encoder"], losses="gaussian_kl", weight=10.0)
    trainer = fit(tmp_path, student, kd)
    assert distance() < 0.8 * before
    assert trainer.callback_metrics["distill/encoder/gaussian_kl"] > 0


def test_gaussian_kl_equals_that_of_torch():
    ours, theirs = (normal(torch.randn(4, 3), torch.randn(4, 3)) for _ in range(2))
    wanted = kl_divergence(theirs, ours).sum(1).mean()
    torch.testing.assert_close(gaussian_kl(ours, theirs), wanted)
    torch.testing.assert_close(
        gaussian_kl(*(Independent(one, 1) for one in (ours, theirs))), wanted
    )
    with pytest.raises(TargetError, match="Laplace"):
        gaussian_kl(Laplace(torch.zeros(2), torch.ones(2)), ours)


@pytest.mark.parametrize("kind", [ModelOutput, Result])
def test_mappings_and_dataclasses_carry_gradients(tmp_path, kind):
    class Wrapping(nn.Linear):
        def forward(self, x):
            return kind(value=super().forward(x), note="kept")

    class Wrapped(Student):
        example_input_array = None

        def __init__(self):
            super().__init__()
            self.decoder = Wrapping(8, 6)

        def loss(self, x):
            found = self.decoder(self.encoder(x))
            assert type(found) is kind
            assert found.note == "kept"
            return 0.0 * found.value.sum()  # only the teacher teaches

    teacher, student = make(Wrapped, seed=1), make(Wrapped)
    before = (student.decoder.weight - teacher.decoder.weight).norm()
    fit(tmp_path, student, KnowledgeDistillation(teacher, pairs=["decoder"]))
    assert (student.decoder.weight - teacher.decoder.weight).norm() < before


def test_the_same_structure_comes_back():
    state = ModelOutput(a=torch.zeros(1), b=(Result(torch.ones(1), "x"), [2, None]))
    leaves, rebuild = flatten(state)
    again = rebuild(iter(leaves))
    assert type(again) is ModelOutput
    assert again.b[0] == state.b[0]
    assert again.b[1] == [2, None]
    assert leaves[0] is state.a
