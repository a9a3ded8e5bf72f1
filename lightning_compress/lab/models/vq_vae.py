"""VQ-VAE: images as maps of integers, which index a codebook that is deployed with the decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.lab.models.autoencoder import (
    ImageAutoencoder,
    ResidualDecoder,
    ResidualEncoder,
)
from lightning_compress.lab.models.base import (
    SAMPLE_BATCH,
    check_count,
    check_range,
    scaled_width,
)

__all__ = ["VQVAE", "IndexDecoder", "IndexEncoder", "nearest"]


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code next to each vector: (N, D, h, w) and (K, D) -> (N, h, w) int64.

    >>> nearest(torch.tensor([0.9, 3.0]).view(1, 1, 1, 2), torch.tensor([[0.0], [1.0]])).tolist()
    [[[1, 1]]]
    """
    vectors = z.movedim(1, -1)
    return torch.cdist(vectors.flatten(0, -2), codebook).argmin(1).view(vectors.shape[:-1])


class IndexEncoder(nn.Module):
    """Images -> maps of vectors, and of the indices of their codes."""

    def __init__(self, network: nn.Module, codebook: nn.Embedding) -> None:
        super().__init__()
        self.network, self.codebook = network, codebook

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, S, S) -> vectors (N, D, s, s) and indices (N, s, s) int64."""
        z = self.network(x)
        return z, nearest(z.detach(), self.codebook.weight.detach())


class IndexDecoder(nn.Module):
    """Codebook and decoder in one: indices -> images."""

    def __init__(self, network: nn.Module, codebook: nn.Embedding) -> None:
        super().__init__()
        self.network, self.codebook = network, codebook

    def vectors(self, indices: Tensor) -> Tensor:
        """Indices (N, s, s) -> their codes (N, D, s, s)."""
        return self.codebook(indices).permute(0, 3, 1, 2)

    def forward(self, indices: Tensor) -> Tensor:
        """Indices (N, s, s) int64 -> images (N, C, S, S)."""
        return self.network(self.vectors(indices))


class VQVAE(ImageAutoencoder):
    """Images <-> maps of indices into a codebook, by squared errors of pixels, codes, commitment.

    Van den Oord et al. 2017, https://arxiv.org/abs/1711.00937 (equation 3). A code that was not
    used in an epoch restarts at a vector of the last batch (Dhariwal et al. 2020,
    https://arxiv.org/abs/2005.00341, section 3.1). With a frozen encoder the encoder keeps the
    codebook that its indices come from, and the deployed one trains as a part of the decoder.
    Logs `train/mse`, `train/codes`, `train/restarted` and `val/l1`.

    Args:
        image_size: pixels a side, a multiple of `2 ** halvings`; like `channels` from the data when
            the app builds the model.
        channels: of the images.
        num_codes: vectors in the codebook.
        code_dim: size of a vector.
        width: channels at full resolution, twice as many below.
        halvings: of the resolution, from images to indices.
        commitment: weight of the loss that keeps vectors near their codes.
        train_part: "all"; or "decoder": the encoder is frozen.
        lr: learning rate, which falls by a cosine to a tenth.
        width_multiplier: scales the decoder's width, to a multiple of 8.

    Raises:
        ValueError: for a bad argument, and sizes that do not divide.

    >>> model = VQVAE(image_size=8, channels=3, width=8, num_codes=16).eval()
    >>> model.code(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 2, 2])
    """

    encoder: IndexEncoder
    decoder: IndexDecoder

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        num_codes: int = 256,
        code_dim: int = 8,
        width: int = 32,
        halvings: int = 2,
        commitment: float = 0.25,
        train_part: str = "all",
        lr: float = 1e-3,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.check_sizes(image_size, channels, halvings)
        self.num_codes = check_count("num_codes", num_codes, least=2)
        check_count("code_dim", code_dim)
        check_range("commitment", commitment, 0)
        check_range("lr", lr, 0)
        self.save_hyperparameters()
        encoded, decoded = scaled_width(width, 1.0), scaled_width(width, width_multiplier)
        codebook = _codebook(num_codes, code_dim)
        self.encoder = IndexEncoder(
            ResidualEncoder(channels, code_dim, width=encoded, halvings=halvings), codebook
        )
        deployed = codebook if train_part == "all" else _codebook(num_codes, code_dim)
        self.decoder = IndexDecoder(
            ResidualDecoder(code_dim, channels, width=decoded, doublings=halvings), deployed
        )
        self.choose_part(train_part)
        self._used = torch.zeros(num_codes, dtype=torch.bool)  # in this epoch

    def code(self, x: Tensor) -> Tensor:
        """Indices (N, s, s), int64."""
        return self.encoder(2 * x - 1)[1]

    def sample_code(self) -> Tensor:
        """Random indices (2, s, s)."""
        shape = (SAMPLE_BATCH, self.code_size, self.code_size)
        return torch.randint(self.num_codes, shape, generator=torch.Generator().manual_seed(0))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Mean squared error of pixels; with a trained encoder those of codes and vectors too."""
        real = 2 * batch[0] - 1
        z, indices = self.encoder(real)
        if self.hparams["train_part"] == "decoder":
            loss = mse = functional.mse_loss(self.decoder(indices), real)
        else:
            vectors = self.decoder.vectors(indices)
            made = self.decoder.network(z + (vectors - z).detach())  # straight through
            mse, codes = functional.mse_loss(made, real), functional.mse_loss(vectors, z.detach())
            codes = codes + self.hparams["commitment"] * functional.mse_loss(z, vectors.detach())
            self.log("train/codes", codes.detach(), batch_size=len(real))
            self._remember(indices, z)
            loss = mse + codes
        self.log("train/mse", mse.detach(), batch_size=len(real), prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Restart unused codes, and let the learning rate fall."""
        super().on_train_epoch_end()
        if self.hparams["train_part"] == "all":
            dead = (~self._used).nonzero().flatten()
            rows = torch.randint(len(self._vectors), (len(dead),))
            with torch.no_grad():
                self.decoder.codebook.weight[dead] = self._vectors[rows]
            self.log("train/restarted", float(len(dead)))
            self._used.fill_(False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW for what is trained."""
        return torch.optim.AdamW(self.trained_weights(), lr=self.hparams["lr"], weight_decay=0.0)

    def _remember(self, indices: Tensor, z: Tensor) -> None:
        self._used[indices.flatten().cpu()] = True
        self._vectors = z.detach().movedim(1, -1).flatten(0, -2)


def _codebook(num_codes: int, code_dim: int) -> nn.Embedding:
    codebook = nn.Embedding(num_codes, code_dim)
    nn.init.uniform_(codebook.weight, -1 / num_codes, 1 / num_codes)
    return codebook
