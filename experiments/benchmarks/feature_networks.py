"""Train the feature networks that ship with the package, about ten minutes on one thread.

python experiments/benchmarks/feature_networks.py [fashion_mnist digits]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from lightning_compress.lab.config import config_dir
from lightning_compress.lab.data import SplitDataModule
from lightning_compress.lab.evaluation.shipped_features import RECIPES, ship
from lightning_compress.lab.workflow.quality import rows


def main(names: Sequence[str]) -> None:
    """The splits are those of the benchmarks: `data.seed=0`."""
    torch.set_num_threads(1)
    for name in names:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose("train", [f"data={name}", "data.seed=0"])
        data: SplitDataModule = instantiate(cfg.data, _convert_="all")
        data.prepare_data()
        data.setup()
        train, test = rows(data.train_dataset), rows(data.test_dataset)
        count = data.dims["num_classes"]
        print(name, ship(name, train, test, num_classes=count, progress=print), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(RECIPES))
