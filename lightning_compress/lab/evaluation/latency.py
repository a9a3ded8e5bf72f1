"""Latency of several models, measured in alternation in one process."""

from __future__ import annotations

import copy
import gc
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.conversion.session import onnx_session
from lightning_compress.errors import require
from lightning_compress.sample_inputs import as_inputs, take_rows

__all__ = ["Latency", "latency", "latency_grid", "onnx_runner", "openvino_runner", "torch_runner"]

Runner = Callable[[], Any]
RunnerFactory = Callable[[tuple[Tensor, ...], "int | None"], Runner]


@dataclass(frozen=True)
class Latency:
    """Time of one call, and how it compares with the first candidate.

    Args:
        median_ms: median over the rounds, milliseconds.
        p10_ms: 10th percentile.
        p90_ms: 90th percentile.
        ratio: median over the rounds of this time / the first candidate's; below 1 is faster.
        ratio_q25: its lower quartile.
        ratio_q75: its upper quartile.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio: float
    ratio_q25: float
    ratio_q75: float


def latency(
    candidates: Mapping[str, Runner], *, repeats: int = 50, warmup: int = 5
) -> dict[str, Latency]:
    """Time candidates in turn, `repeats` rounds of one call each, after `warmup` rounds.

    In turn, so that a busy moment of the machine meets all of them; in an order drawn anew each
    round, so that each follows each, and never itself: it would find its own memory in the caches.
    PyTorch's thread count is restored.

    Raises:
        ValueError: without candidates, or when `repeats` < 1 or `warmup` < 0.

    >>> times = latency({"a": lambda: sum(range(9)), "b": lambda: sum(range(9))}, repeats=3)
    >>> times["a"].ratio
    1.0
    """
    if not candidates or repeats < 1 or warmup < 0:
        raise ValueError(
            "need at least one candidate, repeats >= 1 and warmup >= 0, "
            f"got {list(candidates)}, {repeats}, {warmup}"
        )
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with _quiet_interpreter():
        for turn, order in enumerate(_orders(list(candidates), warmup + repeats)):
            for name in order:
                elapsed = _time(candidates[name])
                if turn >= warmup:
                    times[name].append(elapsed)
    first = np.asarray(next(iter(times.values())))
    return {name: _summary(np.asarray(values), first) for name, values in times.items()}


def _orders(names: list[str], rounds: int) -> Iterator[list[str]]:
    """An order of the names for each round, drawn with a fixed seed; none runs twice in a row."""
    draw, last = random.Random(0), None
    for _ in range(rounds):
        order = draw.sample(names, len(names))
        if order[0] == last:
            order.append(order.pop(0))
        last = order[-1]
        yield order


def latency_grid(
    factories: Mapping[str, RunnerFactory],
    inputs: Tensor | tuple[Tensor, ...],
    *,
    batches: Sequence[int] = (1, 16),
    threads: Sequence[int | None] = (1, None),
    repeats: int = 50,
    warmup: int = 5,
) -> dict[str, dict[str, Latency]]:
    """Latency for each batch size and thread count, keyed `"batch1_threads1"`, `"batch16_all"`.

    Args:
        factories: name -> `(inputs, threads) -> runner`, such as `partial(torch_runner, module)`.
        inputs: examples with the batch on axis 0, cut or repeated to each batch size.
        batches: batch sizes.
        threads: thread counts; None means all.
        repeats: see `latency`.
        warmup: see `latency`.
    """
    grid = {}
    for count in threads:
        for batch in batches:
            rows = take_rows(inputs, batch)
            runners = {name: factory(rows, count) for name, factory in factories.items()}
            key = f"batch{batch}_" + ("all" if count is None else f"threads{count}")
            grid[key] = latency(runners, repeats=repeats, warmup=warmup)
    return grid


def torch_runner(
    module: nn.Module, inputs: Tensor | tuple[Tensor, ...], threads: int | None = 1
) -> Runner:
    """One eager PyTorch call in eval mode with that many threads (None: all), on a copy.

    Calling it sets PyTorch's thread count; `latency` puts it back.
    """
    frozen, batch, count = copy.deepcopy(module).eval(), as_inputs(inputs), _threads(threads)

    def run() -> Any:
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
        with torch.inference_mode():
            return frozen(*batch)

    return run


def onnx_runner(
    path: str | Path,
    inputs: Tensor | tuple[Tensor, ...],
    threads: int | None = 1,
    *,
    graph: str | None = None,
) -> Runner:
    """One call of an ONNX file under ONNX Runtime on the CPU with that many threads (None: all).

    The inputs are given in the order of the file's own inputs. An `.lcz` file that holds a graph
    will do as well: `graph` names one of several.

    Raises:
        MissingExtraError: when onnxruntime is not installed.
        ValueError: when the number of inputs differs from the file's.
    """
    require("onnxruntime", extra="onnx")
    # threads that spin between calls would take the cores from the other candidates
    session = onnx_session(path, graph=graph, threads=_threads(threads), spinning=False)
    names = [entry.name for entry in session.get_inputs()]
    batch = as_inputs(inputs)
    if len(names) != len(batch):
        raise ValueError(f"{path} takes {len(names)} inputs {names}, got {len(batch)}")
    feed = {name: part.numpy(force=True) for name, part in zip(names, batch, strict=True)}
    return lambda: session.run(None, feed)


def openvino_runner(
    path: str | Path, inputs: Tensor | tuple[Tensor, ...], threads: int | None = 1
) -> Runner:
    """One call of an ONNX file under OpenVINO on the CPU with that many threads (None: all).

    Raises:
        MissingExtraError: when openvino is not installed.
    """
    core = require("openvino", extra="openvino").Core()
    hints = {"INFERENCE_NUM_THREADS": _threads(threads), "NUM_STREAMS": 1}
    # bfloat16, where a CPU has it, would not be the arithmetic of the other candidates
    settings = {**hints, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(str(path), "CPU", settings).create_infer_request()
    batch = [part.numpy(force=True) for part in as_inputs(inputs)]
    return lambda: request.infer(batch)


def _threads(threads: int | None) -> int:
    if threads is None:
        available = getattr(os, "sched_getaffinity", None)  # Linux only
        return len(available(0)) if available else os.cpu_count() or 1
    if threads < 1:
        raise ValueError(f"threads must be 1 or more, or None for all, got {threads}")
    return threads


@contextmanager
def _quiet_interpreter() -> Iterator[None]:
    """No garbage collection while timing, and PyTorch's thread count put back afterwards."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()


def _time(call: Runner) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def _summary(values: np.ndarray, first: np.ndarray) -> Latency:
    low, median, high = np.percentile(values, (10, 50, 90))
    ratios = np.percentile(values / np.maximum(first, 1e-9), (50, 25, 75))
    return Latency(*(float(value) for value in (median, low, high, *ratios)))
