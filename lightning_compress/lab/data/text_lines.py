"""Lines of text as sequences of character numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_compress.errors import check_choice
from lightning_compress.lab.data.base import (
    Kind,
    SplitDataModule,
    Splits,
    TensorSplit,
    check_fractions,
    check_integer,
    fraction_split,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lightning_compress.lab.data.base import LoaderOptions

__all__ = [
    "END",
    "PAD",
    "START",
    "UNKNOWN",
    "TextLines",
    "Vocabulary",
]
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


OVERLONG = ("drop", "crop")


class TokenSplit(TensorSplit):
    """Token rows, whose meaning hangs on the vocabulary as well.

    Args:
        x: tokens, int64 of shape (N, T).
        y: zeros, int64 of shape (N,).
        vocabulary: what the numbers stand for.
    """

    def __init__(self, x: Tensor, y: Tensor, vocabulary: Vocabulary) -> None:
        super().__init__(x, y)
        self.vocabulary = vocabulary

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The characters, then the tensors."""
        yield self.vocabulary.characters.encode()
        yield from super().chunks()


class TextLines(SplitDataModule):
    """A text file, one string a line, x (N, max_length + 2): `start c1 c2 ... end pad ...`.

    The vocabulary is that of the training split (see `Vocabulary` for the reserved numbers).
    Empty lines are left out; how many lines were left out or cropped is logged and kept in
    `left_out` and `cropped`.

    Args:
        file: a UTF-8 file, or a folder whose `*.txt` files are read in the order of their names.
        max_length: characters a line.
        overlong: what to do with longer lines: `"drop"` them or `"crop"` them to `max_length`.
        val_fraction: part of the lines to validate on.
        test_fraction: part of the lines to test on.
        common: `batch_size`, `num_workers`, `seed` of `SplitDataModule`.

    Raises:
        ValueError: for an argument out of its range; in `setup` for a file that is not UTF-8 or
            has too few lines.
        FileNotFoundError: in `setup`, for a file that is not given or not there.
    """

    kind: ClassVar[Kind] = "tokens"

    def __init__(
        self,
        file: str | Path | None = None,
        *,
        max_length: int = 32,
        overlong: str = "drop",
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **common: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(**common)
        check_fractions(val_fraction, test_fraction)
        self.file = None if file is None else Path(file).expanduser()
        self.max_length = check_integer("max_length", max_length, 1)
        self.overlong = check_choice("overlong", overlong, OVERLONG)
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.left_out = self.cropped = 0
        self._vocabulary: Vocabulary | None = None

    @property
    def labelled(self) -> bool:
        """Always False: lines have no classes."""
        return False

    @property
    def vocabulary(self) -> Vocabulary:
        """The training split's characters.

        Raises:
            RuntimeError: before `setup`.
        """
        if self._vocabulary is None:
            raise RuntimeError("TextLines has no vocabulary yet: call setup() first")
        return self._vocabulary

    @property
    def dims(self) -> dict[str, int]:
        """`vocab_size`, `steps` (= max_length + 2); known after `setup`."""
        return {"vocab_size": len(self.vocabulary), "steps": self.max_length + 2}

    def encode(self, text: str) -> list[int]:
        """The numbers of a text, with start and end; unknown characters become 3."""
        return self.vocabulary.encode(text)

    def decode(self, ids: Tensor | Iterable[int]) -> str:
        """The text of a row of numbers, up to its end."""
        return self.vocabulary.decode(ids.tolist() if isinstance(ids, Tensor) else ids)

    def build(self) -> Splits:
        """Read the lines, split them, number their characters."""
        lines = self._usable(_read_lines(self._files()))
        try:
            parts = fraction_split(len(lines), self.val_fraction, self.test_fraction, self.seed)
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}; {self.left_out} left out") from None
        texts = [[lines[row] for row in part.tolist()] for part in parts]
        self._vocabulary = vocabulary = Vocabulary.of(texts[0])
        return Splits(*(self._tokens(part, vocabulary) for part in texts))

    def _files(self) -> list[Path]:
        if self.file is None:
            raise FileNotFoundError(
                "no text file given: data.file=<UTF-8 text, one string a line>; for example the"
                " word list /usr/share/dict/words (Debian, Ubuntu: apt-get install wamerican)"
            )
        files = sorted(self.file.glob("*.txt")) if self.file.is_dir() else [self.file]
        if not files or not files[0].is_file():
            reason = "no *.txt file in this folder" if self.file.is_dir() else "no such file"
            raise FileNotFoundError(f"data.file={self.file}: {reason}")
        return files

    def _usable(self, lines: list[str]) -> list[str]:
        full = [line for line in lines if line.strip()]
        short = [line for line in full if len(line) <= self.max_length]
        too_long, empty = len(full) - len(short), len(lines) - len(full)
        crop = self.overlong == "crop"
        self.left_out, self.cropped = (empty, too_long) if crop else (empty + too_long, 0)
        if empty or too_long:
            rank_zero_info(
                f"{self.file}: of {len(lines)} lines, {empty} empty ones left out, {too_long}"
                f" longer than max_length={self.max_length} {'cropped' if crop else 'left out'}"
            )
        return [line[: self.max_length] for line in full] if crop else short

    def _tokens(self, texts: list[str], vocabulary: Vocabulary) -> TokenSplit:
        pads = [PAD] * self.max_length
        rows = [vocabulary.encode(text) + pads[len(text) :] for text in texts]
        return TokenSplit(torch.tensor(rows), torch.zeros(len(texts), dtype=torch.long), vocabulary)


def _read_lines(files: list[Path]) -> list[str]:
    lines: list[str] = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8-sig")  # -sig: without the mark Windows adds
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text: {error}") from error
        # splitlines() would also split at form feeds and the like
        lines += text.removesuffix("\n").split("\n")
    return lines
