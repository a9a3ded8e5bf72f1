"""Size and speed of the coders, on symbols of known entropy and on trained models, one thread.

python experiments/benchmarks/bench_coding.py [--weights 2000000] [--scale 1,10,100]
    [file.lcz | checkpoint ...]

nncodec pins an older NumPy, so it runs in an environment of its own:
    python3 -m venv /tmp/nncodec && /tmp/nncodec/bin/pip install nncodec h5py
    NNCODEC_PYTHON=/tmp/nncodec/bin/python python experiments/benchmarks/bench_coding.py model.lcz
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import lzma
import multiprocessing
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from shared.peers import NNCODEC, nncodec_python
from torch import nn

from lightning_compress.grids import AffineGrid
from lightning_compress.lcz.artifact import load_compressed, save_compressed, write_tensors
from lightning_compress.lcz.checkpoints import read_checkpoint
from lightning_compress.lcz.codecs import CODECS, decode_symbols, encode_symbols, entropy_bits
from lightning_compress.state import set_grid

Steps = NDArray[np.int64]
HELPER = Path(__file__).with_name("shared") / "nncodec_sizes.py"


def synthetic(weights: int, sparsity: float, *, structured: bool) -> Steps:
    """Steps from -7 to 7, (rows, 1024); structured: every row and column has its own density."""
    rng = np.random.default_rng(0)
    shape = (max(weights // 1024, 1), 1024)
    steps = np.rint(2.5 * rng.standard_normal(shape)).astype(np.int64).clip(-7, 7)
    steps[steps == 0] = rng.choice([-1, 1], int((steps == 0).sum()))
    logit = np.full(shape, np.log((1 - sparsity) / sparsity))
    if structured:
        logit += 0.7 * rng.standard_normal((shape[0], 1)) + 0.7 * rng.standard_normal((1, 1024))
    steps[rng.random(shape) > 1 / (1 + np.exp(-logit))] = 0
    return steps


def on_grids(path: Path) -> dict[str, Steps]:
    """The matrices of a file that take few values, as steps from zero."""
    found: dict[str, Steps] = {}
    for name, tensor in read_checkpoint(path).items():
        book, places = np.unique(tensor.double().numpy(), return_inverse=True)
        if tensor.dim() > 1 and len(book) <= 256 and 0 in book:
            found[name] = (places - int(np.searchsorted(book, 0))).reshape(tensor.shape)
    return found


def cut_at(path: Path, sparsity: float) -> dict[str, Steps]:
    """The matrices of a file of dense weights: the smallest of each 0, the rest from -7 to 7."""
    found: dict[str, Steps] = {}
    for name, tensor in read_checkpoint(path).items():
        if tensor.dim() > 1 and tensor.is_floating_point():
            weights = tensor.double().numpy()
            steps = np.rint(weights * (7 / np.abs(weights).max())).astype(np.int64)
            steps[steps == 0] = np.sign(weights[steps == 0])
            steps[np.abs(weights) <= np.quantile(np.abs(weights), sparsity)] = 0
            found[name] = steps
    return found


def symbols_of(steps: Steps) -> NDArray[np.uint16]:
    """0, 1, 2, 3, 4 ... for 0, -1, +1, -2, +2 ..."""
    return (2 * np.abs(steps) - (steps < 0)).astype(np.uint16).reshape(-1)


def timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The result and the least processor time of some calls: others may use the machine too."""
    seconds: list[float] = []
    result = None
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        seconds.append(time.process_time() - start)
    return result, min(seconds)


def code(codec: str, tensors: Mapping[str, Steps], repeats: int) -> tuple[int, float, float]:
    """Bytes in all, and millions of weights a second into them and back."""
    size, spent, weights = 0, [0.0, 0.0], sum(steps.size for steps in tensors.values())
    for name, steps in tensors.items():
        symbols, shape = symbols_of(steps), steps.shape
        (used, data), seconds = timed(
            lambda s=symbols, h=shape: encode_symbols(s, codec, h), repeats
        )
        spent[0] += seconds
        back, seconds = timed(
            lambda d=data, h=shape, u=used: decode_symbols(u, d, h, limit=4096), repeats
        )
        spent[1] += seconds
        if not np.array_equal(back, symbols):
            raise SystemExit(f"{codec} did not give {name} back")
        size += len(data)
    return size, weights / spent[0] / 1e6, weights / spent[1] / 1e6


def general(tensors: Mapping[str, Steps]) -> dict[str, int]:
    """Bytes of general compressors, a byte a weight in."""
    data = b"".join(steps.astype(np.int8).tobytes() for steps in tensors.values())
    sizes = {"gzip -9": len(gzip.compress(data, 9)), "xz -9e": len(lzma.compress(data, preset=9))}
    if (zstd := shutil.which("zstd")) is not None:
        done = subprocess.run([zstd, "-19", "-c"], input=data, capture_output=True, check=True)
        sizes["zstd -19"] = len(done.stdout)
    return sizes


