"""Mistakes are found before training; teachers come from modules, configs and files."""

import copy

import pytest
import torch
from distilling import Student, WideStudent, fit, make
from torch import nn

from lightning_compress import (
    EMATeacher,
    KnowledgeDistillation,
    OnlineTeacher,
    Pair,
    Perceptual,
    Ramp,
    TargetError,
    TeacherScore,
    save_compressed,
)
from lightning_compress.lab.models import DCGAN, VAE, RecurrentVAE


def small_gan(**changes):
    return DCGAN(**{"image_size": 16, "width": 8, "discriminator_width": 8, **changes})


class NeverTrains(Student):
    def training_step(self, batch, index):
        raise AssertionError("training began")


def refuse(tmp_path, message, teacher, model=None, error=TargetError, **arguments):
    kd = KnowledgeDistillation(teacher, **arguments)
    with pytest.raises(error, match=message):
        fit(tmp_path, make(NeverTrains) if model is None else model, kd)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["decodr"], r"the student has no module 'decodr'; closest: \['decoder'"),
        ([("decoder", "decodr")], r"the teacher has no module 'decodr'; closest: \['decoder'"),
        (
            [Pair("decoder", features=[("9", "1")])],
            "the student's 'decoder' has no module '9'; closest",
        ),
        (
            [Pair("decoder", features=[("1", "one")])],
            "the teacher's 'decoder' has no module 'one'; closest",
        ),
        ([], "pairs is empty"),
        ([("a", "b", "c")], "is no pair"),
    ],
)
def test_paths_that_match_nothing_are_named_with_the_closest(tmp_path, pairs, message):
    refuse(tmp_path, message, make(seed=1), pairs=pairs)


def test_a_teacher_that_is_the_student(tmp_path):
    model = make(NeverTrains)
    refuse(tmp_path, "the teacher is the student", model, model)
    refuse(tmp_path, "the teacher is the student", model.decoder, model, pairs=[("decoder", "")])


class Sized(Student):
    def __init__(self, outputs=6, hidden=8, **arguments):
        super().__init__(**arguments)
        self.decoder = nn.Sequential(nn.Linear(hidden, 7), nn.Tanh(), nn.Linear(7, outputs))


def test_sizes_that_do_not_match(tmp_path):
    refuse(
        tmp_path,
        r"the student gives \(2, 6\), the teacher \(2, 5\).*adapter=True",
        make(Sized, seed=1, outputs=5),
        pairs=["decoder"],
    )
    refuse(
        tmp_path,
        r"teacher's 'decoder' cannot take what the student's 'decoder' receives, \[\(2, 8\)\]",
        make(Sized, seed=1, hidden=9),
        pairs=["decoder"],
    )
    features = Pair("decoder", features=[("0", "2")], adapter=False)
    refuse(tmp_path, r"gives \(2, 7\), the teacher \(2, 6\)", make(seed=1), pairs=[features])


class Branching(nn.Module):
    """Its way depends on values: no tracer follows it."""

    def __init__(self, hidden=7):
        super().__init__()
        self.inner, self.out = nn.Linear(8, hidden), nn.Linear(hidden, 6)

    def forward(self, x):
        hidden = self.inner(x)
        return self.out(hidden.tanh() if hidden.sum() > 0 else hidden)


class Untraceable(Student):
    def __init__(self, hidden=7, **arguments):
        super().__init__(**arguments)
        self.decoder = Branching(hidden)


