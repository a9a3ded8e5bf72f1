import importlib.util
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
SEEDS = sorted((HERE / "corpus").iterdir())

spec = importlib.util.spec_from_file_location("fuzz_target", HERE / "target.py")
target = importlib.util.module_from_spec(spec)
spec.loader.exec_module(target)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: path.name)
def test_seeds_and_their_neighbours_give_tensors_or_the_one_error(seed):
    data = seed.read_bytes()
    target.run(data)
    rng = np.random.default_rng(len(data))
    for _ in range(60 if "channels" in seed.name else 30):
        changed = bytearray(data)
        changed[rng.integers(1, len(data))] = rng.integers(256)
        target.run(bytes(changed[: rng.integers(len(data) // 2, len(data) + 1)]))


def test_there_are_seeds_of_every_kind():
    kinds = {path.read_bytes()[0] for path in SEEDS}
    assert kinds == set(range(len(target.CODECS) + 2))
