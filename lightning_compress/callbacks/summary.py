"""CompressionSummary: coverage table before training, achieved sparsity and bits after it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from lightning_compress.callbacks.base import WeightCallback
from lightning_compress.callbacks.quantization_aware_training import (
    PostTrainingQuantization,
    QuantizationAwareTraining,
)
from lightning_compress.sharding import UNSHARDED, local_part, shards_of, to_shards
from lightning_compress.state import compression_state
from lightning_compress.targets import clean_path
from lightning_compress.terminal import ShownArguments

__all__ = ["CompressionSummary"]


class CompressionSummary(ShownArguments, Callback):
    """Print a coverage table when training starts and an achieved table when it ends.

    Args:
        console: where to print; None: standard output.

    >>> CompressionSummary().console.width > 0
    True
    """

    def __init__(self, *, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=False)
        self._printed = False

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Print which parameters each callback compresses, and why it skips the others."""
        self._printed = False
        self._print_coverage(trainer)

    @rank_zero_only
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Print the coverage, where the deployed part is known only now."""
        if not self._printed:
            self._print_coverage(trainer)

    def _print_coverage(self, trainer: Trainer) -> None:
        callbacks = _compressors(trainer)
        if not callbacks or any(one.waiting is not None for one in callbacks):
            return
        self._printed = True
        table = Table(title="Coverage: what is compressed, and why the rest is not")
        for heading in ("parameter", "shape", *(type(one).__name__ for one in callbacks)):
            table.add_column(heading, overflow="fold")
        for rows in zip(*(one.coverage for one in callbacks), strict=True):
            shape = "x".join(map(str, rows[0].shape))
            verdicts = ["yes" if row.selected else f"no: {row.reason}" for row in rows]
            table.add_row(clean_path(rows[0].path), shape, *verdicts)
        self.console.print(table)
        self._print_activations(callbacks)

    def _print_activations(self, callbacks: list[Any]) -> None:
        rows = [
            (one.state_key, row)
            for one in callbacks
            if isinstance(one, QuantizationAwareTraining)
            for row in one.activation_coverage
        ]
        if not rows:
            return
        table = Table("layer", "callback", "on a grid", title="Activations")
        for key, row in rows:
            verdict = "yes" if row.selected else f"no: {row.reason}"
            table.add_row(clean_path(row.path), key, verdict)
        self.console.print(table)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print sparsity and bits of each compressed parameter; all processes count."""
        paths = {row.path for one in _compressors(trainer) for row in one.coverage if row.selected}
        if not paths:
            return
        table = Table(title="Compression achieved")
        for heading in ("parameter", "weights", "zeros", "sparsity", "bits"):
            table.add_column(heading, justify="left" if heading == "parameter" else "right")
        to_shards(pl_module)
        grids, zeros, weights = compression_state(pl_module, masks=False).grids, 0, 0
        for path, parameter in pl_module.named_parameters():
            if path in paths:
                partition, values = (
                    shards_of(parameter) or UNSHARDED,
                    local_part(parameter.detach()),
                )
                count, size = int(partition.all_reduce_sum((values == 0).sum())), parameter.numel()
                zeros, weights = zeros + count, weights + size
                bits = str(grids[path].bits) if path in grids else "-"
                share = f"{count / size:.4f}"
                table.add_row(clean_path(path), f"{size:,}", f"{count:,}", share, bits)
        table.add_section()
        table.add_row("total", f"{weights:,}", f"{zeros:,}", f"{zeros / weights:.4f}", "")
        if trainer.is_global_zero:
            self.console.print(table)


def _compressors(trainer: Trainer) -> list[Any]:
    kinds = (WeightCallback, PostTrainingQuantization)
    return [one for one in trainer.callbacks if isinstance(one, kinds)]  # type: ignore[attr-defined]
