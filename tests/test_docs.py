"""What the pages say exists: imports, arguments, commands."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback

import lightning_compress
from lightning_compress.lab.config import config_dir

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}


def calls():
    for name, text in TEXTS.items():
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    yield name, node


def commands():
    for name, text in TEXTS.items():
        text = text.replace("\\\n", " ")
        for line in re.findall(r"(?:^\s*|`)(lightning-compress(?: [^`\n]*)?)", text, re.MULTILINE):
            words = shlex.split(line, comments=True)[1:]
            if words and words[0] != "-m" and all("=" in word for word in words):
                yield name, words


@pytest.mark.parametrize("name", TEXTS)
def test_every_import_of_a_page_exists(name):
    for names in re.findall(r"^from lightning_compress import (.*)$", TEXTS[name], re.MULTILINE):
        for one in filter(None, re.split(r"[\s,()]+", names)):
            assert one in lightning_compress.__all__, one


def test_calls_in_the_pages_fit_the_signatures():
    seen = 0
    for page, call in calls():
        known = getattr(lightning_compress, call.func.id, None)
        if known is None:
            continue
        keywords = {word.arg: None for word in call.keywords if word.arg}
        try:
            inspect.signature(known).bind(*call.args, **keywords)
        except TypeError as error:
            pytest.fail(f"{page}, line {call.lineno}: {ast.unparse(call)}: {error}")
        seen += 1
    assert seen > 20


def test_commands_in_the_pages_compose():
    found = list(commands())
    assert len(found) > 8
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for page, words in found:
            words = [word for word in words if "<" not in word]
            assert compose("train", words), (page, words)


def test_the_reference_has_every_callback():
    text = (ROOT / "docs" / "reference" / "callbacks.md").read_text(encoding="utf-8")
    public = {name: getattr(lightning_compress, name) for name in lightning_compress.__all__}
    kinds = {name for name, one in public.items() if inspect.isclass(one)}
    wanted = {name for name in kinds if issubclass(public[name], Callback)}
    assert {name for name in wanted if f"lightning_compress.{name}\n" not in text} <= {
        "Guard",  # the base of the two guards
        "RandomState",
        "ScoreMonitor",
    }
