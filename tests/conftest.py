"""Settings that every test shares."""

import logging

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _lightning_speaks():
    """The command line quiets Lightning for its process: not for the tests that follow here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)
