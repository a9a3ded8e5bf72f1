"""IDX files: what is read, and what is refused."""

import gzip
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.datasets.mnist import read_image_file, read_label_file

from lightning_compress.lab.data.images import read_idx


def idx_bytes(values):
    shape = values.shape
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
    return header + values.numpy().tobytes()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.tuples(*[st.integers(1, 6)] * 3), seed=st.integers(0, 2**31), zipped=st.booleans())
def test_images_equal_torchvisions_reader(tmp_path, shape, seed, zipped):
    values = torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    plain, path = tmp_path / "reference", tmp_path / "file"
    plain.write_bytes(idx_bytes(values))
    path.write_bytes(gzip.compress(plain.read_bytes()) if zipped else plain.read_bytes())
    assert torch.equal(read_idx(path, axes=3), read_image_file(str(plain)))


def test_labels_equal_torchvisions_reader(tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(idx_bytes(torch.tensor([3, 0, 9], dtype=torch.uint8)))
    assert torch.equal(read_idx(path, axes=1).long(), read_label_file(str(path)))


GOOD = idx_bytes(torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no IDX file of unsigned bytes with 3 axes: starts with 0x,"),
        (b"PK\x03\x04" + GOOD[4:], "starts with 0x504b0304, expected 0x00000803"),
        (b"\x00\x00\x08\x01" + GOOD[4:], "starts with 0x00000801, expected 0x00000803"),
        (b"\x00\x00\x0d\x03" + GOOD[4:], "starts with 0x00000d03"),
        (GOOD[:9], "truncated in its header: 9 of 16 bytes"),
        (GOOD[:-1], "truncated: its header says 3x2x2 = 12 values, it holds 11"),
        (GOOD[:16], "truncated: its header says 3x2x2 = 12 values, it holds 0"),
        (GOOD + b"x", "too long: its header says 3x2x2 = 12 values, it holds 13"),
        (GOOD[:4] + b"\xff" * 12, "truncated: .* it holds 0"),
        (GOOD[:4] + b"\x00" * 12, "empty: its header says 0x0x0 = 0 values"),
        (gzip.compress(GOOD, mtime=0)[:-9], "damaged or truncated gzip file"),
        (gzip.compress(GOOD, mtime=0)[:12] + b"\xff" * 30, "damaged or truncated gzip file"),
        (b"\x1f\x8bnonsense", "damaged or truncated gzip file"),
    ],
)
def test_damage_is_named_with_the_file(content, message, tmp_path):
    path = tmp_path / "some-file.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"some-file\.gz: .*{message}|some-file\.gz: {message}"):
        read_idx(path, axes=3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        read_idx(tmp_path / "nothing-here", axes=1)
