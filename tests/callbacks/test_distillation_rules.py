"""What distillation must leave alone, and what it must notice."""

import copy
import pickle

import pytest
import torch
from distilling import Student, TaughtGAN, Watch, assert_equal, fit, hooks_of, make
from lightning.pytorch import Callback, seed_everything
from tiny import batches, quiet_trainer
from torch import nn

from lightning_compress import KnowledgeDistillation, Pair, Ramp, TargetError


class Noisy(Student):
    """Draws from the global stream in each step; its teacher draws too."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.decoder = nn.Sequential(nn.Dropout(0.5), *self.decoder)


class AlwaysNoisy(nn.Module):
    def forward(self, x):
        return torch.randn(len(x), 6) + x.mean()


def test_weight_zero_is_bit_for_bit_no_callback(tmp_path):
    models, calls = [], []
    for callbacks in ([], [KnowledgeDistillation(make(Noisy, seed=1), weight=0.0)]):
        model = make(Noisy)
        watch = [Watch(one) for one in callbacks]
        seed_everything(3, verbose=False)
        fit(tmp_path, model, *callbacks, *watch)
        models.append(model)
        calls += [one.teacher_calls for one in watch]
    assert_equal(*models, rtol=0, atol=0)
    assert calls == [[0, 0]]


def test_a_teacher_that_draws_does_not_move_the_students_stream(tmp_path):
    draws = []

    class Drawing(Noisy):
        def training_step(self, batch, index):
            draws.append(torch.rand(()).item())
            return super().training_step(batch, index)

    for callbacks in ([], [KnowledgeDistillation(AlwaysNoisy(), pairs=[("decoder", "")])]):
        seed_everything(3, verbose=False)
        fit(tmp_path, make(Drawing), *callbacks)
    assert draws[:16] == draws[16:]


class Sampling(nn.Module):
    """A VAE's forward: a draw stands between its networks."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        mean = self.inner(x)
        return self.outer(mean + torch.randn_like(mean))


def test_a_teacher_draws_what_the_student_draws(tmp_path):
    class Drawing(Student):
        def __init__(self):
            super().__init__()
            self.vae = Sampling()

        def loss(self, x):
            torch.rand(3)  # other draws around the call
            output = self.vae(x)
            return (output - x).square().mean() + 0 * torch.rand(())

    model, values = make(Drawing), []
    kd = KnowledgeDistillation(copy.deepcopy(model), pairs=["vae"])

    class Read(Callback):
        def on_train_batch_end(self, trainer, *_):
            values.append(float(trainer.logged_metrics["distill/vae/mse"]))

    fit(tmp_path, model, kd, Read())
    assert values[0] == pytest.approx(0.0, abs=1e-9)
    assert values[1] < 0.01  # of other noise it would be about 2


class InPlace(Student):
    """An in-place ReLU after the tapped layer, and the output changed in place by the user."""

    def __init__(self, *, inplace=True, **arguments):
        super().__init__(**arguments)
        self.decoder = nn.Sequential(nn.Linear(8, 7), nn.ReLU(inplace=inplace), nn.Linear(7, 6))
        self.inplace = inplace

    def loss(self, x):
        output = self.decoder(self.encoder(x))
        output = output.mul_(2) if self.inplace else output * 2
        return (output - x).square().mean()


def test_in_place_layers_and_writes_do_not_change_what_the_losses_see(tmp_path):
    models = []
    for inplace in (True, False):
        model = make(InPlace, inplace=inplace)
        pair = Pair("decoder", features=[("0", "0"), ("1", "1")])
        kd = KnowledgeDistillation(make(InPlace, seed=1, inplace=inplace), pairs=[pair], weight=2.0)
        fit(tmp_path, model, kd)
        models.append(model)
    assert_equal(*models)


def test_an_input_that_is_changed_in_place_raises(tmp_path):
    class Careless(Student):
        def loss(self, x):
            hidden = self.encoder(x).detach()
            output = self.decoder(hidden)
            hidden.zero_()
            return output.square().mean()

    class Frozen(Careless):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.decoder = nn.Sequential(nn.Tanh(), nn.Linear(8, 6))  # needs no input of its own

    kd = KnowledgeDistillation(make(Frozen, seed=1), pairs=["decoder"])
    with pytest.raises(RuntimeError, match=r"'decoder'.*in place"):
        fit(tmp_path, make(Frozen), kd)


