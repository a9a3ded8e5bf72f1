"""Weights that are no numbers: an error at the next event, whatever the criterion looks at."""

import pytest
import torch
from lightning.pytorch import Callback
from tiny import TinyAutoencoder, batches, quiet_trainer

from lightning_compress import GradualPruning, ThresholdPruning


class Break(Callback):
    def __init__(self, value):
        self.value = value

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 3:
            module.decoder.weight[0, 0] = self.value


CRITERIA = ["magnitude", "random", "taylor", "fisher", "movement", "activation", "obs"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_broken_weights_end_pruning_with_their_name(tmp_path, criterion, value):
    pruning = GradualPruning(final_sparsity=0.8, criterion=criterion, end=1.0)
    trainer = quiet_trainer(tmp_path, pruning, Break(value), max_epochs=3)
    with pytest.raises(FloatingPointError, match=r"decoder\.weight holds weights .* diverged"):
        trainer.fit(TinyAutoencoder("SGD"), batches())


def test_a_threshold_does_not_pass_over_them(tmp_path):
    pruning = ThresholdPruning(threshold=0.1, end=1.0)
    trainer = quiet_trainer(tmp_path, pruning, Break(float("nan")), max_epochs=3)
    with pytest.raises(FloatingPointError, match=r"decoder\.weight"):
        trainer.fit(TinyAutoencoder("SGD"), batches())
