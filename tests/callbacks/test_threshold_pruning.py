"""ThresholdPruning: masks are what the definition says, after each event of a real run."""

import pytest
import torch
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer

from lightning_compress import Constant, Cosine, Linear, ThresholdPruning, sparsity


class Checked(ThresholdPruning):
    """Compares each event with the definition."""

    seen = 0

    def event(self, trainer):
        values = [projected.values().clone() for projected in self.projected_weights]
        closed = [projected.pruned for projected in self.projected_weights]
        super().event(trainer)
        for projected, value, shut in zip(self.projected_weights, values, closed, strict=True):
            threshold = self.threshold_at(self.events.position)
            if self.relative:
                threshold *= value.std(correction=0).item()
            mask = value.abs() >= threshold
            if shut is not None and not self.dense_gradient:
                mask &= ~shut
            assert torch.equal(projected.parameter, value * mask)
        self.seen += 1


@pytest.mark.parametrize("make", [TinyAutoencoder, TinyGAN])
@pytest.mark.parametrize("relative", [None, "std"])
@pytest.mark.parametrize("regrow", [None, "straight_through"])
def test_masks_follow_the_definition_and_hold(tmp_path, make, relative, regrow):
    threshold = 0.2 if relative is None else 0.7
    pruning = Checked(
        threshold=threshold, relative=relative, regrow=regrow, begin=2, end=14, frequency=3
    )
    model = make()
    trainer = quiet_trainer(tmp_path, pruning)
    trainer.fit(model, batches())
    assert pruning.seen == 5  # 2, 5, 8, 11 and 14
    assert 0.1 < pruning.sparsity < 0.9
    assert sparsity(model) == pytest.approx(pruning.sparsity)
    assert trainer.callback_metrics["threshold/sparsity"] == pytest.approx(pruning.sparsity)


def test_schedules_lend_their_shape_and_callables_speak_for_themselves():
    cosine = ThresholdPruning(threshold=3.0, schedule=Cosine(begin=0, end=10))
    assert cosine.threshold_at(5) == pytest.approx(1.5)
    assert cosine.threshold_at(10) == pytest.approx(3.0)
    assert (cosine.events.begin, cosine.events.end) == (0, 10)
    one_shot = ThresholdPruning(threshold=0.5, schedule=Constant(begin=0.2))
    assert one_shot.threshold_at(0.2) == pytest.approx(0.5)
    own = ThresholdPruning(threshold=1.0, schedule=lambda position: position**2)
    assert own.threshold_at(0.5) == 0.25
    line = ThresholdPruning(threshold=1.0, begin=0, end=10)
    assert [line.threshold_at(step) for step in (0, 5, 99)] == pytest.approx([0, 0.5, 1.0])
    assert isinstance(line.schedule, Linear)


def test_a_floor_keeps_every_layer_alive(tmp_path):
    model = TinyAutoencoder()
    pruning = ThresholdPruning(threshold=50.0, min_keep=0.1)
    quiet_trainer(tmp_path, pruning).fit(model, batches())
    for layer in (model.encoder[0], model.decoder):
        assert int((layer.weight != 0).sum()) == 5


def test_a_run_that_ends_early_is_told(tmp_path):
    pruning = ThresholdPruning(threshold=0.5, begin=0, end=900)
    with pytest.warns(UserWarning, match=r"ended at threshold .* instead of 0\.5"):
        quiet_trainer(tmp_path, pruning).fit(TinyAutoencoder(), batches())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0}, "threshold=0 must be above 0"),
        ({"relative": "mean"}, "relative='mean'"),
        ({"regrow": "gradient"}, "regrow='gradient'"),
        ({"min_keep": 2}, "min_keep=2"),
        ({"schedule": 3}, "schedule=3"),
        ({"frequency": 0}, "frequency=0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ThresholdPruning(**{"threshold": 0.5, **arguments})


def test_a_schedule_that_gives_no_threshold_is_named(tmp_path):
    with pytest.raises(ValueError, match="a threshold is >= 0"):
        ThresholdPruning(threshold=1.0, schedule=lambda _: -1.0).threshold_at(0.5)
