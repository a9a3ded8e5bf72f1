"""A decoder half as wide for diffusers' AutoencoderKL, whose encoder stays frozen.

The latents stay those that a diffusion model was trained on; the small decoder learns from the
large one's features and pixels. Lines marked (*) are the compression.
python experiments/examples/diffusers_autoencoder.py [epochs [folder]]; needs diffusers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import interpolate, l1_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (  # (*)
    GradualPruning,
    KnowledgeDistillation,
    Pair,
    QuantizationAwareTraining,
    save_compressed,
    sparsity,
)


def autoencoder(width: int) -> Any:
    """Images (N, 1, 16, 16) to latents (N, 4, 8, 8) and back."""
    return import_module("diffusers").AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        norm_num_groups=8,
    )


class SmallDecoder(LightningModule):
    """A frozen encoder, and the decoder that is trained."""

    def __init__(self, large: Any) -> None:
        super().__init__()
        self.encoder = nn.Sequential(large.encoder, large.quant_conv).requires_grad_(False)
        small = autoencoder(16)
        self.decoder = nn.Sequential(small.post_quant_conv, small.decoder)
        self.deployed = ("decoder",)  # (*)
        self.example_input_array = torch.zeros(1, 1, 16, 16)  # (*) sizes of the features

    def forward(self, x: Tensor) -> Tensor:
        """Images through the latents' means."""
        return self.decoder(self.encoder(x).chunk(2, dim=1)[0])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Pixels of the data; the callback adds the teacher's."""
        loss = l1_loss(self(batch[0]), batch[0])
        self.log("train/pixels", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.decoder.parameters(), lr=2e-3)


def main(epochs: int, folder: Path) -> None:
    """The large decoder teaches the small one, which is pruned and quantized meanwhile."""
    seed_everything(0, verbose=False)
    images = (
        torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    )
    train = DataLoader(TensorDataset(interpolate(images[:512], 16)), batch_size=32, shuffle=True)
    large = autoencoder(32).eval()  # stands for AutoencoderKL.from_pretrained(...)
    teacher = nn.ModuleDict({"decoder": nn.Sequential(large.post_quant_conv, large.decoder)})
    features = [(f"1.{one}", f"1.{one}") for one in ("mid_block", "up_blocks.0")]
    compression = [  # (*)
        KnowledgeDistillation(teacher, pairs=[Pair("decoder", loss="l1", features=features)]),
        GradualPruning(final_sparsity=0.5),
        QuantizationAwareTraining(weight_bits=8, activation_bits=8),
    ]
    options = {"default_root_dir": folder, "log_every_n_steps": 4}
    model = SmallDecoder(large)
    Trainer(max_epochs=epochs, callbacks=compression, **options).fit(model, train)  # (*)
    info = save_compressed(model.decoder, folder / "decoder.lcz")  # (*)
    weights = [sum(p.numel() for p in one.parameters()) for one in (teacher, model.decoder)]
    print(f"weights: {weights[0]} -> {weights[1]}, of which zeros {sparsity(model.decoder):.1%}")
    print(f"decoder.lcz: {info.bytes} bytes, {4 * weights[0] / info.bytes:.1f}x smaller")


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(int(given.get(1, 10)), Path(given.get(2, "outputs/diffusers_autoencoder")))
