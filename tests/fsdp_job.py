"""Run by test_sharded.py: prunes a sharded model, and saves what the whole of it has become."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import TinyAutoencoder
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import GradualPruning


class ShardedAutoencoder(TinyAutoencoder):
    """Its layers are spread over all processes."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for part in (self.encoder, self.decoder):
            if not isinstance(part, torch.distributed.fsdp.FSDPModule):
                fully_shard(part, mesh=mesh)


class HalfWay(Callback):
    """Saves a checkpoint after the first epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "half.ckpt")


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fit(folder: Path, processes: int, option: str) -> None:
    torch.manual_seed(1)
    model = (ShardedAutoencoder if processes > 1 else TinyAutoencoder)("Adam")
    model.encoder[1] = torch.nn.Identity()  # BatchNorm would see half a batch in each process
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(rows), batch_size=8)  # the same rows in each process
    regrow = "straight_through" if option == "regrow" else None
    pruning = GradualPruning(final_sparsity=0.8, regrow=regrow)
    strategy = ModelParallelStrategy(
        data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=processes,
        strategy=strategy if processes > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=2,
        callbacks=[pruning, *([] if option == "resume" else [HalfWay()])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader, ckpt_path=folder / "half.ckpt" if option == "resume" else None)
    state = {
        "model": {name: whole(value) for name, value in model.state_dict().items()},
        "masks": pruning.state_dict()["masks"],
        "sparsity": pruning.sparsity,
    }
    torch.save(state, folder / f"{processes}-{option}-{trainer.global_rank}.pt")


def main(folder: Path, processes: int) -> None:
    torch.set_num_threads(1)
    for option in ("plain", "resume", "regrow"):  # a start of two processes takes its time
        fit(folder, processes, option)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
