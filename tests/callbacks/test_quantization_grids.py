"""Trained activation grids stand where the next product reads, so that the file is int8."""

import torch
from lightning.pytorch import LightningModule
from tiny import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import QuantizationAwareTraining, compression_state, export_onnx


class Decoder(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 4 * 16),
            nn.LeakyReLU(0.1),
            nn.Unflatten(1, (4, 4, 4)),
            nn.ConvTranspose2d(4, 8, 4, 2, 1),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.InstanceNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 1, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, z):
        return self.net(z)

    def training_step(self, batch, _):
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def test_a_trained_model_multiplies_in_int8_without_calibration(tmp_path):
    torch.manual_seed(0)
    model, z = Decoder(), torch.randn(16, 6)
    data = DataLoader(TensorDataset(z, torch.rand(16, 1, 8, 8)), batch_size=8)
    quiet_trainer(tmp_path, QuantizationAwareTraining()).fit(model, data)
    found = compression_state(model).activations
    assert {path for path, one in found.items() if one.output is not None} == {
        "net.0", "net.4", "net.6", "net.9", "net.12",
    }  # fmt: skip
    info = export_onnx(model.eval(), tmp_path / "m.onnx", z, int8=True)
    assert info.reasons == {}
    assert info.int8_ops["QLinearConv"] == 4
    assert info.int8_ops["QGemm"] == 1
