"""Sample waveforms as WAV files, which the report plays."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import torch
from torch import Tensor

from lightning_compress.files import write_atomically

__all__ = ["save_audio"]

GAP_SECONDS = 0.25  # of silence between examples


def save_audio(waves: Tensor, path: str | Path, *, sample_rate: int) -> Path:
    """Save waveforms (N, T) or (N, 1, T) in [-1, 1] as one 16-bit WAV file, one after another.

    A quarter of a second of silence stands between them. Values outside are clipped.

    Args:
        waves: the waveforms.
        path: the file.
        sample_rate: samples a second.

    Raises:
        ValueError: for another shape, values that are not finite, or a rate below 1.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_audio(torch.zeros(2, 8000), f"{folder}/a.wav", sample_rate=8000)
    ...     with wave.open(str(path)) as found:
    ...         found.getnframes()
    18000
    """
    if sample_rate < 1:
        raise ValueError(f"sample_rate must be at least 1, got {sample_rate}")
    rows = waves.detach().float().cpu()
    if rows.ndim == 3 and rows.shape[1] == 1:
        rows = rows[:, 0]
    if rows.ndim != 2 or rows.numel() == 0:
        raise ValueError(f"waves must have the shape (N, T) or (N, 1, T), got {tuple(waves.shape)}")
    if not rows.isfinite().all():
        raise ValueError("waves must be finite, got NaN or infinity")
    silence = torch.zeros(round(GAP_SECONDS * sample_rate))
    parts = [part for row in rows for part in (row, silence)][:-1]
    pcm = (torch.cat(parts).clamp(-1, 1) * 32767).round().to(torch.int16).numpy().astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(sample_rate)
        stream.writeframes(pcm.tobytes())
    return write_atomically(Path(path), buffer.getvalue(), what="the audio", parents=True)
