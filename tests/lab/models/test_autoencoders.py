"""Autoencoders whose decoder is deployed: from an icon theme to a report, a frozen encoder."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.image import PeakSignalNoiseRatio

from lightning_compress import load_compressed, onnx_session
from lightning_compress.lab.config import config_dir
from lightning_compress.lab.models import VQVAE, AutoencoderKL
from lightning_compress.lab.models.gan import discriminator_loss
from lightning_compress.lab.models.vq_vae import nearest
from lightning_compress.lab.report.page import write_report
from lightning_compress.lab.workflow.experiment import run_experiment
from tests.helpers.icons import discs

SIZES: dict[str, Any] = {"image_size": 16, "channels": 3, "width": 8}
MODELS = {
    "autoencoder_kl": lambda **changes: AutoencoderKL(
        **(SIZES | {"discriminator_width": 4} | changes)
    ),
    "vq_vae": lambda **changes: VQVAE(**(SIZES | {"num_codes": 16} | changes)),
}
NAMES = sorted(MODELS)


def colours(count=16):
    generator = torch.Generator().manual_seed(0)
    flat = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, 16, 16)
    return flat.contiguous()


def fitted(model, tmp_path, epochs=1, x=None):
    x = colours() if x is None else x
    data = TensorDataset(x, torch.zeros(len(x)))
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=8), DataLoader(data, batch_size=8))
    return trainer


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_a_code_is_as_many_halvings_smaller(name, halvings):
    model = MODELS[name](halvings=halvings).eval()
    code = model.code(torch.rand(2, 3, 16, 16))
    side = 16 // 2**halvings
    assert code.shape == ((2, 4, side, side) if name == "autoencoder_kl" else (2, side, side))
    assert code.dtype == model.sample_code().dtype
    assert code.shape == model.sample_code().shape
    assert model(code).shape == (2, 3, 16, 16)
    assert model.outputs(torch.rand(2, 3, 16, 16)).min() >= 0


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_encoder_stays_to_the_bit_while_its_decoder_trains(name, tmp_path):
    model = MODELS[name](train_part="decoder")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fitted(model, tmp_path)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert not [key for key in changed if key.startswith("encoder.")]
    of_decoder = {key for key in before if key.startswith("decoder.")}
    assert {key for key in of_decoder if key.endswith("weight")} <= changed
    optimizer = model.configure_optimizers()
    first = optimizer[0] if isinstance(optimizer, list) else optimizer
    (group,) = first.param_groups
    assert {id(one) for one in group["params"]} == {id(one) for one in model.decoder.parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_training_brings_reconstructions_nearer(name, tmp_path):
    torch.manual_seed(0)
    model, x = MODELS[name](lr=1e-2), colours()
    before = model.distances(model.eval().outputs(x).detach(), x)
    trainer = fitted(model.train(), tmp_path, epochs=8)
    after = model.distances(model.eval().outputs(x).detach(), x)
    assert after["psnr"] > before["psnr"] + 1
    assert 0 < trainer.callback_metrics["val/l1"] < 0.3
    rates = [group["lr"] for one in trainer.optimizers for group in one.param_groups]
    assert rates == pytest.approx([1e-3] * len(rates))


def test_distances_are_those_of_torchmetrics_image_by_image():
    x, y = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)
    metric = PeakSignalNoiseRatio(data_range=1.0)
    expected = sum(float(metric(a, b)) for a, b in zip(x, y, strict=True)) / 4
    found = MODELS["vq_vae"]().distances(x, y)
    assert found["psnr"] == pytest.approx(expected, rel=1e-5)
    assert MODELS["vq_vae"]().distances(x, x)["ssim"] == pytest.approx(1)


def test_the_nearest_code_is_that_of_all_distances():
    z, codes = torch.randn(2, 5, 3, 4), torch.randn(7, 5)
    squares = (z[:, None] - codes[None, :, :, None, None]).square().sum(2)
    assert torch.equal(nearest(z, codes), squares.argmin(1))


def test_the_losses_of_a_vq_vae_are_those_of_the_paper():
    """Equation 3: the codebook moves by its own term alone, the encoder by the other two."""
    model, logged = MODELS["vq_vae"](commitment=0.5), {}
    model.log = lambda name, value, **_: logged.update({name: float(value)})
    x = torch.rand(2, 3, 16, 16)
    loss = model.training_step((x, None), 0)
    z, indices = model.encoder(2 * x - 1)
    codes = model.decoder.codebook(indices).permute(0, 3, 1, 2)
    distance = float((z - codes).detach().square().mean())
    assert logged["train/codes"] == pytest.approx(1.5 * distance, rel=1e-5)
    assert float(loss.detach()) == pytest.approx(logged["train/mse"] + 1.5 * distance, rel=1e-5)
    loss.backward()
    (expected,) = torch.autograd.grad(
        (z.detach() - codes).square().mean(), model.decoder.codebook.weight
    )
    torch.testing.assert_close(model.decoder.codebook.weight.grad, expected)
    assert model.encoder.network[0].weight.grad.abs().sum() > 0


def test_one_codebook_serves_both_until_the_encoder_is_frozen():
    whole, part = MODELS["vq_vae"](), MODELS["vq_vae"](train_part="decoder")
    assert whole.encoder.codebook is whole.decoder.codebook
    assert part.encoder.codebook is not part.decoder.codebook
    part.load_state_dict(whole.state_dict())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(part.eval().outputs(x), whole.eval().outputs(x))


def test_unused_codes_restart_at_vectors_of_the_data(tmp_path):
    model = MODELS["vq_vae"]()
    with torch.no_grad():
        model.decoder.codebook.weight[1:] += 100.0
    fitted(model, tmp_path)
    assert model.decoder.codebook.weight.abs().max() < 50
    assert len(model.decoder.codebook.weight.detach().unique(dim=0)) > 8


def test_the_hinge_loss_is_zero_for_a_sure_discriminator():
    sure = torch.full((2, 1), 1.5)
    assert discriminator_loss(sure, -sure, loss="hinge") / 2 == 0
    assert discriminator_loss(torch.zeros(3), torch.zeros(3), loss="hinge") / 2 == 1


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vq_vae", {"image_size": 18}, "image_size=18 cannot be halved 2 times"),
        ("autoencoder_kl", {"train_part": "encoder"}, r"train_part='encoder': .*'all', 'decoder'"),
        ("autoencoder_kl", {"kl_weight": -1.0}, "kl_weight=-1.0"),
        ("vq_vae", {"num_codes": 1}, "num_codes=1: expected an integer of at least 2"),
        ("vq_vae", {"channels": None}, "channels is None"),
    ],
)
def test_bad_arguments_are_named(name, changes, message):
    with pytest.raises(ValueError, match=message):
        MODELS[name](**changes)


@pytest.fixture(scope="module", params=NAMES)
def run(request, tmp_path_factory):
    """The shipped recipe on a theme of discs, tiny."""
    folder = tmp_path_factory.mktemp(request.param)
    words = [
        f"experiment={request.param}",
        f"data.folder={discs(folder / 'theme')}",
        "data.image_size=16",
        "data.filing.min_size=16",
        "data.test_fraction=0.3",
        "data.batch_size=8",
        "model.width=16",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=4",
        "trainer.accelerator=cpu",
        "evaluate.latency_repeats=1",
        "evaluate.monitor_every=1",
        f"evaluate.cache_dir={folder / 'cache'}",
        "export.int8=false",  # a barely trained GroupNorm magnifies steps beyond the check
    ]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", overrides=words)
    return request.param, run_experiment(cfg, folder / "run"), folder / "run"


def test_the_recipe_runs_from_icons_to_results(run):
    name, results, folder = run
    written = json.loads((folder / "results.json").read_text())
    usage = "active_units" if name == "autoencoder_kl" else "code_perplexity"
    for side in ("dense", "compressed"):
        quality = written[side]["quality"]
        assert {"psnr", "ssim", "perceptual", "fid", usage} <= set(quality)
        assert all(math.isfinite(value) for value in quality.values())
    assert written["dense"]["quality"][usage] == written["compressed"]["quality"][usage]
    assert written["compressed"]["macs"] < 0.55 * written["dense"]["macs"]
    assert written["ratio"] > 6
    assert results["verdict"]["metric"] == "psnr"
    assert "val/psnr" in (folder / "curves.csv").read_text()
    page = write_report([folder]).read_text(encoding="utf-8")
    assert "PSNR (dB)" in page
    assert "begun with the weights of the dense run" in page
    assert ("perplexity of the codebook" in page) == (name == "vq_vae")


def test_samples_are_reconstructions_beside_their_originals(run):
    _, results, folder = run
    assert {"dense", "compressed", "real"} <= set(results["samples"])
    assert (folder / results["samples"]["real"]).is_file()


def test_the_compressed_run_keeps_the_dense_encoder(run):
    _, _, folder = run
    dense, compressed = (
        torch.load(folder / side / "final.ckpt", weights_only=True)["state_dict"]
        for side in ("dense", "compressed")
    )
    of_encoder = [key for key in dense if key.startswith("encoder.")]
    assert of_encoder
    assert all(torch.equal(dense[key], compressed[key]) for key in of_encoder)


def test_the_files_give_the_models_images(run):
    name, _, folder = run
    changes = {"width": 16} | ({"num_codes": 256} if name == "vq_vae" else {})
    model = MODELS[name](**changes).eval()
    load_compressed(folder / "dense" / "model.lcz", model.deployed_module())
    code = model.sample_code()
    session = onnx_session(folder / "dense" / "decoder.onnx")
    (given,) = session.get_inputs()
    assert given.type == ("tensor(int64)" if name == "vq_vae" else "tensor(float)")
    (other,) = session.run(None, {given.name: code.numpy()})
    assert np.abs(model(code).detach().numpy() - other).max() < 1e-3
