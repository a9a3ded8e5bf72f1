"""TextLines and its vocabulary."""

import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.lab.data import TextLines
from lightning_compress.lab.data.text_lines import END, PAD, START, UNKNOWN, Vocabulary

WORDS = Path("/usr/share/dict/words")
LINES = [f"line {n} of {n * n}" for n in range(50)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def ready(file, **kwargs):
    data = TextLines(file, **{"max_length": 20, "batch_size": 8, **kwargs})
    data.setup()
    return data


def texts(data, split):
    return [data.decode(row) for row in split.tensors[0].tolist()]


@given(st.lists(st.text(min_size=1), min_size=1))
def test_known_characters_make_the_round_trip(lines):
    vocabulary = Vocabulary.of(lines)
    for line in lines:
        ids = vocabulary.encode(line)
        assert vocabulary.decode(ids) == line
        assert vocabulary.decode([*ids, PAD, PAD]) == line
        assert (ids[0], ids[-1], len(ids)) == (START, END, len(line) + 2)
        assert min(ids[1:-1]) > UNKNOWN


@given(st.text(), st.text())
def test_unknown_characters_are_marked(known, text):
    vocabulary = Vocabulary.of([known])
    expected = "".join(c if c in known else "\ufffd" for c in text)
    assert vocabulary.decode(vocabulary.encode(text)) == expected


def test_numbers_follow_frequency():
    vocabulary = Vocabulary.of(["bca", "bc", "b", "d"])
    assert vocabulary.characters == "bcad"
    assert len(vocabulary) == 8
    assert vocabulary.encode("bz") == [START, 4, UNKNOWN, END]


def test_decode_stops_at_the_end_and_refuses_foreign_numbers():
    vocabulary = Vocabulary("ab")
    assert vocabulary.decode(torch.tensor([1, 4, 2, 5, 5])) == "a"
    for token in (6, -1):
        with pytest.raises(ValueError, match=f"token {token} is not in the vocabulary: 0 to 5"):
            vocabulary.decode([1, token])
    with pytest.raises(ValueError, match="characters must be distinct, got 'aa'"):
        Vocabulary("aa")


def test_every_line_lies_in_exactly_one_split(file):
    data = ready(file)
    assert [len(split) for split in data.splits] == [40, 5, 5]
    train = texts(data, data.train_dataset)
    assert set(train) <= set(LINES)
    assert data.left_out == 0
    # characters may be unknown outside the training split, so lengths stand for the lines
    rest = [data.val_dataset.tensors[0], data.test_dataset.tensors[0]]
    lengths = [int((row != PAD).sum()) - 2 for row in torch.cat(rest)]
    expected = Counter(map(len, LINES)) - Counter(map(len, train))
    assert Counter(lengths) == expected


def test_batches_and_dims(file):
    data = ready(file)
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype) == ((8, 22), torch.int64)
    assert (y.dtype, y.tolist()) == (torch.int64, [0] * 8)
    for row in x:
        length = int((row != PAD).sum())
        assert row[0] == START
        assert row[length - 1] == END
        assert (row[length:] == PAD).all()
        assert (row[1 : length - 1] > UNKNOWN).all()
    assert data.dims == {"vocab_size": len(data.vocabulary), "steps": 22}
    assert x.max() < data.dims["vocab_size"]
    assert (data.kind, data.labelled) == ("tokens", False)


def test_the_vocabulary_is_that_of_the_training_split(file):
    data = ready(file)
    counts = Counter("".join(texts(data, data.train_dataset)))
    assert set(data.vocabulary.characters) == set(counts)
    frequencies = [counts[c] for c in data.vocabulary.characters]
    assert frequencies == sorted(frequencies, reverse=True)


