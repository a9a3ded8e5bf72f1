"""Rows of the compatibility table whose networks come from packages, in tiny configurations."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from shared.compat_case import Case, Project, batches_like

__all__ = ["package_cases"]


class Call(nn.Module):
    """A network called as a project calls it, as a module."""

    def __init__(self, network: nn.Module, call: Any) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *inputs: Tensor) -> Any:
        """What the call gives."""
        return self.call(self.network, *inputs)


def scvi_case() -> Case:
    """The training plan of scvi-tools' SCVI on Poisson counts."""

    def model() -> Any:
        scvi, anndata = import_module("scvi"), import_module("anndata")
        drawn = np.random.default_rng(0).poisson(2.0, (256, 100)).astype(np.float32)
        data = anndata.AnnData(drawn)
        scvi.model.SCVI.setup_anndata(data)
        return scvi.model.SCVI(data, n_hidden=64)

    def build() -> Any:
        return import_module("scvi.train").TrainingPlan(model().module)

    def batches() -> Any:
        loaders = import_module("scvi.dataloaders")
        return loaders.AnnDataLoader(model().adata_manager, batch_size=32)

    def decode(network: Any, z: Tensor, library: Tensor) -> Any:
        scale, _, rate, dropout = network("gene", z, library, torch.zeros_like(z[:, :1]))
        return scale, rate, dropout

    def part(plan: Any) -> Any:
        return Call(plan.module.decoder, decode), (torch.randn(4, 10), torch.ones(4, 1))

    return Case("scvi-tools, SCVI", "scvi-tools", build, part, batches)


def latent_loss(self: Any, batch: Any) -> Tensor:
    """Of diffusers' AutoencoderKL, through its methods."""
    posterior = self.vae.encode(batch[0]).latent_dist
    return (
        mse_loss(self.vae.decode(posterior.sample()).sample, batch[0])
        + 1e-3 * posterior.kl().mean()
    )


def vq_loss(self: Any, batch: Any) -> Tensor:
    """Of diffusers' VQModel."""
    found = self.vqvae(batch[0])
    return mse_loss(found.sample, batch[0]) + found.commit_loss.mean()


def noise_loss(self: Any, batch: Any) -> Tensor:
    """Of a U-Net that predicts noise."""
    noise, t = torch.randn_like(batch[0]), torch.randint(1000, (len(batch[0]),))
    return mse_loss(self.unet(0.7 * batch[0] + 0.7 * noise, t).sample, noise)


def diffusers_cases() -> list[Case]:
    """AutoencoderKL, VQModel and UNet2DModel."""

    def of(name: str, **options: Any) -> Any:
        common = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}
        return getattr(import_module("diffusers"), name)(**common, **options)

    coders = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    unet = {
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }
    images = batches_like((4, 3, 16, 16))

    def decoder(vae: Any) -> Any:
        return nn.Sequential(vae.post_quant_conv, vae.decoder)

    return [
        Case(
            "diffusers AutoencoderKL",
            "diffusers",
            lambda: Project(latent_loss, vae=of("AutoencoderKL", **coders)),
            lambda one: (decoder(one.vae), (torch.randn(2, 4, 8, 8),)),
            images,
        ),
        Case(
            "diffusers VQModel",
            "diffusers",
            lambda: Project(
                vq_loss, vqvae=of("VQModel", num_vq_embeddings=32, latent_channels=4, **coders)
            ),
            lambda one: (decoder(one.vqvae), (torch.randn(2, 4, 8, 8),)),
            images,
        ),
        Case(
            "diffusers UNet2D",
            "diffusers",
            lambda: Project(noise_loss, unet=of("UNet2DModel", **unet)),
            lambda one: (
                Call(one.unet, lambda net, x, t: net(x, t).sample),
                (torch.randn(2, 3, 16, 16), torch.tensor([3, 500])),
            ),
            images,
        ),
    ]


def monai_case() -> Case:
    """Its AutoencoderKL in two dimensions."""

    def network() -> Any:
        return import_module("monai.networks.nets").AutoencoderKL(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            num_res_blocks=(1, 1),
            channels=(16, 32),
            attention_levels=(False, False),
            latent_channels=4,
            norm_num_groups=8,
        )

    def loss(self: Any, batch: Any) -> Tensor:
        recon, mu, sigma = self.autoencoder(batch[0])
        return (
            mse_loss(recon, batch[0])
            + 1e-3 * (mu.square() + sigma.square() - 2 * sigma.log()).mean()
        )

    return Case(
        "monai AutoencoderKL",
        "monai",
        lambda: Project(loss, autoencoder=network()),
        lambda one: (
            Call(one.autoencoder, lambda net, z: net.decode(z)),
            (torch.randn(2, 4, 8, 8),),
        ),
        batches_like((4, 1, 16, 16)),
    )


