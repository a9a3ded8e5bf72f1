"""docs/tutorial.ipynb: no outputs in the repository, and every cell runs from top to bottom."""

import ast
import json
import re
from pathlib import Path

import matplotlib as mpl
import pytest
import torch

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))
CELLS = NOTEBOOK["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
TEXT = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]


def test_no_outputs_are_stored():
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(code) > 10
    assert [cell["outputs"] for cell in code] == [[] for _ in code]
    assert {cell["execution_count"] for cell in code} == {None}
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)


def test_its_links_lead_to_pages():
    links = re.findall(r"\]\(([^)#]+\.md)[^)]*\)", "\n".join(TEXT))
    assert links
    for link in links:
        assert (ROOT / "docs" / link).is_file(), link


@pytest.mark.slow
def test_the_tutorial_runs(monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    mpl.use("Agg")
    names, shown = {"__name__": "tutorial"}, []
    for source in CODE:
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "tutorial", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "tutorial", "eval"), names))
    files, dense, small, fast = (names[key] for key in ("files", "dense", "small", "fast"))
    assert len(dense.curve) == len(small.curve) == 15
    assert dense.curve[-1] < dense.curve[0]
    assert files["small"].bytes < files["after training"].bytes < files["dense"].bytes
    assert fast.decoder[3].weight.numel() < dense.decoder[3].weight.numel()
    assert names["difference"] < 0.5  # logits, on grids of 255 steps
    assert names["onnx"].int8_ops
    assert (names["again"] == names["drawn"]).all()
    assert torch.equal(small.decoder[0].weight, names["fresh"].decoder[0].weight)
    assert any(value is True for value in shown)  # loads bit for bit
    assert sum(hasattr(value, "_repr_html_") for value in shown) >= 4
    assert "active units" in capsys.readouterr().out
