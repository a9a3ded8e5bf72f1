"""LightningModules to compress, around networks that are plain modules."""

from lightning_compress.lab.models.autoencoder_kl import AutoencoderKL
from lightning_compress.lab.models.base import CompressibleModel
from lightning_compress.lab.models.classifier import ResNet18, SimpleNet
from lightning_compress.lab.models.flow_matching import FlowMatching
from lightning_compress.lab.models.gan import DCGAN, WGANGP
from lightning_compress.lab.models.pix2pix import Pix2Pix
from lightning_compress.lab.models.recurrent_vae import RecurrentVAE
from lightning_compress.lab.models.vae import VAE
from lightning_compress.lab.models.vocoder import Vocoder
from lightning_compress.lab.models.vq_vae import VQVAE

__all__ = [
    "DCGAN",
    "VAE",
    "VQVAE",
    "WGANGP",
    "AutoencoderKL",
    "CompressibleModel",
    "FlowMatching",
    "Pix2Pix",
    "RecurrentVAE",
    "ResNet18",
    "SimpleNet",
    "Vocoder",
]
