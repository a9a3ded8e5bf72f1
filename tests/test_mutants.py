"""The drawn breaks: one line each, valid Python, of all kinds and folders, the same for a seed."""

from importlib import util
from pathlib import Path

import pytest

path = Path(__file__).with_name("mutants.py")
spec = util.spec_from_file_location("mutants", path)
mutants = util.module_from_spec(spec)
__import__("sys").modules["mutants"] = mutants  # which dataclasses ask for
spec.loader.exec_module(mutants)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x = a < b", {"comparison": ["x = a <= b"]}),
        ("x = a is None", {"comparison": ["x = a is not None"]}),
        ("x = (a + b) * c", {"sign": ["x = (a - b) * c", "x = (a + b) / c"]}),
        ("x = -y", {"sign": ["x = y"]}),
        ("x = y[3]", {"off by one": ["x = y[4]"]}),
        ("x.step()", {"dropped call": ["pass"]}),
        ("x = f(ä, b)", {"swapped argument": ["x = f(b, ä)"]}),
        ("x = f(*a, b)", {}),
        ("print(x < 3)", {}),
        ("raise ValueError(f'{x + 1}')", {}),
        ("'text < 3'", {}),
    ],
)
def test_breaks_of_a_line(line, expected):
    found = {}
    for one in mutants.mutants_of(line, "m.py"):
        found.setdefault(one.kind, []).append(one.after)
        assert one.apply(line) == one.after
    assert found == expected


def test_sixty_breaks_lie_in_all_folders_and_are_of_all_kinds():
    first, again = mutants.drawn(0, 60), mutants.drawn(0, 60)
    assert first == again != mutants.drawn(1, 60)
    assert len({one.key for one in first}) == 60
    assert {one.kind for one in first} == set(mutants.KINDS)
    names = [Path(one.path).parts for one in first]
    for folder in ("lcz", "pruning", "quantization", "budget", "conversion", "federated", "lab"):
        assert any(parts[1] == folder for parts in names), folder
    for one in first:
        near, _ = mutants.tests_of(one.path)
        assert all((mutants.ROOT / file).is_file() for file in near)


def test_the_tests_of_a_module_are_those_that_import_it():
    near, further = mutants.tests_of("lightning_compress/lab/evaluation/verdict.py")
    assert near[:2] == [
        "lightning_compress/lab/evaluation/verdict.py",
        "tests/lab/evaluation/test_verdict.py",
    ]
    assert "tests/lab/evaluation/test_fidelity.py" in further
