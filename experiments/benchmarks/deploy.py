"""Sizes and speeds of the files that one trained generator ships as: server, phone, browser.

python experiments/benchmarks/deploy.py [rows.jsonl [page.md]]

A DCGAN on scikit-learn's digits is trained once, pruned and quantized while it trains. Each call
of a runtime is timed in turn with the others', on one core. With a page, only the table of the
rows so far is put into it. Runtimes that are not installed get a row that says so.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared.finetuning import Start
from shared.pages import insert
from shared.rows import Rows, read_rows
from torch import Tensor

from lightning_compress import (
    GradualPruning,
    MissingExtraError,
    QuantizationAwareTraining,
    export_mobile,
    export_onnx,
    fake_quantized,
    save_compressed,
    write_graph,
)
from lightning_compress.conversion.checks import LEVELS, compare
from lightning_compress.conversion.mobile import executorch_method
from lightning_compress.errors import require
from lightning_compress.lab.evaluation.latency import (
    Latency,
    latency,
    onnx_runner,
    openvino_runner,
    torch_runner,
)
from lightning_compress.lab.workflow.training import build_model

EPOCHS = 16
ROUNDS = 200
OVERRIDES = ["model=dcgan", "model.width=32", "model.discriminator_width=16"]
DATA = ("data=digits", "data.image_size=28", "data.fit=resize")
Made = tuple[Path, Callable[[], Any] | None]


def main(path: Path) -> None:
    """Trains, makes the files, times those that run here, and writes a row each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = Rows(path, keys=("file",))
    if all(rows.has(file=name) for name in FILES):
        return
    folder = path.parent / "deploy"
    folder.mkdir(exist_ok=True)
    generator = trained(folder)
    z = torch.randn(16, *generator.sample[0].shape[1:], generator=torch.Generator().manual_seed(0))
    made: dict[str, Made] = {}
    for name, (_, make, _) in FILES.items():
        with contextlib.suppress(MissingExtraError):
            made[name] = make(generator.module, folder, z)
    runs = {name: run for name, (_, run) in made.items() if run is not None}
    apart = {name: beyond_a_step(run, generator.module, z) for name, run in runs.items()}
    times = timed(runs)
    for name in FILES:
        rows.drop(file=name)
        rows.make(partial(row, name, made, times, apart), file=name)


class Trained:
    """The generator, and latents that it takes."""

    def __init__(self, module: torch.nn.Module, sample: tuple[Tensor, ...]) -> None:
        self.module, self.sample = module, sample


def trained(folder: Path) -> Trained:
    """Compressed while it trains: 80 % zeros, int8 weights and activations."""
    start = Start("dcgan", 0, folder, {"dcgan": (OVERRIDES, EPOCHS, [])}, data=DATA)
    kept = folder / "generator.pt"
    torch.manual_seed(0)
    if not kept.exists():
        model = build_model(start.cfg, start.data, seed=0)
        pruning = GradualPruning(final_sparsity=0.8, end=0.6, frequency=5, scope="layer")
        start.fit(
            model,
            [pruning, QuantizationAwareTraining(weight_bits=8, activation_bits=8, freeze=0.8)],
            epochs=EPOCHS,
            steps=None,
        )
        trained: Any = model.eval()
        module, sample = trained.parts()["generator"]
        torch.save((module, sample), kept)
    return Trained(*torch.load(kept, weights_only=False))


def make_torch(module: torch.nn.Module, folder: Path, z: Tensor) -> Made:
    torch.save(module.state_dict(), folder / "model.pt")
    return folder / "model.pt", torch_runner(module, z[:1])


def make_lcz(module: torch.nn.Module, folder: Path, _: Tensor) -> Made:
    return save_compressed(module, folder / "model.lcz").path, None


def make_lcz_graph(module: torch.nn.Module, folder: Path, z: Tensor) -> Made:
    path = folder / "model.graph.lcz"
    save_compressed(module, path, graph=make_int8(module, folder, z)[0])
    return path, onnx_runner(path, z[:1])


