import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.lab.models import ResNet18, SimpleNet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


@pytest.mark.parametrize("size", [16, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(size, channels):
    x = torch.rand(2, channels, size, size)
    for cls in (SimpleNet, ResNet18):
        model = cls(image_size=size, channels=channels, num_classes=7, width=8)
        assert model(x).shape == (2, 7)


def test_resnet_stem_follows_the_picture():
    small = ResNet18(image_size=32, channels=1, num_classes=10, width_multiplier=0.25).net
    large = ResNet18(image_size=64, channels=3, num_classes=10, width_multiplier=0.25).net
    assert (small.conv1.kernel_size, small.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(small.maxpool, torch.nn.Identity)
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(large.maxpool, torch.nn.MaxPool2d)
    assert (small.conv1.out_channels, small.fc.in_features) == (16, 128)


def test_simple_net_learns_digits_and_logs_its_accuracy():
    seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    trainer = Trainer(
        max_epochs=5, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = SimpleNet(image_size=8, channels=1, num_classes=10, width=16)
    test = DataLoader(TensorDataset(x[1200:], y[1200:]), 100)
    trainer.fit(model, DataLoader(TensorDataset(x[:1200], y[:1200]), 32, shuffle=True), test)
    assert {"train/loss", "val/loss", "val/accuracy"} <= set(trainer.callback_metrics)
    with torch.no_grad():
        logits = model.eval()(x[1200:])
    accuracy = (logits.argmax(1) == y[1200:]).float().mean().item()
    assert trainer.callback_metrics["val/accuracy"].item() == pytest.approx(accuracy)
    loss = functional.cross_entropy(logits, y[1200:]).item()
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(loss, rel=1e-5)
    assert accuracy > 0.8
