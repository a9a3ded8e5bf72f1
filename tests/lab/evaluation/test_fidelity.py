"""FID against scipy's matrix root, KID against an explicit sum, precision/recall by brute force."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from lightning_compress.lab.evaluation.fidelity import (
    extract_features,
    fidelity,
    noise_floor,
    precision_recall,
)


class Projection(nn.Module):
    """A fixed feature space of 6 numbers that also depends on the mode it is run in."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.linear = nn.Linear(64, 6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.linear(x.flatten(1)))


def images(count, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, generator=generator) * (1 + shift) + shift


def numpy_features(x, feature):
    weight, bias = feature.linear.weight.detach(), feature.linear.bias.detach()
    return (x.flatten(1) @ weight.T + bias).double().numpy()


def numpy_fid(a, b):
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    traces = np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root)
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + traces


def numpy_mmd(a, b):
    """Unbiased, cubic kernel, by its sums over pairs."""

    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    n, total = len(a), 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += (kernel(a[i], a[j]) + kernel(b[i], b[j])) / (n * (n - 1))
            total -= 2 * kernel(a[i], b[j]) / n**2
    return total


def numpy_coverage(points, support, k):
    """Share of points within the k-th neighbour's radius of some support point."""
    hits = 0
    radii = [sorted(np.linalg.norm(support - s, axis=1))[k] for s in support]
    for point in points:
        distances = np.linalg.norm(support - point, axis=1)
        hits += any(d <= r for d, r in zip(distances, radii, strict=True))
    return hits / len(points)


def test_each_metric_equals_its_reference():
    feature = Projection()
    fake, true = images(40, shift=0.2, seed=1), images(50)
    a, b = numpy_features(fake, feature), numpy_features(true, feature)
    result = fidelity(fake, true, feature, batch_size=7)
    assert list(result) == ["fid", "kid", "kid_std", "precision", "recall", "samples"]
    assert result["fid"] == pytest.approx(numpy_fid(a, b), rel=1e-5)
    assert result["precision"] == numpy_coverage(a, b, 3)
    assert result["recall"] == numpy_coverage(b, a, 3)
    assert result["samples"] == 40


def test_kernel_distance_equals_the_sum_over_pairs():
    feature, fake, true = Projection(), images(40, shift=0.2, seed=1), images(40)
    result = fidelity(fake, true, feature, kid_subset_size=40)
    expected = numpy_mmd(numpy_features(fake, feature), numpy_features(true, feature))
    assert result["kid"] == pytest.approx(expected, rel=1e-5)
    assert result["kid_std"] == pytest.approx(0, abs=1e-9)  # every subset is the whole set
    subsets = fidelity(fake, true, feature)  # halves of 20
    assert subsets["kid_std"] > 0
    assert subsets["kid"] == pytest.approx(expected, abs=subsets["kid_std"])


def test_equal_sets_are_perfect_and_a_collapsed_set_has_no_recall():
    feature, true = Projection(), images(200)
    same = fidelity(true, true, feature)
    assert same["fid"] == pytest.approx(0, abs=1e-6)
    assert same["precision"] == same["recall"] == 1.0
    collapsed = fidelity(true[:1].repeat(200, 1, 1, 1), true, feature)
    assert collapsed["precision"] == 1.0  # it is a real image
    assert collapsed["recall"] <= 1 / 200
    assert collapsed["fid"] > 10 * noise_floor(true, feature)["fid"]


def test_precision_and_recall_do_not_depend_on_the_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    fake, true = torch.randn(61, 4, generator=generator), torch.randn(83, 4, generator=generator)
    whole = precision_recall(fake, true, k=2)
    expected = [numpy_coverage(*pair, 2) for pair in ((fake.numpy(), true.numpy()),)]
    monkeypatch.setattr("lightning_compress.lab.evaluation.fidelity.CHUNK", 9)
    assert precision_recall(fake, true, k=2) == whole
    assert whole[0] == expected[0]
    assert precision_recall(true, fake, k=2) == whole[::-1]


def test_the_noise_floor_compares_disjoint_halves():
    real = images(41)
    seen = []

    class Recorder(Projection):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    floor = noise_floor(real, Recorder(), seed=4)
    assert floor["samples"] == 20
    assert [len(part) for part in seen] == [20, 21]
    rows = torch.cat(seen).flatten(1)
    assert torch.equal(rows.sort(dim=0).values, real.flatten(1).sort(dim=0).values)
    assert noise_floor(real, Projection(), seed=4) == floor
    assert noise_floor(real, Projection(), seed=5) != floor


def test_the_noise_floor_does_not_hang_on_the_order_of_the_images():
    """Files lie sorted by class: the first half against the second would be no noise."""
    dark, bright = images(60), images(60, shift=0.5, seed=1)
    apart = fidelity(dark, bright, Projection())["fid"]
    floor = noise_floor(torch.cat([dark, bright]), Projection())
    assert floor["fid"] < 0.1 * apart
    assert floor["recall"] > 0.6


def test_seeds_decide_and_neither_random_stream_nor_mode_moves():
    feature, random = Projection().train(), torch.get_rng_state()
    fake, true = images(30, seed=1), images(30)
    first = fidelity(fake, true, feature, seed=1)
    torch.rand(3)
    assert fidelity(fake, true, feature, seed=1) == first
    assert fidelity(fake, true, feature, seed=2)["kid"] != first["kid"]
    assert feature.training
    assert feature.dropout.training
    torch.set_rng_state(random)
    fidelity(fake, true, feature)
    assert torch.equal(torch.get_rng_state(), random)


def test_grey_images_reach_the_feature_network_with_one_channel():
    assert extract_features(images(5), Projection()).shape == (5, 6)
    assert extract_features(images(5), Projection()).dtype == torch.float64


BAD = {
    "few": (lambda: (images(3), images(20), Projection()), r"generated: at least 4 .* got 3"),
    "nan": (lambda: (images(9), images(9) / 0 * 0, Projection()), r"real images have .* finite"),
    "shape": (lambda: (images(9), images(9)[..., :4], Projection()), r"\(1, 8, 8\) and \(1, 8, 4"),
    "rank": (lambda: (images(9)[:, 0], images(9), Projection()), r"generated images must be \(N"),
    "feature": (lambda: (images(9), images(9), nn.Identity()), r"feature must return \(N, D\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_refused(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        fidelity(*arguments())


@pytest.mark.parametrize("size", [1, 10])
def test_a_subset_size_outside_the_data_is_refused(size):
    with pytest.raises(ValueError, match=rf"kid_subset_size must lie in \[2, 9\], got {size}"):
        fidelity(images(9), images(9), Projection(), kid_subset_size=size)
    with pytest.raises(ValueError, match=r"real: at least 8 images"):
        noise_floor(images(7), Projection())
