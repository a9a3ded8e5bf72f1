"""Time of a training step beside PyTorch's own quantization-aware training (pt2e, in torchao).

A GAN whose generator upsamples and convolves, since pt2e leaves transposed convolutions in float.
Needs `pip install torchao`.

python experiments/benchmarks/bench_pt2e.py [steps of an epoch [copies]]
"""

from __future__ import annotations

import sys
from importlib import import_module

import torch
from bench_int8 import upsampling_generator
from lightning.pytorch import Callback
from shared.turns import measure_steps
from torch import nn

from lightning_compress import QuantizationAwareTraining
from lightning_compress.lab.models import DCGAN

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 12
COPIES = int(sys.argv[2]) if len(sys.argv) > 2 else 4


def by_pt2e(generator: nn.Module) -> nn.Module:
    """The exported generator with fake quantization of weights and activations, 8 bits."""
    pt2e = import_module("torchao.quantization.pt2e")
    prepare_qat_pt2e = import_module("torchao.quantization.pt2e.quantize_pt2e").prepare_qat_pt2e
    x86 = import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    batch = torch.export.Dim("batch", min=2, max=4096)
    shapes = {"input": {0: batch}}
    exported = torch.export.export(
        generator.train(), (torch.randn(8, 64),), dynamic_shapes=shapes, strict=True
    )
    prepared = prepare_qat_pt2e(exported.module(), quantizer)
    kinds = [type(module).__name__ for module in prepared.modules()]
    assert any("FakeQuantize" in kind for kind in kinds), kinds
    return pt2e.allow_exported_model_train_eval(prepared)


def fresh(arm: str) -> tuple[DCGAN, list[Callback]]:
    model = DCGAN(image_size=28, latent_dim=64)
    generator = upsampling_generator()
    if arm == "pt2e":
        generator = by_pt2e(generator)
    model.generator = nn.Sequential(generator)
    return model, [QuantizationAwareTraining(freeze=1.0)] if arm == "ours" else []


if __name__ == "__main__":
    arms = ["no quantization", "ours", "pt2e"]
    measure_steps({arm: lambda arm=arm: fresh(arm) for arm in arms}, steps=STEPS, copies=COPIES)
