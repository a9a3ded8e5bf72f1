"""Sixty one-line breaks of the package, drawn by a seed, each with the tests that should catch it.

Breaks are of five kinds (a comparison, a sign, off by one, a dropped call, a swapped argument) and
lie in all folders alike. Each is made in a copy of the tree; nearest tests run first (the module's
doctests, files that import it or bear its name), then those of its folder. Finished ones are
kept, so that a stopped command goes on; survivors are printed at the end and exit with 1.

python tests/mutants.py [--seed 0] [--count 60] [--most N] [--out outputs/mutants.jsonl] [--list]
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_compress"
KINDS = ("comparison", "sign", "off by one", "dropped call", "swapped argument")
COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
}
SIGNS = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")}
# What says something to a reader alone: no test needs to hold it.
TOLD = ("print", "rank_zero_info", "rank_zero_warn", "warn", "add_row", "add_column", "add_section")
NEAREST = 6  # test files at first
PATIENCE = 5  # times as long as without a break, and a minute: it hangs
COPIED = (PACKAGE, "conf", "docs", "experiments", "hydra_plugins", "tests")
FILES = ("Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """A break of one line.

    Attributes:
        path: of the file, from the root.
        line: its number.
        kind: one of `KINDS`.
        before: the line, stripped.
        after: the broken line, stripped.
        start: byte in the line where the change begins.
        end: byte in the line where it ends.
        text: what stands there instead.
    """

    path: str
    line: int
    kind: str
    before: str
    after: str
    start: int
    end: int
    text: str

    def apply(self, source: str) -> str:
        """The file's text with the break."""
        lines = source.splitlines(keepends=True)
        broken = _replaced(lines[self.line - 1], self.start, self.end, self.text)
        return "".join([*lines[: self.line - 1], broken, *lines[self.line :]])

    @property
    def key(self) -> str:
        """What tells it from others, wherever its line has moved."""
        return f"{self.path}: {self.before} -> {self.after}"


def _replaced(line: str, start: int, end: int, text: str) -> str:
    raw = line.encode()
    return (raw[:start] + text.encode() + raw[end:]).decode()


def mutants_of(source: str, path: str) -> list[Mutant]:
    """All breaks of a file's text.

    >>> [one.after for one in mutants_of("x = a < 3", "m.py")]
    ['x = a <= 3', 'x = a < 4']
    """
    lines = source.splitlines(keepends=True)
    found = []
    for node, kind, start, end, text in _edits(ast.parse(source), lines):
        line = lines[node.lineno - 1]
        broken = _replaced(line, start, end, text)
        edit = (node.lineno, kind, line.strip(), broken.strip(), start, end, text)
        if line.strip() != broken.strip():
            found.append(Mutant(path, *edit))
    return sorted(set(found), key=lambda one: (one.line, one.start, one.text))


def _edits(
    tree: ast.Module, lines: list[str]
) -> Iterator[tuple[ast.expr | ast.stmt, str, int, int, str]]:
    for node in _code(tree):
        if not isinstance(node, (ast.expr, ast.stmt)) or node.lineno != node.end_lineno:
            continue
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            signs = COMPARISONS[type(node.ops[0])]
            yield node, "comparison", *_sign(lines, node.left, node.comparators[0], *signs)
        elif isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
            yield node, "sign", *_sign(lines, node.left, node.right, *SIGNS[type(node.op)])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield node, "sign", node.col_offset, node.col_offset + 1, ""
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            end = node.end_col_offset or 0
            yield node, "off by one", node.col_offset, end, str(node.value + 1)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if _name(node.value.func) not in TOLD:
                yield node, "dropped call", node.col_offset, node.end_col_offset or 0, "pass"
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            yield from _swapped(node)


def _code(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of messages, annotations, decorators and module-level lists of names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.Assign) and "__all__" in map(_name, node.targets):
            continue
        if isinstance(node, ast.Call) and _name(node.func) in ("cast", "TypeVar", *TOLD):
            continue
        yield node
        yield from _code(node)


