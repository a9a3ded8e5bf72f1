"""The command line starts without PyTorch, and the names of the package are there all the same."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import lightning_compress
from lightning_compress.lab import app, commands

HEAVY = ("torch", "lightning", "numpy", "sklearn", "matplotlib")
SMALL = []


def test_the_command_line_loads_nothing_heavy():
    code = (
        "import sys, lightning_compress.lab.app, lightning_compress.lab.sweeps, hydra_plugins\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_types_and_imports_know_the_same_names():
    tree = ast.parse(Path(lightning_compress.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and not node.orelse
                and ast.unparse(node.test) == "TYPE_CHECKING")  # fmt: skip
    typed = {
        alias.name: node.module.removeprefix("lightning_compress.")
        for node in block.body
        for alias in node.names
    }
    assert typed == lightning_compress._HOME_OF
    assert sorted(typed) == sorted(lightning_compress.__all__)


def test_every_public_name_is_there_and_no_other():
    for name in lightning_compress.__all__:
        assert getattr(lightning_compress, name).__name__ == name
    assert set(lightning_compress.__all__) <= set(dir(lightning_compress))
    assert lightning_compress.callbacks.GradualPruning is lightning_compress.GradualPruning
    with pytest.raises(AttributeError, match="GradualPrunning"):
        lightning_compress.GradualPrunning  # noqa: B018


def test_the_version_is_the_installed_one():
    assert lightning_compress.__version__ == metadata.version("lightning-compress")


def test_the_two_lists_of_commands_are_one():
    assert tuple(commands.COMMANDS) == app.COMMANDS


def test_shell_completion(cli, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/lightning-compress"])
    code, script, _ = cli("-sc", "install=bash", small=False)
    assert code in (0, None)
    assert script.rstrip().endswith("-F hydra_bash_completion lightning-compress")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    for typed, expected in (
        ("model=", {"model=dcgan", "model=vae"}),
        ("compression.prune.final_", {"compression.prune.final_sparsity="}),
        ("data=fash", {"data=fashion_mnist"}),
    ):
        monkeypatch.setenv("COMP_LINE", f"lightning-compress {typed}")
        _, words, _ = cli("-sc", "query=bash", small=False)
        assert expected <= set(words.split()), typed


@pytest.mark.parametrize("words", [["--help"], ["--hydra-help"]])
def test_help(cli, words):
    code, out, _ = cli(*words, small=False)
    assert code in (0, None)
    assert ("-sc install=bash" in out) if "--hydra-help" in words else ("final_sparsity" in out)
