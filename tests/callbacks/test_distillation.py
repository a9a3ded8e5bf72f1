"""A teacher's loss enters the student's backward pass as if the training step had added it."""

import copy

import pytest
import torch
from distilling import Student, TaughtGAN, Watch, assert_equal, fit, make
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_compress import KnowledgeDistillation, Pair


def both(tmp_path, *, kind=Student, path="decoder", trainer=None, weight=3.0, **arguments):
    """The model trained with the callback, and its twin that adds the loss itself."""
    teacher = make(kind, seed=1)
    ours, theirs = make(kind, **arguments), make(kind, **arguments)
    options = dict(trainer or {})
    dtype = torch.bfloat16 if options.get("precision") == "bf16-true" else torch.float32
    theirs.teacher, theirs.weight = [copy.deepcopy(teacher).eval().to(dtype)], weight
    kd = KnowledgeDistillation(teacher, pairs=[path], weight=weight)
    watch = Watch(kd)
    plugin = options.pop("plugin", list)
    fit(tmp_path, ours, kd, watch, plugins=plugin(), **options)
    fit(tmp_path, theirs, plugins=plugin(), **options)
    return ours, theirs, watch


def scaled():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return [MixedPrecision("16-mixed", "cpu", scaler=scaler)]


@pytest.mark.parametrize(
    ("arguments", "trainer"),
    [
        ({}, {}),
        ({"optimizer": "LBFGS"}, {"max_epochs": 1}),
        ({}, {"accumulate_grad_batches": 4}),
        ({}, {"accumulate_grad_batches": 3}),
        ({"manual": True}, {}),
        ({"calls": 3}, {}),
        ({}, {"gradient_clip_val": 0.01}),
        ({"manual": True}, {"precision": "bf16-true"}),
    ],
    ids=["automatic", "lbfgs", "accumulate", "uneven", "manual", "calls", "clipped", "bf16-true"],
)
def test_it_equals_the_sum_of_both_losses(tmp_path, arguments, trainer):
    ours, theirs, _ = both(tmp_path, trainer=trainer, **arguments)
    loose = "precision" in trainer or "optimizer" in arguments
    assert_equal(ours, theirs, rtol=0.03 if loose else 1e-5, atol=0.01 if loose else 1e-6)


@pytest.mark.parametrize("precision", ["bf16", "16"])
def test_mixed_precision_and_gradient_scalers(tmp_path, precision):
    trainer = {"precision": "bf16-mixed"} if precision == "bf16" else {"plugin": scaled}
    ours, theirs, watch = both(tmp_path, trainer=trainer, optimizer="SGD")
    assert watch.teacher_calls == [16]
    start = make(optimizer="SGD")
    assert_equal(ours, theirs, rtol=0.02, atol=2e-3)
    moved = (ours.decoder[0].weight - start.decoder[0].weight).norm()
    apart = (ours.decoder[0].weight - theirs.decoder[0].weight).norm()
    assert apart < 0.03 * moved  # a scale that is left out or counted twice would be 3 of 4 parts


@pytest.mark.parametrize("critic_steps", [1, 3])
def test_a_teacher_is_asked_once_a_generator_step_and_never_for_the_discriminator(
    tmp_path, critic_steps
):
    ours, theirs, watch = both(
        tmp_path, kind=TaughtGAN, path="generator", critic_steps=critic_steps
    )
    assert_equal(ours, theirs, rtol=1e-5, atol=1e-6)
    assert watch.teacher_calls == watch.injections == watch.steps == [16]
    assert watch.calls == [16 * (critic_steps + 1)]  # carried, but no gradient came back


def test_a_toggled_discriminator_step_does_not_even_carry(tmp_path):
    class Toggled(TaughtGAN):
        def training_step(self, batch, index):
            _, d = self.optimizers()
            self.toggle_optimizer(d)
            loss = self.discriminator(self.generator(batch[0][:, :3])).mean()
            self.manual_backward(loss)
            d.step()
            d.zero_grad()
            self.untoggle_optimizer(d)

    kd = KnowledgeDistillation(make(TaughtGAN, seed=1), pairs=["generator"])
    watch = Watch(kd)
    with pytest.warns(UserWarning, match="nothing was distilled into 'generator'"):
        fit(tmp_path, make(Toggled), kd, watch)
    assert watch.calls == watch.teacher_calls == [0]


