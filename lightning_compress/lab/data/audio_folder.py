"""Any folder of wav files: log-mel spectrograms and the waveforms that they are of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.lab.audio import LEAST, log_mel, read_wav, wav_bytes
from lightning_compress.lab.data.base import (
    Kind,
    SplitDataModule,
    Splits,
    TensorSplit,
    check_fractions,
    check_integer,
    fraction_split,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from lightning_compress.lab.data.base import LoaderOptions

__all__ = ["AudioFolder"]
PROMPTS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")  # where the Debian package puts them
PACKAGE = "asterisk-core-sounds-en-wav"
SHOWN = 4  # sound files of a model's samples
LOUDEST = 0.5  # natural log of a mel magnitude that is shown white


class AudioFolder(SplitDataModule):
    """Speech or other sound: x log-mels (N, num_mels, T), y waveforms (N, 1, segment) in [-1, 1].

    Files are split by seed, then cut into segments without overlap, the last of a file filled up
    with silence: no file is in two splits. T is segment / hop_length.

    Args:
        folder: searched for `*.wav` with its subfolders; None: the speech prompts of Debian's
            package asterisk-core-sounds-en-wav.
        segment: samples of a waveform.
        n_fft: size of the Fourier transform.
        hop_length: samples between two frames; divides `segment`.
        num_mels: rows of a spectrogram.
        val_fraction: part of the files to validate on.
        test_fraction: part of the files to test on.
        common: `batch_size`, `num_workers`, `seed` of `SplitDataModule`.

    Raises:
        ValueError: for an argument out of its range; in `setup` for a file that is no PCM wav file
            or has another sample rate than the first.
        FileNotFoundError: in `setup`, for a folder that is missing or without wav files.
    """

    kind: ClassVar[Kind] = "audio"
    paired: ClassVar[bool] = True
    pretext: ClassVar[str] = "direction_and_band"

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        segment: int = 4096,
        n_fft: int = 256,
        hop_length: int = 64,
        num_mels: int = 40,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **common: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(**common)
        check_fractions(val_fraction, test_fraction)
        self.folder = None if folder is None else Path(folder).expanduser()
        self.hop_length = check_integer("hop_length", hop_length, 1)
        self.n_fft = check_integer("n_fft", n_fft, self.hop_length)
        self.segment = check_integer("segment", segment, self.n_fft)
        self.num_mels = check_integer("num_mels", num_mels, 1, self.n_fft // 2)
        if segment % hop_length:
            raise ValueError(f"segment={segment} must be a multiple of hop_length={hop_length}")
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.sample_rate = 0  # known after `setup`

    @property
    def dims(self) -> dict[str, int]:
        """`sample_rate`, `segment`, `n_fft`, `hop_length`, `num_mels`; known after `setup`."""
        _ = self.splits
        names = ("sample_rate", "segment", "n_fft", "hop_length", "num_mels")
        return {name: int(getattr(self, name)) for name in names}

    def build(self) -> Splits:
        """Read all files, split them, cut them into segments."""
        paths = self._files()
        waves = self._read(paths)
        parts = fraction_split(len(paths), self.val_fraction, self.test_fraction, self.seed)
        return Splits(*(self._split([waves[row] for row in part.tolist()]) for part in parts))

    def as_images(self, samples: Tensor) -> Tensor:
        """Waveforms (N, 1, L) as log-mel images (N, 1, num_mels, L / hop_length) in [0, 1]."""
        spectrograms = torch.cat([self.spectrogram(waves) for waves in samples.split(256)])
        low = torch.tensor(LEAST).log().item()
        return ((spectrograms - low) / (LOUDEST - low)).clamp(0, 1).flip(1).unsqueeze(1)

    def sample_files(self, samples: Tensor) -> dict[str, bytes]:
        """The first waveforms as wav files."""
        return {
            f"{index}.wav": wav_bytes(waveform.flatten(), self.sample_rate)
            for index, waveform in enumerate(samples[:SHOWN])
        }

    def spectrogram(self, waves: Tensor) -> Tensor:
        """Log-mels (N, num_mels, L / hop_length) of waveforms (N, 1, L)."""
        return log_mel(
            waves,
            sample_rate=self.sample_rate,
            n_fft=self.n_fft,
            hop_length=self.hop_length,
            num_mels=self.num_mels,
        )

    def _files(self) -> list[Path]:
        folder = PROMPTS if self.folder is None else self.folder
        if self.folder is None and not folder.is_dir():
            raise FileNotFoundError(
                f"no speech prompts in {folder}: `apt-get install {PACKAGE}` brings them, or give "
                "data.folder=<folder of wav files>"
            )
        if not folder.is_dir():
            raise FileNotFoundError(f"data.folder={folder}: no such folder")
        found = [path for path in folder.rglob("*") if path.suffix.lower() == ".wav"]
        if not found:
            raise FileNotFoundError(f"{folder} holds no .wav file")
        return sorted(found)

    def _read(self, paths: Sequence[Path]) -> list[Tensor]:
        waves: list[Tensor] = []
        for path in paths:
            samples, rate = read_wav(path)
            if not len(samples):
                raise ValueError(f"{path} holds no samples")
            if waves and rate != self.sample_rate:
                raise ValueError(
                    f"{path} has {rate} samples a second, {paths[0]} has {self.sample_rate}: all "
                    f"files need the same (`ffmpeg -i FILE -ar {self.sample_rate} NEW.wav`)"
                )
            self.sample_rate = rate
            waves.append(samples)
        return waves

    def _split(self, waves: Sequence[Tensor]) -> TensorSplit:
        cut = [functional.pad(x, (0, -len(x) % self.segment)).view(-1, self.segment) for x in waves]
        y = torch.cat(cut).unsqueeze(1)
        return TensorSplit(torch.cat([self.spectrogram(rows) for rows in y.split(256)]), y)