def _name(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def _sign(
    lines: list[str], left: ast.expr, right: ast.expr, before: str, after: str
) -> tuple[int, int, str]:
    """Where an operator stands between its operands, and what replaces it."""
    first = left.end_col_offset or 0
    between = lines[left.lineno - 1].encode()[first : right.col_offset]
    start = first + between.index(before.encode())
    return start, start + len(before), after


def _swapped(node: ast.Call) -> Iterator[tuple[ast.expr, str, int, int, str]]:
    first, second = node.args[:2]
    if any(isinstance(one, ast.Starred) for one in (first, second)):
        return
    text = f"{ast.unparse(second)}, {ast.unparse(first)}"
    yield node, "swapped argument", first.col_offset, second.end_col_offset or 0, text


def folders() -> dict[str, list[Path]]:
    """The package's files by folder, `lab` by the folders in it."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).parts[:-1]
        found.setdefault("/".join(parts[: 2 if parts[:1] == ("lab",) else 1]), []).append(path)
    return found


@cache
def pool() -> list[dict[str, list[Mutant]]]:
    """All breaks by kind, a folder each."""
    by_folder = []
    for paths in folders().values():
        kinds: dict[str, list[Mutant]] = {}
        for path in paths:
            for one in mutants_of(path.read_text("utf-8"), path.relative_to(ROOT).as_posix()):
                kinds.setdefault(one.kind, []).append(one)
        if kinds:
            by_folder.append(kinds)
    return by_folder


def drawn(seed: int, count: int) -> list[Mutant]:
    """So many breaks, a folder and a kind after the other, by chance within them."""
    stream = random.Random(seed)
    by_folder = [{kind: [*some] for kind, some in kinds.items()} for kinds in pool()]
    stream.shuffle(by_folder)
    chosen: list[Mutant] = []
    for turn in itertools.count():
        for place, kinds in enumerate(by_folder):
            left = kinds.get(KINDS[(turn + place) % len(KINDS)], [])
            one = left.pop(stream.randrange(len(left))) if left else None
            if one is not None and _valid(one):
                chosen.append(one)
            if len(chosen) == count:
                return chosen
        if not any(any(kinds.values()) for kinds in by_folder):
            return chosen
    return chosen


def _valid(mutant: Mutant) -> bool:
    """Whether Python reads the broken file."""
    try:
        ast.parse(mutant.apply((ROOT / mutant.path).read_text("utf-8")))
    except SyntaxError:
        return False
    return True


def tests_of(path: str) -> tuple[list[str], list[str]]:
    """The nearest tests of a module, and all of its folder besides."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    inner = Path(path).relative_to(PACKAGE)
    home = ROOT / "tests" / inner.parent
    files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "faults" not in p.parts]
    named = [p for p in files if p.stem.startswith(f"test_{inner.stem}")]
    named.sort(key=lambda p: (p.parent != home, p.stem != f"test_{inner.stem}"))
    importing = [p for p in files if f"{module} import" in p.read_text("utf-8")]
    near = list(dict.fromkeys([*named, *importing]))[:NEAREST]
    whole = [p for p in files if p.is_relative_to(home)] if inner.parent != Path() else files[:0]
    further = [p for p in whole if p not in near]
    names = [[p.relative_to(ROOT).as_posix() for p in some] for some in (near, further)]
    return [path, *names[0]], names[1]


@dataclass(frozen=True)
class Outcome:
    """What became of a break.

    Attributes:
        caught: the first test that failed with it, "hangs", or None: it survived.
        tests: the files that ran.
        seconds: that it took.
    """

    caught: str | None
    tests: list[str]
    seconds: float


