"""The two projects of a plain user: they run as printed, and none of our models is in them."""

import ast
import runpy
import sys
from pathlib import Path

import pytest

from lightning_compress import inspect_compressed

EXAMPLES = Path(__file__).parents[2] / "experiments" / "examples"


@pytest.mark.parametrize(
    ("name", "artifact"), [("plain_vae", "vae.lcz"), ("plain_gan", "generator.lcz")]
)
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_the_example_runs_as_a_script(name, artifact, tmp_path, monkeypatch, capsys):
    path = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "2", str(tmp_path)])
    runpy.run_path(str(path), run_name="__main__")
    info = inspect_compressed(tmp_path / artifact)
    said = capsys.readouterr().out
    assert f"{info.bytes} bytes" in said
    assert info.ratio > 3
    assert ("loads exactly: True" in said) == (name == "plain_vae")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_example_is_somebody_elses_project(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = {node.module or "" for node in nodes}
    ours = {name for name in names if name.startswith("lightning_compress")}
    assert ours == {"lightning_compress"}