def test_equal_modules_begin_with_the_teachers_weights_traceable_or_not(tmp_path):
    student, teacher = make(Untraceable), make(Untraceable, seed=1)
    kd = KnowledgeDistillation(teacher, pairs=["decoder"], initialize=True)
    fit(tmp_path, student, kd, max_steps=0)
    for ours, theirs in zip(
        student.decoder.parameters(), teacher.decoder.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert not torch.equal(student.encoder[0].weight, teacher.encoder[0].weight)  # no pair


def test_wider_modules_begin_with_some_of_the_teachers_channels(tmp_path):
    student, teacher = make(), make(WideStudent, seed=1)
    kd = KnowledgeDistillation(teacher, pairs=["decoder"], initialize=True)
    fit(tmp_path, student, kd, max_steps=0)
    rows = {tuple(row.tolist()) for row in teacher.decoder[0].weight}
    assert all(tuple(row.tolist()) in rows for row in student.decoder[0].weight)


def test_an_adapter_maps_outputs_where_it_is_asked_for(tmp_path):
    teacher = make(Sized, seed=1, outputs=5)
    kd = KnowledgeDistillation(teacher, pairs=[Pair("decoder", adapter=True)])
    trainer = fit(tmp_path, make(), kd)
    assert trainer.callback_metrics["distill/decoder/mse"] > 0


def test_features_of_unknown_size_are_refused(tmp_path):
    class Unknown(NeverTrains):
        example_input_array = None

        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.decoder = nn.Sequential(nn.Tanh(), nn.Linear(8, 6))

    pair = Pair("decoder", features=[("0", "0")])
    model = make(Unknown)
    refuse(tmp_path, "set example_input_array", copy.deepcopy(model), model, pairs=[pair])


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            {"latent_dim": 7},
            r"'generator' receives, \[\(2, 64\)\]: are latent and image sizes equal",
        ),
        ({"image_size": 32}, r"the student gives \(2, 1, 16, 16\), the teacher \(2, 1, 32, 32\)"),
        ({"channels": 3}, r"the student gives \(2, 1, 16, 16\), the teacher \(2, 3, 16, 16\)"),
    ],
)
def test_a_gan_of_another_latent_or_image_size(tmp_path, teacher, message):
    refuse(tmp_path, message, small_gan(**teacher), small_gan())


