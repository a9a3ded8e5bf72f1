"""Size and speed of the symbol codecs on synthetic weights: 90 % zeros, 4 bits, one thread.

python experiments/bench_coding.py [weights]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.codecs import CODECS, entropy_bits


def synthetic(weights: int, sparsity: float = 0.9) -> NDArray[np.uint16]:
    """Rounded Gaussian steps from -7 to 7 without 0, most of them then set to 0, as symbols."""
    rng = np.random.default_rng(0)
    steps = np.rint(2.5 * rng.standard_normal(weights)).astype(np.int64).clip(-7, 7)
    steps[steps == 0] = rng.choice([-1, 1], int((steps == 0).sum()))
    steps[rng.random(weights) < sparsity] = 0
    return (2 * np.abs(steps) - (steps < 0)).astype(np.uint16)


def best_of(call: Callable[[], Any], repeats: int = 7) -> tuple[Any, float]:
    """The result and the shortest time of some calls."""
    seconds: list[float] = []
    result = None
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def main(weights: int) -> None:
    """Prints one row a codec."""
    symbols = synthetic(weights)
    bound = entropy_bits(symbols) / 8
    print(f"{weights} weights, entropy bound {bound:.0f} bytes")
    print(f"{'codec':12} {'bytes/bound':>11} {'encode MW/s':>11} {'decode MW/s':>11}")
    for name, codec in CODECS.items():
        data, encoding = best_of(lambda codec=codec: codec.encode(symbols))
        back, decoding = best_of(lambda codec=codec, data=data: codec.decode(data, weights))
        if not np.array_equal(back, symbols):
            raise SystemExit(f"{name} did not give the symbols back")
        speeds = f"{weights / encoding / 1e6:11.1f} {weights / decoding / 1e6:11.1f}"
        print(f"{name:12} {len(data) / bound:11.4f} {speeds}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000)
