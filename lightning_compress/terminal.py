"""Text for a terminal and a notebook: escaped output, HTML tables, the arguments of an object."""

from __future__ import annotations

import html
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["ShownArguments", "html_table", "printable", "shape_text", "short"]

MOST_LETTERS = 80  # of one argument
MOST_ROWS = 200  # of a table in a notebook


def printable(text: str, *, lines: bool = True) -> str:
    r"""A text whose control and format characters, and lone surrogates, are written as escapes.

    Args:
        text: to be printed.
        lines: line feeds stay; False escapes them too, as in a name within a line.

    >>> print(printable("a\x1b[2Jb\u202ec\ud800"))
    a\x1b[2Jb\u202ec\ud800
    >>> print(printable("one\ntwo", lines=False))
    one\ntwo
    """
    kept = "\n" if lines else ""
    return "".join(
        letter if letter.isprintable() or letter in kept else _escaped(letter) for letter in text
    )


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def html_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table for a notebook, every cell escaped; numbers stand to the right.

    Rows beyond the first 200 are counted in a last row.

    >>> html_table("a", ["name"], [["<b>"]])
    '<table><caption>a</caption><thead><tr><th>name</th></tr></thead><tbody><tr><td
    style="text-align:left">&lt;b&gt;</td></tr></tbody></table>'
    """
    every = list(rows)
    head = "".join(f"<th>{_cell(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(_data, row))}</tr>" for row in every[:MOST_ROWS])
    if len(every) > MOST_ROWS:
        more = f"and {len(every) - MOST_ROWS} more"
        body += f'<tr><td colspan="{len(header)}">{more}</td></tr>'
    return (
        f"<table><caption>{_cell(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _cell(value: Any) -> str:
    return html.escape(printable(str(value), lines=False))


def _data(value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    text = f"{value:,}" if isinstance(value, int) and number else str(value)
    return f'<td style="text-align:{"right" if number else "left"}">{_cell(text)}</td>'


def shape_text(shape: Sequence[int]) -> str:
    """A shape in a table.

    >>> shape_text((64, 1, 4, 4)), shape_text(())
    ('64x1x4x4', '')
    """
    return "x".join(map(str, shape))


def short(value: Any) -> str:
    """One value in a repr: a module or a plain object by its class, a function by its name.

    >>> short({"a": [1, print], "b": object()})
    "{'a': [1, print], 'b': object(...)}"
    """
    if isinstance(value, Mapping) and type(value) is dict:
        text = f"{{{', '.join(f'{key!r}: {short(one)}' for key, one in value.items())}}}"
    elif type(value) in (list, tuple):
        inside = ", ".join(map(short, value))
        comma = "," if type(value) is tuple and len(value) == 1 else ""
        text = f"[{inside}]" if type(value) is list else f"({inside}{comma})"
    elif inspect.isclass(value) or inspect.isroutine(value):
        text = str(getattr(value, "__qualname__", type(value).__name__))
    elif type(value).__repr__ is object.__repr__ or hasattr(value, "named_parameters"):
        text = f"{type(value).__name__}(...)"
    else:
        text = repr(value)
    text = printable(text, lines=False)
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 3]}..."


class ShownArguments:
    """Mixin whose repr shows the constructor arguments that differ from the defaults.

    They are kept as text: a large argument, such as a teacher, is not held by it.

    >>> class Window(ShownArguments):
    ...     def __init__(self, size, *, step=1, name="a"):
    ...         pass
    >>> Window(3, step=1, name="b")
    Window(size=3, name='b')
    """

    _shown: tuple[str, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An instance that knows how it was made."""
        one = super().__new__(cls)
        one._shown = _differing(cls, args, kwargs)
        return one

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._shown)})"


def _differing(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    parameters = inspect.signature(cls.__init__).parameters
    try:
        bound = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs).arguments
    except TypeError:  # `__init__` says what is wrong with them
        return ()
    shown: list[str] = []
    for name, value in list(bound.items())[1:]:
        kind = parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            shown += [f"{key}={short(one)}" for key, one in value.items()]
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            shown += map(short, value)
        elif not _is_default(value, parameters[name].default):
            shown.append(f"{name}={short(value)}")
    return tuple(shown)


def _is_default(value: Any, default: Any) -> bool:
    try:
        return value is default or (type(value) is type(default) and bool(value == default))
    except (TypeError, ValueError, RuntimeError):  # tensors and arrays have no one answer
        return False