def test_losses_that_do_not_fit_the_outputs(tmp_path):
    pair = Pair("decoder", loss="gaussian_kl")
    refuse(
        tmp_path, r"\['gaussian_kl'\] do not fit what the modules give", make(seed=1), pairs=[pair]
    )
    pair = Pair("decoder", loss=Perceptual())
    refuse(tmp_path, "teacher has no module 'discriminator'", make(seed=1), pairs=[pair])
    pair = Pair("decoder", loss=TeacherScore())
    refuse(tmp_path, "teacher has no module 'discriminator'", make(seed=1), pairs=[pair])
    pair = Pair("generator", loss=Perceptual(layers=["down9"]))
    refuse(
        tmp_path,
        "teacher's discriminator has no module 'down9'",
        small_gan(),
        small_gan(),
        pairs=[pair],
    )


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: KnowledgeDistillation(nn.Tanh(), weight=-1.0), "weight=-1.0"),
        (lambda: KnowledgeDistillation(nn.Tanh(), temperature=0.0), "temperature=0.0"),
        (lambda: KnowledgeDistillation(nn.Tanh(), balance="dwa"), r"balance='dwa'.*gradient_norm"),
        (lambda: KnowledgeDistillation(nn.Tanh(), adapter_lr=0.0), "adapter_lr=0.0"),
        (lambda: Pair("a", weight=float("nan")), "weight=nan"),
        (lambda: Pair("a", prior=-1), "prior=-1"),
        (lambda: Pair("a", features=["b"]), "features holds 'b'"),
        (lambda: Pair("a", loss=None), "neither a loss nor features"),
        (lambda: Ramp(shape="square"), r"shape='square'.*linear"),
        (lambda: Ramp(begin=5, end=2), "must be smaller"),
        (lambda: Ramp(final=-1.0), "final=-1.0"),
        (lambda: EMATeacher(1.0), "decay=1.0"),
        (lambda: TeacherScore(loss="wgan"), r"loss='wgan'.*match"),
        (lambda: OnlineTeacher(nn.Tanh(), changes={}), "give no teacher"),
    ],
)
def test_bad_values_are_named(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_unknown_losses_are_named(tmp_path):
    refuse(
        tmp_path,
        r"loss='mae': valid are \['mse', 'l1'",
        make(seed=1),
        losses="mae",
        pairs=["decoder"],
        error=ValueError,
    )
    refuse(tmp_path, "loss=3", make(seed=1), losses=3, pairs=["decoder"])


@pytest.mark.parametrize(
    ("teacher", "checkpoint", "error", "message"),
    [
        ("dense", None, TargetError, "only lightning-compress trains"),
        ("nowhere.ckpt", None, FileNotFoundError, "there is no teacher nowhere.ckpt"),
        ("nowhere.lcz", None, FileNotFoundError, "there is no teacher nowhere.lcz"),
        (nn.Tanh(), "nowhere.lcz", FileNotFoundError, "there is no teacher nowhere.lcz"),
        ("a.ckpt", "b.ckpt", TargetError, "leave checkpoint out"),
        (3, None, TargetError, "teacher=3: give a module"),
        (lambda: 3, None, TargetError, "give a module"),
        (OnlineTeacher(nn.Tanh()), None, TargetError, "Tanh is no LightningModule"),
        (OnlineTeacher(), None, TargetError, r"no hyperparameters \['width_multiplier'\]"),
    ],
)
def test_teachers_that_cannot_be_built(tmp_path, teacher, checkpoint, error, message):
    refuse(tmp_path, message, teacher, error=error, checkpoint=checkpoint)


def taught_by(tmp_path, teacher, model, checkpoint=None):
    """The state of the teacher that a callback made of what it was given."""
    kd = KnowledgeDistillation(teacher, checkpoint=checkpoint, pairs=["generator"])
    images = torch.utils.data.TensorDataset(torch.rand(4, 1, 16, 16), torch.zeros(4))
    fit(tmp_path, model, kd, loader=torch.utils.data.DataLoader(images, 2), max_epochs=1)
    return kd._module.state_dict()


def test_a_teacher_from_files(tmp_path):
    torch.manual_seed(1)
    teacher = small_gan(width=16)
    images = torch.utils.data.TensorDataset(torch.rand(4, 1, 16, 16), torch.zeros(4))
    trainer = fit(tmp_path, teacher, loader=torch.utils.data.DataLoader(images, 2), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.save(teacher.state_dict(), tmp_path / "a.pt")
    save_compressed(teacher.deployed_module(), tmp_path / "a.lcz")
    config = {"_target_": "lightning_compress.lab.models.DCGAN", "image_size": 16, "width": 16}
    config["discriminator_width"] = 8
    expected = teacher.state_dict()
    for given, checkpoint in (
        (str(tmp_path / "a.ckpt"), None),  # of the student's own class, by its hyperparameters
        (config, tmp_path / "a.ckpt"),
        (lambda: small_gan(width=16), tmp_path / "a.pt"),
        (small_gan(width=16), tmp_path / "a.lcz"),
    ):
        found = taught_by(tmp_path, given, small_gan(), checkpoint)
        for name, value in expected.items():
            if name.startswith("generator"):
                assert torch.equal(found[name], value), (given, name)


def test_files_that_do_not_fit(tmp_path):
    torch.save(small_gan().state_dict(), tmp_path / "a.pt")
    refuse(
        tmp_path,
        "a.pt does not fit DCGAN",
        small_gan(width=16),
        small_gan(),
        checkpoint=str(tmp_path / "a.pt"),
    )
    refuse(tmp_path, "does not say what model it holds", str(tmp_path / "a.pt"), small_gan())
    torch.save({"state_dict": {}}, tmp_path / "b.ckpt")
    refuse(tmp_path, "does not say what model it holds", str(tmp_path / "b.ckpt"), small_gan())


def images(count=8):
    data = torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data, torch.zeros(count)), 4)


