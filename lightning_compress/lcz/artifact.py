"""Encoding of modules into `.lcz` files, and decoding into modules."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.arrays import inspect_compressed
from lightning_compress.lcz.graph_inlining import inline_tensors
from lightning_compress.lcz.info import ArtifactInfo
from lightning_compress.lcz.lost_grids import is_lightning, lost_grids
from lightning_compress.lcz.module_state import (
    Contents,
    check_channels,
    check_tensor,
    fit_channels,
    fold_batchnorm_statistics,
    module_contents,
    module_tensors,
    removed_shapes,
    shared_memory,
    stored_name,
)
from lightning_compress.lcz.opening import MAX_BYTES
from lightning_compress.lcz.rdoq import cheaper_contents, check_rdoq
from lightning_compress.lcz.read import Artifact, check_fit, check_shared, open_artifact
from lightning_compress.lcz.write import Encoding, write_contents
from lightning_compress.sharding import is_sharded, shards_of, to_shards
from lightning_compress.state import (
    ActivationGrids,
    Grid,
    clear_grid,
    set_activation_grids,
    set_grid,
)

__all__ = [
    "inspect_compressed", "load_compressed", "read_tensors", "save_compressed", "write_graph",
    "write_tensors",
]  # fmt: skip

Graph = bytes | str | os.PathLike[str]


def save_compressed(
    module: nn.Module,
    path: str | os.PathLike[str],
    codec: str = "auto",
    *,
    graph: Graph | Mapping[str, Graph] | None = None,
    float_dtype: str | None = None,
    fold_batchnorm: bool = False,
    state: Mapping[str, Tensor] | None = None,
    workers: int = 1,
    signed_zeros: bool = False,
    rdoq: float | None = None,
    data: Iterable[object] | Tensor | Mapping[str, Any] | None = None,
    batch_to_args: Callable[[Any], Any] | None = None,
) -> ArtifactInfo:
    """Write every entry of a module's `state_dict` to one entropy-coded file.

    Lossless with respect to the values of the module (-0.0 apart, see `signed_zeros`),
    unless `float_dtype` or `fold_batchnorm` is set. Weights on a grid become
    symbols; other tensors the smallest of plain values, a codebook, and non-zero values with a
    mask. The file is written atomically. Tensors are encoded one after the other:
    memory grows with the largest, not their sum.
    Of a sharded module (FSDP2) all processes must call: tensors are gathered one by one, and the
    first process writes.

    Args:
        module: of any kind; names of compiled modules are stored without `_orig_mod.`.
        path: of the file; its folder must exist.
        codec: of the symbols: "auto" for the smallest result tensor by tensor, "fast" for the
            smallest of those that encode 10 million weights a second and decode 25 million, or a
            name:
            "arithmetic", "context", "huffman", "rle_huffman", "raw", "relative_index".
        graph: an ONNX model of the module, or the path of one, so that the file also runs by
            itself: `onnx_session(path)`. Its weights are stored once with the module's where they
            are the same numbers in another order, else again: `ArtifactInfo.graphs` names them.
            Several, by name, for a module of several parts.
        float_dtype: "fp16" or "bf16" stores floats that are on no grid in that type; loading casts
            them back.
        fold_batchnorm: store each BatchNorm as one scale and one shift a channel, which costs
            nothing for its statistics: in eval mode the loaded module gives the same outputs, up
            to rounding, but the statistics of its training data are lost.
        state: values to store in place of the module's own, by their keys in `state_dict`: an
            average, or those of a checkpoint.
        workers: threads that encode tensors side by side; memory grows with their number. They
            gain little: the range coder keeps Python's lock.
        signed_zeros: store -0.0 as such. Otherwise it becomes 0.0, which equals it: weights that
            were pruned as `weight * mask` hold it in every second zero, half a bit each.
        rdoq: lossy: choose for each weight on a uniform grid among its point, the next one towards
            0, and 0, by squared change in steps plus `rdoq` times its bits; 0.005 to 0.03. The
            module stays as it is.
        data: for `rdoq`: batches of the module's inputs, as in `quantize_static`. Weights count by
            how much the outputs depend on them, and BatchNorm's statistics are taken anew; without
            data all weights count alike.
        batch_to_args: from a batch to what the module is called with.

    Raises:
        ValueError: for an unknown codec or float_dtype, tensors that the format cannot hold, a
            rewriting of a sharded module, a graph that is no ONNX model, or `rdoq` of a module
            without uniform grids.
        TypeError: for entries that are no dense tensors, or what is no module.
        KeyError: for a key of `state` that the module does not have.
        OSError: naming the path, when it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     info = save_compressed(nn.Linear(4, 2), f"{folder}/model.lcz")
    ...     restored = load_compressed(f"{folder}/model.lcz", nn.Linear(4, 2))
    >>> sorted(info.per_tensor)
    ['bias', 'weight']
    """
    _check_module(module, "write_tensors")
    encoding = Encoding(codec, float_dtype, workers, signed_zeros)
    graphs = onnx_bytes(graph)
    to_shards(module)
    contents = module_contents(module, state or {})
    if is_lightning(module) and (text := lost_grids(module)):
        warnings.warn(f"stored as plain values, which takes more bytes: {text}", stacklevel=2)
    check_rdoq(rdoq, has_data=data is not None)
    asked = ["fold_batchnorm"] * fold_batchnorm + ["rdoq"] * (rdoq is not None)
    if asked and any(map(is_sharded, contents.tensors.values())):
        raise ValueError(
            f"{asked[0]} looks at several whole tensors at once, and the module is "
            "sharded (FSDP2): leave it out, or load the file into a plain module and save again"
        )
    if rdoq is not None:
        if graphs:
            raise ValueError("rdoq= changes weights that graph= holds as they were: give one")
        contents = cheaper_contents(contents, rdoq, module, data, batch_to_args)
    if fold_batchnorm:
        contents = fold_batchnorm_statistics(module, contents)
    return write_contents(contents, Path(path), encoding, graphs)


def write_graph(
    graph: Graph | Mapping[str, Graph], path: str | os.PathLike[str], codec: str = "auto"
) -> ArtifactInfo:
    """Write ONNX models alone to a file, which `onnx_session` runs.

    Args:
        graph: the model or the path of one; several by name.
        path: of the file; its folder must exist.
        codec: as in `save_compressed`.

    Raises:
        ValueError: for an unknown codec, or what is no ONNX model.
        OSError: naming the path, when a file cannot be read or written.
    """
    return write_contents(Contents({}, {}, {}), Path(path), Encoding(codec), onnx_bytes(graph))


def onnx_bytes(graph: Graph | Mapping[str, Graph] | None) -> dict[str, bytes]:
    """ONNX models by name, each with its weights inside; "" names a single one.

    Raises:
        ValueError: naming the graph, for what is no ONNX model.
        OSError: when a file cannot be read.
        TypeError: for what is neither bytes nor a path.
    """
    if graph is None:
        return {}
    named = graph if isinstance(graph, Mapping) else {"": graph}
    return {name: _onnx_model_bytes(name, one) for name, one in named.items()}


def _onnx_model_bytes(name: str, graph: Graph) -> bytes:
    if not isinstance(graph, (bytes, str, os.PathLike)):
        raise TypeError(f"graph: expected bytes or a path of an ONNX model, got {graph!r:.80}")
    where = f"graph {name!r}" if isinstance(graph, bytes) else str(graph)
    folder = None if isinstance(graph, bytes) else Path(graph).parent
    data = graph if isinstance(graph, bytes) else Path(graph).read_bytes()
    try:
        return inline_tensors(data, folder)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_module(module: nn.Module, instead: str) -> None:
    """Reject an object that is no module, and name the function for it."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module: expected a torch.nn.Module, got {type(module).__name__}; "
            f"for tensors by name there is `{instead}`"
        )


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    codec: str = "auto",
    *,
    float_dtype: str | None = None,
    workers: int = 1,
    signed_zeros: bool = False,
) -> ArtifactInfo:
    """Write named tensors as `save_compressed` writes a module's, without a module.

    Raises:
        ValueError: for an unknown codec or float_dtype, or tensors that the format cannot hold.
        TypeError: for entries that are no dense tensors.
        OSError: naming the path, when it cannot be written.
    """
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    encoding = Encoding(codec, float_dtype, workers, signed_zeros)
    return write_contents(Contents(tensors, {}, {}), Path(path), encoding)


