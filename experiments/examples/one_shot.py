"""A checkpoint of somebody else's training, compressed in one shot: no trainer, no loss.

python experiments/examples/one_shot.py [epochs of the stand-in's training [folder]]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_compress import (
    export_onnx,
    fake_quantized,
    load_compressed,
    prune_weights,
    quantize_static,
    save_compressed,
    sparsity,
)


class Decoder(nn.Sequential):
    """Latents (N, 8) to images (N, 1, 8, 8)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__(
            nn.Linear(8, width * 16),
            nn.ReLU(),
            nn.Unflatten(1, (width, 4, 4)),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )


def checkpoint(path: Path, epochs: int) -> tuple[Tensor, Tensor]:
    """Stands for a download: latents are principal components of the digits, and images."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32) / 16
    u, s, _ = torch.linalg.svd(images - images.mean(0), full_matrices=False)
    z = u[:, :8] * s[:8]
    z, images = z / z.std(0), images.view(-1, 1, 8, 8)
    decoder = Decoder()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(z)).split(64):
            loss = (decoder(z[rows]) - images[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.save(decoder.state_dict(), path)
    return z, images


def main(epochs: int, folder: Path) -> None:
    """Load, prune by layer inputs, round, write, read."""
    folder.mkdir(parents=True, exist_ok=True)
    z, images = checkpoint(folder / "decoder.pt", epochs)
    decoder = Decoder().eval()
    decoder.load_state_dict(torch.load(folder / "decoder.pt", weights_only=True))

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(z) - images).square().mean())

    dense, batches = error(decoder), z[:256].split(64)
    prune_weights(decoder, 0.5, criterion="obs", data=batches)
    quantize_static(decoder, batches, weight_bits=6, activation_bits=8, bias_correction=True)
    with fake_quantized(decoder):  # activations on their grids too
        small = error(decoder)
    info = save_compressed(decoder, folder / "decoder.lcz")
    fresh = load_compressed(folder / "decoder.lcz", Decoder()).eval()
    onnx = export_onnx(decoder, folder / "decoder.onnx", z[:4], int8=True)
    print(f"zeros: {sparsity(decoder):.1%}; mean squared error {dense:.4f} -> {small:.4f}")
    print(f"decoder.lcz: {info.bytes} bytes, {info.ratio:.1f}x smaller")
    print(f"loads exactly: {torch.equal(fresh(z), decoder(z))}; in int8: {dict(onnx.int8_ops)}")


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(int(given.get(1, 30)), Path(given.get(2, "outputs/one_shot")))
