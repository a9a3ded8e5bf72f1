"""For the site: what follows the first `>>>` of a docstring is its section of examples."""

from typing import Any

import griffe


class DoctestSections(griffe.Extension):
    """Puts the heading there that the docstrings leave out."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for every class and function."""
        if obj.docstring is None:
            return
        lines = obj.docstring.value.splitlines()
        starts = [at for at, line in enumerate(lines) if line.startswith(">>>")]
        if starts:
            tail = ["    " + line if line else "" for line in lines[starts[0] :]]
            obj.docstring.value = "\n".join([*lines[: starts[0]], "Examples:", *tail])