def test_penalties_by_autograd_grad_stay_clean(tmp_path):
    class Penalized(Student):
        def loss(self, x):
            hidden = self.encoder(x)
            output = self.decoder(hidden)
            (slope,) = torch.autograd.grad(output.sum(), hidden, create_graph=True)
            self.slopes.append(slope.detach())
            total = (output - x).square().mean() + slope.square().mean()
            if self.teacher[0] is not None:
                with torch.no_grad():
                    theirs = self.teacher[0].decoder(hidden)
                total = total + self.weight * functional.mse_loss(output, theirs)
            return total

    Penalized.slopes = []
    ours, theirs, watch = both(tmp_path, kind=Penalized)
    assert_equal(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(Penalized.slopes[:16], Penalized.slopes[16:], rtol=1e-4, atol=1e-5)
    assert watch.teacher_calls == [16]


def test_a_second_backward_adds_nothing_unless_gradients_were_cleared(tmp_path):
    class Twice(Student):
        def training_step(self, batch, index):
            optimizer, loss = self.optimizers(), self.loss(batch[0])
            self.manual_backward(loss, retain_graph=True)
            if self.clear:
                optimizer.zero_grad(set_to_none=self.none)
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    for clear, none, expected in ((False, True, 16), (True, True, 32), (True, False, 32)):
        Twice.clear, Twice.none = clear, none
        kd = KnowledgeDistillation(make(seed=1), pairs=["decoder"])
        watch = Watch(kd)
        fit(tmp_path, make(Twice, manual=True), kd, watch)
        assert watch.injections == [expected]


def test_two_calls_of_one_backward_both_add_after_clearing(tmp_path):
    class Twice(Student):
        def training_step(self, batch, index):
            optimizer, loss = self.optimizers(), self.loss(batch[0])
            self.manual_backward(loss, retain_graph=True)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    ours, theirs, watch = both(tmp_path, kind=Twice, manual=True, calls=2)
    assert_equal(ours, theirs, rtol=1e-5, atol=1e-6)
    assert watch.injections == [64]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the teacher's own
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_activation_checkpointing(tmp_path, reentrant, inside):
    class Chain(torch.nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    class Checkpointed(Student):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            if inside:
                self.decoder = Chain(*self.decoder)

        def loss(self, x):
            if inside:
                return super().loss(x)
            hidden = self.encoder(x)
            output = checkpoint(self.decoder, hidden, use_reentrant=reentrant)
            total = (output - x).square().mean()
            if self.teacher[0] is not None:
                with torch.no_grad():
                    theirs = self.teacher[0].decoder(hidden)
                total = total + self.weight * functional.mse_loss(output, theirs)
            return total

    ours, theirs, _ = both(tmp_path, kind=Checkpointed)
    assert_equal(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("where", ["model", "decoder"])
def test_compiled_models(tmp_path, where):
    teacher, plain, compiled = make(seed=1), make(), make()
    losses = []
    for model in (plain, compiled):
        wrapped = model
        if model is compiled and where == "model":
            wrapped = torch.compile(model, backend="eager")
        elif model is compiled:
            model.decoder = torch.compile(model.decoder, backend="eager")
        kd = KnowledgeDistillation(teacher, pairs=[Pair("decoder", features=[("1", "1")])])
        watch = Watch(kd)
        fit(tmp_path, wrapped, kd, watch, max_epochs=1)
        losses.append(watch.teacher_calls)
    assert losses == [[8], [8]]
    torch.testing.assert_close(list(plain.parameters()), list(compiled.parameters()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_fullgraph_compilation_raises(tmp_path):
    model = make()
    model.decoder = torch.compile(model.decoder, backend="eager", fullgraph=True)
    kd = KnowledgeDistillation(make(seed=1), pairs=[Pair("decoder", features=[("1", "1")])])
    with pytest.raises(Exception, match=r"(?s)fullgraph|torch.compiler.disable|Skip"):
        fit(tmp_path, model, kd)
