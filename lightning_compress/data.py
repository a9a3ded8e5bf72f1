"""Former name of `lightning_compress.lab.data`."""

from lightning_compress._moved import alias

__getattr__ = alias(
    __name__,
    "lightning_compress.lab.data",
    {
        "base": "lightning_compress.lab.data.base",
        "checks": "lightning_compress.lab.data.base",
        "cifar": "lightning_compress.lab.data.images",
        "datasets": "lightning_compress.lab.data.base",
        "digits": "lightning_compress.lab.data.digits",
        "frames": "lightning_compress.lab.data.images",
        "idx": "lightning_compress.lab.data.images",
        "idx_images": "lightning_compress.lab.data.images",
        "image_folder": "lightning_compress.lab.data.image_folder",
        "splits": "lightning_compress.lab.data.base",
        "text_lines": "lightning_compress.lab.data.text_lines",
        "vocabulary": "lightning_compress.lab.data.text_lines",
    },
)