class Tree:
    """A copy of the checkout, in which breaks are made.

    Args:
        home: an empty folder.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        for name in COPIED:
            left_out = shutil.ignore_patterns("__pycache__", "*.png")
            shutil.copytree(ROOT / name, home / name, symlinks=True, ignore=left_out)
        for name in FILES:
            shutil.copy(ROOT / name, home / name)
        self._plain: dict[tuple[str, ...], tuple[list[str], float]] = {}

    def outcome(self, mutant: Mutant) -> Outcome:
        """Run the nearest tests with the break, then those of its folder."""
        start, ran = time.monotonic(), []
        for files in tests_of(mutant.path):
            whole, usual = self._without_break(files)
            ran += whole
            if not whole:
                continue
            path = self.home / mutant.path
            source = path.read_text("utf-8")
            path.write_text(mutant.apply(source), "utf-8")
            try:
                caught = self._failing(whole, 60 + PATIENCE * usual)
            finally:
                path.write_text(source, "utf-8")
            if caught is not None:
                return Outcome(caught, ran, round(time.monotonic() - start, 1))
        return Outcome(None, ran, round(time.monotonic() - start, 1))

    def _without_break(self, files: list[str]) -> tuple[list[str], float]:
        """The files that pass as they are, and their seconds: others would catch anything."""
        key = tuple(files)
        if key not in self._plain:
            start, whole = time.monotonic(), list(files)
            while whole and (failing := self._failing(whole, None)) is not None:
                left = [file for file in whole if not failing.startswith(file)]
                print(f"fails without a break, left out: {failing}", flush=True)
                whole = left if len(left) < len(whole) else []
                start = time.monotonic()
            self._plain[key] = whole, time.monotonic() - start
        return self._plain[key]

    def _failing(self, files: list[str], timeout: float | None) -> str | None:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
        command += ["-m", "not slow and not faults", "--tb=no", *files]
        path = os.pathsep.join([str(self.home), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        more = {"cwd": self.home, "env": environment, "timeout": timeout}
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
        except subprocess.TimeoutExpired:
            return "hangs"
        if done.returncode in (0, 5):  # all passed, or nothing was collected
            return None
        marks = ("FAILED ", "ERROR ")
        lines = [line for line in done.stdout.splitlines() if line.startswith(marks)]
        return lines[0].split(" ", 1)[1].split(" - ")[0] if lines else "does not start"


def known(path: Path) -> dict[str, dict]:
    """Finished breaks by their key; a line that a kill cut short is left out."""
    if not path.exists():
        return {}
    lines = path.read_text("utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["key"]: row for row in rows}


def main() -> int:
    """Run what is missing; 1 where breaks survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--most", type=int, help="of them to run now")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "mutants.jsonl")
    parser.add_argument("--list", action="store_true", help="print them and their tests only")
    chosen = parser.parse_args()
    mutants = drawn(chosen.seed, chosen.count)
    if chosen.list:
        for one in mutants:
            near, further = tests_of(one.path)
            print(f"{one.path}:{one.line} {one.kind}\n  - {one.before}\n  + {one.after}")
            print(f"  tests: {' '.join(near)}, then {len(further)} of its folder")
        return 0
    rows = known(chosen.out)
    missing = [one for one in mutants if one.key not in rows][: chosen.most]
    print(f"{len(mutants)} breaks, {len(missing)} to run now: about {2 * len(missing)} minutes")
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), "utf-8")
    with tempfile.TemporaryDirectory() as home:
        tree = Tree(Path(home) / "tree") if missing else None
        for one in missing:
            assert tree is not None
            outcome = tree.outcome(one)
            row = {"key": one.key, **asdict(one), **asdict(outcome)}
            with chosen.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            rows[one.key] = row
            print(f"{one.path}:{one.line} {one.kind}: {outcome.caught or 'SURVIVED'}", flush=True)
    return told(mutants, rows)


def told(mutants: list[Mutant], rows: dict[str, dict]) -> int:
    """Print the survivors; how a command that found any exits."""
    done = [rows[one.key] for one in mutants if one.key in rows]
    survivors = [row for row in done if row["caught"] is None]
    print(f"{len(done)} of {len(mutants)} run, {len(survivors)} survived")
    for row in survivors:
        print(f"{row['path']}:{row['line']} {row['kind']}")
        print(f"  - {row['before']}\n  + {row['after']}\n  tests: {' '.join(row['tests'])}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
