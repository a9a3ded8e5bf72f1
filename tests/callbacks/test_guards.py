"""Guards: scripted metrics hold the clock of pruning, and only as long as the run allows."""

import logging

import pytest
from lightning.pytorch import Callback
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer

from lightning_compress import (
    BalanceGuard,
    GradualPruning,
    Linear,
    PosteriorGuard,
    ThresholdPruning,
)


class Scripted(TinyGAN):
    """Logs a script, one value a batch."""

    def __init__(self, script, name="train/d_loss"):
        super().__init__()
        self.script, self.name = script, name

    def training_step(self, batch, index):
        super().training_step(batch, index)
        self.log(self.name, float(self.script[8 * self.current_epoch + index]))


class Tape(Callback):
    """Position and sparsity after each batch, and what was logged."""

    def __init__(self, pruning):
        self.pruning, self.rows, self.logged = pruning, [], []

    def on_train_batch_end(self, trainer, *_):
        self.rows.append((self.pruning.events.position, self.pruning.sparsity))
        self.logged.append(float(trainer.callback_metrics.get("guard/paused", -1)))


def run(tmp_path, script, guard, epochs=3, pruning=None, **arguments):
    schedule = Linear(final_sparsity=0.8, begin=0, end=12)
    pruning = pruning or GradualPruning(schedule=schedule, frequency=1)
    tape = Tape(pruning)
    model = Scripted(script, **arguments)
    quiet_trainer(tmp_path, guard, pruning, tape, max_epochs=epochs).fit(model, batches())
    return tape


def test_a_winning_discriminator_stops_the_clock(tmp_path, caplog):
    script = [1.0] * 5 + [0.2] * 6 + [1.0] * 13
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        tape = run(tmp_path, script, BalanceGuard(warmup=3, smoothing=0.0))
    positions = [position for position, _ in tape.rows]
    # Batch 5 is the first that the discriminator wins: the clock stands from the step after it.
    assert positions == [*range(1, 7), *[6] * 6, *range(7, 19)]
    for position, sparsity in tape.rows:
        assert sparsity == round(72 * 0.8 * min(position, 12) / 12) / 72
    assert tape.logged[-1] == 0
    text = caplog.text
    assert "train/d_loss is at 0.2, its average at 1: pruning waits" in text
    assert "GradualPruning[prune] waits for BalanceGuard[guard] at sparsity" in text
    assert "GradualPruning[prune] goes on at sparsity" in text


def test_the_end_is_never_shifted_beyond_the_run(tmp_path):
    script = [1.0] * 4 + [0.1] * 20
    guard = BalanceGuard(warmup=3, smoothing=0.0)
    with pytest.warns(UserWarning, match="hold the schedule"):
        tape = run(tmp_path, script, guard)
    assert tape.rows[-1] == (12, round(0.8 * 72) / 72)
    assert guard.paused


def test_fractions_of_the_run_wait_too(tmp_path):
    script = [1.0] * 5 + [0.2] * 6 + [1.0] * 13
    pruning = GradualPruning(final_sparsity=0.8, end=0.5)
    tape = run(tmp_path, script, BalanceGuard(warmup=3, smoothing=0.0), pruning=pruning)
    positions = [position for position, _ in tape.rows]
    assert positions[5] == pytest.approx(6 / 24)
    assert positions[6:12] == pytest.approx([6 / 24] * 6)
    assert positions[-1] == pytest.approx(18 / 24)
    assert tape.rows[-1][1] == round(0.8 * 72) / 72


def test_a_collapsing_posterior_stops_thresholds_too(tmp_path):
    script = [20.0] * 4 + [5.0] * 4 + [20.0] * 16
    guard = PosteriorGuard(factor=0.6, warmup=2, smoothing=0.0)
    pruning = ThresholdPruning(threshold=0.3, begin=0, end=12, frequency=1)
    tape = run(tmp_path, script, guard, name="train/kl", pruning=pruning)
    assert [position for position, _ in tape.rows][4:9] == [5, 5, 5, 5, 5]


@pytest.mark.parametrize(
    ("measure", "usual", "winning"),
    [("loss", 0.7, 0.2), ("accuracy", 0.7, 0.95), ("distance", 2.0, 5.0)],
)
def test_each_measure_knows_who_wins(measure, usual, winning):
    guard = BalanceGuard(measure=measure, smoothing=0.0, warmup=2)
    for _ in range(5):
        guard.read(usual)
        assert not guard.paused
    guard.read(winning)
    assert guard.paused
    kept = guard.reference
    guard.read(winning)
    assert guard.reference == kept  # waiting does not make it the new normal
    guard.read(usual)
    assert not guard.paused


def test_one_odd_reading_is_smoothed_and_the_warmup_is_silent():
    guard = BalanceGuard(warmup=10, smoothing=0.9)
    for value in [1.0, 0.0, *[1.0] * 90]:
        guard.read(value)
        assert not guard.paused
    guard.read(0.0)
    assert not guard.paused
    for _ in range(12):
        guard.read(0.0)
    assert guard.paused


def test_a_validation_metric_is_read_after_validation(tmp_path):
    guard = PosteriorGuard(monitor="val/zeros", warmup=1)
    trainer = quiet_trainer(tmp_path, guard, GradualPruning(final_sparsity=0.5), max_epochs=3)
    trainer.fit(TinyAutoencoder(), batches(), batches(count=1))
    assert guard.readings == 3  # not in the sanity check


def test_a_metric_that_nobody_logs_is_named(tmp_path):
    for guard in (BalanceGuard(), PosteriorGuard(monitor="val/nothing")):
        trainer = quiet_trainer(tmp_path, guard)
        with pytest.raises(ValueError, match=r"nothing logs monitor='.*'; found \['guard/paused'"):
            trainer.fit(TinyAutoencoder(), batches())


def test_state_returns():
    one, other = BalanceGuard(warmup=2), BalanceGuard(warmup=2)
    for value in (1.0, 0.8, 0.1):
        one.read(value)
    other.load_state_dict(one.state_dict())
    for guard in (one, other):
        guard.read(0.05)
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 1.0}, r"factor=1\.0"),
        ({"decay": 1.0}, r"decay=1\.0"),
        ({"smoothing": -1}, "smoothing=-1"),
        ({"warmup": 0}, "warmup=0"),
        ({"measure": "mood"}, "measure='mood': valid are"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BalanceGuard(**arguments)