def make_graph_only(module: torch.nn.Module, folder: Path, z: Tensor) -> Made:
    path = folder / "model.graph_only.lcz"
    write_graph(make_int8(module, folder, z)[0], path)
    return path, onnx_runner(path, z[:1])


def make_onnx(module: torch.nn.Module, folder: Path, z: Tensor, dtype: str = "float32") -> Made:
    path = folder / f"model.{dtype}.onnx"
    export_onnx(module, path, z, dtype=dtype)
    return path, onnx_runner(path, z[:1].to(getattr(torch, dtype)))


def make_int8(module: torch.nn.Module, folder: Path, z: Tensor) -> Made:
    path = folder / "model.int8.onnx"
    export_onnx(module, path, z, int8=True)
    return path, onnx_runner(path, z[:1])


def make_openvino(module: torch.nn.Module, folder: Path, z: Tensor) -> Made:
    openvino = require("openvino", extra="openvino")
    source, path = folder / "openvino.onnx", folder / "ir" / "model.xml"
    export_onnx(module, source, z, int8=True, runtime="openvino")
    path.parent.mkdir(exist_ok=True)
    openvino.save_model(openvino.convert_model(str(source)), str(path), compress_to_fp16=False)
    return path.parent, openvino_runner(path, z[:1])


def make_executorch(module: torch.nn.Module, folder: Path, z: Tensor) -> Made:
    path = export_mobile(module, folder / "model.pte", z[:1]).path
    return path, partial(executorch_method(path).execute, [z[:1]])


def make_pt2e(module: torch.nn.Module, folder: Path, z: Tensor) -> Made:
    """The same weights by ExecuTorch's own quantizer, which finds its ranges on 16 inputs."""
    xnnpack = "executorch.backends.xnnpack"
    quantizers = require(f"{xnnpack}.quantizer.xnnpack_quantizer", extra="executorch")
    pt2e = require("torchao.quantization.pt2e.quantize_pt2e", extra="executorch")
    exir = require("executorch.exir", extra="executorch")
    partitioners = require(f"{xnnpack}.partition.xnnpack_partitioner", extra="executorch")
    quantizer = quantizers.XNNPACKQuantizer().set_global(
        quantizers.get_symmetric_quantization_config(is_per_channel=True)
    )
    with torch.no_grad():
        traced = torch.export.export(module.eval(), (z[:1],), strict=False).module()
        prepared = pt2e.prepare_pt2e(traced, quantizer)
        for row in z.split(1):
            prepared(row)
        program = torch.export.export(pt2e.convert_pt2e(prepared), (z[:1],), strict=False)
    lowered = exir.to_edge_transform_and_lower(
        program, partitioner=[partitioners.XnnpackPartitioner()]
    ).to_executorch()
    path = folder / "model.pt2e.pte"
    path.write_bytes(lowered.buffer)
    return path, partial(executorch_method(path).execute, [z[:1]])


def make_coreml(module: torch.nn.Module, folder: Path, z: Tensor) -> Made:
    return export_mobile(module, folder / "model.mlpackage", z[:1]).path, None


def make_litert(module: torch.nn.Module, folder: Path, z: Tensor) -> Made:
    path = export_mobile(module, folder / "model.tflite", z[:1]).path
    interpreter = require("ai_edge_litert.interpreter", extra="litert").Interpreter(
        str(path), num_threads=1
    )
    interpreter.allocate_tensors()
    given = interpreter.get_input_details()[0]["index"]
    found = interpreter.get_output_details()[0]["index"]

    def run() -> Any:
        interpreter.set_tensor(given, z[:1].numpy())
        interpreter.invoke()
        return interpreter.get_tensor(found)

    return path, run


