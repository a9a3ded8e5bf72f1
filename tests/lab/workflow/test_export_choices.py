"""Lossy choices of conf/export: a smaller file, and a model that is what its file says."""

import copy

import torch
from omegaconf import OmegaConf

from lightning_compress import load_compressed, quantize_weights
from lightning_compress.lab.data import Digits
from lightning_compress.lab.models import VAE
from lightning_compress.lab.workflow.costs import write_files


def test_side_data_shrink_and_the_model_has_the_files_values(tmp_path):
    torch.manual_seed(0)
    model = VAE(image_size=16, channels=1, width=8, latent_dim=4)
    images = torch.rand(32, 1, 16, 16)
    for _ in range(3):
        model.elbo_terms(images)  # statistics of BatchNorm
    model.eval()
    code = torch.randn(5, 4)
    before, plain = model.decoder(code), copy.deepcopy(model)
    export = OmegaConf.create(
        {"codec": "fast", "onnx": False, "float_dtype": "fp16", "fold_batchnorm": True}
    )
    exact, _ = write_files(plain, tmp_path, export)
    assert torch.equal(plain.decoder(code), before)
    small, _ = write_files(model, tmp_path, export, lossy=True)
    assert small["lcz"] < 0.7 * exact["lcz"]
    after = model.decoder(code)
    assert torch.allclose(after, before, atol=0.02)
    assert not torch.equal(after, before)
    fresh = VAE(image_size=16, channels=1, width=8, latent_dim=4).eval()
    load_compressed(tmp_path / "model.lcz", fresh.deployed_module())
    assert torch.equal(fresh.decoder(code), after)


def test_grid_points_are_chosen_by_the_training_data(tmp_path):
    data = Digits(batch_size=64)
    data.prepare_data()
    data.setup()
    torch.manual_seed(0)
    model = VAE(image_size=16, channels=1, width=8, latent_dim=4).eval()
    quantize_weights(model, 8, scheme="entropy", step=0.3)
    plain, x = copy.deepcopy(model), data.train_dataset[0][0][None]
    export = OmegaConf.create({"codec": "fast", "onnx": False, "rdoq": 0.05})
    exact, _ = write_files(plain, tmp_path, export, data)
    small, _ = write_files(model, tmp_path, export, data, lossy=True)
    assert small["lcz"] < 0.8 * exact["lcz"]
    for ours, before in zip(model.encoder(x), plain.encoder(x), strict=True):
        assert torch.allclose(ours, before, atol=0.3)
        assert not torch.equal(ours, before)