def nncodec(tensors: Mapping[str, Steps]) -> dict[str, int]:
    """Bytes of DeepCABAC's payloads, without side information, in each tensor's best order."""
    if (python := nncodec_python()) is None:
        print(f"nncodec left out: {NNCODEC} names no interpreter, see --help")
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "steps.npz")
        np.savez(path, *tensors.values())
        done = subprocess.run([python, HELPER, path], capture_output=True, text=True, check=True)
    return {"nncodec": int(done.stdout.split()[-1])}


def compare(title: str, tensors: Mapping[str, Steps], options: argparse.Namespace) -> None:
    """Print one row a coder: bytes by the zero-order entropy, and speeds."""
    bound = sum(entropy_bits(symbols_of(steps)) for steps in tensors.values()) / 8
    weights = sum(steps.size for steps in tensors.values())
    zeros = sum(int((steps == 0).sum()) for steps in tensors.values()) / weights
    print(f"\n{title}: {weights} weights, {zeros:.1%} zeros, entropy bound {bound:.0f} bytes")
    print(f"{'coder':16} {'bytes':>9} {'/ bound':>8} {'encode MW/s':>12} {'decode MW/s':>12}")
    for codec in (*CODECS, "fast"):
        size, there, back = code(codec, tensors, options.repeats)
        print(f"{codec:16} {size:9} {size / bound:8.4f} {there:12.1f} {back:12.1f}")
    for name, size in {**nncodec(tensors), **general(tensors)}.items():
        print(f"{name:16} {size:9} {size / bound:8.4f}")


def whole_file(path: Path) -> None:
    """The file of all tensors, with all that stands beside the symbols."""
    with tempfile.TemporaryDirectory() as folder:
        info = write_tensors(read_checkpoint(path), Path(folder, "a.lcz"))
    share = info.bytes / info.entropy_bound_bytes
    print(f"whole file: {info.bytes} bytes, {share:.4f} of its bound with plain values, header")


def scale(millions: list[float], kinds: list[str]) -> None:
    """Seconds and memory of whole files of growing size: growth should be linear."""
    print("\nwhole files of one tensor; memory on top is in the tensor's own float32 bytes")
    for size in millions:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "steps.npy")
            np.save(path, synthetic(int(size * 1e6), 0.9, structured=True).astype(np.int8))
            for kind, codec in itertools.product(kinds, ("fast", "context")):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    save, load, memory = pool.submit(whole, path, codec, kind).result()
                print(
                    f"{kind:6} {codec:8} {size:6g} M weights: save {save:7.2f} s, "
                    f"load {load:7.2f} s, memory on top {memory:.1f}",
                    flush=True,
                )


def whole(path: Path, codec: str, kind: str) -> tuple[float, float, float]:
    """Seconds to write and read a file of a layer, and the most memory that either took on top."""
    steps = np.load(path)
    layer = nn.Linear(steps.shape[1], steps.shape[0], bias=False, device="meta").to_empty(
        device="cpu"
    )
    with torch.no_grad():
        torch.mul(torch.from_numpy(steps), 0.05, out=layer.weight)
    if kind == "grid":
        zero = torch.zeros(1, dtype=torch.int32)
        set_grid(layer, "weight", AffineGrid(torch.tensor([0.05]), zero, 4, True, None))
    target, before = path.with_suffix(".lcz"), peak()
    save = timed(lambda: save_compressed(layer, target, codec), 1)[1]
    load = timed(lambda: load_compressed(target, layer, stream=True), 1)[1]
    return save, load, (peak() - before) / (4 * steps.size)


def peak() -> float:
    """The most bytes that this process has had in memory, on Linux: `ru_maxrss` is inherited."""
    status = Path("/proc/self/status").read_text()
    return 1024.0 * int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Compare on symbols made up, then on the files given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_FORMAT)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--weights", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", help="millions of weights of whole files, such as 1,10,100")
    parser.add_argument("--kinds", default="grid", help="of them: grid, values or grid,values")
    parser.add_argument("--cut", help="also cut files of dense weights at, say, 0.8,0.9,0.95,0.98")
    options = parser.parse_args()
    for structured in (False, True) if options.weights else ():
        steps = synthetic(options.weights, 0.9, structured=structured)
        compare("rows and columns apart" if structured else "independent", {"w": steps}, options)
    for path in options.files:
        for sparsity in map(float, options.cut.split(",")) if options.cut else ():
            compare(f"{path} cut at {sparsity:.0%}", cut_at(path, sparsity), options)
        if options.cut:
            continue
        compare(str(path), on_grids(path), options)
        whole_file(path)
    if options.scale:
        scale([float(size) for size in options.scale.split(",")], options.kinds.split(","))


_FORMAT = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    main()
