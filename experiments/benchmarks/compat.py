"""Which capability holds on which of other people's projects, each in a tiny configuration.

python experiments/benchmarks/compat.py [rows.jsonl [page.md]]

Each project is trained for some steps with each callback. With a page, only the table of the rows
so far is put into it. A package that is not installed gives a row that says so.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from shared.compat_case import Case
from shared.compat_own import own_cases
from shared.compat_packages import package_cases
from shared.pages import insert
from shared.rows import Rows, read_rows
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import (
    ChannelPruning,
    GradualPruning,
    KnowledgeDistillation,
    QuantizationAwareTraining,
    compression_state,
    export_onnx,
    load_compressed,
    save_compressed,
)
from lightning_compress.channels import plan
from lightning_compress.conversion.program import plain_copy

Cell = tuple[bool, str]
EPOCHS = 4
PRODUCTS = {
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "GRU",
    "LSTM",
    "ConvInteger",
    "MatMulInteger",
}
INT8 = re.compile(
    r"^(QLinearConv|ConvInteger|QGemm|QLinearMatMul|MatMulInteger.*|DynamicQuantize.*)$"
)


@contextmanager
def removals_watched() -> Iterator[list[float]]:
    """Largest relative differences of the masked and the smaller module, at each comparison."""
    found: list[float] = []
    original = plan.removal_fault

    def watched(small: Any, inputs: Any, expected: Any, graph: Any, gone: Any) -> str:
        try:
            made = plan.exact_outputs(small, graph.inputs_of(inputs, gone))
        except Exception:  # a removal that is tried, refused, and its reason told
            return original(small, inputs, expected, graph, gone)
        for number, (ours, theirs) in enumerate(zip(made, expected, strict=True)):
            theirs = plan.select_entries(theirs, plan._stays(graph.outputs, number, gone))
            if ours.numel() and ours.is_floating_point():
                scale = max(1.0, float(theirs.abs().max()))
                found.append(float((ours - theirs).abs().max()) / scale)
        return original(small, inputs, expected, graph, gone)

    plan.removal_fault = watched
    try:
        yield found
    finally:
        plan.removal_fault = original


class Losses(Callback):
    """Keeps what the distillation logs, a value a step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # pyright: ignore
        """Sum of the losses of all pairs."""
        found = [float(v) for k, v in trainer.logged_metrics.items() if k.startswith("distill/")]
        if found:  # nothing is taught until a pair has moved to the network that is called
            self.values.append(sum(found))


