"""Each benchmark is found whole where it lies, and what they share adds up."""

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "experiments" / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_imports(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name])  # some read their arguments at once
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in SCRIPTS or error.name.startswith("shared"):
            raise
        pytest.skip(f"{error.name} is not installed")
    assert module.__doc__


def test_the_commands_of_pages_and_verbs_name_scripts_that_exist():
    pages = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")]
    found = {
        path
        for page in pages
        for path in re.findall(r"experiments/[\w/]+\.py", page.read_text(encoding="utf-8"))
    }
    assert len(found) > 10
    assert not [path for path in found if not (ROOT / path).exists()]


def test_times_of_parts_are_added_by_setting_and_file():
    from shared.files import milliseconds_of_parts

    def grid(first, second):
        times = {
            "fp32": SimpleNamespace(median_ms=first),
            "int8": SimpleNamespace(median_ms=second),
        }
        return {"batch1_threads1": times}

    total = milliseconds_of_parts([grid(3.0, 1.0), grid(5.0, 0.5)])
    assert total == {("batch1_threads1", "fp32"): 8.0, ("batch1_threads1", "int8"): 1.5}


def test_a_text_stands_between_the_marks_of_a_page(tmp_path):
    from shared.pages import insert

    page = tmp_path / "page.md"
    page.write_text("a\n<!-- figures -->\nold\n<!-- /figures -->\nb\n")
    for _ in range(2):
        insert(page, "| new |")
        assert page.read_text() == "a\n<!-- figures -->\n| new |\n<!-- /figures -->\nb\n"
