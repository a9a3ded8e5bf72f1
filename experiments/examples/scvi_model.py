"""scvi-tools' VAE of gene counts (Lopez et al. 2018), compressed: the lines marked (*).

python experiments/examples/scvi_model.py [epochs [folder]]; needs `pip install scvi-tools`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from lightning_compress import (  # (*)
    GradualPruning,
    QuantizationAwareTraining,
    load_compressed,
    save_compressed,
)

CELLS, GENES, KINDS = 600, 200, 4


def counts() -> Any:
    """Cells of four kinds, each with a profile of its own: Poisson counts (600, 200)."""
    rng = np.random.default_rng(0)
    profiles = rng.gamma(0.5, 2.0, (KINDS, GENES))
    depth = rng.lognormal(0.0, 0.3, (CELLS, 1))
    drawn = rng.poisson(depth * profiles[rng.integers(KINDS, size=CELLS)])
    return import_module("anndata").AnnData(drawn.astype(np.float32))


def main(epochs: int, folder: Path) -> None:
    """Train with the callbacks, then write the module and read it into a fresh one."""
    scvi = import_module("scvi")
    scvi.settings.seed = 0
    data = counts()
    scvi.model.SCVI.setup_anndata(data)
    model = scvi.model.SCVI(data, n_hidden=64)
    compression: list[Any] = [  # (*)
        GradualPruning(final_sparsity=0.8),
        QuantizationAwareTraining(weight_bits=5, activation_bits=None),
    ]
    model.train(
        max_epochs=epochs,
        batch_size=64,
        accelerator="cpu",
        default_root_dir=str(folder),
        callbacks=compression,  # (*)
    )
    module = model.module.cpu().eval()
    info = save_compressed(module, folder / "scvi.lcz")  # (*)
    fresh = scvi.model.SCVI(data, n_hidden=64)
    load_compressed(folder / "scvi.lcz", fresh.module)  # (*)
    fresh.is_trained = True
    fresh.module.eval()
    same = np.array_equal(model.get_latent_representation(), fresh.get_latent_representation())
    elbo = float(model.history["elbo_train"].to_numpy()[-1, 0])
    print(
        f"zeros: {compression[0].sparsity:.1%} of all weights in use; -ELBO {elbo:.1f} nats a cell"
    )
    print(f"scvi.lcz: {info.bytes} bytes, {info.ratio:.1f}x smaller, loads exactly: {same}")


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(int(given.get(1, 30)), Path(given.get(2, "outputs/scvi")))
