"""The data set's own network: trained on real digits, cached, and apart from the caller's state."""

import sys
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_compress.errors import MissingExtraError
from lightning_compress.lab.evaluation.features import (
    FeatureNetwork,
    inception_extractor,
    trained_feature_network,
)
from lightning_compress.lab.evaluation.fidelity import fidelity, noise_floor


def digits():
    """Real images (1797, 1, 16, 16) in [0, 1] and labels, first 1,200 for training."""
    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 16
    x = nn.functional.interpolate(x, size=16, mode="bilinear").clamp(0, 1)
    y = torch.from_numpy(data.target)
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def extractor(cache):
    return trained(cache)


def trained(cache, **changes):
    train, test = digits()
    options = {"num_classes": 10, "cache_dir": cache, "fingerprint": "digits:1"}
    return trained_feature_network(train, test, **(options | changes))


def test_the_network_knows_unseen_digits(extractor):
    _, (x, y) = digits()
    assert extractor.test_accuracy > 0.9
    logits = extractor.module.network(x)
    assert extractor.test_accuracy == (logits.argmax(1) == y).double().mean().item()
    assert extractor.name.startswith("digits-cnn-")
    assert extractor.module(x).shape == (597, 64)
    assert not any(p.requires_grad for p in extractor.module.parameters())


def test_fidelity_orders_noise_above_real_halves(extractor):
    _, (x, _) = digits()
    floor = noise_floor(x, extractor.module)
    distances = []
    for level in (0.1, 0.3):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        noisy = (x + level * noise).clamp(0, 1)
        distances.append(fidelity(noisy, x, extractor.module))
    assert floor["fid"] < distances[0]["fid"] < distances[1]["fid"]
    assert floor["kid"] < distances[0]["kid"] < distances[1]["kid"]
    assert floor["precision"] > distances[1]["precision"]
    one_class = fidelity(x[:60].repeat(10, 1, 1, 1)[:597], x, extractor.module)
    assert one_class["recall"] < floor["recall"]


def test_torchmetrics_takes_the_module_as_it_is(extractor):
    _, (x, _) = digits()
    metric = FrechetInceptionDistance(feature=extractor.module, normalize=True)
    metric.update(x[:300], real=True)
    metric.update(x[300:], real=False)
    expected = fidelity(x[300:], x[:300], extractor.module)["fid"]
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-4)


def test_the_module_stays_in_eval_mode(extractor):
    wrapper = nn.ModuleDict({"feature": extractor.module}).train()
    assert not any(part.training for part in wrapper["feature"].modules())


def test_the_cache_gives_the_same_network_without_training(extractor, cache):
    def no_training(text):
        raise AssertionError(text)

    again = trained(cache, progress=no_training)
    _, (x, _) = digits()
    assert torch.equal(again.module(x), extractor.module(x))
    assert (again.name, again.test_accuracy) == (extractor.name, extractor.test_accuracy)
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def small(cache, **changes):
    torch.manual_seed(0)
    x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 4
    options = {"num_classes": 4, "cache_dir": cache, "fingerprint": "toy:1", "epochs": 1}
    return trained_feature_network((x, y), (x[:8], y[:8]), **(options | changes))


def test_training_is_decided_by_its_seed_and_moves_no_random_stream(tmp_path):
    x = torch.rand(5, 1, 8, 8)
    first = small(tmp_path / "a").module(x)
    torch.manual_seed(0)
    torch.rand(40, 1, 8, 8)
    random = torch.get_rng_state()
    again = small(tmp_path / "b").module(x)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "change", [{"fingerprint": "toy:2"}, {"seed": 1}, {"epochs": 2}, {"num_classes": 5}]
)
def test_whatever_decides_the_weights_is_in_the_name(change, tmp_path):
    assert small(tmp_path).name != small(tmp_path, **change).name
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_cache_is_built_again_with_a_warning(tmp_path):
    first = small(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="is damaged and is built again"):
        again = small(tmp_path)
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(first.module(x), again.module(x))
    assert small(tmp_path).test_accuracy == first.test_accuracy


def test_of_two_trainings_at_once_the_first_one_written_serves_both(tmp_path):
    files = []

    def meanwhile(text):
        """Another process finishes while this one trains; its weights come out otherwise."""
        small(tmp_path)
        (path,) = tmp_path.iterdir()
        with safe_open(path, framework="pt") as stored:
            weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            record = stored.metadata()
        weights["body.7.bias"] += 1
        save_file(weights, path, metadata=record | {"test_accuracy": "0.125"})
        files.append(path.read_bytes())

    slow = small(tmp_path, progress=meanwhile)
    (path,) = tmp_path.iterdir()  # and no temporary file
    assert [path.read_bytes()] == files
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(slow.module(x), small(tmp_path).module(x))
    assert slow.test_accuracy == 0.125


def test_a_data_set_of_pairs_gives_the_same_network(tmp_path):
    torch.manual_seed(0)
    x, y = torch.rand(40, 3, 9, 11), torch.arange(40) % 4
    options = {"num_classes": 4, "fingerprint": "toy:1", "epochs": 1}
    pairs = TensorDataset(x, y)
    lines = []
    from_pairs = trained_feature_network(
        pairs, pairs, cache_dir=tmp_path / "a", progress=lines.append, **options
    )
    from_tensors = trained_feature_network((x, y), (x, y), cache_dir=tmp_path / "b", **options)
    assert torch.equal(from_pairs.module(x), from_tensors.module(x))
    assert len(lines) == 1
    assert "epoch 1/1" in lines[0]


BAD_DATA = {
    "range": ((torch.full((4, 1, 8, 8), -1.0), torch.zeros(4)), r"train: .* in \[0, 1\]"),
    "bytes": ((torch.zeros(4, 1, 8, 8).byte(), torch.zeros(4)), r"floats in \[0, 1\].*uint8"),
    "nan": ((torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4)), r"floats in \[0, 1\]"),
    "label": ((torch.zeros(4, 1, 8, 8), torch.full((4,), 4)), r"labels .* \[0, 4\), got 4"),
    "count": ((torch.zeros(4, 1, 8, 8), torch.zeros(3)), r"\(4, 1, 8, 8\) and \(3,\)"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_are_refused(case, tmp_path):
    data, message = BAD_DATA[case]
    with pytest.raises(ValueError, match=message):
        trained_feature_network(
            data, data, num_classes=4, cache_dir=tmp_path, fingerprint="toy:1", epochs=1
        )


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 7, 16), (1, 16, 16)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must be \(N, 1, H, W\)"):
        FeatureNetwork(1, 10).features(torch.zeros(shape))


@pytest.mark.parametrize("size", [(8, 8), (13, 28), (64, 64)])
def test_any_size_from_eight_gives_features_and_logits(size):
    network = FeatureNetwork(3, 10, dim=32).eval()
    x = torch.zeros(2, 3, *size)
    assert network.features(x).shape == (2, 32)
    assert network(x).shape == (2, 10)


def test_inception_is_missed_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingExtraError, match="torch_fidelity"):
        inception_extractor()


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_gets_rgb_bytes(monkeypatch, channels):
    seen = []

    class Stub(nn.Module):
        def __init__(self, name, features_list):
            super().__init__()

        def forward(self, x):
            seen.append(x)
            return torch.zeros(len(x), 2048)

    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Stub)
    extractor = inception_extractor()
    assert extractor.test_accuracy is None
    extractor.module(torch.ones(2, channels, 16, 16))
    assert seen[0].shape == (2, 3, 16, 16)
    assert seen[0].dtype == torch.uint8
    assert int(seen[0].min()) == 255
