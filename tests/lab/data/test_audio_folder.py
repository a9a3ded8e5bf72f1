"""Folders of wav files: samples as written, spectrograms as librosa would have them, splits."""

import wave

import numpy as np
import pytest
import torch
from scipy import signal

from lightning_compress.lab.audio import log_mel, mel_filters, read_wav, stft_distance, wav_bytes
from lightning_compress.lab.data import AudioFolder, audio_folder
from tests.helpers.sounds import chirps

SMALL = {"segment": 512, "n_fft": 64, "hop_length": 16, "num_mels": 8}


def write(path, values, width, rate=8000):
    """PCM of any width from rows of integers (samples, channels)."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(values.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        shifted = values + 128 if width == 1 else values
        file.writeframes(
            b"".join(int(v).to_bytes(width, "little", signed=width > 1) for v in shifted.flat)
        )


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_every_width_are_read(tmp_path, width):
    highest = 2 ** (8 * width - 1)
    values = np.array([[-highest, -highest], [0, 0], [highest // 2, 0], [highest - 1, highest - 1]])
    write(tmp_path / "a.wav", values, width)
    found, rate = read_wav(tmp_path / "a.wav")
    assert rate == 8000
    assert found.tolist() == pytest.approx([-1, 0, 0.25, 1 - 1 / highest])


def test_what_is_written_is_read():
    x = torch.rand(300, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert len(wav_bytes(x, 16000)) == 44 + 600


def test_spectrograms_equal_scipys():
    x = torch.randn(1, 1, 512, generator=torch.Generator().manual_seed(0)) * 0.1
    found = log_mel(x, sample_rate=8000, n_fft=64, hop_length=16, num_mels=8)
    padded = np.pad(x[0, 0].numpy(), 24, mode="reflect")
    window = signal.get_window("hann", 64)
    frames = np.stack([padded[i : i + 64] * window for i in range(0, len(padded) - 63, 16)])
    magnitudes = np.abs(np.fft.rfft(frames)).T
    expected = np.log(mel_filters(8000, 64, 8).numpy() @ magnitudes)
    assert found.shape == (1, 8, 32)
    assert found[0].numpy() == pytest.approx(expected, abs=1e-4)


def test_filters_have_unit_area_and_a_tone_is_in_its_own():
    filters = mel_filters(8000, 4096, 20)
    assert (filters.sum(1) * 8000 / 4096).numpy() == pytest.approx(np.ones(20), rel=0.02)
    t = torch.arange(4096) / 8000
    tones = torch.stack([torch.sin(2 * torch.pi * f * t) for f in (200.0, 3000.0)])[:, None]
    rows = log_mel(tones, sample_rate=8000, n_fft=256, hop_length=64, num_mels=20).mean(2).argmax(1)
    assert rows[0] < 4 < 15 < rows[1]


def test_equal_waves_have_no_distance_and_gradients_are_finite_at_silence():
    x = torch.zeros(2, 1, 2048, requires_grad=True)
    assert stft_distance(x, x.detach()) == 0
    stft_distance(x, torch.ones(2, 1, 2048)).backward()
    assert torch.isfinite(x.grad).all()


def test_segments_of_a_file_stay_in_one_split_and_nothing_is_lost(tmp_path):
    data = AudioFolder(chirps(tmp_path), **SMALL, batch_size=4)
    data.setup()
    lengths = [len(read_wav(path)[0]) for path in tmp_path.rglob("*.wav")]
    segments = sum(-(-length // 512) for length in lengths)
    assert sum(len(split) for split in data.splits) == segments
    x, y = data.train_dataset.tensors
    assert (x.shape[1:], y.shape[1:]) == ((8, 32), (1, 512))
    assert x.allclose(data.spectrogram(y), atol=1e-6)
    total = sum(float(split.tensors[1].square().sum()) for split in data.splits)
    files = sum(float(read_wav(path)[0].square().sum()) for path in tmp_path.rglob("*.wav"))
    assert total == pytest.approx(files, rel=1e-5)
    assert data.dims == SMALL | {"sample_rate": 8000}
    assert (data.kind, data.paired, data.labelled) == ("audio", True, False)
    images = data.as_images(y[:3])
    assert images.shape == (3, 1, 8, 32)
    assert 0 <= images.min() < images.max() <= 1
    again = AudioFolder(tmp_path, **SMALL)
    again.setup()
    assert again.fingerprint == data.fingerprint
    (mel, waves), *_ = data.train_dataloader()
    assert mel.allclose(data.spectrogram(waves), atol=1e-6)


def test_missing_prompts_name_their_package(monkeypatch, tmp_path):
    monkeypatch.setattr(audio_folder, "PROMPTS", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="apt-get install asterisk-core-sounds-en-wav"):
        AudioFolder().setup()
    with pytest.raises(FileNotFoundError, match=r"data\.folder=.*nowhere: no such folder"):
        AudioFolder(tmp_path / "nowhere").setup()
    with pytest.raises(FileNotFoundError, match=r"holds no \.wav file"):
        AudioFolder(tmp_path).setup()


def test_files_that_do_not_fit_are_named(tmp_path):
    chirps(tmp_path, 4)
    (tmp_path / "low" / "x.wav").write_bytes(wav_bytes(torch.zeros(900), 16000))
    with pytest.raises(ValueError, match=r"x\.wav has 16000 samples a second, .* has 8000"):
        AudioFolder(tmp_path, **SMALL).setup()
    (tmp_path / "low" / "x.wav").write_bytes(b"RIFF....WAVEnothing")
    with pytest.raises(ValueError, match=r"x\.wav: cannot be read as PCM wav"):
        AudioFolder(tmp_path, **SMALL).setup()
    (tmp_path / "low" / "x.wav").write_bytes(wav_bytes(torch.zeros(0), 8000))
    with pytest.raises(ValueError, match=r"x\.wav holds no samples"):
        AudioFolder(tmp_path, **SMALL).setup()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment": 500}, "segment=500 must be a multiple of hop_length=16"),
        ({"segment": 32}, "segment must be an integer >= 64, got 32"),
        ({"num_mels": 40}, "num_mels must be an integer from 1 to 32, got 40"),
        ({"val_fraction": 2}, "val_fraction must be above 0"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        AudioFolder(**(SMALL | changes))
