"""Encoder of contents into a file, tensor by tensor in bounded memory."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.channel_record import KEY as CHANNELS
from lightning_compress.lcz.channel_record import write_channels
from lightning_compress.lcz.codecs import check_codec
from lightning_compress.lcz.container import MIN_SIZE, container_bytes, write_container
from lightning_compress.lcz.graph import GraphRecord
from lightning_compress.lcz.graph_writing import Source, encoded_graph
from lightning_compress.lcz.header import TensorRecord, read_records, write_records
from lightning_compress.lcz.info import ArtifactInfo, artifact_info
from lightning_compress.lcz.module_state import Contents, shared_memory, write_activations
from lightning_compress.lcz.parallel import check_workers, parallel_map, with_progress
from lightning_compress.lcz.raw_bits import dtype_name, patterns, without_negative_zeros
from lightning_compress.lcz.tensors import encode_on_grid, encode_values, same_grid
from lightning_compress.sharding import full_tensor, is_sharded
from lightning_compress.state import Grid

__all__ = [
    "Encoding",
    "Gather",
    "contents_bytes",
    "run_on_first_process",
    "write_contents",
]
Gather = Callable[[str], Tensor]
T = TypeVar("T")


def run_on_first_process(tensors: Mapping[str, Tensor], work: Callable[[Gather], T]) -> T:
    """Run a function on the first process that gathers sharded tensors one by one.

    The other processes take part in each gather and receive the result or the error. The first
    process alone decides the order, so that errors and threads cause no deadlock.

    Args:
        tensors: by name, sharded or not; the same names on all processes.
        work: gets a function from a name to the whole tensor.

    Returns:
        What `work` returned, on every process.

    Raises:
        Exception: what `work` raised, on every process.
    """
    if distributed.get_rank() != 0:
        return _serve_gathers(tensors)
    lock = Lock()

    def gather(name: str) -> Tensor:
        with lock:
            _broadcast(name)
            return full_tensor(tensors[name])

    try:
        result = work(gather)
    except BaseException as error:
        _broadcast(error)
        raise
    _broadcast([result])
    return result


def _serve_gathers(tensors: Mapping[str, Tensor]) -> Any:
    while isinstance(message := _broadcast(), str):
        full_tensor(tensors[message])
    if isinstance(message, BaseException):
        raise message
    return message[0]


def _broadcast(what: Any = None) -> Any:
    """Broadcast from the first process: a name, an error, or a result in a list."""
    box = [what]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


_FLOAT_DTYPES = {None: None, "fp16": torch.float16, "bf16": torch.bfloat16}
_IN_MEMORY = 1 << 26  # bytes of payloads held in memory until the header is known
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Encoding:
    """How tensors are encoded.

    Args:
        codec: of the symbols, as in `save_compressed`.
        float_dtype: dtype that floats without a grid are cast to: None, "fp16" or "bf16".
        workers: threads that encode tensors side by side.
        signed_zeros: whether -0.0 is kept apart from 0.0.

    Raises:
        ValueError: for an unknown codec or float_dtype, or no worker.
    """

    codec: str = "auto"
    float_dtype: str | None = None
    workers: int = 1
    signed_zeros: bool = False

    def __post_init__(self) -> None:
        check_codec(self.codec)
        if self.float_dtype not in _FLOAT_DTYPES:
            raise ValueError(f"float_dtype={self.float_dtype!r}: valid are None, 'fp16', 'bf16'")
        check_workers(self.workers)


@dataclass(frozen=True)
class _Encoded:
    record: TensorRecord
    payload: bytes
    warning: str = ""


def write_contents(
    contents: Contents,
    path: Path,
    encoding: Encoding,
    graphs: Mapping[str, bytes] | None = None,
) -> ArtifactInfo:
    """Write a file of these contents; where some are sharded, all processes must.

    Args:
        contents: of the module.
        path: of the file.
        encoding: how tensors are encoded.
        graphs: ONNX models by name, with their weights inside.

    Raises:
        ValueError: for what the format cannot hold.
        OSError: naming the path, when it cannot be written.
    """
    tensors = contents.tensors
    if any(map(is_sharded, tensors.values())):
        return run_on_first_process(
            tensors, lambda gather: _write_file(contents, path, encoding, gather, graphs)
        )
    return _write_file(contents, path, encoding, tensors.__getitem__, graphs)


def contents_bytes(contents: Contents, encoding: Encoding) -> bytes:
    """The bytes of the file that `write_contents` writes, of tensors that are not sharded.

    Raises:
        ValueError: for what the format cannot hold.
    """
    tied, found, payloads = _tied_names(contents), {}, bytearray()
    own = set(contents.tensors) - set(tied)
    for coded in _encode_all(contents, own, encoding, contents.tensors.__getitem__):
        if coded.warning:
            warnings.warn(coded.warning, stacklevel=3)
        found[coded.record.name] = coded.record
        payloads += coded.payload
    for name, source in tied.items():
        found[name] = _tied_record(name, found[source], has_grid=name in contents.grids)
    rows = write_records([found[name] for name in contents.tensors])
    return container_bytes({"tensors": _check_rows(rows, len(payloads))}, bytes(payloads))


def _write_file(
    contents: Contents,
    path: Path,
    encoding: Encoding,
    gather: Gather,
    graphs: Mapping[str, bytes] | None,
) -> ArtifactInfo:
    tied = _tied_names(contents)
    header: dict[str, Any] = {}
    if contents.activations:
        header["activations"] = write_activations(contents.activations)
    if contents.channels:
        header[CHANNELS] = write_channels(contents.channels)
    with (
        _errors_name_path(path),
        tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(path.parent)) as spool,
    ):
        found: dict[str, TensorRecord] = {}
        for coded in _encode_all(contents, set(contents.tensors) - set(tied), encoding, gather):
            if coded.warning:
                warnings.warn(coded.warning, stacklevel=4)  # the caller of save_compressed
            found[coded.record.name] = coded.record
            spool.write(coded.payload)
        for name, source in tied.items():
            found[name] = _tied_record(name, found[source], has_grid=name in contents.grids)
        records = [found[name] for name in contents.tensors]
        header["tensors"] = _check_rows(write_records(records), spool.tell())
        runnable: list[GraphRecord] = []
        sources = _graph_sources(contents, found, gather)
        for name, model in (graphs or {}).items():
            encoded = encoded_graph(name, model, encoding.codec, sources)
            runnable.append(encoded.record)
            spool.writelines(encoded.payloads)
        if runnable:
            header["graphs"] = [
                graph.row() | {"tensors": write_records(graph.records)} for graph in runnable
            ]
        spool.seek(0)
        size = write_container(path, header, iter(lambda: spool.read(_CHUNK), b""))
    return artifact_info(path, records, size, runnable)


def _graph_sources(
    contents: Contents, records: Mapping[str, TensorRecord], gather: Gather
) -> dict[str, Source]:
    """The module's tensors that a graph may share."""

    def steps(name: str) -> NDArray[np.integer] | None:
        if records[name].kind != "grid":
            return None
        return contents.grids[name].quantize(gather(name)).cpu().numpy()

    return {
        name: Source(record, partial(steps, name), lambda name=name: patterns(gather(name)))
        for name, record in records.items()
        if record.kind != "tied" and not record.stored and record.elements
    }


