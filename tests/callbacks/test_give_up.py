"""GiveUp prunes runs below the limit, and no others."""

import pytest
from tiny import TinyAutoencoder, batches, quiet_trainer

from lightning_compress.callbacks import GiveUp, HopelessRunError


class Scripted(TinyAutoencoder):
    """Logs a given curve, one value an epoch."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def training_step(self, batch, index):
        if (value := self.values[self.current_epoch]) is not None:
            self.log("val/score", value, on_step=False, on_epoch=True)
        return super().training_step(batch, index)


def fit(tmp_path, values, **options):
    steps = len(batches())
    rows = [(steps * (epoch + 1), "val/score", 10.0) for epoch in range(len(values))]
    give_up = GiveUp(rows, **{"monitor": "val/score", "mode": "min", "max_loss": 0.5, **options})
    trainer = quiet_trainer(tmp_path, give_up, max_epochs=len(values))
    trainer.fit(Scripted(values), batches())


def test_a_run_far_below_its_dense_twin_is_ended_with_both_values(tmp_path):
    words = r"val/score is 17 after epoch 3 of 4, 70% worse .* more than 50%"
    with pytest.raises(HopelessRunError, match=words):
        fit(tmp_path, [9.0, 16.0, 17.0, 9.0])


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ([14.9, 14.9, 14.8, 14.7], {}),  # worse, but not beyond hope
        ([99.0, 98.0, 9.0, 9.0], {"after": 0.75}),  # bad only before it counts
        ([9.0, 99.0, 9.0, 99.0], {}),  # never twice in a row
        ([9.0, 99.0, None, None], {}),  # one bad value, seen three times
        ([1.0, 1.5, 1.2, 1.3], {"mode": "min"}),  # better is never hopeless
        ([99.0, 98.0, 97.0, 96.0], {"mode": "max"}),
    ],
)
def test_everything_else_goes_on(tmp_path, values, options):
    fit(tmp_path, values, **options)


def test_without_the_dense_curve_nothing_is_judged(tmp_path):
    fit(tmp_path, [99.0, 98.0, 97.0, 96.0], monitor="val/other")


@pytest.mark.parametrize(
    "options", [{"mode": "up"}, {"max_loss": 0.0}, {"after": 2.0}, {"patience": 0}]
)
def test_bad_arguments_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        GiveUp([], **{"monitor": "a", "mode": "min", "max_loss": 0.5, **options})
