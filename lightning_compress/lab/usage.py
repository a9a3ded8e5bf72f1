"""Usage of the command line: its commands with examples, its groups, and what a word was meant as.

Reads text alone: PyTorch and Hydra take seconds to load, which `--help` does not wait for.
"""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_compress.lab.config import config_dir

__all__ = ["COMMANDS", "CommandParser", "check_words", "help_text", "unknown_option"]

PROGRAM = "lightning-compress"
COMMANDS: Mapping[str, tuple[str, str]] = {  # what each does, and an example
    "report": ("one HTML page of any number of runs", "report outputs multirun --out page.html"),
    "inspect": ("tensors and graphs of an .lcz file, from its header", "inspect model.lcz"),
    "pack": ("a checkpoint or an ONNX file to an .lcz file", "pack last.ckpt --rdoq 0.02"),
    "unpack": ("an .lcz file to a checkpoint or an ONNX file", "unpack model.lcz --out model.pt"),
    "diff": ("compare the tensors of two checkpoints or .lcz files", "diff model.lcz model.pt"),
    "sensitivity": ("loss of quality of each layer's compression", "sensitivity model=vae"),
    "advise": ("a recipe for a model, with its reasons", "advise outputs/digits-vae/<run>"),
    "federated": ("clients that train together", "federated federated.rounds=5 data=digits"),
}
_WIDTH = 100
_VALUED = {  # Hydra's options that the next word belongs to
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
}
_OPTIONS = {
    *_VALUED,
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc"),
}


def help_text() -> str:
    """The commands with an example each, then the groups with a line a choice."""
    lines = [
        f"usage: {PROGRAM} [group=choice] [key=value] ...   train dense and compressed, and report",
        f"       {PROGRAM} COMMAND ...",
        "",
        "Commands (COMMAND --help has their options):",
    ]
    for name, (what, example) in COMMANDS.items():
        lines += [f"  {name:<12} {what}", f"  {'':<12} {PROGRAM} {example}"]
    lines += [
        "",
        "Options: --help, --version, -m (a sweep: key=1,2,3), --cfg job (shows the config),",
        "         -sc install=bash (shell completion), --hydra-help (all of Hydra's)",
        "",
        f"Groups ({PROGRAM} model=vae data=fashion_mnist compression=[prune,quantize]):",
    ]
    for group in groups():
        lines.append(f"  {group}")
        for path in sorted((config_dir() / group).glob("*.yaml")):
            what = first_sentence(path)
            short = textwrap.shorten(what, _WIDTH - 25, placeholder=" ...")
            lines.append(f"    {path.stem:<20} {short}".rstrip())
    return "\n".join(lines)


def groups() -> list[str]:
    """Names of the config groups."""
    root = config_dir()
    return sorted(one.name for one in root.iterdir() if one.is_dir() and any(one.glob("*.yaml")))


def first_sentence(path: Path) -> str:
    """The first sentence of a config file's first comment; empty where it has none.

    >>> first_sentence(config_dir() / "compression" / "prune.yaml")
    'Gradual magnitude pruning, Zhu & Gupta 2017'
    """
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        words.append(line.removeprefix("#").strip())
    return re.split(r"\.(?:\s+(?=[A-Z])|$)", " ".join(words), maxsplit=1)[0]


def check_words(argv: Sequence[str]) -> str | None:
    """The message for words that are neither commands, options nor overrides; None if all are.

    >>> check_words(["reprot", "outputs"]).splitlines()[0]
    "there is no command 'reprot': did you mean 'report'?"
    >>> check_words(["model", "=", "vae"])
    "no blanks around '=': write model=vae"
    >>> check_words(["model=vae", "-m"]) is None
    True
    """
    skip = False
    for place, word in enumerate(argv):
        if skip or word.startswith("-"):
            skip = not skip and word in _VALUED
            continue
        before = argv[place - 1] if place else ""
        after = argv[place + 1] if place + 1 < len(argv) else ""
        if word.startswith("=") or after.startswith("=") or _is_open(before, word):
            return _without_blanks(argv, place)
        if "=" not in word and not word.startswith("~"):
            return _unknown_word(word, place)
    return None


def _is_open(before: str, word: str) -> bool:
    return before.endswith("=") and "=" not in word


def _without_blanks(argv: Sequence[str], place: int) -> str:
    """The override that words around a lonely = were meant as."""
    first = place if argv[place][0] != "=" and not _is_open(argv[place - 1], argv[place]) else None
    start = place if first is not None or not place else place - 1
    joined = argv[start]
    for word in argv[start + 1 :]:
        if not (joined.endswith("=") or word.startswith("=")):
            break
        joined += word
    return f"no blanks around '=': write {joined}"


def _unknown_word(word: str, place: int) -> str:
    if word in COMMANDS:
        _, example = COMMANDS[word]
        return f"the command {word!r} comes first: {PROGRAM} {example}"
    if word in (known := groups()):
        return f"{word!r} needs a choice: {', '.join(f'{word}={one}' for one in _choices(word))}"
    if chosen := [group for group in known if word in _choices(group)]:
        options = " or ".join(f"{group}={word}" for group in chosen)
        return f"{word!r} is a choice of a group: write {options}"
    what = "command" if place == 0 else "command, option or override"
    names = list(COMMANDS)
    close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.5)
    if not close:
        return (
            f"there is no {what} {word!r}: commands are {', '.join(names)}; settings are key=value"
        )
    _, example = COMMANDS[close[0]]
    return f"there is no {what} {word!r}: did you mean {close[0]!r}?\n  {PROGRAM} {example}"


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def unknown_option(argv: Sequence[str]) -> str | None:
    """The message for an option that Hydra does not know; None if it knows all.

    >>> unknown_option(["--hlep"])
    "there is no option '--hlep': did you mean '--help'?"
    """
    for word in _options(argv):
        name = word.partition("=")[0]
        short = re.fullmatch(r"-(c|p|cp|cn|cd|i)\S+", word)  # a value may follow at once
        full = [one for one in _OPTIONS if one.startswith(name)] if name.startswith("--") else []
        if name in _OPTIONS or full or short:
            continue
        return _no_option(name, _OPTIONS, PROGRAM)
    return None


def _no_option(name: str, options: Collection[str], program: str) -> str:
    close = difflib.get_close_matches(name, sorted(options), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"{program} --help shows them"
    return f"there is no option {name!r}: {hint}"


class CommandParser(argparse.ArgumentParser):
    """Parser of a command, which refuses an unknown word itself, with its own usage.

    argparse leaves that to the outer parser, whose usage has none of the command's options.
    """

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride] (it has overloads)
        self, args: Any = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As argparse's, but a word that is left over ends the program."""
        chosen, left = super().parse_known_args(args, namespace)
        if left:
            name = left[0].partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            self.error(
                _no_option(name, known, self.prog)
                if name.startswith("-")
                else f"{name!r} is one word too many"
            )
        return chosen, left


def _options(argv: Sequence[str]) -> Iterator[str]:
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word.startswith("-"):
            skip = word in _VALUED
            yield word
