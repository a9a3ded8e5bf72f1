"""Characters as numbers, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

__all__ = ["END", "PAD", "START", "UNKNOWN", "Vocabulary"]

PAD, START, END, UNKNOWN = range(4)
RESERVED = 4
REPLACEMENT = "\ufffd"  # how an unknown character is shown


@dataclass(frozen=True)
class Vocabulary:
    """Numbers for characters: 0 pad, 1 start, 2 end, 3 unknown, then the characters.

    Args:
        characters: distinct characters in the order of their numbers, from 4 on.

    Raises:
        ValueError: when a character comes twice.

    >>> vocabulary = Vocabulary.of(["noon", "no"])
    >>> vocabulary.encode("on!")
    [1, 5, 4, 3, 2]
    >>> vocabulary.decode([1, 5, 4, 3, 2, 0, 0]) == "on" + REPLACEMENT
    True
    """

    characters: str

    def __post_init__(self) -> None:
        if len(set(self.characters)) < len(self.characters):
            raise ValueError(f"characters must be distinct, got {self.characters!r}")

    @classmethod
    def of(cls, texts: Iterable[str]) -> Vocabulary:
        """All characters of some texts, the most frequent first, equals by code point."""
        counts = Counter[str]()
        for text in texts:
            counts.update(text)
        return cls("".join(sorted(counts, key=lambda c: (-counts[c], c))))

    def __len__(self) -> int:
        return RESERVED + len(self.characters)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {character: RESERVED + i for i, character in enumerate(self.characters)}

    def encode(self, text: str) -> list[int]:
        """`start`, one number a character, `end`."""
        return [START, *(self._numbers.get(c, UNKNOWN) for c in text), END]

    def decode(self, ids: Iterable[int]) -> str:
        """The text before the first `end`; pads and starts are left out.

        Raises:
            ValueError: for a number that is not in the vocabulary.
        """
        shown: list[str] = []
        for i in map(int, ids):
            if not 0 <= i < len(self):
                raise ValueError(f"token {i} is not in the vocabulary: 0 to {len(self) - 1}")
            if i == END:
                break
            if i == UNKNOWN:
                shown.append(REPLACEMENT)
            elif i >= RESERVED:
                shown.append(self.characters[i - RESERVED])
        return "".join(shown)
