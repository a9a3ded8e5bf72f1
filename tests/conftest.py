"""Settings that every test shares."""

import contextlib
import logging
import sys

import pytest
import torch

from lightning_compress.lab.app import main
from lightning_compress.lab.commands import COMMANDS

torch.set_num_threads(1)

# TensorBoard brings absl, whose log handler closes the stream that stood at sys.stderr when it was
# imported, once another stands there and Hydra sets up logging anew: in pytest, pytest's own.
with contextlib.suppress(ImportError):
    from absl.logging import get_absl_handler

    get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(autouse=True)
def _lightning_speaks():
    """The command line quiets Lightning for its process: not for the tests that follow here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def cli(request, tmp_path, monkeypatch, capsys, tmp_path_factory):
    """Runs the command line in an empty folder; returns exit code, output and errors.

    With `small`, the test module's `SMALL` stands before overrides of the test's own, which so win,
    and behind a command or an option, which come first.
    """
    monkeypatch.chdir(tmp_path)
    cache = tmp_path_factory.getbasetemp() / "features"

    def call(*words, small=True):
        extra = [*request.module.SMALL, f"evaluate.cache_dir={cache}"] if small else []
        first = bool(words) and (words[0] in COMMANDS or words[0].startswith("--"))
        code = 0
        try:
            main([*words, *extra] if first else [*extra, *words])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
