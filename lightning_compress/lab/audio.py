"""Sound: wav files, log-mel spectrograms, and spectral distances between waveforms."""

from __future__ import annotations

import io
import math
import wave
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["log_mel", "mel_filters", "read_wav", "stft_distance", "wav_bytes"]

LEAST = 1e-5  # magnitude below which a spectrogram is silent
RESOLUTIONS = (1024, 512, 256)  # FFT sizes of the multi-resolution distance; hops are a quarter


def read_wav(path: Path) -> tuple[Tensor, int]:
    """Samples (L,) in [-1, 1] of a PCM wav file, channels averaged, and its sample rate in Hz.

    Raises:
        ValueError: naming the file, when it is no PCM wav file.
    """
    try:
        with wave.open(str(path)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(
            f"{path}: cannot be read as PCM wav: {error}; `ffmpeg -i FILE -c:a pcm_s16le NEW.wav` "
            "converts others"
        ) from error
    whole = np.frombuffer(content, np.uint8)[
        : len(content) // (width * channels) * width * channels
    ]
    return torch.from_numpy(_integers(whole, width).reshape(-1, channels).mean(1)).float(), rate


def _integers(content: np.ndarray, width: int) -> np.ndarray:
    """PCM values of `width` bytes as float64 in [-1, 1); those of one byte are unsigned."""
    if width == 1:
        return content.astype(np.float64) / 128 - 1
    padded = np.zeros((len(content) // width, 4), np.uint8)
    padded[:, 4 - width :] = content.reshape(-1, width)
    return padded.view("<i4")[:, 0].astype(np.float64) / 2**31


def wav_bytes(samples: Tensor, sample_rate: int) -> bytes:
    """A wav file of 16 bits from samples (L,), clipped to [-1, 1].

    >>> len(wav_bytes(torch.zeros(100), 8000))
    244
    """
    pcm = (samples.detach().float().cpu().clamp(-1, 1) * 32767).round().numpy().astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(pcm.tobytes())
    return buffer.getvalue()


@cache
def mel_filters(sample_rate: int, n_fft: int, num_mels: int) -> Tensor:
    """Triangular filters (num_mels, n_fft // 2 + 1), equally spaced in mels from 0 to Nyquist.

    Slaney's area normalization on the HTK scale, mel = 2595 log10(1 + f / 700).

    >>> mel_filters(8000, 256, 40).shape
    torch.Size([40, 129])
    """
    highest = 2595 * math.log10(1 + sample_rate / 2 / 700)
    mels = torch.linspace(0, highest, num_mels + 2, dtype=torch.float64)
    edges = 700 * (10 ** (mels / 2595) - 1)
    frequencies = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (frequencies - low) / (centre - low)
    falling = (high - frequencies) / (high - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (high - low)).float()


def log_mel(
    waves: Tensor, *, sample_rate: int, n_fft: int, hop_length: int, num_mels: int
) -> Tensor:
    """Log-mel spectrograms (N, num_mels, L / hop_length) of waveforms (N, 1, L), natural log.

    Frames are centred by reflection at both ends, as HiFi-GAN's are; L is a multiple of the hop.
    """
    padding = (n_fft - hop_length) // 2
    padded = functional.pad(waves, (padding, n_fft - hop_length - padding), mode="reflect")
    magnitudes = _magnitudes(padded.squeeze(1), n_fft, hop_length, center=False)
    filters = mel_filters(sample_rate, n_fft, num_mels).to(waves.device)
    return (filters @ magnitudes).clamp(min=LEAST).log()


def stft_distance(outputs: Tensor, targets: Tensor) -> Tensor:
    """Multi-resolution STFT distance of waveforms (N, 1, L): a scalar, 0 for equal ones.

    Spectral convergence plus the mean absolute difference of log magnitudes, averaged over three
    FFT sizes: Yamamoto et al. 2020, equations 3 to 6, https://arxiv.org/abs/1910.11480.
    """
    total = torch.zeros((), device=outputs.device)
    for n_fft in RESOLUTIONS:
        made, real = (_magnitudes(x.squeeze(1), n_fft, n_fft // 4) for x in (outputs, targets))
        convergence = torch.linalg.norm(real - made) / torch.linalg.norm(real).clamp(min=LEAST)
        logs = (real.clamp(min=LEAST).log() - made.clamp(min=LEAST).log()).abs().mean()
        total = total + convergence + logs
    return total / len(RESOLUTIONS)


def _magnitudes(waves: Tensor, n_fft: int, hop_length: int, *, center: bool = True) -> Tensor:
    """Magnitudes (N, n_fft // 2 + 1, frames) of the short-time Fourier transform, Hann window."""
    window = torch.hann_window(n_fft, device=waves.device)
    found = torch.stft(
        waves.float(),
        n_fft,
        hop_length,
        window=window,
        center=center,
        pad_mode="constant",
        return_complex=True,
    )
    # the gradient of a magnitude is not finite at 0
    return (found.real.square() + found.imag.square() + LEAST**2).sqrt()
