"""Size and speed of int8 files beside the dense model's fp32 file: one thread, calls in turn.

python experiments/benchmarks/bench_int8.py [rounds [model]...]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.conversion.export import export_onnx
from lightning_compress.lab.evaluation.latency import latency_grid, onnx_runner, openvino_runner
from lightning_compress.lab.models import DCGAN, VAE, WGANGP, RecurrentVAE
from lightning_compress.lab.models.networks import initialize_dcgan

Part = tuple[nn.Module, tuple[Tensor, ...]]


def upsampling_generator(width: int = 64) -> nn.Module:
    """Latents (N, 64) -> images (N, 1, 28, 28): nearest upsampling before each convolution."""
    network = nn.Sequential(
        nn.Linear(64, 4 * width * 49, bias=False),
        nn.BatchNorm1d(4 * width * 49),
        nn.ReLU(),
        nn.Unflatten(1, (4 * width, 7, 7)),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(4 * width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 1, 3, padding=1),
        nn.Tanh(),
    )
    initialize_dcgan(network)
    return network


def models() -> dict[str, Part]:
    """Name -> module and sample."""
    recurrent = RecurrentVAE(steps=28, features=28).parts()
    return {
        "DCGAN": DCGAN(image_size=28).parts()["generator"],
        "WGAN-GP": WGANGP(image_size=28).parts()["generator"],
        "upsample + conv": (upsampling_generator(), (torch.randn(2, 64),)),
        "VAE decoder": VAE(image_size=28).parts()["decoder"],
        "recurrent VAE decoder": recurrent["decoder"],
        "recurrent VAE encoder": recurrent["encoder"],
    }


def like(sample: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    """Inputs drawn like the sample: normal latents, or images in [0, 1]."""
    draw = torch.rand if float(sample[0].min()) >= 0 else torch.randn
    return tuple(draw(rows, *part.shape[1:]) for part in sample)


def settle(module: nn.Module, sample: tuple[Tensor, ...]) -> None:
    """Give BatchNorm statistics of its own."""
    module.train()
    with torch.no_grad():
        for _ in range(20):
            module(*like(sample, 64))
    module.eval()


def bench(name: str, part: Part, folder: Path, rounds: int) -> None:
    """Print a model's rows."""
    module, sample = part
    settle(module, sample)
    dense = export_onnx(module, folder / "dense.onnx", sample)
    recurrent = any(isinstance(layer, nn.RNNBase) for layer in module.modules())
    calibration = None if recurrent else [like(sample, 64) for _ in range(4)]  # weights alone
    whole = partial(export_onnx, module, sample=sample, int8=True, calibration=calibration)
    small = whole(folder / "onnxruntime.int8.onnx", runtime="onnxruntime")
    whole(folder / "openvino.int8.onnx", runtime="openvino")
    smaller = dense.bytes / small.bytes
    print(f"\n{name}: {dense.bytes} -> {small.bytes} bytes, {smaller:.2f}x smaller")
    print(f"  int8 {dict(small.int8_ops)}, float {dict(small.float_ops)}")
    for runtime, parity in small.parity.items():
        print(
            f"  {runtime}: equal {parity.equal:.2%}, one step {parity.one_step:.2%}, "
            f"more {parity.more:.2%}, largest {parity.largest:.2f} steps"
        )
    factories: dict[str, Callable[..., Any]] = {}
    for runtime, runner in (("onnxruntime", onnx_runner), ("openvino", openvino_runner)):
        files = {"dense": "dense.onnx", "int8": f"{runtime}.int8.onnx"}  # each written for it
        for kind, file in files.items():
            factories[f"{runtime} {kind}"] = partial(runner, folder / file)
    grid = latency_grid(factories, like(sample, 16), threads=(1,), repeats=rounds)
    for key, times in grid.items():
        row = (f"{one} {at.median_ms:.2f} ms {1 / at.ratio:.2f}x" for one, at in times.items())
        print(f"  {key}: " + ", ".join(row))


def main(rounds: int) -> None:
    """Print all models' rows."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cpu = Path("/proc/cpuinfo")
    known = cpu.is_file() and "vnni" in cpu.read_text(encoding="utf-8")
    only = sys.argv[2:]
    print(f"VNNI: {'yes' if known else 'no'}")
    with tempfile.TemporaryDirectory() as folder:
        for name, part in models().items():
            if not only or name in only:
                bench(name, part, Path(folder), rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
