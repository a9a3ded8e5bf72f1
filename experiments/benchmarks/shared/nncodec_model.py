"""A model's weights through MPEG's nncodec and back: headline_arms.py runs it in another venv."""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from nncodec.nn import decode, encode


def through(weights: dict[str, Any], folder: Path, point: int) -> tuple[int, dict[str, Any]]:
    """Bytes of the bitstream at a quantization parameter, and what it decodes to.

    Trellis (dependent) quantization is on, as is nncodec's way.

    nncodec leaves the bitstream in the folder too; without one, in the one that it is run in.
    """
    stream = encode(weights, {"verbose": False, "results": str(folder), "qp": point})
    return len(stream), decode(stream)


if __name__ == "__main__":
    source, target, point = sys.argv[1:]
    loaded = np.load(source)
    size, decoded = through(
        {name: loaded[name] for name in loaded.files}, Path(target).parent, int(point)
    )
    np.savez(target, **decoded)
    print(size)
