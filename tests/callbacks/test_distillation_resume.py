"""Adapters, streams, averages and twins: trained beside the model, dropped at the end, resumed."""

import copy

import pytest
import torch
from distilling import Student, TaughtGAN, Watch, WideStudent, assert_equal, fit, make
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from tiny import batches
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    EMATeacher,
    GradualPruning,
    KnowledgeDistillation,
    OnlineTeacher,
    Pair,
    PostTrainingQuantization,
    Ramp,
    RandomState,
    sparsity,
)

FEATURES = Pair("decoder", loss="mse", features=[("1", "1")], weight=2.0)


def test_adapters_train_and_belong_to_nobody_else(tmp_path):
    model, kd = make(), KnowledgeDistillation(make(WideStudent, seed=1), pairs=[FEATURES])
    names = set(model.state_dict())
    watch = Watch(kd)
    trainer = fit(tmp_path, model, kd, watch)
    first, last = (watch.adapters[index][0]["feature0.map.weight"] for index in (0, -1))
    assert first.shape == (11, 7)
    assert not torch.equal(first, last)
    assert set(model.state_dict()) == names
    owned = sum(len(group["params"]) for one in trainer.optimizers for group in one.param_groups)
    assert owned == len(list(model.parameters()))
    assert kd.session is None  # dropped


def test_adapters_learn_what_the_features_have_in_common(tmp_path):
    """With a student that stands still, the adapter nears the least-squares fit."""

    class Still(Student):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model, teacher = make(Still), make(WideStudent, seed=1)
    pair = Pair("decoder", loss=None, features=[("1", "1")])
    kd = KnowledgeDistillation(teacher, pairs=[pair], adapter_lr=0.05)
    loader = batches(count=1, size=64)
    trainer = fit(tmp_path, model, kd, loader=loader, max_epochs=300)
    hidden = model.encoder(loader.dataset.tensors[0])
    ours, theirs = (one.decoder[:2](hidden).detach() for one in (model, teacher))
    design = torch.cat([ours, torch.ones(64, 1)], dim=1)
    best = (design @ torch.linalg.lstsq(design, theirs).solution - theirs).square().mean()
    found = trainer.callback_metrics["distill/decoder/1/mse"]
    assert best < found < 2 * best < 0.1 * theirs.var()


def test_adapters_do_not_see_the_gradient_scalers_factor(tmp_path):
    found = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            found.append(kd.session.adapter_parameters()[0].grad.clone())

    for scale in (1.0, 4096.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        kd = KnowledgeDistillation(make(WideStudent, seed=1), pairs=[FEATURES])
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        fit(tmp_path, make(), kd, Look(), plugins=[plugin], max_steps=1)
    assert found[0].norm() > 0
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("clears", [True, False])
def test_adapters_gradients_are_cleared_with_the_students(tmp_path, clears):
    """A step that is skipped leaves nothing behind, accumulated batches add up."""
    gradients = []

    class Skipping(Student):
        def training_step(self, batch, index):
            optimizer = self.optimizers()
            if clears:
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch[0]))
            (adapter, _) = kd.session.adapter_parameters()
            gradients.append(adapter.grad.clone())

    kd = KnowledgeDistillation(make(WideStudent, seed=1), pairs=[FEATURES])
    x = next(iter(batches()))[0]
    loader = DataLoader(TensorDataset(x.repeat(2, 1)), len(x))
    fit(tmp_path, make(Skipping, manual=True), kd, loader=loader, max_epochs=1)
    torch.testing.assert_close(gradients[1], gradients[0] * (1 if clears else 2))


class Latent(Student):
    """Draws from the global stream in each step, as a VAE does."""

    def loss(self, x):
        hidden = self.encoder(x)
        return (self.decoder(hidden + 0.1 * torch.randn_like(hidden)) - x).square().mean()


class Sized(Latent):
    def __init__(self, width=4, **arguments):
        super().__init__(**arguments)
        self.save_hyperparameters()
        self.decoder = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 6))


