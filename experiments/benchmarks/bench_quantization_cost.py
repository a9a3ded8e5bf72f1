"""Time of a training step with weights and activations on grids, against no callback.

python experiments/benchmarks/bench_quantization_cost.py [steps of an epoch [copies]]
"""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Callback
from shared.turns import measure_steps

from lightning_compress import QuantizationAwareTraining
from lightning_compress.lab.models import DCGAN

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
COPIES = int(sys.argv[2]) if len(sys.argv) > 2 else 6
ARMS: dict[str, dict[str, Any] | None] = {
    "no callback": None,
    "W8A8": {},
    "W8A8, moving average": {"observer": "moving_average"},
    "W4A8, learned_step": {"weight_bits": 4, "scheme": "learned_step"},
    "W4, codebook": {"weight_bits": 4, "activation_bits": None, "scheme": "codebook"},
    "W8, entropy": {"activation_bits": None, "scheme": "entropy"},
}


def fresh(arm: str) -> tuple[DCGAN, list[Callback]]:
    options = ARMS[arm]
    quantize = [] if options is None else [QuantizationAwareTraining(freeze=1.0, **options)]
    return DCGAN(image_size=28), [*quantize]


if __name__ == "__main__":
    measure_steps({arm: lambda arm=arm: fresh(arm) for arm in ARMS}, steps=STEPS, copies=COPIES)
