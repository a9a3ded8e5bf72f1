"""Number and bytes of the messages of callbacks between two processes.

python experiments/benchmarks/measure_messages.py > messages.md

Counts what goes through torch.distributed on behalf of this package: the gradients that DDP and
FSDP2 reduce themselves, and the weights that FSDP2 gathers for a forward pass, are not in it.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress
from lightning_compress import (
    ArtifactCallback,
    EntropyGrid,
    GradualPruning,
    KnowledgeDistillation,
    Pair,
    QuantizationAwareTraining,
    StopOnNonFinite,
)

HOME = str(Path(lightning_compress.__file__).parent)
PLUMBING = ("sharding.py", "together.py")
STEPS, EVENTS = 40, 10
Found = dict[tuple[str, str], list[int]]


class Network(LightningModule):
    """One million weights: two large layers and two small ones."""

    def __init__(self, *, sharded: bool = False) -> None:
        super().__init__()
        self.sharded = sharded
        self.encoder = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 1024))

    def configure_model(self) -> None:
        if self.sharded and not isinstance(self, FSDPModule):
            fully_shard(self, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def asker(frame: FrameType | None) -> str | None:
    """The package's function that sends a message, without helper functions."""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(HOME) and not path.endswith(PLUMBING):
            return f"{Path(path).stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return None


def listen() -> Found:
    """Count the bytes of each collective, by caller and kind."""
    found: Found = defaultdict(list)

    def heard(kind: str, size: int) -> None:
        if (name := asker(sys._getframe(2))) is not None:
            found[name, kind].append(size)

    def wrap(module: Any, name: str, size: Callable[..., int]) -> None:
        inner = getattr(module, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            heard(name, size(*args, **kwargs))
            return inner(*args, **kwargs)

        setattr(module, name, outer)

    for module in (torch.distributed, distributed_c10d):
        wrap(module, "all_reduce", lambda tensor, *_, **__: tensor.nbytes)
        wrap(module, "broadcast", lambda tensor=None, *_, **__: tensor.nbytes)
        wrap(module, "all_gather", lambda _, tensor, *__, **___: tensor.nbytes)
    # The largest part that a process sends for it.
    wrap(DTensor, "full_tensor", lambda tensor: -(-tensor.numel() // 2) * tensor.element_size())
    return found


SCENES: dict[str, tuple[bool, Callable[[Path], list[Callback]]]] = {
    "DDP, GradualPruning": (False, lambda _: [prune()]),
    "DDP, GradualPruning(criterion='taylor')": (False, lambda _: [prune(criterion="taylor")]),
    "DDP, GradualPruning(criterion='activation')": (
        False, lambda _: [prune(criterion="activation")],
    ),
    "DDP, QuantizationAwareTraining": (False, lambda _: [quantize(activation_bits=8)]),
    "DDP, KnowledgeDistillation with an adapter": (False, lambda _: [distill()]),
    "FSDP2, GradualPruning": (True, lambda _: [prune()]),
    **{
        f"FSDP2, QuantizationAwareTraining({text})": (True, lambda _, r=rules: [quantize(**r)])
        for text, rules in {
            "scheme='symmetric', per_channel=True": {},
            "observer='mse'": {"observer": "mse"},
            "scheme='learned_step'": {"scheme": "learned_step"},
            "scheme='codebook'": {"scheme": "codebook"},
            "scheme='entropy'": {"scheme": "entropy"},
            "scheme='entropy', rate=0.01": {"scheme": "entropy", "entropy": EntropyGrid(rate=0.01)},
            "scheme='rate_distortion'": {"scheme": "rate_distortion", "lmbda": 0.01},
        }.items()
    },
    "FSDP2, ArtifactCallback": (True, lambda folder: [ArtifactCallback(folder / "model.lcz")]),
    "either, StopOnNonFinite": (False, lambda _: [StopOnNonFinite()]),
}  # fmt: skip


def prune(**rules: Any) -> Callback:
    return GradualPruning(final_sparsity=0.9, end=1.0, frequency=STEPS // EVENTS, **rules)


def quantize(**rules: Any) -> Callback:
    rules = {"activation_bits": None, "weight_bits": 4, "frequency": STEPS // EVENTS, **rules}
    return QuantizationAwareTraining(**rules, freeze=0.8)


def distill() -> Callback:
    teacher = Network()
    teacher.encoder = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 8))
    pair = Pair("encoder", features=[("0", "0")])
    return KnowledgeDistillation(teacher, pairs=[pair])


def run(title: str, folder: Path, found: Found) -> None:
    """Train once, and print what was heard."""
    sharded, make = SCENES[title]
    torch.manual_seed(0)
    found.clear()
    data = TensorDataset(torch.randn(STEPS * 4, 512))
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy if sharded else "ddp",
        max_epochs=1,
        use_distributed_sampler=False,
        callbacks=make(folder),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Network(sharded=sharded), DataLoader(data, batch_size=4))
    if trainer.global_rank == 0:
        for (name, kind), sizes in found.items():
            least, most, total = min(sizes), max(sizes), sum(sizes)
            span = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            print(f"| {title} | {name} | {kind} | {len(sizes)} | {span} | {total / STEPS:,.0f} |")


def main() -> None:
    """Prints a table."""
    torch.set_num_threads(1)
    found = listen()
    if "LOCAL_RANK" not in os.environ:
        print(f"{STEPS} steps, {EVENTS} events, two processes, 1.06 million weights\n")
        print("| run | who | how | messages | bytes of one | bytes a step |")
        print("| --- | --- | --- | --- | --- | --- |")
    with TemporaryDirectory() as folder:
        for title in SCENES:
            run(title, Path(folder), found)


if __name__ == "__main__":
    main()
