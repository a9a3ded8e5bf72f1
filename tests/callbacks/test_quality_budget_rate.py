"""QualityBudget beside rate-distortion grids: it moves lambda, whose bytes follow later."""

import itertools

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from tiny import TinyAutoencoder, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    QualityBudget,
    QuantizationAwareTraining,
    load_compressed,
    save_compressed,
)
from lightning_compress.budget.reference import predicted_bytes

DENSE = 3.0  # squared error that the autoencoder comes to without any compression, about
EPOCHS = 40


class Digits(TinyAutoencoder):
    """Eight numbers for an image of 64 pixels."""

    def __init__(self):
        super().__init__(lr=5e-3)
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))

    def training_step(self, batch, _):
        return (self(batch[0]) - batch[0]).square().sum(1).mean()

    def validation_step(self, batch, _):
        self.log("val/loss", (self(batch[0]) - batch[0]).square().sum(1).mean())


@pytest.fixture(scope="module")
def loaders():
    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    training, validation = TensorDataset(images[:512]), TensorDataset(images[512:768])
    return DataLoader(training, batch_size=64), DataLoader(validation, batch_size=256)


class StopAfter(Callback):
    def on_train_epoch_start(self, trainer, _):
        if trainer.current_epoch == 17:
            raise ConnectionError("preempted")


class Tape(Callback):
    """After each validation: whether bytes have settled, the budget has decided, and lambda."""

    def __init__(self, budget):
        self.budget, self.rows, self._tried = budget, [], 0

    def on_validation_end(self, trainer, pl_module):
        (quantize,) = (one for one in trainer.callbacks if hasattr(one, "rate_settled"))
        tried, self._tried = self._tried, len(self.budget.history)
        self.rows.append((quantize.rate_settled, self._tried > tried, quantize.lmbda))


def run(folder, loaders, budget, *others, ckpt_path=None):
    torch.manual_seed(0)
    model = Digits()
    quantize = QuantizationAwareTraining(
        activation_bits=None, scheme="rate_distortion", lmbda=1.0, lr=0.03
    )
    trainer = quiet_trainer(
        folder, budget, quantize, *others, max_epochs=EPOCHS, enable_checkpointing=bool(others)
    )
    trainer.fit(model, *loaders, ckpt_path=ckpt_path)
    return model, quantize


@pytest.mark.parametrize("asked", [2600, 1600])
def test_the_file_fits_a_given_size(tmp_path, loaders, asked):
    budget = QualityBudget("val/loss", max_bytes=asked, begin=0.1, end=0.8)
    model, quantize = run(tmp_path, loaders, budget)
    assert quantize.frozen
    info = save_compressed(model, tmp_path / "model.lcz")
    assert 0.8 * asked < info.bytes <= asked
    assert 0.01 < quantize.lmbda < 100
    fresh = load_compressed(tmp_path / "model.lcz", Digits())
    assert predicted_bytes(fresh) == pytest.approx(predicted_bytes(model))


def test_lambda_rises_while_quality_allows_and_goes_back(tmp_path, loaders):
    budget = QualityBudget("val/loss", 0.3, reference=DENSE, spread=0.0, begin=0.1)
    tape = Tape(budget)
    model, quantize = run(tmp_path, loaders, budget, tape)
    found = quiet_trainer(tmp_path).validate(model, loaders[1], verbose=False)[0]["val/loss"]
    assert found <= 1.3 * DENSE * 1.01
    levels = [trial.levels[0] for trial in budget.history]
    failed = [trial.levels[0] for trial in budget.history if trial.verdict == "too costly"]
    assert levels[:3] == pytest.approx([0.0, 0.2, 0.4])
    assert failed
    assert quantize.lmbda == pytest.approx(0.01 * 1e4 ** budget.search.good.levels[0])
    assert quantize.lmbda < 0.01 * 1e4 ** max(failed)
    good = [trial.size for trial in budget.history if trial.verdict == "good"]
    assert good[-1] < 0.7 * good[0]
    # Bytes follow lambda later: the first reading after a move comes too early for a verdict.
    assert all(settled for settled, decided, _ in tape.rows if decided)
    rows = tape.rows[: round(0.85 * EPOCHS)]  # later, frozen grids count as settled
    moves = [now[0] for before, now in itertools.pairwise(rows) if now[2] != before[2]]
    assert len(moves) >= 3
    assert not any(moves)


def test_a_resumed_search_is_the_same_bit_for_bit(tmp_path, loaders):
    def budget():
        return QualityBudget("val/loss", 0.5, reference=DENSE, spread=0.0, begin=0.1)

    def saver(name):
        return ModelCheckpoint(tmp_path / name, save_last=True)

    one, other = budget(), budget()
    whole, _ = run(tmp_path, loaders, one, saver("whole"))
    with pytest.raises(ConnectionError):
        run(tmp_path, loaders, budget(), saver("parts"), StopAfter())
    resumed, _ = run(
        tmp_path, loaders, other, saver("parts"), ckpt_path=tmp_path / "parts" / "last.ckpt"
    )
    assert one.history == other.history
    assert len(one.history) > 3
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