def test_copies_and_pickles_of_the_model_are_not_taught(tmp_path):
    seen = {}

    class Copying(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, index):
            for name, model in (
                ("copy", copy.deepcopy(pl_module.decoder)),
                ("pickle", pickle.loads(pickle.dumps(pl_module.decoder))),
            ):
                assert hooks_of(model)
                model(torch.zeros(2, 8)).sum().backward()
                seen[name] = [injector.calls for injector in kd.session.injectors]

    kd = KnowledgeDistillation(make(seed=1), pairs=[Pair("decoder", features=[("0", "0")])])
    fit(tmp_path, make(), kd, Copying(), max_epochs=1)
    assert seen == {"copy": [7], "pickle": [7]}  # of the 7 batches before the last one, alone


def test_hooks_go_away_after_the_fit_and_after_an_exception(tmp_path):
    class Breaking(Student):
        def training_step(self, batch, index):
            if index == 2:
                raise ValueError("broken")
            return super().training_step(batch, index)

    pair = Pair("decoder", features=[("0", "0")])
    for kind in (Student, Breaking):
        model, teacher = make(kind), make(seed=1)
        kd = KnowledgeDistillation(teacher, pairs=[pair])
        if kind is Student:
            fit(tmp_path, model, kd)
        else:
            with pytest.raises(ValueError, match="broken"):
                fit(tmp_path, model, kd)
        assert not hooks_of(model)
        assert not hooks_of(teacher)
        assert not model.configure_optimizers()._optimizer_step_post_hooks


def test_the_teacher_is_frozen_and_in_no_checkpoint(tmp_path):
    model, teacher = make(), make(Noisy, seed=1)
    before = copy.deepcopy(teacher.state_dict())
    kd = KnowledgeDistillation(teacher.train(), pairs=[("decoder", "decoder")])
    trainer = fit(tmp_path, model, kd)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(content["state_dict"]) == set(model.state_dict())
    assert content["callbacks"].get(kd.state_key, {}) == {}


class Result:
    def __init__(self, value):
        self.value = value


def test_unknown_outputs_raise_and_known_structures_pass(tmp_path):
    class Wrapping(nn.Linear):
        kind = Result

        def forward(self, x):
            return self.kind(value=super().forward(x))

    class Wrapped(Student):
        example_input_array = None

        def __init__(self, result):
            super().__init__()
            self.decoder = Wrapping(8, 6)
            self.decoder.kind = result

        def loss(self, x):
            found = self.decoder(self.encoder(x))
            value = found["value"] if isinstance(found, dict) else found.value
            return (value - x).square().mean()

    kd = KnowledgeDistillation(make(Wrapped, seed=1, result=Result), pairs=["decoder"])
    with pytest.raises(TargetError, match="'decoder' gives a Result"):
        fit(tmp_path, make(Wrapped, result=Result), kd)
    kd = KnowledgeDistillation(make(Wrapped, seed=1, result=dict), pairs=["decoder"])
    trainer = fit(tmp_path, make(Wrapped, result=dict), kd)
    assert trainer.callback_metrics["distill/decoder/mse"] > 0