RUNS = {
    "adapters": lambda: [
        KnowledgeDistillation(make(WideStudent, seed=1), pairs=[FEATURES], weight=Ramp(end=12))
    ],
    "prior": lambda: [
        KnowledgeDistillation(
            make(WideStudent, seed=1), pairs=[Pair("decoder", prior=5)], weight=5.0
        )
    ],
    "average": lambda: [KnowledgeDistillation(EMATeacher(0.9), pairs=["decoder"], weight=3.0)],
    "online": lambda: [
        KnowledgeDistillation(OnlineTeacher(changes={"width": 9}), pairs=["decoder"], weight=3.0)
    ],
    "pruned": lambda: [
        KnowledgeDistillation(make(WideStudent, seed=1), pairs=[FEATURES]),
        GradualPruning(final_sparsity=0.7),
    ],
}


@pytest.mark.parametrize("kind", list(RUNS))
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, kind):
    found = []
    for seed, ckpt in ((0, None), (9, tmp_path / "epoch=1.ckpt")):
        callbacks, model = RUNS[kind](), make(Sized, seed=seed)
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1 if ckpt is None else 0)
        torch.manual_seed(4 + seed)
        # A loader draws from the global stream at each epoch, unless it has a stream of its own.
        loader = DataLoader(batches().dataset, 4, generator=torch.Generator())
        options = {"max_epochs": 4, "enable_checkpointing": True, "ckpt": ckpt, "loader": loader}
        fit(tmp_path, model, *callbacks, RandomState(), saver, **options)
        found.append(model)
    assert_equal(*found, rtol=0, atol=0)


def test_distill_prune_and_quantize_in_one_run(tmp_path):
    teacher, model = make(TaughtGAN, seed=1), make(TaughtGAN)
    kd = KnowledgeDistillation(teacher, weight=10.0)
    watch = Watch(kd)
    pruning = GradualPruning(final_sparsity=0.5, scope="layer")
    fit(tmp_path, model, kd, pruning, PostTrainingQuantization(weight_bits=4), watch)
    assert sparsity(model.generator) >= 0.5
    assert watch.teacher_calls == [16]
    for layer in (model.generator[0], model.generator[2]):
        assert all(len(row.unique()) <= 16 for row in layer.weight)


def test_the_average_follows_the_students_weights(tmp_path):
    model, expected, kd = make(), [], KnowledgeDistillation(EMATeacher(0.8), pairs=["decoder"])
    start = copy.deepcopy(model.decoder)

    class Follow(Watch):
        def on_train_start(self, trainer, pl_module):
            mean = [parameter.detach().clone() for parameter in start.parameters()]

            def after(*_):
                for one, value in zip(mean, pl_module.decoder.parameters(), strict=True):
                    one.mul_(0.8).add_(0.2 * value.detach())
                expected[:] = [one.clone() for one in mean]

            trainer.optimizers[0].register_step_post_hook(after)

        def on_train_end(self, *_):
            self.found = [one.clone() for one in kd.session.paired_modules[0].teacher.parameters()]

    watch = Follow(kd)
    fit(tmp_path, model, kd, watch)
    torch.testing.assert_close(watch.found, expected)


def test_prior_draws_teach_without_data(tmp_path):
    """A decoder that only sees zeros learns the teacher all over the prior."""

    class Blind(Student):
        def loss(self, x):
            return 1e-6 * self.decoder(torch.zeros(4, 8)).square().mean()

    teacher, model = make(WideStudent, seed=1), make(Blind)
    z = torch.randn(256, 8)
    distance = lambda: (model.decoder(z) - teacher.decoder(z)).square().mean().item()  # noqa: E731
    before = distance()
    kd = KnowledgeDistillation(teacher, pairs=[Pair("decoder", prior=64)])
    fit(tmp_path, model, kd, max_epochs=40)
    assert distance() < 0.2 * before


def test_prior_draws_leave_norm_statistics_alone(tmp_path):
    found = []
    for prior in (0, 8):
        model = make()
        model.decoder.insert(0, nn.BatchNorm1d(8))
        teacher = copy.deepcopy(model)
        kd = KnowledgeDistillation(teacher, pairs=[Pair("decoder", prior=prior)], weight=1e-12)
        fit(tmp_path, model, kd)
        found.append([*model.decoder[0].buffers()])
    torch.testing.assert_close(*found)
