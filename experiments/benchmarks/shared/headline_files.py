"""One artifact a row of the headline table: its bytes, its speed and its quality."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import export_onnx, load_compressed, onnx_session, save_compressed
from lightning_compress.lab.evaluation.cost import torch_bytes
from lightning_compress.lab.evaluation.latency import latency_grid, onnx_runner
from lightning_compress.lab.evaluation.likelihood import likelihood
from lightning_compress.lab.workflow.costs import deployed_cost, graph_name, inputs_in_use
from lightning_compress.lab.workflow.quality import rows
from lightning_compress.lcz.artifact import write_graph
from lightning_compress.state import compression_state

from .headline_runs import Runs

__all__ = ["OnnxPart", "Shipped", "loaded", "measured", "packed", "streamed"]

Row = dict[str, Any]
BOUND = 64  # samples of the importance-weighted bound
IMAGES = 1000  # of the test split that it is measured on
ROUNDS = 50


@dataclass
class Shipped:
    """A row's model, and its one artifact.

    Args:
        model: whose weights the artifact holds.
        kind: of the artifact, in words.
        bytes: of it.
        graphs: path of the runnable file of each part, and the graph's name in it; of an `.lcz`
            file the artifact itself, of another stream what it decodes to.
    """

    model: Any
    kind: str
    bytes: int
    graphs: dict[str, tuple[Path, str | None]]


class OnnxPart(nn.Module):
    """A part of a model that ONNX Runtime computes, on one thread.

    Args:
        path: of an ONNX file, or of an `.lcz` file with a graph.
        graph: of an `.lcz` file with several, the name of one.
    """

    def __init__(self, path: Path, graph: str | None = None) -> None:
        super().__init__()
        self.session: Any = onnx_session(path, graph=graph, threads=1)

    def forward(self, *inputs: Tensor) -> Any:
        """What the file gives: a tensor, or several."""
        names = [one.name for one in self.session.get_inputs()]
        feed = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
        out = [torch.from_numpy(one) for one in self.session.run(None, feed)]
        return out[0] if len(out) == 1 else tuple(out)


def packed(runs: Runs, model: Any, home: Path, *, calibrate: bool = False) -> Shipped:
    """A model as one `.lcz` file that holds its runnable graphs.

    Weights on grids are stored as integers, others as floats. Activations are integers where
    training gave them grids, or `calibrate` shows their ranges on training data.
    """
    path, names = home / "model.lcz", list(model.parts())
    graphs = {name: graph_name(name, len(names)) for name in names}
    with TemporaryDirectory() as folder:
        files = {}
        for name, (part, sample) in model.parts().items():
            state, file = compression_state(part), Path(folder) / f"{name}.onnx"
            integers = calibrate or bool(state.grids) or bool(state.activations)
            ranges = inputs_in_use(model, part, runs.start.data) if calibrate else None
            export_onnx(part, file, sample, int8=integers, calibration=ranges)
            files[graphs[name] or ""] = file
        size = write_graph(files, path).bytes
    save_compressed(model.deployed_module(), home / "weights.lcz")  # to go on from, not shipped
    return Shipped(model, ".lcz", size, {name: (path, graph) for name, graph in graphs.items()})


def streamed(model: Any, home: Path, kind: str, size: int) -> Shipped:
    """A model whose artifact is a stream of weights: it runs as what that decodes to, in float."""
    graphs: dict[str, tuple[Path, str | None]] = {}
    for name, (part, sample) in model.parts().items():
        export_onnx(part, home / f"{name}.onnx", sample)
        graphs[name] = home / f"{name}.onnx", None
    save_compressed(model.deployed_module(), home / "weights.lcz")
    return Shipped(model, kind, size, graphs)


def smallest(data: bytes) -> int:
    """Bytes of a file under xz, the best of the usual general coders on weights."""
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def loaded(runs: Runs, home: Path) -> Any:
    """The model of a row's folder."""
    model = runs.fresh()
    load_compressed(home / "weights.lcz", model.deployed_module())
    return model.eval()


def measured(runs: Runs, shipped: Shipped, dense: Path) -> Row:
    """Bytes of the artifact; quality and speed of what ONNX Runtime computes from it.

    Args:
        runs: of the row.
        shipped: what it ended with.
        dense: folder of the dense row, whose artifact is timed in turn with this one.
    """
    plain = runs.fresh()
    weights = torch_bytes(plain.deployed_module())
    row: Row = {"file": shipped.kind, "bytes": shipped.bytes, "dense_bytes": weights}
    row["ratio"] = round(weights / shipped.bytes, 2)
    cost, whole = deployed_cost(shipped.model), deployed_cost(plain)
    row["macs_left"] = cost["macs"] / whole["macs"]
    row["nonzero_left"] = cost["nonzero_params"] / whole["params"]
    row["speed"] = speeds(runs, shipped, dense)
    for name, (path, graph) in shipped.graphs.items():
        setattr(shipped.model, name, OnnxPart(path, graph))
    row |= runs.start.quality(shipped.model)
    row["validation"] = runs.validation(shipped.model)
    if runs.kind in ("vae", "recurrent_vae"):
        x = rows(runs.start.data.test_dataset)[0][:IMAGES]
        row["neg_iwae"] = likelihood(shipped.model, x, importance_samples=BOUND)["neg_iwae"]
    return row


def speeds(runs: Runs, shipped: Shipped, dense: Path) -> dict[str, float]:
    """Times faster than the dense artifact, all parts one after the other, calls in turn."""
    spent: dict[tuple[str, str], float] = {}
    names = list(shipped.graphs)
    for name, (_, inputs) in runs.fresh().parts().items():
        path, graph = shipped.graphs[name]
        runners: dict[str, Callable[..., Any]] = {
            "dense": partial(onnx_runner, dense / "model.lcz", graph=graph_name(name, len(names))),
            "this": partial(onnx_runner, path, graph=graph),
        }
        for where, times in latency_grid(runners, inputs, threads=(1,), repeats=ROUNDS).items():
            for key, at in times.items():
                spent[where, key] = spent.get((where, key), 0.0) + at.median_ms
    places = dict.fromkeys(where for where, _ in spent)
    return {
        f"batch {where.removeprefix('batch').partition('_')[0]}": round(
            spent[where, "dense"] / spent[where, "this"], 3
        )
        for where in places
    }