def read_tensors(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, workers: int = 1
) -> dict[str, Tensor]:
    """The tensors of a file by name, without a module.

    Args:
        path: of the file.
        max_bytes: refuse a file whose tensors, and the memory to decode the largest of them, take
            more than this: a small file can hold a huge tensor of zeros.
        workers: threads that decode tensors side by side.

    Raises:
        CorruptArtifactError: when the file is damaged, or above `max_bytes`.
        OSError: when it cannot be read.
    """
    with open_artifact(Path(path), verify=True) as artifact:
        artifact.file.check_size(max_bytes, workers)
        found = {name: tensor for name, tensor, _ in artifact.decoded(workers)}
        return {record.name: found[record.name] for record in artifact.records}


def load_compressed(
    path: str | os.PathLike[str], module: nn.Module, *, stream: bool = False, workers: int = 1
) -> nn.Module:
    """Load a file's tensors and grids into a module, in place.

    Names, shapes and dtypes must be the same on both sides; layers whose channels were
    removed according to the file, and that still have their full size, are resized first.

    Args:
        path: of the file.
        module: to fill.
        stream: put each tensor into the module as soon as it is decoded, in the memory of one
            tensor. Otherwise all is decoded before the first value changes, so that memory for one
            more copy of the tensors is needed, as in `torch.load`. The checksum is compared first
            either way, so that only a malicious file can leave a module partly loaded.
        workers: threads that decode tensors side by side.

    Returns:
        The module.

    Raises:
        CorruptArtifactError: when the file is damaged or does not fit the module, which then is
            as it was (see `stream`).
        OSError: when the file cannot be read.
        TypeError: for an object that is no module.
    """
    _check_module(module, "read_tensors")
    keys = module_tensors(module)
    with open_artifact(Path(path), verify=True) as artifact:
        tensors = {name: tensor for name, (_, tensor) in keys.items()}
        smaller = removed_shapes(artifact.records, artifact.channels, tensors)
        check_fit(artifact.records, tensors, smaller)
        layers = _activation_layers(
            artifact, module, {name: key for name, (key, _) in keys.items()}
        )
        paths = {name: key for name, (key, _) in keys.items()}
        paths |= {stored_name(path): path for path, _ in module.named_modules()}
        check_channels(module, smaller, artifact.channels, paths)
        prepare = partial(fit_channels, module, smaller, artifact.channels, paths)
        grids = _decode_into(artifact, module, keys, prepare, stream=stream, workers=workers)
    _attach_grids(module, {keys[name][0]: grid for name, grid in grids.items()}, layers)
    return module


