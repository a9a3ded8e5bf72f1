"""Weights that come back: straight-through masks and RigL, in real training."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer
from torch.nn.utils import parametrize

from lightning_compress import (
    BalanceGuard,
    Constant,
    GradualPruning,
    Linear,
    Regrowth,
    ThresholdPruning,
    sparsity,
)
from lightning_compress.pruning.masks import global_masks


class StopAfter(Callback):
    """Ends a run at an epoch as a crash would: nothing else is told."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise ConnectionError("preempted")


class MaskedForward(torch.nn.Module):
    """The textbook form: the mask from the latent weights, straight through, in each forward."""

    def __init__(self):
        super().__init__()
        self.mask = None

    def forward(self, weight):
        if self.mask is None:
            return weight
        return weight + (weight * self.mask - weight).detach()


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_straight_through_equals_masks_recomputed_in_the_forward(tmp_path, optimizer):
    model = TinyAutoencoder(optimizer, lr=0.05)
    twin = copy.deepcopy(model)
    schedule = Linear(final_sparsity=0.6, begin=0, end=100)
    pruning = GradualPruning(
        schedule=schedule, frequency=1, regrow="straight_through", min_keep=0, on_miss="warn"
    )
    with pytest.warns(UserWarning, match="ended at sparsity"):
        quiet_trainer(tmp_path, pruning, max_epochs=5).fit(model, batches())

    layers = [twin.encoder[0], twin.decoder]
    masking = [MaskedForward() for _ in layers]
    for layer, one in zip(layers, masking, strict=True):
        parametrize.register_parametrization(layer, "weight", one)
    optim = twin.configure_optimizers()
    reopened, step = 0, 0
    for _ in range(5):
        for batch in batches():
            optim.zero_grad()
            (twin(batch[0]) - batch[0]).square().mean().backward()
            optim.step()
            step += 1
            latents = [layer.parametrizations.weight.original.detach() for layer in layers]
            masks = global_masks([one.abs() for one in latents], schedule(step))
            for one, mask in zip(masking, masks, strict=True):
                before = torch.ones_like(mask) if one.mask is None else one.mask > 0
                reopened += int((mask & ~before).sum())
                one.mask = mask.float()
    assert reopened > 0  # or nothing was tested
    for layer, original, one in zip(
        (model.encoder[0], model.decoder), layers, masking, strict=True
    ):
        latent = original.parametrizations.weight.original.detach()
        assert torch.equal(layer.weight, latent * one.mask)
    assert sparsity(model) == round(96 * schedule(40)) / 96


class Recorded(GradualPruning):
    """Masks before and after each event, and what it saw."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.rows = []

    def event(self, trainer):
        before = [
            None if projected.pruned is None else ~projected.pruned
            for projected in self.projected_weights
        ]
        values = [projected.values().clone() for projected in self.projected_weights]
        growth = [
            self._statistics[-1].criterion.scores(projected).clone()
            for projected in self.projected_weights
        ]
        super().event(trainer)
        after = [~projected.pruned for projected in self.projected_weights]
        shown = [projected.parameter.detach().clone() for projected in self.projected_weights]
        rows = zip(before, values, growth, after, shown, strict=True)
        self.rows.append((self.events.done, list(rows)))


@pytest.mark.parametrize("make", [TinyAutoencoder, TinyGAN])
@pytest.mark.parametrize("schedule", [Constant, Linear])
@pytest.mark.parametrize("scope", ["erk", "global"])
def test_rigl_keeps_the_count_and_moves_by_gradient(tmp_path, make, schedule, scope):
    pruning = Recorded(
        schedule=schedule(final_sparsity=0.75, begin=0, end=30),
        frequency=5,
        scope=scope,
        regrow=Regrowth(fraction=0.5),
    )
    torch.manual_seed(0)
    model = make()
    quiet_trainer(tmp_path, pruning, max_epochs=4).fit(model, batches())
    total = sum(projected.target.numel for projected in pruning.projected_weights)
    moved = 0
    for (done, rows), step in zip(pruning.rows, (5, 10, 15, 20, 25, 30), strict=False):
        asked = pruning.schedule(step)
        assert sum(int((~row[3]).sum()) for row in rows) == round(asked * total)
        if schedule is Constant and step > 5 and step < 30:
            share = 0.5 / 2 * (1 + math.cos(math.pi * done))
            moved += sum(by_hand(row, share) for row in rows)
    assert schedule is Linear or moved > 0
    # Of the mask: what came back to a dead unit has no gradient and is still 0.
    assert pruning.sparsity == pytest.approx(round(0.75 * total) / total)
    assert sparsity(model) >= pruning.sparsity - 1e-9
    assert all(projected.taps == [] for projected in pruning.projected_weights)


def by_hand(row, share):
    """Check one layer's exchange by sorting in Python; the number of weights that moved."""
    before, values, growth, after, shown = row
    active = [i for i, one in enumerate(before.flatten().tolist()) if one]
    count = int(share * len(active))
    size = values.abs().flatten().tolist()
    survivors = set(sorted(active, key=lambda i: size[i])[count:])
    rest = [i for i in range(before.numel()) if i not in survivors]
    slope = growth.flatten().tolist()
    grown = set(sorted(rest, key=lambda i: slope[i])[len(rest) - count :])
    got = {i for i, one in enumerate(after.flatten().tolist()) if one}
    assert got == survivors | grown
    new = [i for i in grown if not before.flatten()[i]]
    assert not shown.flatten()[new].any()  # they start at 0
    return len(new)


