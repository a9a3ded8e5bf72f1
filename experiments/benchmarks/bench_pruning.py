"""Time of a training step under pruning, against no callback and against Lightning's own.

python experiments/benchmarks/bench_pruning.py [steps of an epoch [copies]]
"""

import sys

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning
from shared.turns import measure_steps
from torch import nn
from torch.nn.utils import prune

from lightning_compress import Constant, GradualPruning
from lightning_compress.lab.models import DCGAN

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
COPIES = int(sys.argv[2]) if len(sys.argv) > 2 else 6


def main() -> None:
    setups = {
        "no callback": lambda _: [],
        "GradualPruning 90 %": lambda _: [
            GradualPruning(schedule=Constant(final_sparsity=0.9, begin=0, end=1))
        ],
        "GradualPruning, an event every 25 steps": lambda _: [
            GradualPruning(final_sparsity=0.9, begin=0, end=2 * STEPS, frequency=25)
        ],
        "Lightning ModelPruning": lambda model: [
            ModelPruning("l1_unstructured", parameters_to_prune=weights(model), amount=0.9)
        ],
        "torch.nn.utils.prune": pruned_by_torch,
    }

    def fresh(name: str) -> tuple[DCGAN, list[Callback]]:
        model = DCGAN(image_size=28)
        return model, setups[name](model)

    measure_steps(
        {name: lambda name=name: fresh(name) for name in setups}, steps=STEPS, copies=COPIES
    )


def pruned_by_torch(model: DCGAN) -> list[Callback]:
    prune.global_unstructured(weights(model), prune.L1Unstructured, amount=0.9)
    return []


def weights(model: DCGAN) -> list[tuple[nn.Module, str]]:
    kinds = (nn.Linear, nn.ConvTranspose2d, nn.Conv2d)
    return [(part, "weight") for part in model.generator.modules() if isinstance(part, kinds)]


if __name__ == "__main__":
    main()
