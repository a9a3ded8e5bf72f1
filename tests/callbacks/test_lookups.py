"""Targets and optimizers are looked up again: what comes in mid-run is taken, or named."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import BackboneFinetuning
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    ChannelPruning,
    GradualPruning,
    KnowledgeDistillation,
    PostTrainingQuantization,
    Projector,
    QuantizationAwareTraining,
    TargetError,
    ThresholdPruning,
    compression_state,
    sparsity,
)


def rounding(**arguments):
    return QuantizationAwareTraining(**{"weight_bits": 3, "activation_bits": 3, **arguments})


def all_on_grids(model, *, but=()):
    state = compression_state(model)
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and path not in but
    }
    assert set(state.grids) == {f"{path}.weight" for path in layers}
    assert set(state.activations) == set(layers)
    for path, grid in state.grids.items():
        weight = model.get_parameter(path)
        assert torch.equal(grid.project(weight), weight), path
        assert weight.unique().numel() > 1, path


@contextmanager
def no_warnings_of_ours():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*(Pruning|Training)\[")
        yield


class NewOptimizers(Callback):
    """Makes them anew, as in the middle of an epoch of a phase-wise training."""

    def __init__(self, epoch=1, index=3):
        self.epoch, self.index = epoch, index

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.index):
            trainer.strategy.setup_optimizers(trainer)


class Growing(TinyAutoencoder):
    """Gets a layer, and another output layer, when an epoch begins."""

    def __init__(self, own=True):
        super().__init__()
        self.middle = nn.Sequential()
        self.own = own

    def forward(self, x):
        return self.decoder(self.middle(self.encoder(x)))

    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            torch.manual_seed(1)
            self.middle.append(nn.Linear(8, 8))
            self.decoder = nn.Linear(8, 6)
            if self.own:
                self.trainer.strategy.setup_optimizers(self.trainer)


@pytest.mark.parametrize("kind", ["prune", "quantize", "both", "threshold"])
def test_new_optimizers_in_mid_run_are_hooked(tmp_path, kind):
    seed_everything(0, verbose=False)
    pruning, quantizing = GradualPruning(final_sparsity=0.8, frequency=1), rounding()
    if kind == "threshold":
        pruning = ThresholdPruning(threshold=0.2, frequency=1)
    chosen = {"quantize": [quantizing], "both": [pruning, quantizing]}.get(kind, [pruning])
    model = TinyAutoencoder("AdamW")
    with no_warnings_of_ours():
        quiet_trainer(tmp_path, *chosen, NewOptimizers(), max_epochs=4).fit(model, batches())
    assert chosen[0].projector.steps == [32]
    if kind in ("prune", "both"):
        assert sparsity(model) == pytest.approx(0.8, abs=0.02)
    if kind in ("quantize", "both"):
        all_on_grids(model)
        assert max(row.unique().numel() for row in model.decoder.weight) <= 8


def test_a_gan_with_new_optimizers_goes_on(tmp_path):
    seed_everything(0, verbose=False)
    model, pruning = TinyGAN(), GradualPruning(final_sparsity=0.8, frequency=1)
    new = NewOptimizers(epoch=0, index=2)
    with no_warnings_of_ours():
        quiet_trainer(tmp_path, pruning, rounding(), new, max_epochs=4).fit(model, batches())
    assert sparsity(model, ["generator"]) == pytest.approx(0.8, abs=0.02)
    assert Projector.find(model) is None


class Frozen(TinyAutoencoder):
    """A backbone that BackboneFinetuning frees after an epoch."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        del self.encoder

    def forward(self, x):
        return self.decoder(self.backbone(x))

    def configure_optimizers(self):
        free = [one for one in self.parameters() if one.requires_grad]
        return torch.optim.Adam(free, lr=0.01)


@pytest.mark.parametrize("first", [True, False])
def test_what_a_finetuning_callback_frees_is_compressed(tmp_path, first):
    seed_everything(0, verbose=False)
    model = Frozen()
    model.deployed = ("backbone", "decoder")
    pruning = GradualPruning(final_sparsity=0.8, frequency=1)
    ours = [pruning, rounding()]
    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    order = [tuning, *ours] if first else [*ours, tuning]
    # At the start it is right that most is left out: it is frozen.
    with no_warnings_of_ours(), pytest.warns(UserWarning, match="only 30 % .*frozen"):
        quiet_trainer(tmp_path, *order, max_epochs=4).fit(model, batches())
    assert sparsity(model) == pytest.approx(0.8, abs=0.02)
    assert pruning.sparsity == pytest.approx(0.8, abs=0.02)
    all_on_grids(model)


@pytest.mark.parametrize("end", [0.3, 0.9])
@pytest.mark.parametrize("scheme", ["symmetric", "codebook", "learned_step"])
def test_layers_that_grow_are_compressed(tmp_path, end, scheme):
    seed_everything(0, verbose=False)
    model, pruning = Growing(), GradualPruning(final_sparsity=0.75, end=end, frequency=1)
    model.deployed = ("encoder", "middle", "decoder")
    both = [pruning, rounding(scheme=scheme, freeze=0.95 if end == 0.9 else 0.4)]
    with no_warnings_of_ours():
        quiet_trainer(tmp_path, *both, max_epochs=4).fit(model, batches())
    assert len(pruning.projected_weights) == 3
    assert pruning.sparsity == pytest.approx(0.75, abs=0.02)
    assert sparsity(model) == pytest.approx(0.75, abs=0.03)
    all_on_grids(model)
    assert {row.path for row in pruning.coverage if row.selected} == {
        "encoder.0.weight",
        "middle.0.weight",
        "decoder.weight",
    }
    assert compression_state(model).activations["decoder"].output is not None


