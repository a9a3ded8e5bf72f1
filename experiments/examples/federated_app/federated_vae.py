"""A VAE on the embedded digits for `flwr run`: each node trains on its partition.

What is one's own is `module` and `data`; the rest is the same for any LightningModule.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything

from lightning_compress.federated import (
    ClientRound,
    CompressedStrategy,
    UpdateCodec,
    lightning_client,
    model_arrays,
    partition_rows,
    record_of,
)
from lightning_compress.lab.data import Digits
from lightning_compress.lab.models import VAE

UP, DOWN = UpdateCodec(), UpdateCodec(density=0.2, relative_step=1.5)


def module() -> LightningModule:
    """Equal weights everywhere, so that the first model need not be sent."""
    seed_everything(0, verbose=False)
    return VAE(image_size=16, width=8)


def data(now: ClientRound) -> LightningDataModule:
    """The rows of one node."""
    digits = Digits(batch_size=32)
    digits.setup()
    parts = partition_rows(digits.train_dataset[:][1], now.partitions or 2)
    return digits.part(parts[int(now.name)], seed=now.seed)


client = lightning_client(module, data, up=UP, down=DOWN, local_epochs=1)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write the ledger."""
    config = context.run_config
    folder = Path(str(config["folder"]) or ".")
    strategy = CompressedStrategy(
        FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=int(config["nodes"])),
        up=UP,
        down=DOWN,
        checkpoint=folder / "server.pt",
        hello_timeout=float(str(config["timeout"])) / 4,
        on_round=lambda row: (folder / f"round-{row['round']}.json").write_text(json.dumps(row)),
    )
    first = record_of(model_arrays(module()))
    rounds, timeout = int(config["rounds"]), float(str(config["timeout"]))
    strategy.start(grid, first, num_rounds=rounds, timeout=timeout)
