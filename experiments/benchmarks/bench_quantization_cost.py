"""Time of a training step with weights and activations on grids, against no callback.

python experiments/benchmarks/bench_quantization_cost.py [steps of an epoch [copies]]
Of a VAE of 6.6 million weights at a batch of 32, grids for the entropy coder:
python experiments/benchmarks/bench_quantization_cost.py 8 2 vae
"""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule
from shared.turns import measure_steps

from lightning_compress import EntropyGrid, QuantizationAwareTraining
from lightning_compress.lab.models import DCGAN, VAE

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
COPIES = int(sys.argv[2]) if len(sys.argv) > 2 else 6
IS_VAE = "vae" in sys.argv[3:]
WIDE: dict[str, dict[str, Any] | None] = {
    "no callback": None,
    "W8, entropy": {"scheme": "entropy"},
    "W8, entropy with rate": {"scheme": "entropy", "entropy": EntropyGrid(rate=5.0)},
    "W8, rate_distortion": {"scheme": "rate_distortion", "lmbda": 12.0},
}
ARMS: dict[str, dict[str, Any] | None] = {
    "no callback": None,
    "W8A8": {},
    "W8A8, moving average": {"observer": "moving_average"},
    "W4A8, learned_step": {"weight_bits": 4, "scheme": "learned_step"},
    "W4, codebook": {"weight_bits": 4, "activation_bits": None, "scheme": "codebook"},
    "W8, entropy": {"activation_bits": None, "scheme": "entropy"},
}


def fresh(arm: str) -> tuple[LightningModule, list[Callback]]:
    options = ARMS[arm]
    quantize = [] if options is None else [QuantizationAwareTraining(freeze=1.0, **options)]
    return DCGAN(image_size=28), [*quantize]


def fresh_vae(arm: str) -> tuple[LightningModule, list[Callback]]:
    options = WIDE[arm]
    if options is None:
        return VAE(image_size=28, channels=1, width=96), []
    quantize = QuantizationAwareTraining(activation_bits=None, **options)
    return VAE(image_size=28, channels=1, width=96), [quantize]


if __name__ == "__main__":
    setups = {arm: lambda arm=arm: fresh(arm) for arm in ARMS}
    if IS_VAE:
        setups = {arm: lambda arm=arm: fresh_vae(arm) for arm in WIDE}
    measure_steps(setups, steps=STEPS, copies=COPIES, rows=32 if IS_VAE else 64)