def test_a_character_outside_the_training_split_is_unknown(tmp_path):
    # every line has a character of its own
    path = tmp_path / "a.txt"
    path.write_text("\n".join(chr(0x4E00 + i) for i in range(30)), encoding="utf-8")
    data = ready(path)
    assert len(data.vocabulary.characters) == 24
    assert (data.test_dataset.tensors[0][:, :3] == torch.tensor([START, UNKNOWN, END])).all()


def test_overlong_and_empty_lines_are_counted(tmp_path, caplog):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(["abc"] * 10 + ["abcd"] * 4 + ["", "  "]) + "\n")
    with caplog.at_level(logging.INFO):
        data = ready(path, max_length=3)
    assert (sum(map(len, data.splits)), data.left_out, data.cropped) == (10, 6, 0)
    assert "of 16 lines, 2 empty ones left out, 4 longer than max_length=3 left out" in caplog.text
    with caplog.at_level(logging.INFO):
        data = ready(path, max_length=3, overlong="crop")
    assert (sum(map(len, data.splits)), data.left_out, data.cropped) == (14, 2, 4)
    assert "4 longer than max_length=3 cropped" in caplog.text
    assert set(texts(data, data.train_dataset)) == {"abc"}


def test_a_folder_is_its_text_files(tmp_path):
    (tmp_path / "b.txt").write_text("b\n" * 5)
    (tmp_path / "a.txt").write_text("a\n" * 5)
    (tmp_path / "c.log").write_text("c\n" * 5)
    data = ready(tmp_path)
    assert sum(map(len, data.splits)) == 10
    assert set(data.vocabulary.characters) == {"a", "b"}


def test_line_ends_and_byte_order_mark_of_windows(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"ab\x0cc\r\n" * 5)
    data = ready(tmp_path / "a.txt")
    assert set(texts(data, data.train_dataset)) == {"ab\x0cc"}


def test_seed_decides_splits(file):
    def train(seed):
        data = ready(file, seed=seed)
        return texts(data, data.train_dataset), data.fingerprint

    assert train(1) == train(1)
    assert train(1) != train(2)


def test_the_fingerprint_knows_the_characters(tmp_path):
    hashes = set()
    for character in "ab":  # equal numbers, different meaning
        (tmp_path / character).write_text(f"{character}\n" * 9)
        hashes.add(ready(tmp_path / character).fingerprint)
    assert len(hashes) == 2


def test_faulty_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text file given: data.file=.*dict/words"):
        ready(None)
    with pytest.raises(FileNotFoundError, match=r"data.file=.*absent: no such file"):
        ready(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no \*.txt file in this folder"):
        ready(tmp_path)
    (tmp_path / "latin").write_bytes(b"caf\xe9\n" * 9)
    with pytest.raises(ValueError, match=r"latin: not UTF-8 text: .*0xe9 in position 3"):
        ready(tmp_path / "latin")
    (tmp_path / "short").write_text("a\nb\n\n")
    with pytest.raises(ValueError, match=r"short: 2 rows are too few .*; 1 left out"):
        ready(tmp_path / "short")


def test_before_setup_there_is_no_vocabulary(file):
    for use in (lambda d: d.dims, lambda d: d.encode("a"), lambda d: d.decode([1])):
        with pytest.raises(RuntimeError, match=r"no vocabulary yet: call setup\(\)"):
            use(TextLines(file))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_length": 0}, "max_length must be an integer >= 1, got 0"),
        ({"overlong": "wrap"}, "overlong='wrap'"),
        ({"val_fraction": -0.1}, "val_fraction must be above 0 and below 1, got -0.1"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TextLines("anywhere", **kwargs)


@pytest.mark.skipif(not WORDS.is_file(), reason="no word list (Debian: wamerican) installed")
def test_a_real_word_list():
    data = ready(WORDS, max_length=32)
    words = WORDS.read_text(encoding="utf-8").split("\n")[:-1]
    assert sum(map(len, data.splits)) + data.left_out == len(words)
    assert set(texts(data, data.train_dataset)) <= set(words)
