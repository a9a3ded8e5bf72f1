"""QualityBudget on small models of other people's making: what it tries, restores and leaves."""

import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    BalanceGuard,
    EntropyGrid,
    GradualPruning,
    PostTrainingQuantization,
    ProjectedEMA,
    QualityBudget,
    QuantizationAwareTraining,
    TargetError,
    ThresholdPruning,
    compression_state,
    sparsity,
)
from lightning_compress.budget.reference import predicted_bytes
from lightning_compress.budget.sensitivity import LayerScan, Sensitivity
from lightning_compress.callbacks.rollback import bytes_now


class Measured(TinyAutoencoder):
    """Logs its own loss on fixed data, and a script's offset."""

    def validation_step(self, batch, _):
        self.log("val/loss", (self(batch[0]) - batch[0]).square().mean())


class MeasuredGAN(TinyGAN):
    """A score that grows with what was pruned, as a GAN's distance would."""

    def validation_step(self, batch, _):
        zeros = torch.cat([p.flatten() == 0 for p in self.generator.parameters()]).float().mean()
        self.log("val/distance", 1 + zeros**2)


class Tape(Callback):
    """Everything that a decision may change, at the end of each validation."""

    def __init__(self):
        self.rows = []

    def on_validation_end(self, trainer, pl_module):
        self.rows.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def fit(tmp_path, model, *callbacks, epochs=30, **arguments):
    trainer = quiet_trainer(tmp_path, *callbacks, max_epochs=epochs, **arguments)
    trainer.fit(model, batches(), batches(seed=1))
    return trainer


def pruning(**arguments):
    return GradualPruning(final_sparsity=0.9, **arguments)


def test_it_ends_with_a_compressed_model_within_the_budget(tmp_path, capsys):
    torch.manual_seed(0)
    model, budget, prune = Measured(), QualityBudget("val/loss", 0.1, spread=0.0), pruning()
    trainer = fit(tmp_path, model, budget, prune, epochs=60)
    final = trainer.validate(model, batches(seed=1), verbose=False)[0]["val/loss"]
    assert final <= 1.1 * budget.reference.dense * 1.02
    assert 0.05 < sparsity(model) == pytest.approx(prune.sparsity)
    assert budget.search.good.levels[0] == pytest.approx(
        math.log1p(-prune.parts[0].requested) / math.log(0.01)
    )
    verdicts = {trial.verdict for trial in budget.history}
    assert {"good", "too costly"} <= verdicts
    printed = capsys.readouterr().out
    assert "Budget: what was tried" in printed
    assert f"sparsity {prune.parts[0].requested:.4f}" in printed


def test_what_fails_is_undone_to_the_last_bit(tmp_path):
    class Snap(Callback):
        """Compares what was kept with what is there after going back."""

        def __init__(self):
            self.kept = None
            self.checked = 0

        def on_validation_end(self, trainer, pl_module):
            if budget._pending.keep:
                self.kept = self.now(trainer, pl_module)
            self.back = budget._pending.restore

        def on_train_batch_start(self, trainer, pl_module, *_):
            if getattr(self, "back", False):
                for mine, theirs in zip(self.now(trainer, pl_module), self.kept, strict=True):
                    assert mine.keys() == theirs.keys()
                    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
                self.checked += 1
                self.back = False

        @staticmethod
        def now(trainer, module):
            optimizer = trainer.optimizers[0]
            moments = {
                f"{index}.{key}": torch.as_tensor(value).clone()
                for index, state in enumerate(optimizer.state.values())
                for key, value in state.items()
            }
            projected_weights = prune.projector.projected_weights
            masks = {
                path: projected.pruned
                for path, projected in projected_weights.items()
                if projected.pruned is not None
            }
            latents = {
                path: projected.values().clone() for path, projected in projected_weights.items()
            }
            weights = {key: value.clone() for key, value in module.state_dict().items()}
            return weights, moments, masks, latents

    torch.manual_seed(0)
    budget, prune, snap = (
        QualityBudget("val/loss", 0.05, spread=0.0, search={"stride": (0.5, 0.1)}),
        pruning(),
        Snap(),
    )
    budget.limits = replace(budget.limits, min_bits=8)  # no move of theirs hides what went back
    quantize = QuantizationAwareTraining(weight_bits=8, activation_bits=None)
    fit(tmp_path, Measured(), budget, prune, quantize, snap)
    assert snap.checked >= 2


