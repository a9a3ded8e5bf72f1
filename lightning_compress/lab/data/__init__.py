"""LightningDataModules: images, pairs of images, sequences, tokens and sound, as `(x, y)` batches.

Every module here has `kind`, `labelled`, `dims`, `fingerprint` and the three splits of
`SplitDataModule`, so that models and evaluation need no other knowledge of a data set.
"""

from lightning_compress.lab.data.audio_folder import AudioFolder
from lightning_compress.lab.data.base import SplitDataModule
from lightning_compress.lab.data.digits import DigitRows, Digits
from lightning_compress.lab.data.glyph_pairs import GlyphPairs
from lightning_compress.lab.data.image_folder import ImageFolder
from lightning_compress.lab.data.images import CIFAR10, IdxImages, IdxRows
from lightning_compress.lab.data.text_lines import TextLines

__all__ = [
    "CIFAR10",
    "AudioFolder",
    "DigitRows",
    "Digits",
    "GlyphPairs",
    "IdxImages",
    "IdxRows",
    "ImageFolder",
    "SplitDataModule",
    "TextLines",
]
