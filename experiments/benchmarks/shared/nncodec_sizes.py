"""Bytes of integer tensors under nncodec's DeepCABAC: bench_coding.py runs it in another venv."""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys

import numpy as np
from nncodec.extensions import deepCABAC
from nncodec.nnc_core.hdsp.hdsp_tool import HDSP_OPTS_OFF

UNARY, PARAMETERS_TUNED = 11, 1  # nncodec's defaults


def size(steps: np.ndarray) -> int:
    """The smallest payload over its scan orders and its two profiles."""
    matrix = np.ascontiguousarray(steps.reshape(len(steps), -1), np.int32)
    empty_rows = (~matrix.any(1)).astype(np.int32)
    sizes: list[int] = []
    for scan in range(4):
        for profile in (0, 1):
            encoder = deepCABAC.Encoder()
            encoder.initCtxModels(UNARY, PARAMETERS_TUNED)
            skip = profile, 0, profile, empty_rows
            encoder.encodeLayer(matrix, 0, scan, *skip, *HDSP_OPTS_OFF(), 0, 0)
            sizes.append(len(encoder.finish()))
    return min(sizes)


if __name__ == "__main__":
    tensors = np.load(sys.argv[1])
    print(sum(size(tensors[name]) for name in tensors.files))