def test_a_soft_undo_reopens_what_was_pruned_and_keeps_what_was_trained(tmp_path):
    class Snap(Callback):
        def __init__(self):
            self.kept = self.before = None
            self.checked = 0

        def on_validation_end(self, trainer, pl_module):
            projected_weights = prune.projector.projected_weights
            now = {p: (s.values().clone(), s.pruned) for p, s in projected_weights.items()}
            if budget._pending.keep:
                self.kept = now
            self.before = now if budget._pending.soft else None

        def on_train_batch_start(self, trainer, pl_module, *_):
            if self.before is None:
                return
            for path, projected in prune.projector.projected_weights.items():
                (kept, mask), (values, pruned) = self.kept[path], self.before[path]
                back = torch.ones_like(pruned) if mask is None else ~mask
                back &= pruned
                assert torch.equal(projected.values(), torch.where(back, kept, values))
                assert mask is None or torch.equal(projected.pruned, mask)
            self.before = None
            self.checked += 1

    torch.manual_seed(0)
    prune, snap, model = pruning(), Snap(), Measured()
    budget = QualityBudget("val/loss", 0.05, spread=0.0, search={"undo": "projection"})
    fit(tmp_path, model, budget, prune, snap)
    assert snap.checked >= 2
    assert sparsity(model) == pytest.approx(prune.sparsity)


@pytest.mark.parametrize("scheme", ["entropy", "symmetric", "learned_step", "codebook"])
def test_it_steers_grids_of_each_scheme(tmp_path, scheme):
    torch.manual_seed(0)
    model = Measured()
    quantize = QuantizationAwareTraining(weight_bits=8, activation_bits=None, scheme=scheme)
    budget = QualityBudget("val/loss", 0.5, spread=0.0, search={"stride": (0.4, 0.1)})
    fit(tmp_path, model, budget, quantize)
    level = budget.search.good.levels[0]
    assert level > 0
    grids = compression_state(model).grids
    if scheme == "entropy":
        assert quantize.weights.relative_step == pytest.approx(0.25 * 12**level)
    else:
        assert {grid.bits for grid in grids.values()} == {8 - round(6 * level)}
    for path, parameter in model.named_parameters():
        if path in grids:
            assert torch.equal(grids[path].project(parameter), parameter)


def test_a_gan_under_manual_optimization(tmp_path):
    torch.manual_seed(0)
    model, prune = MeasuredGAN(), pruning()
    budget = QualityBudget(
        "val/distance", 0.3, spread=0.0, search={"patience": 1, "stride": (0.2, 0.02)}
    )
    fit(tmp_path, model, prune, budget, epochs=40)
    # The score is 1 + z^2 for z zeros in all parameters, so the limit is at z = sqrt(0.3).
    zeros = torch.cat([p.flatten() == 0 for p in model.generator.parameters()]).float().mean()
    assert 0.85 * math.sqrt(0.3) < zeros <= math.sqrt(0.3)
    assert all((p != 0).all() for p in model.discriminator.parameters())


@pytest.mark.parametrize("share", [0.12, 0.06])
def test_a_given_size_is_met_at_the_end(tmp_path, share):
    torch.manual_seed(0)
    model = Measured()
    model.encoder = nn.Sequential(nn.Linear(6, 96), nn.ReLU())
    model.decoder = nn.Linear(96, 6)
    dense = predicted_bytes(model)
    fixed = 102 * 4 + 4 * 17 + 160  # biases and headers
    asked = fixed + share * (dense - fixed)
    quantize = QuantizationAwareTraining(weight_bits=8, activation_bits=None, scheme="entropy")
    budget = QualityBudget("val/loss", max_bytes=asked, begin=0.1, end=0.8)
    fit(tmp_path, model, pruning(), quantize, budget, epochs=40)
    assert 0.85 * asked < predicted_bytes(model) <= asked
    assert budget.search.good is not None


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_a_criterion_gathers_before_each_trial(tmp_path, criterion):
    torch.manual_seed(0)
    model, prune = Measured(), pruning(criterion=criterion)
    budget = QualityBudget("val/loss", 0.3, spread=0.0)
    fit(tmp_path, model, budget, prune, epochs=25)
    assert sparsity(model) > 0.05
    assert [trial.size for trial in budget.history if trial.verdict == "good"] == sorted(
        (trial.size for trial in budget.history if trial.verdict == "good"), reverse=True
    )


