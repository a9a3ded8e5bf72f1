"""A project laid out as lightning-hydra-template: the compression is one file of YAML.

`hydra_template/configs/callbacks/compression.yaml` lists the callbacks by `_target_`; this script
is the template's train.py and eval.py in short, and knows nothing of them.

python experiments/examples/hydra_template.py [trainer.max_epochs=30] [output_dir=folder]
"""

from __future__ import annotations

from pathlib import Path

import hydra
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import save_compressed, sparsity


def instantiate_callbacks(cfg: DictConfig) -> list[Callback]:
    """Each entry of `callbacks` that has a `_target_`."""
    return [hydra.utils.instantiate(one) for one in cfg.values() if "_target_" in one]


@hydra.main(version_base="1.3", config_path="hydra_template/configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Train, evaluate the best checkpoint in a fresh model, write it."""
    seed_everything(cfg.seed, workers=True, verbose=False)
    images = (
        torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    )
    train = DataLoader(TensorDataset(images[:1500]), batch_size=64, shuffle=True)
    val = DataLoader(TensorDataset(images[1500:]), batch_size=297)

    model: LightningModule = hydra.utils.instantiate(cfg.model)
    callbacks = instantiate_callbacks(cfg.callbacks)
    trainer: Trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks)
    trainer.fit(model, train, val)

    best = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    fresh: LightningModule = hydra.utils.instantiate(cfg.model)  # eval.py ckpt_path=...
    trainer.validate(fresh, val, ckpt_path=best, verbose=False)
    info = save_compressed(fresh, Path(cfg.output_dir) / "vae.lcz")
    print(f"best: {best}, zeros {sparsity(fresh):.1%}, {trainer.callback_metrics['val/loss']:.1f}")
    print(f"vae.lcz: {info.bytes} bytes, {info.ratio:.1f}x smaller")


if __name__ == "__main__":
    main()
