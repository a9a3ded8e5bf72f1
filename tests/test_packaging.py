"""What is installed: versions, the typed package, and how little its import loads."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
VERSION = re.search(r'^version = "(.+)"$', PROJECT, re.MULTILINE)[1]
MOST_MODULES = 60  # some forty, all of the standard library; torch alone is more than a thousand


def test_the_import_loads_a_few_modules_and_neither_torch_nor_lightning():
    code = (
        "import sys; before = set(sys.modules); import lightning_compress; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = done.stdout.split()
    assert "lightning_compress" in found
    assert len(found) <= MOST_MODULES
    ours = {"lightning_compress"}
    assert {name.partition(".")[0] for name in found} <= set(sys.stdlib_module_names) | ours


def test_the_version_is_the_same_in_each_file():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == VERSION
    assert citation["title"] == "lightning_compress"
    assert VERSION in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")[1]


def test_the_workflows_test_each_python_that_is_supported():
    tests, docs, release = (
        yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text("utf-8"))
        for name in ("tests", "docs", "release")
    )
    low, high = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', PROJECT).groups()
    pythons = [f"3.{minor}" for minor in range(int(low), int(high))]
    assert tests["jobs"]["test"]["strategy"]["matrix"]["python-version"] == pythons
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for workflow in (tests, docs):
        text = json.dumps(workflow["jobs"])
        verbs = re.findall(r"make ([a-z-]+)", text)
        assert verbs
        assert all(f"\n{verb}:" in makefile for verb in verbs)
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "tags" in release[True]["push"]  # YAML 1.1 reads `on` as true


def test_the_hooks_are_the_commands_of_make_check():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repository,) = hooks["repos"]
    names = [one["entry"].split()[:2] for one in repository["hooks"]]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    check = makefile.partition("\ncheck:")[2].partition("\nformat:")[0]
    for name in names:
        assert " ".join(name).replace(".venv/bin", "$(BIN)") in check


@pytest.mark.slow  # pyright reads torch and Lightning for it
def test_a_consumer_is_typed_in_strict_mode(tmp_path):
    pyright = Path(sys.executable).with_name("pyright")
    if not pyright.exists():
        pytest.skip("pyright is not installed")
    shutil.copy(ROOT / "tests" / "consumer.py", tmp_path / "consumer.py")
    settings = {"include": ["consumer.py"], "typeCheckingMode": "strict", "pythonVersion": "3.10"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings | {"extraPaths": [str(ROOT)]}))
    command = [str(pyright), "--pythonpath", sys.executable, "--outputjson", "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    assert [one["message"] for one in report["generalDiagnostics"]] == []
