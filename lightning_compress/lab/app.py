"""Command line: `lightning-compress [key=value ...]`, `... report DIR ...`, `... inspect FILE`.

`python -m lightning_compress` is the same. `lightning-compress federated [key=value ...]` runs the
first form with the config `federated`.

argparse parses `report` and the commands on files; all other words are Hydra overrides.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import lightning_compress
from lightning_compress.lab.config import config_dir, explain
from lightning_compress.lab.sweeps import Outcome, run_sweep_job, sweep_folder
from lightning_compress.lab.sweeps.jobs import PRUNED_EXIT_CODE, stop_with_launcher
from lightning_compress.lab.usage import CommandParser, check_words, help_text, unknown_option
from lightning_compress.terminal import printable

__all__ = [
    "main",
    "quiet",
    "quote_partition",
    "report_parser",
    "terminable",
]


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt while the block runs.

    While a Trainer fits, it has put a handler of its own in place, which calls this one: then the
    batch under way is finished first, and Lightning ends the training.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change handlers
        return

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if signal.getsignal(signal.SIGTERM) is stop:
            raise KeyboardInterrupt("terminated")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


OUT_HELP = "default: report.html in their common parent; a suffix .md or .csv selects that format"
COMMANDS = ("inspect", "pack", "unpack", "diff", "sensitivity", "advise")
USAGE = 2  # exit code of what argparse and we refuse before anything runs
BROKEN_PIPE = 141  # as a shell has it for SIGPIPE

# The typed words, where recorded overrides of a run folder are added to them; else None.
_typed: ContextVar[Sequence[str] | None] = ContextVar("typed", default=None)
_EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, KeyError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 for an error, 2 for bad usage, 130 when interrupted.

    Where the reader of its output ends first, as `head` does, it exits with 141 silently.
    """
    try:
        try:
            _run_words(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


def _run_words(argv: list[str]) -> None:
    if argv[:1] == ["report"]:
        sys.exit(_report(argv[1:]))
    if argv and argv[0] in COMMANDS:
        from lightning_compress.lab.commands import run_command  # with PyTorch, which takes seconds

        sys.exit(run_command(argv))
    if argv[:1] in (["--version"], ["-V"]):
        print(f"lightning-compress {lightning_compress.__version__}")
        return
    argv = _hydra_words(argv)
    sweep = [word for word in argv if word in ("-m", "--multirun")]  # anywhere, as in git
    words = [word for word in argv if word not in sweep]
    if sweep and not any(word.startswith("hydra.sweep.dir=") for word in words):
        words.append(f"hydra.sweep.dir={sweep_folder(words)}")
    if not sweep and any(word.startswith("ckpt_path=") for word in words):
        typed, words = words, _with_recorded_words(words)
        _typed.set(typed if len(words) > len(typed) else None)
    sys.argv = [sys.argv[0], *sweep[:1], *words]
    stop_with_launcher()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # we print the errors ourselves, with the valid keys
    try:
        with terminable():
            _experiment()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error, argv))
    except BrokenPipeError:
        raise
    except OSError as error:  # Hydra makes the output folder before we can
        _fail(_message(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _hydra_words(argv: list[str]) -> list[str]:
    """The words for Hydra; prints the commands before its help, and refuses what it cannot mean."""
    if argv[:1] == ["help"] or "--help" in argv or "-h" in argv:
        argv = ["--help", *(word for word in argv if word not in ("help", "--help", "-h"))]
        print(help_text(), end="\n\n", flush=True)
    if "federated" in argv and "--config-name" not in argv:  # the same run, another config on top
        argv = ["--config-name=federated", *(word for word in argv if word != "federated")]
    if said := check_words(argv) or unknown_option(argv):
        _fail(said, USAGE)
    return [quote_partition(word) for word in argv]


def quote_partition(word: str) -> str:
    """Quote a partition with parentheses, which Hydra would parse as a function.

    >>> quote_partition("federated.partition=iid,dirichlet(0.1)")
    "federated.partition=iid,'dirichlet(0.1)'"
    """
    if not word.startswith("federated.partition="):
        return word
    return re.sub(r"""(?<!["'])(dirichlet\([^()]*\))""", r"'\1'", word)


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")
def _experiment(cfg: DictConfig) -> Outcome | None:
    runtime = HydraConfig.get()
    if runtime.mode == RunMode.MULTIRUN:
        return run_sweep_job(cfg, runtime)
    _run(cfg, runtime)
    return None


def _run(cfg: DictConfig, runtime: HydraConf) -> None:
    from lightning_compress.lab.monitoring import HopelessRunError
    from lightning_compress.lab.report.page import write_report
    from lightning_compress.lab.report.tables import print_summary
    from lightning_compress.lab.workflow.experiment import run_experiment
    from lightning_compress.lab.workflow.federated import check_federated, federated_training
    from lightning_compress.lab.workflow.resume import resume_command
    from lightning_compress.lab.workflow.run_identity import (
        check_record,
        run_folder,
        write_run_records,
    )
    from lightning_compress.lab.workflow.training import InterruptedRunError

    quiet()
    typed = _typed.get()
    if typed is not None and cfg.ckpt_path is not None:
        try:
            check_record(cfg, run_folder(cfg.ckpt_path), typed)
        except ValueError as error:
            _fail(_message(error))
    folder = Path(runtime.runtime.output_dir)
    names = {key: str(runtime.runtime.choices[key]) for key in ("model", "data")}
    try:
        begun = partial(write_run_records, cfg, folder)
        second = federated_training if "federated" in cfg else None
        if second is not None:
            check_federated(cfg.federated)
        results = run_experiment(cfg, folder, names=names, begun=begun, second=second)
        page = write_report([folder])
    except (InterruptedRunError, KeyboardInterrupt) as stop:
        command = resume_command(_display_path(folder), sys.argv[1:])
        print(f"\n{stop or 'interrupted'}. To go on:\n  {command}", file=sys.stderr, flush=True)
        raise KeyboardInterrupt from None
    except HopelessRunError as stop:
        print(f"pruned: {stop}", file=sys.stderr)
        sys.exit(PRUNED_EXIT_CODE)
    except (HydraException, OmegaConfBaseException) as error:  # else Hydra prints one of its own
        if os.environ.get("LIGHTNING_COMPRESS_TRACEBACK"):
            raise
        _fail(explain(error, sys.argv[1:]))
    except _EXPECTED as error:
        if os.environ.get("LIGHTNING_COMPRESS_TRACEBACK"):
            raise
        _fail(_message(error))
    print_summary(results)
    print(f"report: {_display_path(page)}")


def _with_recorded_words(words: Sequence[str]) -> list[str]:
    from lightning_compress.lab.workflow.run_identity import with_recorded

    try:
        return with_recorded(words)
    except (HydraException, OSError, ValueError) as error:
        _fail(_message(error))


def report_parser() -> CommandParser:
    """Parser of the words behind `report`."""
    parser = CommandParser(
        prog="lightning-compress report", description="Make one HTML page of any number of runs."
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run, multirun or parent folders")
    parser.add_argument("--out", type=Path, help=OUT_HELP)
    return parser


def _report(argv: list[str]) -> int:
    from lightning_compress.lab.report.page import write_report
    from lightning_compress.lab.report.tables import EXPORTS, write_export

    chosen = report_parser().parse_args(argv)
    try:
        if chosen.out is not None and chosen.out.suffix in EXPORTS:
            page = write_export(chosen.folders, chosen.out)
        else:
            page = write_report(chosen.folders, chosen.out)
    except (OSError, ValueError) as error:
        if os.environ.get("LIGHTNING_COMPRESS_TRACEBACK"):
            raise
        _fail(_message(error))
    print(printable(f"report: {_display_path(page)}"))
    return 0


def quiet() -> None:
    """Silence Lightning's messages about deliberate settings of the harness."""
    for name in ("lightning.pytorch", "onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # the data sit in memory
        ".*LeafSpec.*",  # Lightning 2.6 on torch 2.14
        ".*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _message(error: BaseException) -> str:
    text = str(error) if not isinstance(error, KeyError) else f"missing key {error}"
    return f"{text or type(error).__name__} (LIGHTNING_COMPRESS_TRACEBACK=1 shows where)"


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(code)


def _display_path(path: Path) -> Path:
    """A path for the terminal: relative to the working folder where it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


if __name__ == "__main__":
    main()
