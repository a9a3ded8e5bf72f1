"""Count of the files on three paths through the package: weight to file, export, teacher.

python experiments/rooms.py
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

import lightning_compress
from lightning_compress import KnowledgeDistillation, export_onnx, save_compressed

HOME = str(Path(lightning_compress.__file__).parent)


def net(width: int) -> nn.Sequential:
    """A generator-like network with a weight of each kind of layer."""
    return nn.Sequential(
        nn.Linear(4, 16 * width), nn.Unflatten(1, (width, 4, 4)), nn.ReLU(),
        nn.ConvTranspose2d(width, 1, 4, 2, 1),
    )  # fmt: skip


class Student(LightningModule):
    """Student without a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(4)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return 0 * self.net(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def teach() -> None:
    """One training step with a teacher."""
    teacher = KnowledgeDistillation(nn.ModuleDict({"net": net(8)}), pairs=["net"])
    trainer = Trainer(
        max_steps=1,
        callbacks=[teacher],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    few: Any = torch.zeros(4, 4)
    trainer.fit(Student(), torch.utils.data.DataLoader(few, batch_size=4))


def ways(work: Callable[[], Any]) -> tuple[int, int]:
    """How many of the package's files a call enters, and how often it goes from one to another."""
    files, turns, last = set(), 0, None

    def see(frame: FrameType, event: str, _: Any) -> None:
        nonlocal turns, last
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(HOME) and frame.f_code.co_name != "<module>":
            files.add(file)
            turns += file != last
            last = file

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return len(files), turns


if __name__ == "__main__":
    torch.manual_seed(0)
    folder, few = Path(tempfile.mkdtemp()), torch.randn(4, 4)
    for name, work in {
        "a weight to its file": lambda: save_compressed(net(8).eval(), folder / "model.lcz"),
        "export to int8": lambda: export_onnx(
            net(8).eval(), folder / "model.onnx", few, int8=True, calibration=[few]
        ),
        "a teacher's first step": teach,
    }.items():
        entered, turned = ways(work)
        print(f"{name}: {entered} files, {turned} changes of file")
