"""Features without labels: they are learned, cached, told by name, and order what they compare."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_compress.lab.evaluation.fidelity import fidelity, noise_floor
from lightning_compress.lab.evaluation.self_supervised import (
    PRETEXT_TASKS,
    self_supervised_network,
)


def digits():
    x = torch.from_numpy(load_digits().images).float()[:, None] / 16
    x = nn.functional.interpolate(x, size=16, mode="bilinear").clamp(0, 1)
    return x[:1000], x[1000:1400]


def trained(cache, task="rotation", **changes):
    train, test = digits()
    options = {"task": task, "cache_dir": cache, "fingerprint": "digits:1", "epochs": 2}
    return self_supervised_network(train, test, **(options | changes))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def extractor(cache):
    return trained(cache)


def test_rotations_are_those_of_rot90_and_halves_where_images_are_not_square():
    x = torch.rand(3, 2, 8, 8)
    changed, ways = PRETEXT_TASKS["rotation"].examples(x)
    assert ways.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for way in range(4):
        assert changed[ways == way].equal(torch.rot90(x, way, (2, 3)))
    wide = torch.rand(3, 2, 8, 12)
    changed, ways = PRETEXT_TASKS["rotation"].examples(wide)
    assert ways.max() == 1
    assert changed[ways == 1].equal(wide.flip(2, 3))


def test_bands_are_told_by_place_and_direction():
    x = torch.arange(16.0).reshape(1, 1, 16, 1).expand(1, 1, 16, 8) + torch.arange(8.0) / 10
    changed, ways = PRETEXT_TASKS["direction_and_band"].examples(x)
    assert changed.shape == (6, 1, 12, 8)
    firsts = [changed[way, 0, 0].tolist() for way in ways.tolist()]
    forwards = [[start + step / 10 for step in range(8)] for start in (0, 2, 4)]
    for way, first in enumerate(firsts):
        expected = forwards[way // 2]
        assert first == pytest.approx(expected[::-1] if way % 2 else expected)


def test_the_network_knows_the_rotation_of_unseen_digits(extractor):
    _, test = digits()
    changed, ways = PRETEXT_TASKS["rotation"].examples(test)
    hits = (extractor.module.network(changed).argmax(1) == ways).double().mean().item()
    assert extractor.test_accuracy == hits > 0.7  # 0.25 by chance; 0, 1 and 8 look alike turned
    assert (extractor.task, extractor.name[:16]) == ("rotation", "digits-rotation-")


def test_fidelity_orders_noise_above_real_halves(extractor):
    _, x = digits()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        fidelity((x + level * noise).clamp(0, 1), x, extractor.module)["fid"]
        for level in (0.1, 0.3)
    ]
    assert noise_floor(x, extractor.module)["fid"] < distances[0] < distances[1]


def test_the_cache_gives_the_same_network_and_the_callers_random_stream_stays(extractor, cache):
    def no_training(text):
        raise AssertionError(text)

    before = torch.get_rng_state()
    again = trained(cache, progress=no_training)
    fresh = trained(cache, fingerprint="digits:2", epochs=1)
    assert torch.get_rng_state().equal(before)
    _, x = digits()
    assert again.module(x).equal(extractor.module(x))
    assert (again.name, again.test_accuracy) == (extractor.name, extractor.test_accuracy)
    assert fresh.name != extractor.name


@pytest.mark.parametrize(
    ("train", "task", "message"),
    [
        (torch.rand(4, 1, 16, 16), "jigsaw", "'jigsaw': valid are .*'rotation'"),
        (torch.rand(4, 1, 16, 16) * 2, "rotation", "train: images must be floats in"),
        (torch.rand(4, 1, 16, 4), "rotation", r"train: .*H, W >= 8, got \(4, 1, 16, 4\)"),
    ],
)
def test_bad_input_is_named(tmp_path, train, task, message):
    with pytest.raises(ValueError, match=message):
        self_supervised_network(
            train, torch.rand(4, 1, 16, 16), task=task, cache_dir=tmp_path, fingerprint="x:1"
        )
