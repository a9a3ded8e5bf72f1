"""Commands on files without the model's code: `inspect`, `pack`, `unpack`, `diff`.

And on a dense model before compression: `sensitivity`, `advise`.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_compress.files import write_atomically
from lightning_compress.lab.usage import CommandParser
from lightning_compress.lcz.arrays import MAX_ONNX_BYTES, inspect_compressed, onnx_model
from lightning_compress.lcz.artifact import write_graph
from lightning_compress.lcz.checkpoints import read_checkpoint, read_contents, write_checkpoint
from lightning_compress.lcz.codecs import CHOICES
from lightning_compress.lcz.info import ArtifactInfo, GraphInfo, TensorInfo
from lightning_compress.lcz.lost_grids import few_valued
from lightning_compress.lcz.opening import MAX_BYTES
from lightning_compress.lcz.raw_bits import patterns
from lightning_compress.lcz.rdoq import cheaper_contents, check_rdoq
from lightning_compress.lcz.write import Encoding, write_contents
from lightning_compress.terminal import printable

__all__ = ["COMMANDS", "command_parser", "run_command"]

_N = TypeVar("_N", int, float)
SAME, DIFFERENT, TROUBLE = 0, 1, 2  # as diff has them


def run_command(argv: Sequence[str]) -> int:
    """Run one of `COMMANDS`; 0 for success, 1 where `diff` finds a difference, 2 for an error."""
    chosen = command_parser().parse_args(argv)
    try:
        for name in ("file", "checkpoint", "one", "other"):
            if (path := getattr(chosen, name, None)) is not None:
                _check_file(path)
        return COMMANDS[chosen.command](chosen)
    except BrokenPipeError:
        raise
    except FileNotFoundError as error:
        missing = f"there is no file {error.filename}" if error.filename else str(error)
        print(f"error: {printable(missing)}", file=sys.stderr)
        return TROUBLE
    except (OSError, ValueError, TypeError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return TROUBLE


def _check_file(path: Path) -> None:
    """Refuse what no command on files can read, whatever its kind."""
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no file", str(path))
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is empty: it has 0 bytes")


def command_parser() -> argparse.ArgumentParser:
    """Parser of the commands on files and on dense models."""
    parser = CommandParser(prog="lightning-compress")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect", help="tensors and graphs of an .lcz file, from its header"
    )
    inspect.add_argument("file", type=Path, help="an .lcz file")
    pack = commands.add_parser("pack", help="a checkpoint or an ONNX file to an .lcz file")
    what = ".pt, .pth, .ckpt, .bin, .safetensors; or .onnx, for an .lcz file that runs"
    pack.add_argument("checkpoint", type=Path, help=what)
    what = "default: beside the checkpoint, as .lcz; model.lcz for model.int8.onnx"
    pack.add_argument("--out", type=Path, help=what)
    pack.add_argument("--codec", choices=list(CHOICES), default="auto")
    pack.add_argument("--float-dtype", choices=["fp16", "bf16"], help="lossy: of plain floats")
    what = "lossy: squared steps that a bit is worth, for weights on uniform grids; 0.02 to 0.03"
    pack.add_argument("--rdoq", type=float, metavar="LAMBDA", help=what)
    pack.add_argument("--workers", type=int, default=1, help="threads")
    unpack = commands.add_parser("unpack", help="an .lcz file to a checkpoint or an ONNX file")
    unpack.add_argument("file", type=Path, help="an .lcz file")
    unpack.add_argument("--out", type=Path, help="default: beside the file, as .safetensors")
    what = "write the runnable graph of the file here, in place of a checkpoint"
    unpack.add_argument("--onnx", type=Path, metavar="MODEL.onnx", help=what)
    unpack.add_argument("--graph", help="name of the graph, where the file holds several")
    diff = commands.add_parser("diff", help="compare the tensors of two checkpoints or .lcz files")
    for name in ("one", "other"):
        diff.add_argument(name, type=Path, help="a checkpoint, a safetensors file or an .lcz file")
    for command in (pack, diff):
        command.add_argument("--key", help="entry of a checkpoint that holds the tensors")
    for command in (unpack, diff):
        what = "limit of the decoded bytes of .lcz files"
        command.add_argument("--max-bytes", type=int, default=MAX_BYTES, help=what)
    _add_models(commands)
    return parser


def _add_models(commands: Any) -> None:
    """Parsers of the commands on a dense model."""
    what = "a run's folder, a checkpoint in one, a model config's name, or overrides"
    scan = commands.add_parser("sensitivity", help="loss of quality of each layer's compression")
    advise = commands.add_parser("advise", help="a recipe for a model, with its reasons")
    for command, sparsities in (
        (scan, [0.5, 0.8, 0.9, 0.95, 0.98]),
        (advise, [0.5, 0.8, 0.9, 0.97]),
    ):
        command.add_argument("words", nargs="+", metavar="MODEL", help=what)
        command.add_argument(
            "--out", type=Path, help="folder; default: the run's, or outputs/<command>"
        )
        command.add_argument("--rows", type=int, default=1000, help="of the validation split")
        command.add_argument(
            "--sparsities", type=_fractions, default=sparsities, help="such as 0.5,0.9"
        )
        allow = "a class, module or package that a run's config may name besides; repeatable"
        command.add_argument("--allow", action="append", help=allow)
        command.add_argument("--bits", type=_numbers, default=[2, 3, 4, 6], help="such as 2,4,6")
    advise.add_argument("--ratio", type=float, default=30.0, help="target compression ratio")


def _fractions(text: str) -> list[float]:
    return _list_of(float, text, "fractions separated by commas, such as 0.5,0.9")


def _numbers(text: str) -> list[int]:
    return _list_of(int, text, "integers separated by commas, such as 2,4,6")


def _list_of(kind: Callable[[str], _N], text: str, what: str) -> list[_N]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: valid are {what}") from None


def _model_command(chosen: argparse.Namespace) -> int:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from lightning_compress.lab.app import quiet
    from lightning_compress.lab.config import explain

    quiet()
    if chosen.rows < 1:
        raise ValueError(f"--rows {chosen.rows}: expected an integer of at least 1")
    first = Path(chosen.words[0])
    folder = chosen.out or (first if first.is_dir() else Path("outputs") / chosen.command)
    more: dict[str, Any] = {"allowed": chosen.allow or ()}
    more |= {"sparsities": chosen.sparsities, "bits": chosen.bits, "rows": chosen.rows}
    try:
        if chosen.command == "advise":
            from lightning_compress.lab.workflow.advising import run_advise

            run_advise(chosen.words, folder, ratio=chosen.ratio, **more)
        else:
            from lightning_compress.lab.workflow.sensitivity import run_sensitivity

            run_sensitivity(chosen.words, folder, **more)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, chosen.words)) from error
    return SAME


def _inspect(chosen: argparse.Namespace) -> int:
    print(describe(inspect_compressed(chosen.file)))
    return SAME


def _pack(chosen: argparse.Namespace) -> int:
    if chosen.checkpoint.suffix.lower() == ".onnx":
        return _pack_graph(chosen)
    target = chosen.out or chosen.checkpoint.with_suffix(".lcz")
    contents = read_contents(chosen.checkpoint, chosen.key)
    if chosen.rdoq is not None:
        check_rdoq(chosen.rdoq, has_data=False)
        contents = cheaper_contents(contents, chosen.rdoq)
    encoding = Encoding(chosen.codec, chosen.float_dtype, chosen.workers)
    few = [] if contents.grids else few_valued(contents.tensors.items())
    if few:
        print(
            f"note: {printable(few[0])} takes few values, but {printable(str(chosen.checkpoint))} "
            "has no grids: a full checkpoint of a fit with the compression callbacks "
            "gives a smaller file",
            file=sys.stderr,
        )
    info = write_contents(contents, target, encoding)
    print(
        f"{printable(str(target))}: {info.bytes} bytes, {info.ratio:.2f}x smaller than its tensors"
    )
    return SAME


def _pack_graph(chosen: argparse.Namespace) -> int:
    for name in ("key", "float_dtype", "rdoq"):
        if getattr(chosen, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is for checkpoints: {chosen.checkpoint} is an ONNX file")
    target = chosen.out or _beside(chosen.checkpoint)
    info = write_graph(chosen.checkpoint, target, chosen.codec)
    print(f"{target}: {info.bytes} bytes, {info.ratio:.2f}x smaller than the ONNX file")
    return SAME


def _beside(path: Path) -> Path:
    """`model.lcz` for `model.int8.onnx`, unless the weights of a module are there."""
    target = path.with_name(path.stem.removesuffix(".int8") + ".lcz")
    if target.exists() and inspect_compressed(target).per_tensor:
        raise ValueError(f"{target} holds the tensors of a module: name another file with --out")
    return target


def _unpack_graph(chosen: argparse.Namespace) -> int:
    if chosen.out is not None:
        raise ValueError("--out is for a checkpoint and --onnx for the graph: give one of them")
    most = min(chosen.max_bytes, MAX_ONNX_BYTES)
    data = onnx_model(chosen.file, chosen.graph, max_bytes=most)
    write_atomically(chosen.onnx, data, what="the ONNX file")
    print(f"{chosen.onnx}: {len(data)} bytes")
    return SAME


def _unpack(chosen: argparse.Namespace) -> int:
    if chosen.onnx is not None:
        return _unpack_graph(chosen)
    if chosen.graph is not None:
        raise ValueError(f"--graph {chosen.graph}: name the ONNX file with --onnx")
    if chosen.file.suffix.lower() == ".lcz" and _only_graphs(chosen.file):
        raise ValueError(f"{chosen.file} holds a graph and no tensors: unpack it with --onnx FILE")
    target = chosen.out or chosen.file.with_suffix(".safetensors")
    tensors = read_checkpoint(chosen.file, max_bytes=chosen.max_bytes)
    write_checkpoint(tensors, target)
    print(f"{printable(str(target))}: {len(tensors)} tensors")
    return SAME


def _only_graphs(path: Path) -> bool:
    info = inspect_compressed(path)
    return bool(info.graphs) and not info.per_tensor


def _diff(chosen: argparse.Namespace) -> int:
    one, other = (
        read_checkpoint(path, chosen.key if path.suffix != ".lcz" else None,
                        max_bytes=chosen.max_bytes)
        for path in (chosen.one, chosen.other)
    )  # fmt: skip
    lines = differences(one, other)
    print("\n".join(lines) if lines else f"{len(one)} tensors, all the same bit for bit")
    return DIFFERENT if lines else SAME


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": _inspect,
    "pack": _pack,
    "unpack": _unpack,
    "diff": _diff,
    "sensitivity": _model_command,
    "advise": _model_command,
}


def describe(info: ArtifactInfo) -> str:
    """The tensors of a file as a table, and their sums."""
    head = ("tensor", "shape", "dtype", "sparsity", "bits", "codec", "bytes", "bound")
    rows = [_row(name, tensor) for name, tensor in info.per_tensor.items()]
    for graph, one in info.graphs.items():
        prefix = f"{graph or 'graph'}: "
        rows += [_row(prefix + name, tensor) for name, tensor in one.per_tensor.items()]
        model = one.bytes - sum(tensor.bytes for tensor in one.per_tensor.values())
        rows.append((prefix + "model", "-", "", "-", "", "deflate", str(model), "-"))
    sums = ("all", "", "", "", "", "", str(info.bytes), str(info.entropy_bound_bytes))
    table = [head, *rows, sums]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = [
        "  ".join(
            text.ljust(width) if column in (0, 2, 5) else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    plain = f"{info.header_bytes} bytes of {info.bytes} are header and checksum"
    what = "tensors" if info.per_tensor or not info.graphs else "ONNX files"
    lines.append(f"{plain}; {info.ratio:.2f}x smaller than its {what}")
    return "\n".join([*lines, *(_graph_line(*pair) for pair in info.graphs.items())])


def _row(name: str, tensor: TensorInfo) -> tuple[str, ...]:
    return (
        printable(name, lines=False),
        "x".join(map(str, tensor.shape)) or "-",
        tensor.dtype,
        f"{1 - tensor.nonzero / tensor.elements:.2%}" if tensor.elements else "-",
        str(tensor.bits),
        tensor.codec,
        str(tensor.bytes),
        str(tensor.bound_bytes),
    )


def _graph_line(name: str, graph: GraphInfo) -> str:
    title = f"graph {name!r}" if name else "graph"
    line = f"{title}: {graph.bytes} bytes, an ONNX file of {graph.onnx_bytes}"
    if graph.shared:
        line += f"; {len(graph.shared)} tensors are the module's, stored once"
    if graph.twice:
        line += f"; stored a second time: {', '.join(graph.twice)}"
    return line


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """A line for each tensor that is not the same in both, bit for bit.

    >>> differences({"a": torch.zeros(2)}, {"a": torch.tensor([0.0, 0.5]), "b": torch.ones(1)})
    ['a: 1 of 2 values differ, by 0.5 at most', 'b: only in the second']
    """
    lines: list[str] = []
    for name in dict.fromkeys([*one, *other]):
        shown = printable(name, lines=False)
        if name not in one or name not in other:
            lines.append(f"{shown}: only in the {'first' if name in one else 'second'}")
        elif (line := _difference(one[name], other[name])) is not None:
            lines.append(f"{shown}: {line}")
    return lines


def _difference(one: Tensor, other: Tensor) -> str | None:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        kinds = (f"{value.dtype} {tuple(value.shape)}" for value in (one, other))
        return " against ".join(kinds)
    apart = patterns(one) != patterns(other)
    if not apart.any():
        return None
    if one.dtype.is_complex:
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    most = (one.double() - other.double()).abs().max().item()
    return f"{np.count_nonzero(apart)} of {apart.size} values differ, by {most:g} at most"
