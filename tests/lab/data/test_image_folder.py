"""ImageFolder on images that Pillow writes here."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from lightning_compress.lab.data import ImageFolder
from lightning_compress.lab.data.image_folder import ImageFiling, read_image


def save(path, *, size=(20, 12), seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = len(mode) if mode != "L" else 1
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels))
    Image.fromarray(pixels.astype(np.uint8).squeeze()).save(path)
    return path


@pytest.fixture
def flat(tmp_path):
    for i in range(20):
        save(tmp_path / "flat" / f"{i:02}.png", size=(20 + i, 30), seed=i)
    return tmp_path / "flat"


@pytest.fixture
def classes(tmp_path):
    for i in range(20):
        save(tmp_path / "classes" / ("cat", "dog")[i % 2] / f"{i:02}.png", seed=i)
    return tmp_path / "classes"


def ready(folder, **kwargs):
    data = ImageFolder(folder, **{"image_size": 8, "batch_size": 4, **kwargs})
    data.setup()
    return data


def names(split):
    return [path.as_posix() for path, _ in split.files]


def test_classes_equal_torchvision(classes):
    # Pillow's own scaling, which rounds differently by one level
    transform = transforms.Compose(
        [transforms.Resize(8), transforms.CenterCrop(8), transforms.ToTensor()]
    )
    reference = datasets.ImageFolder(classes, transform)
    data = ready(classes)
    expected = dict(reference.samples)
    found = {}
    for split in data.splits:
        for row, (path, label) in enumerate(split.files):
            found[str(classes / path)] = label
            at = reference.samples.index((str(classes / path), label))
            torch.testing.assert_close(split[row][0], reference[at][0], atol=1.01 / 255, rtol=0)
            assert split[row][1] == label
    assert found == expected
    assert data.classes == reference.classes
    assert data.dims == {"channels": 3, "image_size": 8, "num_classes": 2}
    assert data.labelled


def test_a_flat_folder_has_no_labels(flat):
    data = ready(flat, grey=True)
    assert [len(split) for split in data.splits] == [16, 2, 2]
    everything = sorted(name for split in data.splits for name in names(split))
    assert everything == sorted(path.name for path in flat.iterdir())
    for x, y in data.train_dataloader():
        assert (x.shape, x.dtype) == ((4, 1, 8, 8), torch.float32)
        assert (y.dtype, y.tolist()) == (torch.int64, [0] * 4)
        assert 0 <= x.min() < x.max() <= 1
    assert data.dims == {"channels": 1, "image_size": 8, "num_classes": 1}
    assert not data.labelled


def test_one_subfolder_has_no_labels(tmp_path):
    for i in range(4):
        save(tmp_path / "all" / "img" / f"{i}.png")
    data = ready(tmp_path / "all")
    assert (data.labelled, data.dims["num_classes"]) == (False, 1)


def test_seed_decides_splits_and_order(flat):
    def order(seed):
        return names(ready(flat, seed=seed).train_dataset)

    assert order(1) == order(1) != order(2)
    first, again = (torch.cat([x for x, _ in ready(flat).train_dataloader()]) for _ in range(2))
    assert torch.equal(first, again)


def test_worker_processes_give_the_same_batches(flat):
    alone, shared = (ready(flat, num_workers=n).val_dataloader() for n in (0, 1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, shared, strict=True))


def test_the_fingerprint_follows_content_and_frame(flat):
    before = ready(flat).fingerprint
    assert ready(flat).fingerprint == before != ready(flat, grey=True).fingerprint
    path = flat / names(ready(flat).train_dataset)[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")  # of the same length
    assert ready(flat).fingerprint != before
    path.write_bytes(content)
    assert ready(flat).fingerprint == before


def test_a_broken_image_is_named(flat):
    whole = (flat / "00.png").read_bytes()
    for path in flat.iterdir():
        path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"flat.\d\d\.png: cannot be read as an image: "):
        next(iter(ready(flat).train_dataloader()))


def test_other_files_are_counted_not_hidden(flat, caplog):
    (flat / "notes.txt").write_text("hello")
    with caplog.at_level(logging.INFO):
        data = ready(flat)
    assert sum(map(len, data.splits)) == 20
    assert "flat: 1 files are no images, left out" in caplog.text


def test_faulty_folders_are_named(flat, classes, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image folder given: data.folder="):
        ready(None)
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        ready(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no image \(\.jpg"):
        ready(tmp_path / "empty")
    (classes / "bird").mkdir()
    with pytest.raises(FileNotFoundError, match="bird holds no image"):
        ready(classes)
    (flat / "sub").mkdir()
    with pytest.raises(ValueError, match=r"flat .*00\.png.*sub"):
        ready(flat)


def test_dims_wait_for_setup():
    for name in ("dims", "labelled"):
        with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
            getattr(ImageFolder("anywhere"), name)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 0}, "image_size must be an integer >= 1, got 0"),
        ({"val_fraction": 0}, "val_fraction must be above 0 and below 1, got 0"),
        ({"test_fraction": 1.0}, "test_fraction must be above 0 and below 1, got 1.0"),
        ({"test_fraction": "x"}, "test_fraction must be above 0 and below 1, got 'x'"),
        (
            {"val_fraction": 0.5, "test_fraction": 0.5},
            r"must be below 1, got 0.5 \+ 0.5 = 1.0",
        ),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder("anywhere", **kwargs)


def test_transparent_parts_are_black(tmp_path):
    pixels = np.full((4, 4, 4), 255, dtype=np.uint8)
    pixels[:2, :, 3] = 0  # white, and invisible
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 4, grey=True)
    assert image[0].mean(1).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("mode", "value"), [("RGBA", (9, 9, 9, 0)), ("LA", (9, 0)), ("P", 0)])
def test_transparent_parts_show_the_background(tmp_path, mode, value):
    given = {"transparency": 0} if mode == "P" else {}
    Image.new(mode, (4, 4), value).save(tmp_path / "a.png", **given)
    assert read_image(tmp_path / "a.png", 4, grey=False).max() == 0
    assert read_image(tmp_path / "a.png", 4, grey=False, background="white").min() == 1
    for i in range(4):
        save(tmp_path / f"{i}.png")
    black, white = (ready(tmp_path, background=one) for one in ("black", "white"))
    assert black.fingerprint != white.fingerprint


@pytest.fixture
def theme(tmp_path):
    """Twenty icons in three sizes, one of them under a second name."""
    for i in range(20):
        for size in (8, 16, 24):
            save(tmp_path / f"{size}x{size}" / "actions" / f"{i}.png", size=(size, size), seed=i)
    (tmp_path / "16x16" / "alias.png").symlink_to(tmp_path / "16x16" / "actions" / "3.png")
    return tmp_path


def test_all_sizes_of_an_icon_are_in_one_split(theme, caplog):
    with caplog.at_level(logging.INFO):
        data = ready(theme, filing=ImageFiling(classes=False, group="stem", min_size=16))
    stems = [[path.stem for path, _ in split.files] for split in data.splits]
    assert [len(split) for split in stems] == [32, 4, 4]  # 16 pixels and 24 of each icon
    assert sum(len(set(split)) for split in stems) == len(set().union(*stems)) == 20
    assert {path.parts[0] for split in data.splits for path, _ in split.files} == {"16x16", "24x24"}
    assert not data.labelled
    assert "1 files are copies, left out" in caplog.text
    alone = ready(theme, filing=ImageFiling(classes=False))
    assert sum(map(len, alone.splits)) == 61


def test_faulty_filing_is_named(theme, tmp_path):
    with pytest.raises(FileNotFoundError, match="`apt-get install some-theme` brings it"):
        ready(tmp_path / "absent", filing=ImageFiling(package="some-theme"))
    with pytest.raises(FileNotFoundError, match="holds no image of 99 pixels or more"):
        ready(theme, filing=ImageFiling(classes=False, min_size=99))
    with pytest.raises(ValueError, match=r"group='name': valid are \[None, 'stem'\]"):
        ImageFiling(group="name")
    with pytest.raises(ValueError, match="min_size must be an integer >= 0, got -1"):
        ImageFiling(min_size=-1)
    with pytest.raises(ValueError, match="background='mauv' is no colour"):
        ImageFolder("anywhere", background="mauv")


def test_photographs_are_turned_upright(tmp_path):
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[:4] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png", 8, grey=True)
    assert image[0].mean(1).tolist() == [0] * 4 + [1] * 4


def test_sixteen_bits_are_refused_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 300, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: .* mode I;16 has more than 8 bits"):
        read_image(tmp_path / "deep.png", 8, grey=True)
