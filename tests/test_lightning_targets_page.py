"""The code of docs/lightning_targets.md runs, from top to bottom."""

import re
import warnings
from pathlib import Path

import torch

PAGE = Path(__file__).parents[1] / "docs" / "lightning_targets.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    names = {"__name__": "page"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        for block in blocks:
            exec(block, names)
