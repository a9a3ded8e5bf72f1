"""Folders of small wav files: chirps that differ in pitch, direction and length."""

import torch

from lightning_compress.lab.audio import wav_bytes


def chirps(folder, count=60, *, rate=8000, seconds=0.2):
    """Write `count` files into two subfolders, as collections of speech lie."""
    for index in range(count):
        t = torch.arange(int(rate * seconds * (1 + index % 3 / 2))) / rate
        phase = 2 * torch.pi * (150 + 12 * index) * (t + (index % 5 - 2) * t**2)
        home = folder / ("low" if index < count // 2 else "high")
        home.mkdir(parents=True, exist_ok=True)
        wave = 0.5 * torch.sin(phase) * torch.exp(-2 * t)
        (home / f"{index:02}.wav").write_bytes(wav_bytes(wave, rate))
    return folder