FILES: dict[str, tuple[str, Callable[[torch.nn.Module, Path, Tensor], Made], str]] = {
    "PyTorch, `state_dict`": ("the class, torch", make_torch, "torch"),
    "`.lcz`, weights alone": ("the class, torch; or NumPy arrays", make_lcz, "torch"),
    "`.lcz` with the graph beside the weights": (
        "onnxruntime, constriction",
        make_lcz_graph,
        "onnxruntime",
    ),
    "`.lcz`, the graph alone": ("onnxruntime, constriction", make_graph_only, "onnxruntime"),
    "ONNX fp32": ("onnxruntime", make_onnx, "onnxruntime"),
    "ONNX fp16": ("onnxruntime", partial(make_onnx, dtype="float16"), "onnxruntime"),
    "ONNX int8": ("onnxruntime, onnxruntime-web", make_int8, "onnxruntime"),
    "OpenVINO IR int8": ("openvino", make_openvino, "openvino"),
    "ExecuTorch int8, XNNPACK": ("the ExecuTorch runtime", make_executorch, "executorch"),
    "ExecuTorch int8 by pt2e": ("the ExecuTorch runtime", make_pt2e, "executorch"),
    "Core ML int8": ("iOS 17, macOS 14", make_coreml, "coremltools"),
    "LiteRT float": ("the LiteRT runtime", make_litert, "litert_torch"),
}


def timed(runs: dict[str, Callable[[], Any]]) -> dict[str, Latency]:
    """Calls in turn on one core, as runtimes differ in how many threads they can be held to."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        return latency(runs, repeats=ROUNDS, warmup=10)
    finally:
        os.sched_setaffinity(0, cores)


def beyond_a_step(run: Callable[[], Any], module: torch.nn.Module, z: Tensor) -> float:
    """Share of an image's numbers that are over a 255th of their range from the int8 module's."""
    with torch.no_grad(), fake_quantized(module):
        expected = module(z[:1])
    found = run()
    first = found if isinstance(found, (Tensor, np.ndarray)) else found[0]
    numbers = torch.as_tensor(first).float().reshape(expected.shape).numpy()
    step = float(expected.max() - expected.min()) / LEVELS
    return compare(lambda _: [numbers], [()], [[expected]], [step]).more


def row(
    name: str, made: dict[str, Made], times: dict[str, Latency], apart: dict[str, float]
) -> dict[str, Any]:
    """Bytes, bytes behind brotli, milliseconds a call, parity; or why there is no file."""
    if name not in made:
        return {"missing": f"{FILES[name][2]} is not installed"}
    path = made[name][0]
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    found: dict[str, Any] = {"bytes": sum(one.stat().st_size for one in files)}
    try:
        brotli = require("brotli", extra="web")
        found["brotli"] = sum(len(brotli.compress(one.read_bytes(), quality=11)) for one in files)
    except MissingExtraError as error:
        found["brotli_missing"] = str(error)
    if name in times:
        found |= {"ms": round(times[name].median_ms, 3), "ratio": round(times[name].ratio, 3)}
        found["beyond_a_step"] = round(apart[name], 4)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """One line a file; sizes against the `.lcz` of the weights, times against eager PyTorch."""
    known = {row["file"]: row for row in rows}
    least = known["`.lcz`, weights alone"]["bytes"]
    lines = [
        "| file | bytes | against `.lcz` | brotli 11 | ms a call | faster than PyTorch "
        "| numbers off | needs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (needs, _, _) in FILES.items():
        if name not in known:
            continue
        one = known[name]
        if "missing" in one:
            lines.append(f"| {name} | not made: {one['missing']} | | | | | | {needs} |")
            continue
        packed = f"{one['brotli']:,} ({one['brotli'] / least:.2f}×)" if "brotli" in one else ""
        time = f"{one['ms']:.2f} | {1 / one['ratio']:.2f}×" if "ms" in one else "not run |"
        off = f"{one['beyond_a_step']:.1%}" if "beyond_a_step" in one else ""
        lines.append(
            f"| {name} | {one['bytes']:,} | {one['bytes'] / least:.2f}× | {packed} | {time} "
            f"| {off} | {needs} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    PATH = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/bench/deploy.jsonl")
    if len(sys.argv) > 2:
        insert(Path(sys.argv[2]), table(read_rows(PATH)))
    else:
        main(PATH)
