"""A model's weights through MPEG's nncodec and back: headline_arms.py runs it in another venv."""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys
from typing import Any

import numpy as np
from nncodec.nn import decode, encode


def through(weights: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Bytes of the bitstream, with nncodec's own settings, and what it decodes to."""
    stream = encode(weights, {"verbose": False})
    return len(stream), decode(stream)


if __name__ == "__main__":
    source, target = sys.argv[1:]
    loaded = np.load(source)
    size, decoded = through({name: loaded[name] for name in loaded.files})
    np.savez(target, **decoded)
    print(size)
