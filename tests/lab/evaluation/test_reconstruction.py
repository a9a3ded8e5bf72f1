"""Paired distances in feature maps, and how much of a code is used."""

import math

import pytest
import torch
from torch import nn

from lightning_compress.lab.evaluation.features import FrozenFeatures, drawn_network
from lightning_compress.lab.evaluation.reconstruction import (
    code_usage,
    codebook_usage,
    perceptual_distance,
)
from lightning_compress.lab.models import VAE, VQVAE


def images(count=5, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_the_distance_is_that_of_the_paper_without_weights():
    """By hand: unit vectors over channels, squares summed over them, means over positions."""
    layer = nn.Conv2d(3, 6, 3)
    feature = nn.Sequential(
        layer, nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten()
    )
    a, b = images(seed=1), images(seed=2)
    expected = 0.0
    for cut in (2, 4):
        maps = [feature[:cut](one).detach().clone() for one in (a, b)]
        unit = [one / one.norm(dim=1, keepdim=True).clamp_min(1e-12) for one in maps]
        expected += float((unit[0] - unit[1]).pow(2).sum(1).mean())
    assert perceptual_distance(a, b, feature) == pytest.approx(expected, rel=1e-5)
    assert perceptual_distance(a, b, feature, batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_the_distance_grows_with_noise_in_the_features_of_the_data():
    feature, x = FrozenFeatures(drawn_network(3, 4, seed=0)), images()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = [perceptual_distance(x + level * noise, x, feature) for level in (0, 0.01, 0.1)]
    assert 0 == found[0] < found[1] < found[2]


def test_a_network_without_maps_is_compared_at_its_output():
    feature = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    a, b = images(seed=1), images(seed=2)
    unit = [nn.functional.normalize(feature(one).detach(), dim=1) for one in (a, b)]
    expected = float((unit[0] - unit[1]).pow(2).sum(1).mean())
    assert perceptual_distance(a, b, feature) == pytest.approx(expected, rel=1e-5)


def test_images_of_other_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(5, 3, 16, 16\), \(4, 3, 16, 16\)"):
        perceptual_distance(images(5), images(4), nn.Flatten())


@pytest.mark.parametrize(
    ("indices", "perplexity", "used"),
    [([3] * 8, 1.0, 1 / 8), (list(range(8)), 8.0, 1.0), ([0, 0, 0, 1], 4 / 27**0.25, 2 / 8)],
)
def test_perplexity_is_that_of_the_indices(indices, perplexity, used):
    found = codebook_usage(torch.tensor(indices).view(2, -1), 8)
    assert found["code_perplexity"] == pytest.approx(perplexity)
    assert found["codes_used"] == used


def test_each_kind_of_code_has_its_usage():
    quantized = VQVAE(image_size=16, channels=3, width=8, num_codes=16)
    found = code_usage(quantized, images(), batch_size=2)
    assert found == codebook_usage(quantized.eval().code(images()), 16)
    assert 1 <= found["code_perplexity"] <= 16 * found["codes_used"] * (1 + 1e-9)
    gaussian = VAE(image_size=16, channels=3, width=8, latent_dim=4)
    assert code_usage(gaussian, images())["latent_dim"] == 4
    assert code_usage(nn.Flatten(), images()) == {}
    assert math.isfinite(found["code_perplexity"])
