"""GradualPruning under Lightning: exact sparsity, two optimizers, resume, and honest ends."""

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer

from lightning_compress import (
    Constant,
    GradualPruning,
    Linear,
    Polynomial,
    Projector,
    TargetError,
    sparsity,
)


class Watch(Callback):
    """Records the zeros of the targets right after every step of every optimizer."""

    def __init__(self, pruning):
        self.pruning, self.zeros, self.losses = pruning, [], []

    def on_train_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.zeros.append(self.count()))

    def count(self):
        projected_weights = self.pruning.projected_weights
        return sum(int((projected.parameter == 0).sum()) for projected in projected_weights)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop", "LBFGS"])
def test_final_sparsity_is_absolute_and_exact(tmp_path, scope, optimizer):
    model = TinyAutoencoder(optimizer, lr=0.001)
    pruning = GradualPruning(final_sparsity=0.8, scope=scope)
    quiet_trainer(tmp_path, pruning).fit(model, batches())
    zeros = [int((layer.weight == 0).sum()) for layer in (model.encoder[0], model.decoder)]
    if scope == "global":
        assert sum(zeros) == round(0.8 * 96)
    else:
        assert zeros == [round(0.8 * 48)] * 2
    assert sparsity(model) == pytest.approx(sum(zeros) / 96)
    assert not (model.encoder[1].bias == 0).all()  # trained from 0, and never pruned


def test_masks_follow_the_schedule_and_hold_after_every_step(tmp_path):
    model, schedule = TinyAutoencoder(), Linear(final_sparsity=0.5, begin=0, end=10)
    pruning = GradualPruning(schedule=schedule, frequency=1)
    watch = Watch(pruning)
    quiet_trainer(tmp_path, pruning, watch, max_epochs=2).fit(model, batches())
    assert watch.zeros == [round(96 * schedule(step)) for step in range(1, 17)]


def test_fractions_reach_the_end_of_the_run(tmp_path):
    pruning = GradualPruning(schedule=Polynomial(final_sparsity=0.75, begin=0.25, end=1.0))
    watch = Watch(pruning)
    quiet_trainer(tmp_path, pruning, watch).fit(TinyAutoencoder(), batches())
    assert watch.zeros[2] == 0  # 3 of 16 batches
    assert watch.zeros[-1] == 72
    assert watch.zeros == sorted(watch.zeros)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("critic_steps", [1, 3])
def test_a_gan_prunes_by_the_generators_own_clock(tmp_path, raw, critic_steps):
    model = TinyGAN(critic_steps, raw)
    pruning = GradualPruning(schedule=Linear(final_sparsity=0.9, begin=0, end=12), frequency=4)
    watch = Watch(pruning)
    quiet_trainer(tmp_path, pruning, watch).fit(model, batches())
    assert pruning.projector.steps == [16, 16 * critic_steps]
    total = sum(projected.target.numel for projected in pruning.projected_weights)
    by_generator_step = watch.zeros[critic_steps :: critic_steps + 1]
    expected = [0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12, 12]
    assert by_generator_step == [round(total * 0.9 * step / 12) for step in expected]
    assert (model.discriminator[0].weight != 0).all()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_accumulation_precision_and_clipping(tmp_path, accumulate, precision):
    model = TinyAutoencoder()
    pruning = GradualPruning(final_sparsity=0.6)
    quiet_trainer(
        tmp_path,
        pruning,
        precision=precision,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
    ).fit(model, batches())
    assert sparsity(model) == pytest.approx(round(0.6 * 96) / 96)
    assert pruning.projector.steps == [16 if accumulate == 1 else 6]