@contextlib.contextmanager
def _errors_name_path(path: Path) -> Iterator[None]:
    """Name the path in errors of the temporary file of payloads."""
    try:
        yield
    except OSError as error:
        if error.filename == str(path):
            raise
        message = f"cannot write the artifact: {error.strerror or error}"
        raise OSError(error.errno, message, str(path)) from error


def _check_rows(rows: list[dict[str, Any]], payload_bytes: int) -> list[dict[str, Any]]:
    try:
        read_records(rows, payload_bytes, payload_bytes + MIN_SIZE)
    except CorruptArtifactError as error:
        raise ValueError(f"the format cannot hold this module: {error}") from None
    return rows


def _tied_names(contents: Contents) -> dict[str, str]:
    """By name: the tensor whose memory and grid it shares."""
    grids = contents.grids
    return {
        name: source
        for name, source in shared_memory(contents.tensors, first=grids).items()
        if name not in grids or same_grid(grids[name], grids.get(source))
    }


def _encode_all(
    contents: Contents, own: set[str], encoding: Encoding, gather: Gather
) -> Iterator[_Encoded]:
    names = [name for name in contents.tensors if name in own]
    sizes = [contents.tensors[name].numel() for name in names]

    def encode(name: str) -> _Encoded:
        return _encode(name, gather(name), contents.grids.get(name), encoding)

    yield from with_progress(parallel_map(encode, names, encoding.workers), sizes, "encoding")


def _tied_record(name: str, source: TensorRecord, *, has_grid: bool) -> TensorRecord:
    row = TensorRecord(name, source.shape, source.dtype, kind="tied", tied=source.name)
    return replace(row, grid=source.grid if has_grid else ())


def _encode(name: str, tensor: Tensor, grid: Grid | None, encoding: Encoding) -> _Encoded:
    if not encoding.signed_zeros:
        tensor = without_negative_zeros(tensor)
    record = TensorRecord(name, tuple(tensor.shape), dtype_name(tensor.dtype), zeros=_zeros(tensor))
    warning = ""
    if grid is not None:
        if (coded := encode_on_grid(record, tensor, grid, encoding.codec)) is not None:
            return _Encoded(*coded)
        warning = f"tensor {name!r} is not bit for bit on its grid: stored as values, without it"
    cast = _FLOAT_DTYPES[encoding.float_dtype]
    if cast is not None and tensor.is_floating_point() and tensor.dtype.itemsize > cast.itemsize:
        narrow = tensor.to(cast)
        if torch.equal(narrow.isfinite(), tensor.isfinite()):
            record = replace(record, stored=dtype_name(cast), zeros=_zeros(narrow))
            return _Encoded(*encode_values(record, narrow, encoding.codec), warning)
        warning = f"tensor {name!r} has values beyond {dtype_name(cast)}: stored as {record.dtype}"
    return _Encoded(*encode_values(record, tensor, encoding.codec), warning)


def _zeros(tensor: Tensor) -> int:
    return int((tensor.detach() == 0).sum())  # count_nonzero lacks some dtypes
