"""Run by test_sharded.py: compresses a sharded model, and saves what the whole of it has become."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import TinyAutoencoder
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    ArtifactCallback,
    CompressionSummary,
    EntropyGrid,
    GradualPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    compression_state,
    load_compressed,
    save_compressed,
)

QAT = {  # every scheme and observer, in both layouts of scales
    "minmax": {"weight_bits": 8, "activation_bits": 8},
    "affine": {"scheme": "affine", "observer": "moving_average", "per_channel": False},
    "mse": {"weight_bits": 3, "observer": "mse"},
    "percentile": {"weight_bits": 4, "scheme": "affine", "observer": "percentile"},
    "learned": {"weight_bits": 4, "scheme": "learned_step"},
    "learned_tensor": {"weight_bits": 4, "scheme": "learned_step", "per_channel": False},
    "codebook": {"weight_bits": 3, "scheme": "codebook", "freeze": 0.6},
    "entropy": {
        "scheme": "entropy",
        "entropy": EntropyGrid(rate=0.01, target_bits=2.5),
        "freeze": 0.8,
    },
    "rate": {"scheme": "rate_distortion", "lmbda": 0.1},
    "rate_channels": {"scheme": "rate_distortion", "lmbda": 0.1, "per_channel": True},
}
RESUMED = ("learned", "codebook", "entropy", "rate")


class Autoencoder(TinyAutoencoder):
    """Layers whose rows do not divide by the number of processes, and fewer rows than processes."""

    def __init__(self):
        super().__init__("Adam")
        self.encoder = torch.nn.Sequential(
            torch.nn.Linear(6, 7), torch.nn.ReLU(), torch.nn.Linear(7, 1), torch.nn.Linear(1, 7)
        )
        self.decoder = torch.nn.Linear(7, 6)


class ShardedAutoencoder(Autoencoder):
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


def plain(module, state):
    """The module as one process would have it."""
    found = Autoencoder()
    found.load_state_dict(state)
    for (_, one), (_, other) in zip(module.named_modules(), found.named_modules(), strict=True):
        for name in ("_compression_grids", "_compression_activations"):
            if name in one.__dict__:
                other.__dict__[name] = deepcopy(one.__dict__[name])
    return found


def made(option):
    """The callbacks of a way."""
    if option in QAT:
        rules = {"activation_bits": None, **QAT[option]}
        return [GradualPruning(final_sparsity=0.5), QuantizationAwareTraining(**rules)]
    if option == "afterwards":
        return [GradualPruning(final_sparsity=0.5), PostTrainingQuantization(weight_bits=4)]
    return [GradualPruning(final_sparsity=0.8, regrow=option if option != "plain" else None)]


def fit(folder: Path, option: str, processes: int) -> None:
    """Trains in a way, and the ways that must resume once more from the middle."""
    train(folder, option, processes)
    if option in ("plain", *RESUMED):
        train(folder, option, processes, resume=True)


def train(folder: Path, option: str, processes: int, *, resume: bool = False) -> None:
    torch.manual_seed(1)
    model = (ShardedAutoencoder if processes > 1 else Autoencoder)()
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(rows), batch_size=8)  # the same rows in each process
    callbacks = made(option)
    name = f"{processes}-{option}{'-resume' * resume}"
    artifact = ArtifactCallback(f"{name}.lcz")
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
        callbacks=[*callbacks, *([] if resume else [HalfWay()]), CompressionSummary(), artifact],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    half = folder / "half.ckpt" if resume else None
    trainer.fit(model, loader, loader, ckpt_path=half)  # validation leaves weights gathered
    weights = {key: whole(value) for key, value in model.state_dict().items()}
    known = compression_state(model)
    state = {
        "model": weights,
        "masks": callbacks[0].state_dict()["masks"],
        "zeros": known.masks,
        "sparsity": callbacks[0].sparsity,
        "grids": {path: vars(grid) for path, grid in known.grids.items()},
        "activations": {
            path: [one and (one.scale, one.zero_point) for one in (pair.input, pair.output)]
            for path, pair in known.activations.items()
        },
        "quantizer": callbacks[1].state_dict() if option in QAT else {},
        "bytes": artifact.info.bytes,
    }
    alone = save_compressed(plain(model, weights), folder / f"{name}-{trainer.global_rank}.lcz")
    assert alone.bytes == artifact.info.bytes
    if option == "minmax":
        load(folder, name, model, weights)
    torch.save(state, folder / f"{name}-{trainer.global_rank}.pt")


def load(folder: Path, name: str, model, weights) -> None:
    """A file goes into a sharded module, and an error of the writer reaches all processes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_compressed(folder / f"{name}.lcz", model)
    for key, value in model.state_dict().items():
        assert torch.equal(whole(value), weights[key]), key
    with pytest.raises(OSError, match="cannot write"):
        save_compressed(model, folder / "nowhere" / "model.lcz")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for option in sys.argv[3:]:  # a start takes its time
        fit(Path(sys.argv[1]), option, int(sys.argv[2]))
