"""What the pages say exists: imports, arguments, commands with their options, files and verbs."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from lightning.pytorch import Callback
from omegaconf.errors import OmegaConfBaseException
from pages import python_blocks, shell_commands

import lightning_compress
from lightning_compress.lab import app, commands, usage
from lightning_compress.lab.config import config_dir

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
README_LINES, CELL_WORDS = 150, 25
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def wrong_imports(text):
    """Names that a page imports from the package and that are not there."""
    for block in python_blocks(text):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for one in node.names:
                    if one.name.split(".")[0] == "lightning_compress":
                        importlib.import_module(one.name)
            elif isinstance(node, ast.ImportFrom) and _is_ours(node.module):
                module = importlib.import_module(node.module)
                known = getattr(module, "__all__", None) or dir(module)
                yield from (one.name for one in node.names if one.name not in known)


def _is_ours(module):
    return (module or "").split(".")[0] == "lightning_compress"


def wrong_calls(text):
    """Calls of public names whose arguments do not fit; and how many were looked at."""
    wrong, seen = [], 0
    for block in python_blocks(text):
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.Call):
                continue
            owner, _, name = ast.unparse(node.func).rpartition(".")
            if owner not in ("", "lc", "lightning_compress"):
                continue
            known = getattr(lightning_compress, name, None)
            if not callable(known) or any(isinstance(one, ast.Starred) for one in node.args):
                continue
            try:
                keywords = {word.arg: None for word in node.keywords if word.arg}
                inspect.signature(known).bind(*node.args, **keywords)
            except TypeError as error:
                wrong.append(f"{ast.unparse(node)}: {error}")
            seen += 1
    return wrong, seen


def mistake_in(words):
    """What is wrong with a command of a page; None if nothing is."""
    program, *rest = [word for word in words if word not in ("...", "|")]
    if program == "make":
        return next((f"no verb {one}" for one in rest if f"\n{one}:" not in MAKEFILE), None)
    if program.startswith("python"):
        module = rest[:1] == ["-m"] and _is_ours(rest[1])
        script = None if module or not rest or not rest[0].endswith(".py") else ROOT / rest[0]
        return None if script is None or script.is_file() else f"no file {rest[0]}"
    if program == "pip":
        extras = re.findall(r"lightning-compress\[([\w,]+)\]", " ".join(rest))
        names = [name for one in extras for name in one.split(",")]
        return next((f"no extra {one}" for one in names if f"\n{one} = [" not in PROJECT), None)
    return _mistake_of_ours(rest)


def _mistake_of_ours(words):
    try:
        if len(words) == 1 and words[0] in usage.COMMANDS:  # the name alone, in a sentence
            return None
        if words[:1] == ["report"]:
            app.report_parser().parse_args(words[1:])
        elif words and words[0] in commands.COMMANDS:
            commands.command_parser().parse_args(words)
        else:
            return _mistake_of_hydra(words)
    except SystemExit as stop:
        return f"refused with {stop.code}" if stop.code else None
    except (HydraException, OmegaConfBaseException) as error:
        return str(error)
    return None


def _mistake_of_hydra(words):
    config = "federated" if "federated" in words else "train"
    words = [word for word in words if word not in ("federated", "-m", "--multirun")]
    if said := usage.check_words(words) or usage.unknown_option(words):
        return said
    if any(word.startswith("-") for word in words):  # --help, --version, a folder of configs
        return None
    words = [word for word in map(app.quote_partition, words) if not re.search(r"<\w+>", word)]
    swept = [word for word in words if not word.lstrip("+").startswith("hydra")]
    parser = OverridesParser.create()
    for override in parser.parse_overrides(swept):
        choices = override.sweep_string_iterator() if override.is_sweep_override() else [None]
        for choice in choices:
            others = [one for one in swept if one != override.input_line]
            chosen = override.input_line if choice is None else f"{override.key_or_group}={choice}"
            compose(config, [*others, chosen])
    return None


@pytest.mark.parametrize("name", TEXTS)
def test_every_import_of_a_page_exists(name):
    assert list(wrong_imports(TEXTS[name])) == []


def test_calls_in_the_pages_fit_the_signatures():
    found = {name: wrong_calls(text) for name, text in TEXTS.items()}
    assert {name: wrong for name, (wrong, _) in found.items() if wrong} == {}
    assert sum(seen for _, seen in found.values()) > 40


def test_commands_in_the_pages_are_accepted():
    found = [(name, words) for name, text in TEXTS.items() for words in shell_commands(text)]
    ours = [words for _, words in found if words[0] == "lightning-compress"]
    assert len(ours) > 40
    assert {words[1] for words in ours if len(words) > 1} >= {
        "-m", "report", "inspect", "pack", "advise", "sensitivity", "federated",
    }  # fmt: skip
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        wrong = {
            (name, *words): said for name, words in found if (said := mistake_in(words)) is not None
        }
    assert wrong == {}


BROKEN_IMPORTS = [
    "```python\nfrom lightning_compress import (\n    sparsity,\n    Absent,\n)\n```",
    "```pycon\n>>> from lightning_compress import Absent\n>>> 1\n1\n```",
    "- a list\n\n    ```py\n    from lightning_compress.schedules import Absent\n    ```",
]


@pytest.mark.parametrize("text", BROKEN_IMPORTS)
def test_a_wrong_import_is_found(text):
    assert list(wrong_imports(text)) == ["Absent"]


def test_a_wrong_argument_is_found():
    block = "```python\nimport lightning_compress as lc\nlc.GradualPruning(sparsity=0.9)\n```"
    assert len(wrong_calls(block)[0]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nlightning-compress -m compression.prune.sparsity=0.5,0.8\n```",
        "    lightning-compress -m model=vae,vea",
        "    lightning-compress report a --output page.html",
        "Use `lightning-compress pack a.pt --rdok 0.02`.",
        "Use `lightning-compress unpack\na.lcz b.pt`.",
        "    lightning-compress federated federated.round=3",
        "```bash\nlightning-compress model=vae \\\n  dta=digits\n```",
        "    lightning-compress inspekt model.lcz",
        "    make dmeo",
        "    pip install 'lightning-compress[onx]'",
        "`python experiments/absent.py 3`",
    ],
)
def test_a_wrong_command_is_found(text, capsys):
    (words,) = shell_commands(text)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        assert mistake_in(words) is not None


def test_the_readme_is_short_and_so_are_the_cells_of_its_tables():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= README_LINES
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [cell for row in rows for cell in row.strip("|").split("|")]
    assert len(cells) > 60
    assert [cell for cell in cells if len(cell.split()) > CELL_WORDS] == []


def test_the_reference_has_every_callback():
    text = (ROOT / "docs" / "reference" / "callbacks.md").read_text(encoding="utf-8")
    public = {name: getattr(lightning_compress, name) for name in lightning_compress.__all__}
    kinds = {name for name, one in public.items() if inspect.isclass(one)}
    wanted = {name for name in kinds if issubclass(public[name], Callback)}
    assert {name for name in wanted if f"lightning_compress.{name}\n" not in text} == set()
