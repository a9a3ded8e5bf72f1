"""The floors of the house: who may import whom, read from the import statements."""

import ast
import subprocess
import sys
import warnings
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_compress"
FLOORS = (
    (
        "errors",
        "files",
        "modes",
        "hooks",
        "outputs",
        "schedules",
        "entropy",
        "fast_tensors",
        "grids",
        "removed",
        "terminal",
    ),
    (
        "copies",
        "deployment",
        "targets",
        "sample_inputs",
        "sharding",
        "state",
        "projection",
        "structure",
    ),
    ("pruning", "quantization"),
    ("channels",),
    ("lcz",),
    ("distillation", "budget"),
    ("conversion",),
    ("callbacks",),
    ("federated",),
    ("lab",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# They forward names, and import on demand.
DOORS = ("", "__main__", "_moved", "models", "data", "coding", "adaptive")


def module_of(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {
    module_of(path): path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts
}


def room_of(module):
    return module.partition(".")[2].partition(".")[0]


@cache
def statements(path):
    """(module, line, whether at the top) of each import that is not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in types:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, not node.col_offset) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names = [one if one in MODULES else node.module for one in full.values()]
            found += [(name, node.lineno, not node.col_offset) for name in names]
    return found


def imports_of(path, *, lazy=True):
    """(module, line) of each import statement; without `lazy`, those at the top alone."""
    return [(module, line) for module, line, top in statements(path) if lazy or top]


def test_every_room_has_a_floor():
    rooms = {room_of(module) for module in MODULES} - set(DOORS)
    assert rooms <= set(FLOOR)


def test_no_module_imports_a_higher_floor():
    wrong = []
    for module, path in MODULES.items():
        if (room := room_of(module)) in DOORS:
            continue
        for target, line in imports_of(path):
            other = room_of(target) if target.startswith("lightning_compress.") else None
            beside = other != room and FLOOR.get(other) == FLOOR[room] and FLOOR[room] > 1
            if other is not None and (FLOOR.get(other, 99) > FLOOR[room] or beside):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong


def test_no_circle():
    graph = {
        module: {target for target, _ in imports_of(path, lazy=False) if target in MODULES}
        for module, path in MODULES.items()
        if room_of(module) not in DOORS
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {error.args[1]}")


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        (("lightning", "pytorch_lightning"), ("callbacks", "federated", "lab")),
        (("hydra", "omegaconf"), ("distillation", "federated", "lab")),  # a teacher from a config
    ],
)
def test_who_imports_lightning_and_hydra(library, rooms):
    wrong = {
        f"{path.relative_to(ROOT)}:{line}"
        for module, path in MODULES.items()
        for target, line in imports_of(path)
        if target.split(".")[0] in library and room_of(module) not in rooms
    }
    assert not wrong


def test_no_symbolic_link_in_the_repository():
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-s"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert not [line for line in listed.stdout.splitlines() if line.startswith("120000")]


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("from lightning_compress.models import VAE as found", "VAE"),
        ("from lightning_compress.models.vae import VAE as found", "VAE"),
        ("from lightning_compress.data import Digits as found", "Digits"),
        ("from lightning_compress.coding.artifact import save_compressed as found", "save_"),
        ("from lightning_compress.adaptive.search import QualitySearch as found", "QualitySearch"),
    ],
)
def test_former_module_names_work_and_warn(statement, name):
    homes = tuple(f"lightning_compress.{door}" for door in DOORS[3:])
    code, names = compile(statement, "a user's file", "exec"), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, {})  # torch registers what it loads once a process: that stays loaded
    with mock.patch.dict(sys.modules):
        for module in [one for one in sys.modules if one.startswith(homes)]:
            del sys.modules[module]  # as in a process where nobody has imported it
        with pytest.warns(FutureWarning, match="moved to") as told:
            exec(code, names)
    assert names["found"].__name__.startswith(name)
    assert [(one.filename, one.lineno) for one in told] == [("a user's file", 1)]


def test_modules_that_tests_share_are_where_pytest_finds_them():
    """Pytest skips a module of tests in silence when one that it imports cannot be found."""
    tests = ROOT / "tests"
    shared = {path.stem: path.parent for path in tests.rglob("*.py")}
    for path in tests.rglob("test_*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        froms = {one.module for one in body if isinstance(one, ast.ImportFrom)}
        plain = (one.names for one in body if isinstance(one, ast.Import))
        for name in froms | {alias.name for names in plain for alias in names}:
            folder = shared.get(str(name), tests / "helpers")
            own = folder == path.parent and (folder / "conftest.py").is_file()
            assert folder == tests / "helpers" or own, f"{path} imports {name} of {folder}"