def test_rigl_whole_channels(tmp_path):
    torch.manual_seed(0)
    pruning = GradualPruning(
        schedule=Constant(final_sparsity=0.5, begin=0, end=30),
        frequency=3,
        granularity="column",
        scope="layer",
        regrow=Regrowth(fraction=0.9),
    )
    model = TinyAutoencoder()
    seen = set()

    original = pruning.event

    def event(trainer):
        original(trainer)
        gone = pruning.projected_weights[1].pruned.all(0)  # what comes back starts at 0
        assert model.decoder.weight.detach()[:, gone].eq(0).all()
        assert int(gone.sum()) == 4
        seen.add(tuple(gone.tolist()))

    pruning.event = event
    quiet_trainer(tmp_path, pruning, max_epochs=4).fit(model, batches())
    assert len(seen) > 1


MODES = {
    "none": {},
    "straight_through": {"regrow": "straight_through"},
    "straight_layer": {"regrow": "straight_through", "scope": "layer"},
    "rigl": {"regrow": "gradient", "schedule": Constant(final_sparsity=0.8, end=0.9)},
    "rigl_gradual": {"regrow": "gradient", "scope": "erk", "final_sparsity": 0.8, "end": 0.9},
    "rows": {"granularity": "row", "final_sparsity": 0.5, "end": 0.9},
    "n_of_m": {"granularity": "1:2", "end": 0.9},
    "block": {"granularity": ("block", (2, 2)), "end": 0.9, "final_sparsity": 0.5},
    "patterns": {"final_sparsity": {"*.0.*": 0.5, "*": 0.8}, "end": 0.9},
    "rewind": {"rewind": 0.1, "begin": 0.15, "end": 0.9, "frequency": 7, "final_sparsity": 0.8},
    "rewind_dense": {
        "rewind": 3,
        "regrow": "straight_through",
        "begin": 4,
        "end": 28,
        "frequency": 6,
    },
    "guard": {"final_sparsity": 0.8, "end": 0.6},
    "taylor": {"criterion": "taylor", "end": 0.9, "frequency": 5},
    "obs": {"criterion": "obs", "end": 0.9, "frequency": 5, "scope": "layer"},
    "movement": {"criterion": "movement", "regrow": "straight_through", "end": 0.9},
    "activation_rows": {"criterion": "activation", "granularity": "row", "final_sparsity": 0.5},
}


def resume(tmp_path, make, make_callbacks):
    def run(folder, *extra, ckpt_path=None):
        seed_everything(7, verbose=False)
        model, callbacks = make(), make_callbacks()
        saver = ModelCheckpoint(folder, save_last=True, every_n_epochs=1)
        trainer = quiet_trainer(
            folder, *callbacks, saver, *extra, max_epochs=4, enable_checkpointing=True
        )
        trainer.fit(model, batches(), ckpt_path=ckpt_path)
        return model, callbacks[0]

    whole, first = run(tmp_path / "whole")
    with pytest.raises(ConnectionError):
        run(tmp_path / "parts", StopAfter(2))
    resumed, second = run(tmp_path / "parts", ckpt_path=tmp_path / "parts" / "last.ckpt")
    for (name, one), other in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert first.sparsity == second.sparsity
    assert 0.2 < sparsity(resumed) < 0.95
    return first, second


class LoudGAN(TinyGAN):
    """Logs what a guard watches: a discriminator that wins for a while."""

    def training_step(self, batch, index):
        super().training_step(batch, index)
        step = 8 * self.current_epoch + index
        self.log("train/d_loss", 0.1 if 9 <= step < 19 else 1.0)


@pytest.mark.filterwarnings("ignore:.*ended at sparsity:UserWarning")
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("make", [TinyAutoencoder, TinyGAN])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, make, mode):
    if mode == "guard":
        make = LoudGAN
    guards = [BalanceGuard(warmup=3, smoothing=0.3)] if mode == "guard" else []
    resume(tmp_path, make, lambda: [GradualPruning(**MODES[mode]), *copy.deepcopy(guards)])


@pytest.mark.parametrize("regrow", [None, "straight_through"])
def test_a_resumed_threshold_run_equals_an_uninterrupted_one(tmp_path, regrow):
    arguments = {"threshold": 0.8, "relative": "std", "end": 0.9, "regrow": regrow}
    resume(tmp_path, TinyAutoencoder, lambda: [ThresholdPruning(**arguments)])


class Look(Callback):
    """What is hidden when training begins."""

    def __init__(self, pruning, seen):
        self.pruning, self.seen = pruning, seen

    def on_train_start(self, trainer, pl_module):
        projected = self.pruning.projected_weights[0]
        self.seen.append(projected.latent[projected.pruned].clone())


def test_hidden_weights_go_on_in_a_second_fit(tmp_path):
    pruning = GradualPruning(
        schedule=Constant(final_sparsity=0.5, begin=0, end=20), regrow="straight_through"
    )
    model = TinyAutoencoder()
    quiet_trainer(tmp_path, pruning).fit(model, batches())
    projected = pruning.projected_weights[0]
    hidden = projected.latent[projected.pruned].clone()
    assert hidden.abs().sum() > 0
    seen = []
    again = quiet_trainer(tmp_path, pruning, max_epochs=1)

    again.callbacks.append(Look(pruning, seen))
    again.fit(model, batches())
    assert torch.equal(seen[0], hidden)