def test_validation_and_checkpoints_see_what_is_shipped(tmp_path):
    model = TinyAutoencoder()
    checkpoint = ModelCheckpoint(
        tmp_path,
        filename="{epoch}-{val/zeros:.4f}",
        save_top_k=-1,
        monitor="val/zeros",
        auto_insert_metric_name=False,
    )
    pruning = GradualPruning(final_sparsity=0.8, scope="layer", end=1.0)
    trainer = quiet_trainer(
        tmp_path, pruning, checkpoint, enable_checkpointing=True, num_sanity_val_steps=0
    )
    trainer.fit(model, batches(), batches(count=1))
    for path, recorded in checkpoint.best_k_models.items():
        weight = torch.load(path, weights_only=True)["state_dict"]["decoder.weight"]
        assert (weight == 0).float().mean() == pytest.approx(recorded.item())


class StopAfter(Callback):
    """Ends a run at an epoch as a crash would: nothing else is told."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise ConnectionError("preempted")


@pytest.mark.parametrize("make", [TinyAutoencoder, TinyGAN])
@pytest.mark.parametrize("frequency", [None, 3])
@pytest.mark.parametrize("first", ["pruning", "checkpoint"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, make, frequency, first):
    def run(folder, *extra, ckpt_path=None):
        seed_everything(7, verbose=False)
        model = make()
        pruning = GradualPruning(final_sparsity=0.8, frequency=frequency, end=0.9)
        saver = ModelCheckpoint(folder, save_last=True, every_n_epochs=1)
        ordered = [pruning, saver] if first == "pruning" else [saver, pruning]
        trainer = quiet_trainer(folder, *ordered, *extra, max_epochs=4, enable_checkpointing=True)
        trainer.fit(model, batches(), ckpt_path=ckpt_path)
        return model, pruning

    whole, _ = run(tmp_path / "whole")
    with pytest.raises(ConnectionError):
        run(tmp_path / "parts", StopAfter(2))
    resumed, pruning = run(tmp_path / "parts", ckpt_path=tmp_path / "parts" / "last.ckpt")
    assert pruning.projector.steps[0] == 32
    for (name, one), other in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert 0.7 < sparsity(resumed) < 0.9


def test_a_checkpoint_loads_into_the_plain_model(tmp_path):
    model = TinyAutoencoder()
    trainer = quiet_trainer(tmp_path, GradualPruning(final_sparsity=0.5))
    trainer.fit(model, batches())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    plain = TinyAutoencoder.load_from_checkpoint(tmp_path / "model.ckpt", strict=True)
    x = torch.randn(3, 6)
    assert torch.equal(plain.eval()(x), model.eval()(x))
    assert Projector.find(model) is None


def test_resuming_without_the_callback_tells_the_user(tmp_path):
    trainer = quiet_trainer(tmp_path, GradualPruning(final_sparsity=0.5))
    trainer.fit(TinyAutoencoder(), batches())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.warns(UserWarning, match=r"GradualPruning\[prune\]"):
        quiet_trainer(tmp_path, max_epochs=3).fit(
            TinyAutoencoder(), batches(), ckpt_path=tmp_path / "model.ckpt"
        )


def test_validate_with_a_checkpoint_leaves_a_later_fit_alone(tmp_path):
    first = GradualPruning(final_sparsity=0.5)
    trainer = quiet_trainer(tmp_path, first)
    trainer.fit(TinyAutoencoder(), batches())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    model, pruning = (
        TinyAutoencoder(),
        GradualPruning(final_sparsity=0.5, begin=90, end=99, on_miss="warn"),
    )
    trainer = quiet_trainer(tmp_path, pruning)
    trainer.validate(model, batches(), ckpt_path=tmp_path / "model.ckpt", verbose=False)
    fresh = TinyAutoencoder()
    with pytest.warns(UserWarning, match="ended at sparsity"):
        trainer.fit(fresh, batches())
    assert sparsity(fresh) == 0.0


def test_fit_test_fit_goes_on_with_the_same_masks(tmp_path):
    model = TinyAutoencoder()
    pruning = GradualPruning(final_sparsity=0.8)
    quiet_trainer(tmp_path, pruning).fit(model, batches())
    before = model.decoder.weight.detach() == 0
    trainer = quiet_trainer(tmp_path, pruning)
    trainer.validate(model, batches(), verbose=False)
    trainer.fit(model, batches())
    assert torch.equal(model.decoder.weight == 0, before)
    assert sparsity(model) == pytest.approx(round(0.8 * 96) / 96)


def test_two_callbacks_prune_two_parts(tmp_path):
    model = TinyAutoencoder()
    callbacks = [
        GradualPruning(final_sparsity=0.5, include=["encoder.*"], name="encoder"),
        GradualPruning(final_sparsity=0.75, include=["decoder.*"], name="decoder"),
    ]
    quiet_trainer(tmp_path, *callbacks).fit(model, batches())
    assert sparsity(model, ["encoder.*"]) == 0.5
    assert sparsity(model, ["decoder.*"]) == 0.75


def test_two_callbacks_on_one_weight_are_refused(tmp_path):
    callbacks = [GradualPruning(name="one"), GradualPruning(include=["decoder.*"], name="two")]
    with pytest.raises(
        TargetError, match=r"decoder.weight is pruned by .*\[one\] and by .*\[two\]"
    ):
        quiet_trainer(tmp_path, *callbacks).fit(TinyAutoencoder(), batches())


def test_sparsity_is_logged(tmp_path):
    trainer = quiet_trainer(tmp_path, GradualPruning(final_sparsity=0.5))
    trainer.fit(TinyAutoencoder(), batches())
    assert trainer.callback_metrics["prune/sparsity"] == pytest.approx(0.5)


@pytest.mark.parametrize("on_miss", ["warn", "raise"])
def test_a_missed_target_is_told(tmp_path, on_miss):
    trainer = quiet_trainer(tmp_path, GradualPruning(end=500, on_miss=on_miss))
    if on_miss == "raise":
        with pytest.raises(RuntimeError, match=r"instead of 0\.9"):
            trainer.fit(TinyAutoencoder(), batches())
    else:
        with pytest.warns(UserWarning, match=r"instead of 0\.9"):
            trainer.fit(TinyAutoencoder(), batches())


@pytest.mark.parametrize("averaging", [WeightAveraging, StochasticWeightAveraging])
def test_plain_averaging_is_refused_with_the_hint(tmp_path, averaging):
    arguments = {"swa_lrs": 0.1} if averaging is StochasticWeightAveraging else {}
    trainer = quiet_trainer(tmp_path, GradualPruning(), averaging(**arguments))
    with pytest.raises(TargetError, match=f"{averaging.__name__}.*ProjectedEMA"):
        trainer.fit(TinyAutoencoder(), batches())


def test_mistakes_are_found_before_training(tmp_path):
    with pytest.raises(TargetError, match=r"'decodr\.\*' matches no parameter"):
        quiet_trainer(tmp_path, GradualPruning(include=["decodr.*"])).fit(
            TinyAutoencoder(), batches()
        )
    with pytest.raises(ValueError, match="the run has no end"):
        quiet_trainer(tmp_path, GradualPruning(), max_epochs=-1).fit(TinyAutoencoder(), batches())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final_sparsity": 1.0}, r"final_sparsity=1\.0"),
        ({"begin": 0.8, "end": 0.2}, r"begin=0\.8 must be smaller"),
        ({"criterion": "magic"}, "criterion='magic': valid are"),
        ({"scope": "village"}, "scope='village': valid are"),
        ({"granularity": "dust"}, "granularity='dust': valid are"),
        ({"on_miss": "cry"}, "on_miss='cry'"),
        ({"frequency": 0}, "frequency=0"),
        ({"schedule": "cubic"}, "schedule='cubic'"),
        ({"schedule": Constant(final_sparsity=0.5), "end": 0.9}, r"brings its own \['end'\]"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradualPruning(**arguments)


def test_a_callable_schedule_is_checked_when_it_speaks(tmp_path):
    wild = GradualPruning(schedule=lambda position: 2 * position, end=1.0)
    with pytest.raises(ValueError, match="the schedule gave"):
        quiet_trainer(tmp_path, wild).fit(TinyAutoencoder(), batches())
