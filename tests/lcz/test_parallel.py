"""Threads side by side, and long arrays piece by piece."""

import threading
import time

import numpy as np
import pytest

from lightning_compress.lcz import bits
from lightning_compress.lcz.parallel import parallel_map


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_keep_their_order(workers):
    def slow_at_first(item):
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    assert list(parallel_map(slow_at_first, range(30), workers)) == [
        item * item for item in range(30)
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_is_taken_than_is_worked_on(workers):
    taken = []
    items = (taken.append(item) or item for item in range(100))
    for asked, _ in enumerate(parallel_map(abs, items, workers), 1):
        assert len(taken) <= asked + 2 * workers - 1
    assert asked == 100


def test_threads_work_at_the_same_time():
    meeting = threading.Barrier(2, timeout=20)
    assert sorted(parallel_map(lambda _: meeting.wait(), range(2), workers=2)) == [0, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_ends_the_work(workers):
    begun = []

    def fail_at_3(item):
        begun.append(item)
        if item == 3:
            raise OSError("disk full")
        return item

    with pytest.raises(OSError, match="disk full"):
        list(parallel_map(fail_at_3, range(100), workers))
    assert len(begun) < 12


@pytest.mark.parametrize("workers", [0, -1])
def test_no_worker_is_refused(workers):
    with pytest.raises(ValueError, match=f"workers={workers}: valid are integers from 1"):
        list(parallel_map(abs, [1], workers))


def test_pieces_add_up(monkeypatch):
    monkeypatch.setattr(bits, "CHUNK", 7)
    for count in (0, 1, 7, 50):
        values = np.random.default_rng(count).integers(0, 9, count).astype(np.uint16)
        assert bits.count_values(values).tolist() == np.bincount(values).tolist()
        assert bits.count_values(values, 12).tolist() == np.bincount(values, minlength=12).tolist()
        squares = bits.map_in_chunks(np.square, values, np.uint8)
        assert squares.tolist() == (values**2).tolist()
        assert squares.dtype == np.uint8