def test_parts_keep_the_relation_of_their_densities(tmp_path):
    torch.manual_seed(0)
    prune = GradualPruning(final_sparsity={"encoder.*": 0.5, "decoder.*": 0.75})
    fit(tmp_path, Measured(), QualityBudget("val/loss", 1.0, spread=0.0), prune, epochs=20)
    encoder, decoder = (part.requested for part in prune.parts)
    assert decoder > 0.3
    assert 1 - encoder == pytest.approx(math.sqrt(1 - decoder))


def test_layers_share_the_sparsity_by_their_sensitivity(tmp_path):
    def layer(path, rate):
        return LayerScan(path, 48, (0.5, 0.9), (0.1 * rate, 0.5 * rate), (), (), ())

    scan = Sensitivity(
        "loss", 1.0, "lower", [layer("encoder.0.weight", 1.0), layer("decoder.weight", 9.0)]
    )
    path = scan.save(tmp_path / "sensitivity.json")
    torch.manual_seed(0)
    model = Measured()
    budget = QualityBudget("val/loss", 0.3, spread=0.0, limits={"sensitivity": str(path)})
    fit(tmp_path, model, budget, pruning())
    assert sparsity(model, "encoder.*") > sparsity(model, "decoder.*") + 0.2
    narrow = QualityBudget("val/loss", 0.3, limits={"sensitivity": replace(scan, layers=[])})
    with pytest.raises(ValueError, match=r"sensitivities of \['encoder.0.weight'"):
        fit(tmp_path, Measured(), narrow, pruning())


def test_a_guard_holds_what_the_budget_asks(tmp_path):
    class Lost(Measured):
        def training_step(self, batch, index):
            self.log("train/d_loss", 1.0 if self.trainer.current_epoch < 3 else 0.01)
            return super().training_step(batch, index)

    guard = BalanceGuard(warmup=3, smoothing=0.0)
    model = Lost()
    budget = QualityBudget("val/loss", 5.0, begin=0.5)
    fit(tmp_path, model, guard, pruning(), budget, epochs=16)
    assert sparsity(model) == 0


def run_in_two(tmp_path, make, stop):
    """A run saved after some batches and gone on with, beside one that was never stopped."""

    class Saver(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == stop:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    torch.manual_seed(0)
    whole, first, callbacks = make()
    fit(tmp_path, whole, *callbacks, Saver(), epochs=24)
    torch.manual_seed(0)
    resumed, second, callbacks = make()
    trainer = quiet_trainer(tmp_path, *callbacks, max_epochs=24)
    trainer.fit(resumed, batches(), batches(seed=1), ckpt_path=tmp_path / "cut.ckpt")
    return (whole, first), (resumed, second)


@pytest.mark.parametrize(
    ("stop", "place", "undo"), [(3, 0, "all"), (8, 2, "all"), (9, 0, "projection")]
)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, stop, place, undo):
    def make():
        others = [pruning(), QuantizationAwareTraining(weight_bits=8, activation_bits=8)]
        budget = QualityBudget("val/loss", 0.1, spread=0.0, search={"undo": undo})
        others.insert(place, budget)
        return Measured(), budget, others

    whole, resumed = run_in_two(tmp_path, make, stop)
    assert whole[1].history == resumed[1].history
    assert len(whole[1].history) > 3
    state, again = whole[0].state_dict(), resumed[0].state_dict()
    assert all(torch.equal(state[key], again[key]) for key in state)