def _activation_layers(
    artifact: Artifact, module: nn.Module, keys: Mapping[str, str]
) -> dict[str, ActivationGrids]:
    """Activation grids by path in the module; checks that each grid has a parameter or layer."""
    parameters = {key for key, _ in module.named_parameters(remove_duplicate=False)}
    for record in artifact.records:
        if record.grid and keys[record.name] not in parameters:
            raise CorruptArtifactError(f"tensor {record.name!r}: a grid, but no parameter")
    # A compiled module and the one inside it are both stored as the inner one's name.
    paths = {stored_name(path): path for path, _ in module.named_modules(remove_duplicate=False)}
    if missing := [path for path in artifact.activations if path not in paths]:
        raise CorruptArtifactError(f"does not fit the module: no layer {missing[0]!r}")
    return {paths[path]: pair for path, pair in artifact.activations.items()}


def _decode_into(
    artifact: Artifact,
    module: nn.Module,
    keys: Mapping[str, tuple[str, Tensor]],
    prepare: Callable[[], None],
    *,
    stream: bool,
    workers: int,
) -> dict[str, Grid]:
    if stream:
        prepare()
    grids: dict[str, Grid] = {}
    values: dict[str, Tensor] = {}
    shared = shared_memory({name: tensor for name, (_, tensor) in keys.items()})
    kept = {*shared, *shared.values()}
    for name, value, grid in artifact.decoded(workers):
        if stream:
            _load_values(module, {keys[name][0]: (keys[name][1], value)})
        if not stream or name in kept:
            values[name] = value
        if grid is not None:
            grids[name] = grid
    check_shared(values, {name: keys[name][1] for name in values})
    if not stream:
        prepare()
        _load_values(
            module, {keys[name][0]: (keys[name][1], value) for name, value in values.items()}
        )
    return grids


@torch.no_grad()
def _load_values(module: nn.Module, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Load values into a module, by key: the present tensor and its values."""
    state = {key: _as_shard(target, value) for key, (target, value) in values.items()}
    module.load_state_dict(state, strict=False)  # the names have been compared


def _as_shard(target: Tensor, value: Tensor) -> Tensor:
    shards = shards_of(target)
    return value if shards is None else shards.joined(shards.part(value).to(target.device))


def _attach_grids(
    module: nn.Module, grids: Mapping[str, Grid], layers: Mapping[str, ActivationGrids]
) -> None:
    for layer in module.modules():
        set_activation_grids(layer, None)
        for name, _ in layer.named_parameters(recurse=False, remove_duplicate=False):
            clear_grid(layer, name)
    for key, grid in grids.items():
        owner, _, name = key.rpartition(".")
        set_grid(module.get_submodule(owner), name, grid)
    for path, pair in layers.items():
        set_activation_grids(module.get_submodule(path), pair)
