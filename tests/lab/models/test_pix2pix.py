"""pix2pix from typefaces to its report: networks, losses of the paper, files that ship."""

import json
import math

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import load_compressed, onnx_session
from lightning_compress.lab.config import config_dir
from lightning_compress.lab.models import Pix2Pix
from lightning_compress.lab.models.image_networks import PatchGAN, ResnetGenerator, UNetGenerator
from lightning_compress.lab.report.page import write_report
from lightning_compress.lab.workflow.experiment import run_experiment
from tests.helpers.fonts import GLYPHS
from tests.helpers.tiny import quiet_trainer

SIZES = {"image_size": 16, "width": 8, "discriminator_width": 8}


def small(**changes):
    return Pix2Pix(**SIZES | changes)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_a_unet_halves_down_to_two_pixels_and_skips_every_level(size):
    network = UNetGenerator(3, size, 8).eval()
    sizes = []
    for down in network.down:
        down.register_forward_hook(lambda *args: sizes.append(args[2].shape[-1]))
    x = torch.rand(1, 3, size, size, requires_grad=True)
    made = network(x)
    assert made.shape == x.shape
    assert made.abs().max() <= 1
    assert sizes == [size >> level for level in range(1, len(sizes) + 1)]
    assert sizes[-1] == 2
    for level, up in enumerate(network.up[:-1]):  # what comes from below, and the skip beside it
        wide = network.down[level].conv.out_channels
        assert up.conv.in_channels == 2 * wide


@pytest.mark.parametrize(("halvings", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_patch_of_the_judge_is_as_large_as_in_the_paper(halvings, field):
    judge = PatchGAN(1, 4, halvings=halvings)
    assert isinstance(judge[0], nn.Conv2d)
    x = torch.zeros(1, 1, 160, 160, requires_grad=True)
    for module in judge.modules():  # only which pixels reach a score matters
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
    scores = judge.eval()(x)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    reached = x.grad[0, 0].ne(0).nonzero()
    assert (reached.max(0).values - reached.min(0).values + 1).tolist() == [field, field]


def test_the_losses_are_those_of_the_paper(tmp_path):
    model = small(l1_weight=7.0, lr=0.0)
    batch = tuple(torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)).split(2))
    loader = DataLoader(TensorDataset(*batch), batch_size=2)
    trainer = quiet_trainer(tmp_path, max_steps=2)
    losses = []
    model.manual_backward = lambda loss: (losses.append(loss.item()), loss.backward())
    trainer.fit(model, loader)
    with torch.no_grad():
        torch.manual_seed(0)
        x, real = (2 * one - 1 for one in batch)
        model.train()
        for module in model.generator.modules():  # as in training, but for what dropout draws
            if isinstance(module, nn.Dropout2d):
                module.eval()
        fake = model.generator(x)
        l1 = (fake - real).abs().mean()
        true, false = (model._judge(x, one) for one in (real, fake))
        d = (functional.softplus(-true).mean() + functional.softplus(false).mean()) / 2
        g = functional.softplus(-false).mean() + 7.0 * l1
    assert losses == pytest.approx([d.item(), g.item()], rel=0.05)
    assert trainer.callback_metrics["train/l1"] == pytest.approx(l1.item() / 2, rel=0.05)


def test_distances_are_of_images_in_0_1():
    model = small()
    real = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert model.distances(real, real) == pytest.approx({"l1": 0.0, "ssim": 1.0})
    found = model.distances((real + 0.25).clamp(0, 1), real)
    assert 0 < found["l1"] < 0.25
    assert found["ssim"] < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 24}, "image_size=24.*power of two.*network='resnet'"),
        ({"image_size": 4}, "image_size=4"),
        ({"network": "resnet", "image_size": 18}, "image_size=18.*multiple of 4"),
        ({"network": "unit"}, "network='unit'.*unet"),
        ({"image_size": None}, "image_size is None"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"l1_weight": -1.0}, "l1_weight=-1.0"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_the_resnet_generator_keeps_sizes_and_range():
    made = ResnetGenerator(3, 20, 8, blocks=2)(torch.rand(2, 3, 20, 20))
    assert made.shape == (2, 3, 20, 20)
    assert made.abs().max() <= 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The shipped recipe between two installed typefaces, tiny."""
    folder = tmp_path_factory.mktemp("pix2pix")
    words = [
        "experiment=pix2pix",
        *GLYPHS,
        "data.image_size=16",
        "data.batch_size=16",
        "data.test_fraction=0.3",
        "model.width=16",
        "model.discriminator_width=8",
        "trainer.max_epochs=4",
        "trainer.limit_train_batches=4",
        "trainer.accelerator=cpu",
        "compression.channels.on_miss=warn",
        "evaluate.latency_repeats=1",
        f"evaluate.cache_dir={folder / 'cache'}",
        "hopeless.max_loss=auto",
    ]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", overrides=words)
    return cfg, run_experiment(cfg, folder / "run"), folder / "run"


def test_the_recipe_runs_from_fonts_to_results(run):
    _, results, folder = run
    written = json.loads((folder / "results.json").read_text())
    for side in ("dense", "compressed"):
        quality = written[side]["quality"]
        assert {"l1", "ssim", "fid", "kid"} <= set(quality)
        assert all(math.isfinite(value) for value in quality.values())
        assert all(written[side]["bytes"][key] > 0 for key in ("torch", "lcz", "onnx_int8"))
    assert results["verdict"]["metric"] == "l1"
    assert written["evaluator"]["feature"].startswith("GlyphPairs-rotation-")
    assert written["ratio"] > 3
    assert written["compressed"]["macs"] < written["dense"]["macs"]
    (operators,) = results["compressed"]["int8_ops"].values()
    assert sum(operators["int8_ops"].values()) > 0
    page = write_report([folder]).read_text(encoding="utf-8")
    assert "mean absolute difference" in page
    assert "structural similarity" in page
    assert page.count("Conditions") >= 1
    for side in ("condition", "real", "dense", "compressed"):
        assert (folder / results["samples"][side]).is_file()


def test_the_files_give_the_models_images(run):
    _, _, folder = run
    model = small(width=16).eval()
    load_compressed(folder / "compressed" / "model.lcz", model.deployed_module())
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    session = onnx_session(folder / "compressed" / "generator.onnx")
    (made,) = session.run(None, {session.get_inputs()[0].name: (2 * x - 1).numpy()})
    assert np.abs(model.outputs(x).detach().numpy() - (made + 1) / 2).max() < 1e-3