def sound_cases() -> list[Case]:
    """Encodec, DAC, vocos, Matcha-TTS."""
    waves = batches_like((4, 1, 256))

    def encodec() -> Project:
        modules = import_module("encodec.modules")
        common = {
            "dimension": 32,
            "n_filters": 8,
            "ratios": [4, 2],
            "n_residual_layers": 1,
            "lstm": 1,
        }

        def loss(self: Any, batch: Any) -> Tensor:
            return l1_loss(self.decoder(self.encoder(batch[0])), batch[0])

        return Project(
            loss, encoder=modules.SEANetEncoder(**common), decoder=modules.SEANetDecoder(**common)
        )

    def dac() -> Project:
        network = import_module("dac").DAC(
            encoder_dim=8,
            encoder_rates=[2, 4],
            decoder_dim=32,
            decoder_rates=[4, 2],
            n_codebooks=2,
            codebook_size=32,
            sample_rate=16000,
        )

        def loss(self: Any, batch: Any) -> Tensor:
            found = self.model(batch[0])
            return (
                l1_loss(found["audio"], batch[0])
                + found["vq/commitment_loss"]
                + found["vq/codebook_loss"]
            )

        return Project(loss, model=network)

    def vocos() -> Project:
        models, heads = import_module("vocos.models"), import_module("vocos.heads")
        backbone = models.VocosBackbone(
            input_channels=16, dim=32, intermediate_dim=64, num_layers=2
        )
        head = heads.ISTFTHead(dim=32, n_fft=64, hop_length=16, padding="same")

        def loss(self: Any, batch: Any) -> Tensor:
            return l1_loss(self.head(self.backbone(batch[0])), batch[1][:, 0])

        return Project(loss, backbone=backbone, head=head)

    def matcha() -> Project:
        decoder = import_module("matcha.models.components.decoder").Decoder(
            in_channels=32,
            out_channels=16,
            channels=(32, 32),
            n_blocks=1,
            num_mid_blocks=1,
            num_heads=2,
            attention_head_dim=16,
            act_fn="snakebeta",
        )

        def loss(self: Any, batch: Any) -> Tensor:
            x, mu = batch
            noise, t = torch.randn_like(x), torch.rand(len(x))
            noisy = (1 - t.view(-1, 1, 1)) * noise + t.view(-1, 1, 1) * x
            return mse_loss(
                self.estimator(noisy, torch.ones(len(x), 1, x.shape[-1]), mu, t), x - noise
            )

        return Project(loss, estimator=decoder)

    spectrum = (torch.randn(2, 16, 16),)
    mask = torch.ones(2, 1, 16)
    return [
        Case(
            "encodec",
            "encodec",
            encodec,
            lambda one: (one.decoder, (torch.randn(2, 32, 16),)),
            waves,
        ),
        Case(
            "DAC",
            "descript-audio-codec",
            dac,
            lambda one: (one.model.decoder, (torch.randn(2, one.model.latent_dim, 16),)),
            waves,
        ),
        Case(
            "vocos",
            "vocos",
            vocos,
            lambda one: (nn.Sequential(one.backbone, one.head), spectrum),
            batches_like((4, 16, 16), (4, 1, 256)),
        ),
        Case(
            "Matcha-TTS",
            "matcha-tts",
            matcha,
            lambda one: (one.estimator, (*spectrum, mask, *spectrum, torch.rand(2))),
            batches_like((4, 16, 16), (4, 16, 16)),
        ),
    ]


def lucidrains_case() -> Case:
    """denoising-diffusion-pytorch."""

    def build() -> Project:
        package = import_module("denoising_diffusion_pytorch")
        unet = package.Unet(
            dim=16, dim_mults=(1, 2), flash_attn=False, attn_heads=2, attn_dim_head=16
        )
        diffusion = package.GaussianDiffusion(
            unet, image_size=16, timesteps=100, auto_normalize=False
        )
        return Project(lambda self, batch: self.diffusion(batch[0]), diffusion=diffusion)

    return Case(
        "denoising-diffusion-pytorch",
        "denoising-diffusion-pytorch",
        build,
        lambda one: (one.diffusion.model, (torch.randn(2, 3, 16, 16), torch.tensor([3, 50]))),
        batches_like((4, 3, 16, 16)),
    )


def pythae_case() -> Case:
    """Pythae's VAE with its default networks."""

    def build() -> Project:
        models = import_module("pythae.models")
        network = models.VAE(models.VAEConfig(input_dim=(1, 14, 14), latent_dim=8))
        return Project(lambda self, batch: self.model({"data": batch[0]}).loss, model=network)

    return Case(
        "pythae",
        "pythae",
        build,
        lambda one: (
            Call(one.model.decoder, lambda net, z: net(z).reconstruction),
            (torch.randn(4, 8),),
        ),
        lambda: [(x.abs(),) for (x,) in batches_like((16, 1, 14, 14))()],
    )


def package_cases() -> list[Case]:
    """All of them."""
    return [
        scvi_case(),
        *diffusers_cases(),
        monai_case(),
        *sound_cases(),
        lucidrains_case(),
        pythae_case(),
    ]
