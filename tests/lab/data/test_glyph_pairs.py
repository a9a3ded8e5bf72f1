"""Pairs of glyphs: both typefaces draw the same character, and test characters are new."""

import string

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from lightning_compress.lab.data import GlyphPairs, glyph_pairs
from lightning_compress.lab.data.glyph_pairs import font_file
from tests.helpers.fonts import CHARACTERS, SANS, SERIF

SMALL = {"source": SANS, "target": SERIF, "characters": CHARACTERS, "image_size": 16}


def made(**changes):
    data = GlyphPairs(**SMALL | changes)
    data.setup()
    return data


def drawn(path, character, size):
    """The same glyph by Pillow alone."""
    image = Image.new("L", (size, size))
    font = ImageFont.truetype(path, round(0.9 * size))
    ImageDraw.Draw(image).text((size / 2, size / 2), character, 255, font, anchor="mm")
    return torch.from_numpy(np.array(image)).float()[None] / 255


def test_a_pair_is_one_character_in_both_typefaces():
    data = made(characters="abcdefgh", val_fraction=0.2, test_fraction=0.2)
    assert data.dims == {"image_size": 16, "channels": 1}
    assert not data.labelled
    x, y = (torch.cat(each) for each in zip(*(s.tensors for s in data.splits), strict=True))
    known = {tuple(drawn(SANS, one, 16).flatten().tolist()): one for one in "abcdefgh"}
    found = [known.pop(tuple(row.flatten().tolist())) for row in x]
    assert not known
    for character, row in zip(found, y, strict=True):
        assert torch.equal(row, drawn(SERIF, character, 16))


def test_characters_are_split_by_seed_and_none_is_in_two_splits():
    letters = {"characters": string.ascii_letters}  # of the others, some look the same
    data, same, other = made(**letters), made(**letters), made(**letters, seed=1)
    rows = [
        {pair.numpy().tobytes() for pair in torch.cat(split.tensors, 1)} for split in data.splits
    ]
    assert sum(map(len, rows)) == 52
    assert not rows[0] & rows[1] | rows[0] & rows[2] | rows[1] & rows[2]
    assert data.fingerprint == same.fingerprint != other.fingerprint


def test_what_a_font_lacks_is_left_out_and_a_limit_holds():
    lacking = "\u4e00\u4e01 "  # ideographs, and nothing to see
    total = sum(len(split) for split in made(characters=CHARACTERS[:30] + lacking).splits)
    assert total == 30
    assert sum(len(split) for split in made(limit=12).splits) == 12


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"characters": "\u4e00\u4e01"}, ValueError, "have 0 of the characters.*data.characters"),
        ({"image_size": 4}, ValueError, "image_size must be an integer >= 8, got 4"),
        ({"limit": 2}, ValueError, "limit must be an integer >= 3, got 2"),
        ({"val_fraction": 0.0}, ValueError, "val_fraction must be above 0"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        made(**changes)


@pytest.fixture
def fontconfig(monkeypatch):
    """A machine's answers: one family, which has longer names too."""
    said = {
        "fc-match": ["DejaVu Sans", SANS, "0"],
        "fc-list": ["DejaVu Sans,DejaVu Sans Condensed", "AR PL UKai CN", ""],
    }
    monkeypatch.setattr(glyph_pairs.shutil, "which", lambda name: name)
    monkeypatch.setattr(glyph_pairs, "_told", lambda command, *_: said[command])
    return said


def test_a_family_is_found_by_its_whole_name(fontconfig):
    assert str(font_file("dejavu sans")[0]) == SANS
    fontconfig["fc-match"] = ["Zen,Zen Hei", SANS, str(0x10002)]  # a named instance of face 2
    assert font_file("Zen Hei") == (font_file(SANS)[0], 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AR PL UKai", "'AR PL UKai' is not installed: these are: 'AR PL UKai CN'"),
        ("Noto Serif CJK SC", "apt-get install fonts-noto-cjk"),
        ("Nobody's", "install it, or give the path of a font file"),
    ],
)
def test_a_missing_family_is_told_with_the_way_to_it(fontconfig, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        font_file(name)


def test_without_fontconfig_the_package_is_named(monkeypatch):
    monkeypatch.setattr(glyph_pairs.shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match="apt-get install fontconfig"):
        font_file("AR PL UKai CN")