def test_a_vae_is_taught_at_its_own_noise(tmp_path):
    """An equal teacher in eval mode has nothing to teach: both decoders see one z."""
    torch.manual_seed(0)
    model = VAE(image_size=16, width=8, latent_dim=4)
    for chain in (model.encoder.body, model.decoder):
        for name, layer in list(chain.named_children()):
            if isinstance(layer, nn.BatchNorm2d):  # its statistics differ between the two modes
                setattr(chain, name, nn.Identity())
    teacher = copy.deepcopy(model)
    pairs = [Pair("encoder", loss="gaussian_kl"), Pair("decoder", loss="bernoulli_kl")]
    kd = KnowledgeDistillation(teacher, pairs=pairs)
    trainer = fit(tmp_path, model, kd, loader=images(4), max_epochs=1)
    assert trainer.callback_metrics["distill/encoder/gaussian_kl"].item() == pytest.approx(
        0, abs=1e-5
    )
    assert trainer.callback_metrics["distill/decoder/bernoulli_kl"].item() == pytest.approx(
        0, abs=1e-3
    )


def test_posteriors_of_other_sizes_meet_through_an_adapter(tmp_path):
    teacher, model = (VAE(image_size=16, width=8, latent_dim=size) for size in (6, 4))
    pair = Pair("encoder", loss="gaussian_kl", adapter=True)
    trainer = fit(tmp_path, model, KnowledgeDistillation(teacher, pairs=[pair]), loader=images())
    assert trainer.callback_metrics["distill/encoder/gaussian_kl"] > 0


def test_a_recurrent_decoder_is_taught_step_by_step(tmp_path):
    """The teacher reads the student's tokens and z, and begins with a state of its own size."""
    torch.manual_seed(0)
    tokens = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0]])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, torch.zeros(2)), 2)
    teacher, model = (RecurrentVAE(vocab_size=9, steps=5, hidden=size) for size in (32, 8))
    seen = []
    model.decoder.register_forward_hook(lambda _, args, output: seen.append((args, output[0])))
    pairs = [Pair("encoder", loss="gaussian_kl"), Pair("decoder", loss="step_kl")]
    trainer = fit(
        tmp_path, model, KnowledgeDistillation(teacher, pairs=pairs), loader=loader, max_steps=1
    )
    (inputs, _, z), logits = seen[-1]
    theirs, _ = teacher.decoder(inputs, torch.zeros(2, 32), z)
    sides = [torch.distributions.Categorical(logits=one.detach()) for one in (theirs, logits)]
    steps = torch.distributions.kl_divergence(*sides)
    expected = (steps[0, :3].sum() + steps[1, :2].sum()) / 2  # nothing after the end token
    torch.testing.assert_close(trainer.callback_metrics["distill/decoder/step_kl"], expected)


def test_the_teachers_discriminator_judges_the_student(tmp_path):
    torch.manual_seed(0)
    teacher, model = small_gan(width=16), small_gan()
    fakes = []
    handle = model.discriminator.register_forward_pre_hook(lambda _, args: fakes.append(args[0]))
    losses = [Perceptual(), TeacherScore(), TeacherScore(loss="hinge")]
    kd = KnowledgeDistillation(teacher, pairs=[Pair("generator", loss=losses[:2])])
    metrics = fit(tmp_path, model, kd, loader=images(4), max_epochs=1).callback_metrics
    handle.remove()
    assert metrics["distill/generator/perceptual"] > 0
    assert metrics["distill/generator/teacher_score"] > 0
    assert all(one.grad is None for one in teacher.parameters())


def test_perceptual_distance_and_scores_by_hand():
    from lightning_compress.distillation.losses import LossInputs

    torch.manual_seed(0)
    teacher = nn.ModuleDict(
        {"discriminator": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))}
    )
    net = teacher["discriminator"]
    ours, theirs = torch.randn(5, 3), torch.randn(5, 3)
    call = LossInputs(ours, theirs)
    hidden = [net[1](net[0](x)) for x in (ours, theirs)]
    expected = (hidden[0] - hidden[1]).square().mean() / hidden[1].square().mean()
    cases = {
        Perceptual(): expected,
        Perceptual(layers=["1"]): expected,
        TeacherScore(): (net(ours) - net(theirs)).square().mean(),
        TeacherScore(loss="hinge"): -net(ours).mean(),
        TeacherScore(loss="non_saturating"): -net(ours).sigmoid().log().mean(),
    }
    for loss, value in cases.items():
        loss.bind(teacher)
        torch.testing.assert_close(loss(call), value)
        loss.release()
    assert not net[1]._forward_hooks
