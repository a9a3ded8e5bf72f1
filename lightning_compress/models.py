"""Former name of `lightning_compress.lab.models`."""

from lightning_compress._moved import alias

__getattr__ = alias(
    __name__,
    "lightning_compress.lab.models",
    {
        "base": "lightning_compress.lab.models.base",
        "classifier": "lightning_compress.lab.models.classifier",
        "gan": "lightning_compress.lab.models.gan",
        "gan_base": "lightning_compress.lab.models.gan",
        "gan_losses": "lightning_compress.lab.models.gan",
        "networks": "lightning_compress.lab.models.networks",
        "recurrent_networks": "lightning_compress.lab.models.recurrent_vae",
        "recurrent_vae": "lightning_compress.lab.models.recurrent_vae",
        "vae": "lightning_compress.lab.models.vae",
    },
)
