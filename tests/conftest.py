"""Settings that every test shares, and what makes a test one of `make test-unit`.

A unit test trains, starts and exports nothing: its file names no Trainer, process, command line or
ONNX export (`TAKES_LONG`), or, of a doctest, its example. `unit` is set by that rule, and a unit
test that trains or starts something all the same fails.
"""

import contextlib
import copy
import logging
import re
import subprocess
import sys
from functools import cache

import pytest
import torch

TAKES_LONG = re.compile(
    r"\b(Trainer|quiet_trainer|subprocess|multiprocessing|forkserver|executable|run_experiment|runpy|cli|main"
    r"|run_blocks|export_onnx|write_int8_files|KMeans|federated)\b|\bexec\("
    r"|^from (distilling|kill_job|processes|shrinking) import",
    re.MULTILINE,
)

torch.set_num_threads(1)

# TensorBoard brings absl, whose log handler closes the stream that stood at sys.stderr when it was
# imported, once another stands there and Hydra sets up logging anew: in pytest, pytest's own.
with contextlib.suppress(ImportError):
    from absl.logging import get_absl_handler

    get_absl_handler().python_handler.stream = sys.__stderr__


@cache
def _takes_long(path):
    return TAKES_LONG.search(path.read_text(encoding="utf-8")) is not None


def pytest_collection_modifyitems(items):
    for item in items:
        doctest = getattr(item, "dtest", None)
        if item.get_closest_marker("slow") or item.get_closest_marker("faults"):
            continue
        if doctest is None:
            long = _takes_long(item.path)
        else:
            long = any(TAKES_LONG.search(one.source) for one in doctest.examples)
        if not long:
            item.add_marker(pytest.mark.unit)


@pytest.fixture(autouse=True)
def _a_unit_test_trains_and_starts_nothing(request, monkeypatch):
    if request.node.get_closest_marker("unit") is None:
        return

    def refuse(*_args, **_options):
        pytest.fail(
            "a unit test trains and starts nothing: name what it uses in conftest.TAKES_LONG"
        )

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    if (lightning := sys.modules.get("lightning.pytorch")) is not None:
        monkeypatch.setattr(lightning.Trainer, "__init__", refuse)


@pytest.fixture(autouse=True)
def _torchs_table_of_onnx_operators_is_read_once():
    """Each export parses the source of some 500 functions for it: half of what an export takes.

    Once torch has brought it in, all exports of a process get copies of one table.
    """
    module = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry = getattr(module, "ONNXRegistry", None)
    if registry is None or hasattr(registry, "read_once"):
        return
    registry.read_once = cache(registry.from_torchlib)

    def from_torchlib(**version):
        made = copy.copy(registry.read_once(**version))
        made.functions = {name: list(found) for name, found in made.functions.items()}
        return made

    registry.from_torchlib = staticmethod(from_torchlib)


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
    from lightning_compress.lab.app import main
    from lightning_compress.lab.commands import COMMANDS

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
