"""Networks that ship with the package: taken by what they were kept from, or refused aloud."""

import json
import shutil

import pytest
import torch

from lightning_compress.lab.data import Digits
from lightning_compress.lab.evaluation import shipped_features
from lightning_compress.lab.evaluation.likelihood import accuracy
from lightning_compress.lab.evaluation.shipped_features import (
    FOLDER,
    RECIPES,
    Recipe,
    image_set_digest,
    ship,
    shipped_extractor,
)


def digits(seed=0):
    data = Digits(seed=seed)
    data.setup()
    return data.test_dataset.tensors


def test_each_network_is_as_good_as_its_index_says():
    index = json.loads((FOLDER / "networks.json").read_text())
    assert set(index) == set(RECIPES)
    assert index["fashion_mnist"]["test_accuracy"] >= 0.91
    x, y = digits()
    found = shipped_extractor("digits", x)
    assert found.test_accuracy == accuracy(found.module.network, x, y)["accuracy"] > 0.98
    assert found.name == f"digits-shipped-{index['digits']['sha256'][:8]}"
    assert found.module(x).square().mean().item() == pytest.approx(1.0, abs=0.2)


def test_it_is_taken_where_the_test_split_is_the_one_it_was_kept_from():
    x, _ = digits()
    assert shipped_extractor("digits", x.flip(0)) is not None  # the order is no matter
    assert shipped_extractor("digits", digits(seed=1)[0]) is None  # it has seen some of these
    assert shipped_extractor("digits", x[:-1]) is None
    assert shipped_extractor("mnist", x) is None
    assert image_set_digest(x) != image_set_digest(x[:, :, :-1])


def test_an_evaluator_takes_it():
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from lightning_compress.lab.config import config_dir
    from lightning_compress.lab.workflow.quality import Evaluator

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", ["data=digits"])
    data = instantiate(cfg.data, _convert_="all")
    data.setup()
    found = Evaluator(cfg.evaluate, data, "vae", "digits").extractor
    assert found.name.startswith("digits-shipped-")


@pytest.mark.parametrize("harm", ["content", "missing"])
def test_a_damaged_or_missing_file_is_told_with_the_command_that_makes_it(harm, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "networks")
    path = tmp_path / "networks" / "digits.lcz"
    path.unlink()
    if harm == "content":
        shutil.copy(FOLDER / "fashion_mnist.lcz", path)  # whole, and another network
    said = "not what was shipped" if harm == "content" else "No such file"
    with pytest.warns(UserWarning, match=rf"{said}.*make feature-networks makes it again"):
        assert shipped_extractor("digits", digits()[0], folder=tmp_path / "networks") is None


def test_a_network_is_made_alike_from_a_seed_and_found_again(tmp_path, monkeypatch):
    quick = Recipe(width=4, epochs=2, flip=True, shift=1, batch_size=16)
    monkeypatch.setitem(RECIPES, "digits", quick)
    x, y = digits()
    state = torch.get_rng_state()
    made = [
        ship("digits", (x, y), (x[:50], y[:50]), num_classes=10, folder=tmp_path / name)
        for name in ("a", "b")
    ]
    assert made[0] == made[1]
    assert torch.equal(torch.get_rng_state(), state)
    found = shipped_extractor("digits", x[:50], folder=tmp_path / "a")
    assert found.test_accuracy == made[0]["test_accuracy"]
    with pytest.raises(
        ValueError, match=r"dataset='faces': valid are \['digits', 'fashion_mnist'\]"
    ):
        ship("faces", (x, y), (x, y), num_classes=10)


def test_images_are_mirrored_and_moved_within_their_frame():
    x = torch.zeros(64, 1, 5, 5)
    x[:, :, 2, 1] = 1.0
    draws = torch.Generator().manual_seed(0)
    recipe = Recipe(width=4, epochs=1, flip=True, shift=1)
    seen = {
        tuple(place.tolist())
        for _ in range(60)
        for place in shipped_features.augmented(x, recipe, draws).nonzero()[:, 2:]
    }
    assert seen == {(row, column) for row in (1, 2, 3) for column in (0, 1, 2, 3, 4)}
    still = Recipe(width=4, epochs=1, flip=False, shift=0)
    assert torch.equal(shipped_features.augmented(x, still, draws), x)