def test_a_new_layer_that_no_optimizer_has_is_named(tmp_path):
    model = Growing(own=False)
    with pytest.warns(
        UserWarning, match=r"no optimizer owns \['decoder.weight', 'middle.0.weight'"
    ):
        quiet_trainer(tmp_path, GradualPruning(include=["*"]), max_epochs=4).fit(model, batches())


def test_channels_of_a_new_layer_are_named(tmp_path):
    model = Growing()
    model.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    model.example_input_array = torch.zeros(2, 6)
    cutting = ChannelPruning(final_sparsity=0.5, round_to=2, fade=1, end=0.4)
    with pytest.warns(UserWarning, match=r"channels of \['decoder.weight'.*stay"):
        quiet_trainer(tmp_path, cutting, max_epochs=4).fit(model, batches())


class BuiltInSetup(TinyAutoencoder):
    def __init__(self, lazy=False):
        super().__init__()
        self.lazy = lazy
        self.decoder = nn.LazyLinear(6) if lazy else None
        if lazy:
            self.encoder = nn.Sequential(nn.LazyLinear(8), nn.ReLU())
        else:
            del self.encoder

    def setup(self, stage):
        if self.lazy:
            self(torch.zeros(2, 6))
        elif self.decoder is None:
            self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
            self.decoder = nn.Linear(8, 6)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("pattern", [None, ["decoder.*"]])
def test_layers_that_setup_makes_are_found(tmp_path, lazy, pattern):
    seed_everything(0, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules")
        model = BuiltInSetup(lazy)
    pruning = GradualPruning(final_sparsity=0.75, include=pattern)
    others = [rounding(include=pattern)] if lazy else [PostTrainingQuantization(include=pattern)]
    quiet_trainer(tmp_path, pruning, *others).fit(model, batches())
    assert pruning.sparsity == pytest.approx(0.75, abs=0.03)
    assert pruning.coverage
    assert compression_state(model).grids


def test_a_student_that_setup_makes_is_distilled(tmp_path):
    teacher, student = BuiltInSetup(), BuiltInSetup()
    teacher.setup("fit")
    distilling = KnowledgeDistillation(teacher, pairs=[("decoder", "decoder")])
    quiet_trainer(tmp_path, distilling).fit(student, batches())


def test_a_pattern_that_matches_nothing_in_setup_is_still_refused(tmp_path):
    pruning = GradualPruning(include=["decodr.*"])
    with pytest.raises(TargetError, match=r"'decodr\.\*' matches no parameter"):
        quiet_trainer(tmp_path, pruning).fit(BuiltInSetup(), batches())


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization, arXiv:2010.01412, as it is written everywhere."""

    def __init__(self, params, rho=0.05, lr=0.01):
        super().__init__(params, {"rho": rho, "lr": lr})
        self.base = torch.optim.SGD(self.param_groups, lr=lr)

    @torch.no_grad()
    def first_step(self):
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["old"] = weight.clone()
            weight.add_(weight.grad, alpha=self.param_groups[0]["rho"])

    @torch.no_grad()
    def second_step(self):
        for weight in self.param_groups[0]["params"]:
            weight.copy_(self.state[weight]["old"]).sub_(weight.grad, alpha=0.01)

    def step(self, closure=None):
        raise RuntimeError("call first_step and second_step")


class Sharpness(TinyAutoencoder):
    def __init__(self, idle=False):
        super().__init__()
        self.automatic_optimization = False
        self.idle = idle

    def training_step(self, batch, index):
        optimizer = self.optimizers(use_pl_optimizer=False)
        for update in () if self.idle else (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            update()

    def configure_optimizers(self):
        return SAM(self.parameters())


class EpochsSeen(Callback):
    def __init__(self):
        self.epochs = 0

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs += 1


@pytest.mark.parametrize("make", [GradualPruning, rounding])
@pytest.mark.parametrize(
    ("idle", "reason"),
    [
        (False, r"SAM updates weights by first_step, second_step, never by step\(\)"),
        (True, "SAM has made no step, and its weights have not changed"),
    ],
)
def test_an_optimizer_without_steps_is_named_in_the_first_epoch(tmp_path, make, idle, reason):
    watch = EpochsSeen()
    trainer = quiet_trainer(tmp_path, watch, make(), max_epochs=3)
    with no_warnings_of_ours(), pytest.raises(UserWarning, match=reason):  # it ends the run
        trainer.fit(Sharpness(idle), batches())
    assert watch.epochs == 1


def test_at_the_end_the_reason_is_the_same(tmp_path):
    callback = GradualPruning(on_miss="raise")
    with (
        pytest.warns(UserWarning, match="first_step"),
        pytest.raises(RuntimeError, match=r"instead of 0.9000: SAM updates weights by first_step"),
    ):
        quiet_trainer(tmp_path, callback).fit(Sharpness(), batches())
