"""Weights of layers that no forward pass calls: they take no part in a global comparison."""

import pytest
import torch
from tiny import TinyAutoencoder, batches, quiet_trainer
from torch import nn

from lightning_compress import GradualPruning, QuantizationAwareTraining, compression_state


class WithSpare(TinyAutoencoder):
    """A head that nothing calls, whose small weights would all be pruned first."""

    def __init__(self, late=False):
        super().__init__()
        self.deployed, self.late = ("",), late
        self.spare = nn.Linear(6, 16, bias=False)
        nn.init.constant_(self.spare.weight, 1e-6)

    def forward(self, x):
        out = super().forward(x)
        return out + self.spare(x).mean() if self.late and self.current_epoch > 1 else out


def fit(tmp_path, model, **arguments):
    torch.manual_seed(0)
    pruning = GradualPruning(final_sparsity=0.5, on_miss="raise", **arguments)
    trainer = quiet_trainer(tmp_path, pruning, max_epochs=4)
    trainer.fit(model, batches())
    return pruning, trainer


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_they_are_left_out_with_a_reason(tmp_path, criterion):
    model = WithSpare()
    with pytest.warns(UserWarning, match=r"leaves \['spare.weight'\] as they are: no forward"):
        pruning, trainer = fit(tmp_path, model, criterion=criterion)
    own = [model.encoder[0].weight, model.decoder.weight]
    assert sum(int((one == 0).sum()) for one in own) == sum(one.numel() for one in own) // 2
    assert not (model.spare.weight == 0).any()
    (row,) = (row for row in pruning.coverage if row.path == "spare.weight")
    assert not row.selected
    assert "no forward pass calls" in row.reason
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = GradualPruning(final_sparsity=0.5, criterion=criterion)
    with pytest.warns(UserWarning, match="leaves"):
        quiet_trainer(tmp_path, again, max_epochs=5).fit(
            resumed := WithSpare(), batches(), ckpt_path=tmp_path / "a.ckpt"
        )
    assert again.paths() == pruning.paths() == ["encoder.0.weight", "decoder.weight"]
    assert not (resumed.spare.weight == 0).any()


def test_what_is_called_later_is_a_target_again(tmp_path):
    model = WithSpare(late=True)
    with pytest.warns(UserWarning, match="leaves"):
        pruning, _ = fit(tmp_path, model, end=0.9)
    assert "spare.weight" in pruning.paths()
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("late", [False, True])
def test_another_callback_keeps_them(tmp_path, late):
    torch.manual_seed(0)
    model = WithSpare(late=late)
    pruning = GradualPruning(final_sparsity=0.5, on_miss="raise", end=0.9)
    grids = QuantizationAwareTraining(weight_bits=4, activation_bits=None)
    with pytest.warns(UserWarning, match="leaves"):
        quiet_trainer(tmp_path, pruning, grids, max_epochs=4).fit(model, batches())
    assert ("spare.weight" in pruning.paths()) == late
    assert "spare.weight" in grids.paths()
    weight = model.spare.weight.detach()
    grid = compression_state(model, masks=False).grids["spare.weight"]
    assert torch.equal(grid.project(weight), weight)