@torch.no_grad()
def outputs(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Tensors that a module gives in eval mode, under fixed noise."""
    modes = {one: one.training for one in module.modules()}
    module.eval()
    torch.manual_seed(1)
    leaves = tree_leaves(module(*inputs))
    for one, mode in modes.items():
        one.training = mode
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def fit(case: Case, model: LightningModule, folder: Path, *callbacks: Callback) -> None:
    """A short run."""
    batches: Any = case.batches()
    if isinstance(batches, list):
        batches = DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType]
    Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks],
    ).fit(model, batches)


class Run:
    """The checks of one project; the compressed model is trained once."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.pruning = GradualPruning(final_sparsity=0.8, end=0.6, frequency=2, on_miss="raise")
        self.model, self.trained, self.keys = self.fresh(0), False, []

    def fresh(self, seed: int) -> LightningModule:
        """A model of other weights."""
        seed_everything(seed, verbose=False)
        return self.case.build()

    def compressed(self) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """What ships, pruned and quantized."""
        if not self.trained:
            self.keys = list(self.model.state_dict())
            grids = QuantizationAwareTraining(freeze=0.9)
            fit(self.case, self.model, self.folder, self.pruning, grids)
            self.trained = True
        torch.manual_seed(0)
        part, inputs = self.case.part(self.model.eval())
        return part.eval(), inputs

    def targets(self) -> Cell:
        """At least half of the deployed weights, no judge."""
        part, _ = self.compressed()
        chosen = {id(one.parameter) for one in self.pruning.projected_weights}
        judges = [self.model.get_submodule(name) for name in self.case.judges]
        judged = sum(id(p) in chosen for judge in judges for p in judge.parameters())
        weights = [p for p in part.parameters() if p.requires_grad]
        share = sum(p.numel() for p in weights if id(p) in chosen) / sum(p.numel() for p in weights)
        if judged:
            return False, f"{judged} weights of {', '.join(self.case.judges)} are targets"
        if share >= 0.5:
            return True, f"{share:.0%}"
        ours = {id(p): name for name, p in self.model.named_parameters()}
        mine = {ours.get(id(p)) for p in weights}
        rows = [row for row in self.pruning.coverage if row.path in mine and not row.selected]
        first = max(rows, key=lambda row: torch.Size(row.shape).numel())
        return False, f"{share:.0%}: {first.path}: {first.reason}"

    def compression(self) -> Cell:
        """Asked sparsity and grids, keys as before."""
        part, _ = self.compressed()
        zeros, grids = self.pruning.sparsity, compression_state(part, masks=False).grids
        if list(self.model.state_dict()) != self.keys:
            return False, "the keys of the state_dict have changed"
        wrong = [n for n, p in part.named_parameters() if n in grids and not _on_grid(p, grids[n])]
        if wrong:
            return False, f"{wrong[0]} is off its grid"
        return abs(zeros - 0.8) < 0.005 and bool(grids), f"{zeros:.0%} zeros, {len(grids)} grids"

    def file(self) -> Cell:
        """The values come back."""
        part, inputs = self.compressed()
        info = save_compressed(part, self.folder / "model.lcz")
        other = self.case.part(self.fresh(1).eval())[0].eval()
        load_compressed(self.folder / "model.lcz", other)
        same = all(map(torch.equal, outputs(part, inputs), outputs(other, inputs)))
        return same, f"{info.ratio:.1f}×" if same else "outputs differ"

    def onnx(self) -> Cell:
        """The file computes what PyTorch does."""
        part, inputs = self.compressed()
        batch = self.case.batch
        info = export_onnx(part, self.folder / "model.onnx", inputs, batch=batch)
        note = f"{info.max_abs_error:.0e}" + (f", at batch {batch} alone" if batch else "")
        return info.max_abs_error < 1e-3, note

    def int8(self) -> Cell:
        """At least 90 % of the products multiply integers; parity is checked by the export."""
        part, inputs = self.compressed()
        path, batch = self.folder / "model.int8.onnx", self.case.batch
        info = export_onnx(part, path, inputs, int8=True, batch=batch)
        whole = sum(count for name, count in info.int8_ops.items() if INT8.match(name))
        products = weighted_products(info.path)
        share = f"{whole} of {products}"
        compared = all(parity.elements for parity in info.parity.values())
        if compared and whole >= 0.9 * products:
            return True, share
        first = next(iter(info.reasons.items()), ("OnnxInfo.reasons", "says nothing of the others"))
        return False, f"{share}; {': '.join(first)}"

    def channels(self) -> Cell:
        """At least 30 % fewer MACs; the smaller model is the masked one."""
        model = self.fresh(0)
        before = _macs(*self.case.part(model))
        callback = ChannelPruning(
            budget={"macs": 0.65}, round_to=2, end=0.6, frequency=4, fade=2, on_miss="raise"
        )
        with removals_watched() as differences:
            fit(self.case, model, self.folder, callback)
        left = _macs(*self.case.part(model)) / before
        largest = max(differences, default=math.inf)
        note = f"{left:.0%} of the MACs, difference {largest:.0e}"
        return left <= 0.7 and largest < 1e-5, note

    def teacher(self) -> Cell:
        """The loss between two models of other weights falls."""
        losses = Losses()
        teaching = KnowledgeDistillation(self.fresh(1), weight=100.0)  # above the task's loss
        fit(self.case, self.fresh(0), self.folder, teaching, losses)
        few = max(1, len(losses.values) // 4)
        first, last = sum(losses.values[:few]) / few, sum(losses.values[-few:]) / few
        return 0 < last < first, f"{first:.3g} → {last:.3g}"


COLUMNS: dict[str, Callable[[Run], Cell]] = {
    "default targets": Run.targets,
    "prune + QAT": Run.compression,
    "`.lcz`": Run.file,
    "ONNX fp32": Run.onnx,
    "int8": Run.int8,
    "channels": Run.channels,
    "teacher": Run.teacher,
}


def weighted_products(path: Path) -> int:
    """Products of a file with weights; those of two activations, as in attention, are none."""
    graph = import_module("onnx").load(str(path)).graph
    moving, found = {one.name for one in graph.input}, 0
    for node in graph.node:
        weighted = len(node.input) > 1 and node.input[0] in moving and node.input[1] not in moving
        found += node.op_type in PRODUCTS and weighted
        if moving.intersection(node.input):
            moving.update(node.output)
    return found


def _on_grid(parameter: torch.Tensor, grid: Any) -> bool:
    values = parameter.detach()
    return torch.allclose(grid.project(values), values, atol=1e-6)


def _macs(part: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    still = plain_copy(part).requires_grad_(False)  # torch's counter trips over expanded parameters
    # A recurrent layer is one operator of oneDNN's that torch's counter does not know.
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        outputs(still, inputs)
    return counter.get_total_flops()


def reason(error: BaseException) -> str:
    """What a message says first, without paths of this machine."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(/[\w.+-]+){2,}", "…", text)
    return text if len(text) <= 220 else text[:217].rsplit(" ", 1)[0] + " …"


def measure(case: Case) -> dict[str, Any]:
    """A cell a column: whether it is a tick, and the figure or the reason."""
    with TemporaryDirectory() as folder:
        try:
            run = Run(case, Path(folder))
        except ImportError as error:
            return {"missing": f"{case.source} is not installed: {reason(error)}"}
        cells: dict[str, Any] = {}
        for name, check in COLUMNS.items():
            try:
                tick, note = check(run)
            except Exception as error:  # of any kind: it is the cell
                tick, note = False, f"{type(error).__name__}: {reason(error)}"
            cells[name] = {"tick": bool(tick), "note": note}
        return {"cells": cells}


def main(path: Path) -> None:
    """A row a project; what is known is kept, what was not installed is tried again."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = Rows(path, keys=("project",))
    for case in [*package_cases(), *own_cases()]:
        known = rows.known.get((case.name,), {})
        if "missing" in known:
            rows.drop(project=case.name)
        rows.make(
            partial(lambda one: {"source": one.source, **measure(one)}, case), project=case.name
        )


def table(rows: list[dict[str, Any]]) -> str:
    """One line a project, the reasons of what is no tick below."""
    order = [case.name for case in [*package_cases(), *own_cases()]]
    rows = sorted(
        (row for row in rows if row["project"] in order), key=lambda r: order.index(r["project"])
    )
    lines = [
        f"| project | network from | {' | '.join(COLUMNS)} |",
        f"| --- | --- |{' --- |' * len(COLUMNS)}",
    ]
    reasons: list[str] = []
    ticks = cells = 0
    for row in rows:
        shown = []
        for name in COLUMNS:
            if "missing" in row:
                shown.append("not run")
                continue
            one = row["cells"][name]
            cells, ticks = cells + 1, ticks + one["tick"]
            if not one["tick"]:
                note = one["note"].replace("|", "\\|").replace("<", "&lt;")
                reasons.append(f"{len(reasons) + 1}. {row['project']}, {name}: {note}")
            shown.append(f"✓ {one['note']}" if one["tick"] else f"no, reason {len(reasons)}")
        lines.append(f"| {row['project']} | {row['source']} | {' | '.join(shown)} |")
    missing = [
        f"\n{row['project']} was not run: {row['missing']}." for row in rows if "missing" in row
    ]
    known = {row["project"] for row in rows}
    missing += [f"\n{one} has no row yet." for one in order if one not in known]
    head = f"{ticks} of {cells} cells are ticks ({ticks / max(cells, 1):.0%})."
    return "\n".join(["", head, "", *lines, "", *reasons, *missing])


if __name__ == "__main__":
    PATH = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/bench/compat.jsonl")
    if len(sys.argv) > 2:
        insert(Path(sys.argv[2]), table(read_rows(PATH)))
    else:
        main(PATH)