def test_the_average_goes_back_with_the_model(tmp_path):
    torch.manual_seed(0)
    model, tape = Measured(), Tape()
    budget = QualityBudget("val/loss", 0.05, spread=0.0, search={"stride": (0.5, 0.1)})
    ema = ProjectedEMA(decay=0.8)
    fit(tmp_path, model, pruning(), budget, ema, tape)
    assert any(trial.verdict == "too costly" for trial in budget.history)
    assert sparsity(model) > 0
    with pytest.raises(TargetError, match=r"before ProjectedEMA"):
        fit(tmp_path, Measured(), pruning(), ProjectedEMA(), QualityBudget("val/loss", 0.1))


def test_a_checkpoints_score_is_of_its_weights(tmp_path):
    torch.manual_seed(0)
    saver = ModelCheckpoint(
        tmp_path, filename="{epoch}-{val/loss:.6f}", monitor="val/loss", save_top_k=-1,
        auto_insert_metric_name=False, save_weights_only=True,
    )  # fmt: skip
    budget = QualityBudget("val/loss", 0.1, spread=0.0)
    trainer = fit(tmp_path, Measured(), budget, pruning(), saver, enable_checkpointing=True)
    assert len(budget.history) > 3
    for path, score in saver.best_k_models.items():
        model = Measured()
        model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        again = quiet_trainer(tmp_path).validate(model, batches(seed=1), verbose=False)
        assert again[0]["val/loss"] == pytest.approx(float(score), rel=1e-5)
    assert trainer.current_epoch == 30


def test_a_budget_that_cannot_be_met_is_said(tmp_path):
    model, budget = Measured(), QualityBudget("val/loss", 0.0, reference=1e-9)
    with pytest.warns(UserWarning, match="no model was within the budget"):
        fit(tmp_path, model, pruning(), budget, epochs=6)
    assert sparsity(model) == 0
    with pytest.raises(RuntimeError, match="no model was within the budget"):
        fit(
            tmp_path,
            Measured(),
            pruning(),
            QualityBudget("val/loss", max_bytes=1.0, on_miss="raise"),
            epochs=6,
        )


def test_a_higher_metric_may_be_the_better_one(tmp_path):
    class Elbo(Measured):
        def validation_step(self, batch, _):
            self.log("val/elbo", -(self(batch[0]) - batch[0]).square().mean())

    torch.manual_seed(0)
    budget = QualityBudget("val/elbo", 0.1, mode="max", spread=0.0)
    model = Elbo()
    fit(tmp_path, model, budget, pruning(), epochs=20)
    torch.manual_seed(0)
    twin, same = QualityBudget("val/loss", 0.1, spread=0.0), Measured()
    fit(tmp_path, same, twin, pruning(), epochs=20)
    assert twin.history == budget.history
    assert torch.equal(model.decoder.weight, same.decoder.weight)


def test_a_training_metric_is_read_after_each_epoch(tmp_path):
    torch.manual_seed(0)
    budget, model = QualityBudget("train/loss", 0.5, spread=0.0), Measured()
    fit(tmp_path, model, budget, pruning())
    assert sparsity(model) > 0


