"""Tests of devices: those with the mark `gpu` need CUDA, the others pretend."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pretend.py, for tests and jobs alike
collect_ignore = ["waits_job.py"]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(
            reason="no CUDA device: `make test-gpu` runs this where there is one"
        )
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(skip)