def test_a_pair_that_never_fires_warns(tmp_path):
    class Silent(Student):
        def training_step(self, batch, index):
            optimizer = self.optimizers()
            loss = (self.decoder(self.encoder(batch[0])) - batch[0]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    kd = KnowledgeDistillation(make(seed=1), pairs=["decoder"])
    with pytest.warns(UserWarning, match="self.manual_backward"):
        fit(tmp_path, make(Silent, manual=True), kd)


class Methodical(Student):
    """Its decoder is used through its layers, never called itself."""

    def loss(self, x):
        hidden = self.encoder(x)
        return (self.decoder[2](self.decoder[1](self.decoder[0](hidden))) - x).square().mean()


def test_what_was_called_takes_the_place_of_what_was_not(tmp_path):
    """After the first batch; a resumed run knows it, and explicit features are not dropped."""
    kd = KnowledgeDistillation(make(seed=1), weight=2.0)
    model = make(Methodical)
    trainer = fit(tmp_path, model, kd)
    logged = {name for name in trainer.callback_metrics if name.startswith("distill/")}
    assert logged == {f"distill/{one}/mse" for one in ("encoder", "decoder.0", "decoder.2")}
    assert all(trainer.callback_metrics[name] > 0 for name in logged)
    assert not hooks_of(model)


def test_a_resumed_run_goes_on_with_what_was_called(tmp_path):
    class Saving(Callback):
        def on_train_batch_end(self, *_):
            steps.append(list(taught.session.steps))

        def on_train_epoch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    steps, taught = [], KnowledgeDistillation(make(seed=1), weight=2.0)
    fit(tmp_path, whole := make(Methodical), taught, Saving())
    assert steps[-1] == [16, 16, 16]
    steps, taught = [], KnowledgeDistillation(make(seed=1), weight=2.0)
    trainer = quiet_trainer(tmp_path, taught, Saving())
    trainer.fit(resumed := make(Methodical, seed=5), batches(), ckpt_path=tmp_path / "0.ckpt")
    assert steps[0] == [9, 9, 9]
    assert_equal(whole, resumed, rtol=0, atol=0)


def test_nothing_that_is_called_is_refused_after_the_first_batch(tmp_path):
    class Functional(Student):
        def loss(self, x):
            hidden = self.encoder(x)
            return nn.functional.linear(hidden, self.decoder[0].weight).square().mean()

    model = make(Functional)
    with pytest.raises(TargetError, match="'decoder' itself is never called, nor a layer"):
        fit(tmp_path, model, KnowledgeDistillation(make(seed=1)))
    assert model.trainer.global_step == 1
    pair = Pair("decoder", features=[("1", "1")])
    with pytest.raises(TargetError, match=r"but \['decoder.0', 'decoder.2'\] inside it are"):
        fit(tmp_path, make(Methodical), KnowledgeDistillation(make(seed=1), pairs=[pair]))


def test_the_whole_lightning_module_is_a_pair(tmp_path):
    class Whole(Student):
        def loss(self, x):
            return (self(x) - x).square().mean()

    kd = KnowledgeDistillation(make(seed=1), pairs=[""])
    watch = Watch(kd)
    trainer = fit(tmp_path, make(Whole), kd, watch)
    assert watch.injections == [16]
    assert trainer.callback_metrics["distill/model/mse"] > 0


def test_losses_are_logged_unweighted(tmp_path):
    teacher, model = make(seed=1), make()
    x = next(iter(batches()))[0]
    with torch.no_grad():
        hidden = model.encoder(x)
        expected = (model.decoder(hidden) - teacher.decoder(hidden)).square().mean().item()
    kd = KnowledgeDistillation(teacher, pairs=["decoder"], weight=7.0)
    trainer = fit(tmp_path, model, kd, max_steps=1)
    assert trainer.callback_metrics["distill/decoder/mse"].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weight", "asked"),
    [
        (Ramp(initial=0.0, final=1.0, begin=4, end=8), 11),  # steps 5 to 15
        (Ramp(initial=1.0, final=0.0, begin=0.0, end=0.5), 7),  # batches 1 to 7 of 16
        (lambda step: float(step >= 10), 6),
    ],
)
def test_weights_follow_their_schedule(tmp_path, weight, asked):
    kd = KnowledgeDistillation(make(seed=1), pairs=["decoder"], weight=weight)
    watch = Watch(kd)
    fit(tmp_path, make(), kd, watch)
    assert watch.teacher_calls == [asked]


def test_a_ramp_in_fractions_needs_a_run_that_ends(tmp_path):
    kd = KnowledgeDistillation(make(seed=1), pairs=["decoder"], weight=Ramp(end=0.5))
    with pytest.raises(ValueError, match="the run has no end"):
        fit(tmp_path, make(), kd, max_epochs=-1)


def test_balanced_gradients_have_the_norm_of_the_users(tmp_path):
    arriving, leaving = [], []

    class Measured(Student):
        def loss(self, x):
            output = self.decoder(self.encoder(x))
            output.register_hook(arriving.append)
            return (output - x).square().mean()

    def watch(_module, _args, output):
        if output.requires_grad:
            output.register_hook(leaving.append)

    for weight in (0.0, 0.5):
        model = make(Measured)
        model.decoder[2].register_forward_hook(watch)
        options = {"weight": weight, "balance": "gradient_norm"}
        kd = KnowledgeDistillation(make(seed=1), pairs=["decoder"], **options)
        fit(tmp_path, model, kd, max_steps=1)
    added = leaving[1] - leaving[0]
    assert added.norm().item() == pytest.approx(0.5 * arriving[0].norm().item(), rel=1e-4)


def test_a_gan_learns_its_teachers_pictures(tmp_path):
    teacher, model = make(TaughtGAN, seed=1), make(TaughtGAN)
    z = torch.randn(64, 3)
    distance = lambda: (model.generator(z) - teacher.generator(z)).square().mean().item()  # noqa: E731
    before = distance()
    fit(tmp_path, model, KnowledgeDistillation(teacher, weight=100.0), max_epochs=10)
    assert distance() < 0.2 * before