def test_a_metric_that_is_not_logged_each_time_is_not_read_twice(tmp_path):
    class Rarely(Measured):
        def validation_step(self, batch, index):
            if self.trainer.current_epoch % 5 == 4:
                super().validation_step(batch, index)

    budget = QualityBudget("val/loss", 0.1, reference=100.0, begin=0.0)
    fit(tmp_path, Rarely(), budget, pruning(), epochs=30)
    assert sum(trial.readings for trial in budget.history) <= 6
    with pytest.raises(ValueError, match="nothing logs monitor='val/lost'; found"):
        fit(tmp_path, Measured(), QualityBudget("val/lost", 0.1), pruning(), epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of max_degradation and max_bytes"),
        ({"max_degradation": 0.1, "max_bytes": 9}, "give one of"),
        ({"max_degradation": -0.1}, "max_degradation=-0.1"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"max_degradation": 0.1, "mode": "up"}, r"mode='up': valid are \['min', 'max'\]"),
        ({"max_degradation": 0.1, "begin": 0.9}, "begin=0.9, end=0.85"),
        ({"max_degradation": 0.1, "search": {"patience": 0}}, "patience=0"),
        ({"max_degradation": 0.1, "spread": -1.0}, "spread=-1.0"),
        ({"max_degradation": 0.1, "search": {"stride": (0.1, 0.2)}}, r"stride=\(0.1, 0.2\)"),
        ({"max_degradation": 0.1, "reference": "best"}, "reference='best'"),
        ({"max_degradation": 0.1, "search": {"undo": "half"}}, r"undo='half': valid are \['all'"),
        ({"max_degradation": 0.1, "on_miss": "shrug"}, "on_miss='shrug'"),
        ({"max_degradation": 0.1, "limits": {"max_sparsity": 1.0}}, "max_sparsity=1.0"),
        ({"max_degradation": 0.1, "limits": {"steps": (2.0, 1.0)}}, r"steps=\(2.0, 1.0\)"),
        ({"max_degradation": 0.1, "limits": {"min_bits": 1}}, "min_bits=1"),
    ],
)
def test_mistakes_are_found_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        QualityBudget("val/loss", **arguments)


def test_what_cannot_be_steered_is_refused(tmp_path):
    with pytest.raises(TargetError, match="nothing to steer"):
        fit(tmp_path, Measured(), QualityBudget("val/loss", 0.1))
    with pytest.raises(TargetError, match="ThresholdPruning"):
        fit(tmp_path, Measured(), QualityBudget("val/loss", 0.1), ThresholdPruning(threshold=0.1))
    prune = GradualPruning(granularity="2:4")
    with pytest.raises(ValueError, match="n:m ends at a fixed sparsity"):
        fit(tmp_path, Measured(), QualityBudget("val/loss", 0.1), prune)
    entropy = QuantizationAwareTraining(
        activation_bits=None, scheme="entropy", entropy=EntropyGrid(target_bits=2.0)
    )
    with pytest.raises(ValueError, match="steered by a target already"):
        fit(tmp_path, Measured(), QualityBudget("val/loss", 0.1), entropy)
    budget = QualityBudget("val/loss", 0.1, reference="dense")
    with pytest.raises(ValueError, match=r"command line.*dense"):
        fit(tmp_path, Measured(), budget, pruning())


def test_a_dense_run_is_compared_at_the_same_step(tmp_path):
    class Curve(Callback):
        def __init__(self):
            self.rows = []

        def on_train_epoch_end(self, trainer, _):
            batch = trainer.fit_loop.total_batch_idx + 1
            self.rows.append((batch, "val/loss", float(trainer.callback_metrics["val/loss"])))

    torch.manual_seed(0)
    curve = Curve()
    fit(tmp_path, Measured(), curve)
    torch.manual_seed(0)
    budget = QualityBudget(
        "val/loss", 1e-4, reference="dense", spread=0.0, begin=0.05, search={"stride": (0.2, 0.1)}
    )
    budget.take_dense([*curve.rows, (9, "val/other", 5.0)])
    model = Measured()
    with pytest.warns(UserWarning, match="worse than the dense model"):
        fit(tmp_path, model, budget, pruning())
    # Each trial fails. What is left trains on from where it was as the dense model did.
    good = [trial for trial in budget.history if trial.verdict != "too costly"]
    assert 0 < len(good) < len(budget.history)
    assert [trial.cost for trial in good] == pytest.approx([0.0] * len(good), abs=1e-6)
    assert all(trial.levels == (0.0,) for trial in good)
    with pytest.raises(ValueError, match=r"logged no 'val/loss': \['val/other'\]"):
        budget.take_dense([(9, "val/other", 5.0)])


def test_weights_that_are_quantized_after_training_count_their_bits(tmp_path):
    model, later = Measured(), PostTrainingQuantization(weight_bits=8, per_channel=False)
    trainer = quiet_trainer(tmp_path, later)
    later.setup(trainer, model, "fit")
    eight = bytes_now(trainer, model)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    trainer.callbacks.remove(later)
    assert bytes_now(trainer, model) == pytest.approx(eight + 3 * weights)
