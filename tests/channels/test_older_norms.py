"""Models under the older `torch.nn.utils.weight_norm` and `spectral_norm`: vocoders and codecs."""

import copy
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils import spectral_norm

from lightning_compress import (
    ChannelPruning,
    EMATeacher,
    KnowledgeDistillation,
    ProjectedEMA,
    copy_module,
    rebuild_channels,
)
from tests.helpers.tiny import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated")


def weight_norm(layer, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer, **arguments)


class Vocoder(LightningModule):
    def __init__(self, norm):
        super().__init__()
        self.net = nn.Sequential(
            norm(nn.Conv1d(6, 16, 3, padding=1)),
            nn.LeakyReLU(0.1),
            norm(nn.ConvTranspose1d(16, 16, 4, 2, 1)),
            nn.LeakyReLU(0.1),
            norm(nn.Conv1d(16, 6, 4, 2, 1)),
        )
        self.example_input_array = torch.randn(2, 6, 8)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return (self(batch) - batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(16, 6, 8), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


NORMS = {"weight": weight_norm, "axis": partial(weight_norm, dim=1), "spectral": spectral_norm}


@pytest.mark.parametrize("norm", NORMS)
def test_channels_go_beside_averages_and_a_teacher(norm, tmp_path):
    """Masked equals removed (else the run stops), keys stay, and a fresh model takes the file."""
    model = Vocoder(NORMS[norm])
    keys = list(model.state_dict())
    model(model.example_input_array).sum().backward()  # it was run: copies are refused by torch
    trainer = quiet_trainer(
        tmp_path,
        ChannelPruning(final_sparsity=0.5, round_to=1, fade=1, on_miss="raise"),
        ProjectedEMA(decay=0.9),
        KnowledgeDistillation(EMATeacher()),
        max_epochs=4,
    )
    trainer.fit(model)
    assert list(model.state_dict()) == keys
    assert model.net[0].out_channels + model.net[2].out_channels == 16
    fresh = Vocoder(NORMS[norm])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    rebuild_channels(fresh, saved)
    fresh.load_state_dict(saved["state_dict"])
    x = model.example_input_array
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x))


@pytest.mark.parametrize("norm", NORMS)
def test_a_model_that_was_run_can_be_copied_to_be_a_teacher(norm, tmp_path):
    model = Vocoder(NORMS[norm])
    model(model.example_input_array).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    before = model.net[0].weight
    teacher = copy_module(model)
    assert model.net[0].weight is before
    assert before.grad_fn is not None
    distillation = KnowledgeDistillation(teacher)
    quiet_trainer(tmp_path, distillation, max_epochs=1).fit(model)
    assert not torch.equal(*(next(one.parameters()) for one in (model, teacher)))
