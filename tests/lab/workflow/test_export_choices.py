"""Lossy choices of conf/export: a smaller file, and a model that is what its file says."""

import copy

import torch
from omegaconf import OmegaConf

from lightning_compress import load_compressed
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
