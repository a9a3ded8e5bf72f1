"""A vocoder from wav files to its report: losses of the paper, data, files that ship."""

import json
import math
import wave

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from lightning_compress import load_compressed, onnx_session
from lightning_compress.lab.config import config_dir
from lightning_compress.lab.data import AudioFolder
from lightning_compress.lab.models import Vocoder
from lightning_compress.lab.models.hifi_gan import Discriminators, HiFiGenerator
from lightning_compress.lab.models.vocoder import (
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
)
from lightning_compress.lab.report.page import write_report
from lightning_compress.lab.workflow.experiment import run_experiment
from tests.helpers.sounds import chirps

SIZES = {"sample_rate": 8000, "n_fft": 64, "hop_length": 16, "num_mels": 8, "segment": 512}


def small(**changes):
    return Vocoder(**(SIZES | {"width": 16, "rates": (4, 4), "discriminator_width": 4} | changes))


@pytest.mark.parametrize("rates", [(4, 4), (5, 3), (8, 2, 2)])
def test_a_frame_becomes_as_many_samples_as_the_rates_multiply_to(rates):
    made = HiFiGenerator(8, width=16, rates=rates)(torch.zeros(2, 8, 7))
    assert made.shape == (2, 1, 7 * math.prod(rates))
    assert made.abs().max() <= 1


def test_every_discriminator_judges_any_length():
    judged = Discriminators(4)(torch.rand(2, 1, 509))
    assert len(judged) == 5 + 2
    assert all(scores.shape[0] == 2 and len(features) == 4 for scores, features in judged)


def test_the_losses_are_those_of_the_paper():
    real = [(torch.tensor([[1.0]]), [torch.tensor([1.0, 3.0])])]
    fake = [(torch.tensor([[0.5]]), [torch.tensor([0.0, 1.0])])]
    assert discriminator_loss(real, fake) == 0.25
    assert generator_loss(fake) == 0.25
    assert feature_matching_loss(real, fake) == 1.5
    assert discriminator_loss(real * 2, fake * 2) == 0.5


def test_both_distances_grow_with_noise_and_weigh_every_row():
    model = small()
    real = 0.3 * torch.sin(torch.arange(2048.0) * 0.3).repeat(300, 1, 1)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    found = [model.distances(real + level * noise, real) for level in (0.0, 0.01, 0.1)]
    for name in ("mel_distance", "stft_distance"):
        assert 0 == found[0][name] < found[1][name] < found[2][name]
    uneven = torch.cat([real[:256], real[256:] + 0.1 * noise[256:]])
    assert model.distances(uneven, real)["mel_distance"] == pytest.approx(
        float(model._mel_loss(uneven, real)), rel=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": (4, 2)}, r"rates=\(4, 2\) multiply to 8, hop_length=16"),
        ({"rates": (2, 2, 2, 2)}, "width=8 cannot be halved by each of 4 rates"),
        ({"discriminator_width": 6}, "discriminator_width=6: expected a multiple of 4"),
        ({"sample_rate": None}, "sample_rate is None"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**({"width": 8} if "rates" in changes else {}) | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The shipped recipe on a folder of chirps, tiny."""
    folder = tmp_path_factory.mktemp("vocoder")
    words = [
        "experiment=vocoder",
        f"data.folder={chirps(folder / 'chirps')}",
        *(f"data.{name}={SIZES[name]}" for name in ("segment", "n_fft", "hop_length", "num_mels")),
        "data.batch_size=8",
        "data.test_fraction=0.3",
        "model.width=16",
        "model.rates=[4,4]",
        "model.discriminator_width=4",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=4",
        "trainer.accelerator=cpu",
        "evaluate.latency_repeats=1",
        "evaluate.monitor_every=1",
        f"evaluate.cache_dir={folder / 'cache'}",
        "hopeless.max_loss=auto",
    ]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", overrides=words)
    return cfg, run_experiment(cfg, folder / "run"), folder / "run"


def test_the_recipe_runs_from_wav_files_to_results(run):
    _, results, folder = run
    written = json.loads((folder / "results.json").read_text())
    for side in ("dense", "compressed"):
        quality = written[side]["quality"]
        assert {"mel_distance", "stft_distance", "fid", "kid"} <= set(quality)
        assert all(math.isfinite(value) for value in quality.values())
        assert all(written[side]["bytes"][key] > 0 for key in ("torch", "lcz", "onnx_int8"))
    assert results["verdict"]["metric"] == "mel_distance"
    assert written["evaluator"]["feature"].startswith("AudioFolder-direction_and_band-")
    assert written["evaluator"]["feature_accuracy"] > 1 / 6
    assert written["ratio"] > 3
    (operators,) = results["compressed"]["int8_ops"].values()
    assert sum(operators["int8_ops"].values()) > 0
    curves = (folder / "curves.csv").read_text()
    assert "val/mel_distance" in curves
    assert "val/mel_loss" in curves
    page = write_report([folder]).read_text(encoding="utf-8")
    assert "log-mel distance" in page
    assert "self-supervised: test accuracy on direction of time and frequency band" in page


def test_samples_are_sounds_and_spectrograms(run):
    _, results, folder = run
    names = results["samples"]
    for side in ("dense", "compressed", "real"):
        assert (folder / f"samples_{side}.png").is_file()
        with wave.open(str(folder / names[f"{side}_0.wav"])) as file:
            assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (8000, 1, 512)


def test_the_files_give_the_models_waveforms(run):
    cfg, _, folder = run
    data = AudioFolder(cfg.data.folder, **{k: v for k, v in SIZES.items() if k != "sample_rate"})
    data.setup()
    mel = data.test_dataset.tensors[0][:2]
    model = small().eval()
    load_compressed(folder / "compressed" / "model.lcz", model.deployed_module())
    made = model.outputs(mel).detach().numpy()
    session = onnx_session(folder / "compressed" / "generator.onnx")
    (other,) = session.run(None, {session.get_inputs()[0].name: mel.numpy()})
    assert np.abs(made - other).max() < 1e-3
