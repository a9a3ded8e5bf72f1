"""Escaping of untrusted text for a terminal."""

from __future__ import annotations

__all__ = ["printable"]


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
