"""Checks of the pages, run by `make docs` and by the tests: names in them, and names they lack.

A word in code font that is neither in the sources nor in this file is misspelled or gone. A public
name that no page of the reference has is missing. Links are mkdocs' own check (`strict`).
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "lightning_compress",
    "hydra_plugins",
    "conf",
    "experiments",
)  # tests misspell on purpose
SUFFIXES = {".py", ".yaml", ".json", ".jsonl", ".html"}
FILES = ("Makefile", "pyproject.toml")
# Words of others' tools, and of commands, that no source here has.
FOREIGN = {
    "MyModel", "FLWR_HOME", "FedAdam", "installation", "packaging", "superlink", "supernode",
    "BackboneFinetuning", "first_step", "second_step", "genA2B", "submitit_local",
    "model_checkpoint", "simd", "threaded", "FedMedian", "FedTrimmedAvg", "Krum", "auth",
    "crt", "pem", "int32_data", "additional_parameters", "requeue", "submitit_slurm", "timeout_min",
}  # fmt: skip
WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@cache
def known_words() -> frozenset[str]:
    """Every identifier and word of the sources, with the names of their files."""
    words: set[str] = set(FOREIGN)
    for path in _sources():
        words.update(WORD.findall(path.read_text(encoding="utf-8", errors="replace")))
        words.update(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.joinpath("tests").rglob("*.py"):
        words.update(path.relative_to(ROOT).with_suffix("").parts)
    return frozenset(words)


def _sources() -> list[Path]:
    below = [one for name in SOURCES for one in (ROOT / name).rglob("*")]
    return [ROOT / name for name in FILES] + [
        one for one in below if one.suffix in SUFFIXES and "__pycache__" not in one.parts
    ]


def public_names() -> list[str]:
    """`__all__` of the package, read from its source."""
    text = (ROOT / "lightning_compress" / "__init__.py").read_text(encoding="utf-8")
    block = re.search(r"^__all__ = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    return re.findall(r'"(\w+)"', block.group(1))


def unknown_names(page: str) -> list[str]:
    """Names in code font of a page that no source has: identifiers of more than two letters.

    Code blocks count too: all but a block's own assignments, which are its own business.
    """
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^    .*$", "", prose, flags=re.MULTILINE)  # commands, which a test composes
    spans = re.findall(r"`([^`\n]+)`", prose)
    imported = re.findall(r"^from lightning_compress import (.*)$", "\n".join(blocks), re.MULTILINE)
    found = [word for span in (*spans, *imported) for word in WORD.findall(_plain(span))]
    return sorted({word for word in found if len(word) > 2 and word not in known_words()})


def _plain(span: str) -> str:
    """A span without placeholders, addresses, packages' versions and numbers."""
    span = re.sub(r"<[^>]*>|https?://\S+|\\x[0-9a-f]{2}|\b\d[\w.]*", " ", span)
    return re.sub(r"\b[0-9A-F]{2}(?: [0-9A-F]{2})+\b", " ", span)


def missing_names(reference: str) -> list[str]:
    """Public names without an entry in the reference."""
    named = set(re.findall(r"^::: lightning_compress\.(\w+)$", reference, re.MULTILINE))
    return [name for name in public_names() if name not in named]


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page: a name that no source has ends the build."""
    unknown = unknown_names(markdown)
    if unknown:
        raise ValueError(f"{page.file.src_uri}: names that no source has: {', '.join(unknown)}")
    return markdown


def on_pre_build(**_: Any) -> None:
    """Called by mkdocs first: a public name without a place ends the build."""
    pages = (ROOT / "docs" / "reference").glob("*.md")
    missing = missing_names("\n".join(page.read_text(encoding="utf-8") for page in pages))
    if missing:
        raise ValueError(f"docs/reference has no entry for {', '.join(missing)}")
