"""Time and memory by round of simulations with more and more clients, each once.

`bench_federated_scale.py rows.jsonl [word=value ...]`: the command `federated` in a process of its
own, 10 clients a round of a VAE on Fashion-MNIST, whatever the number of clients. Further words are
the command's. What the file has is not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.rows import Rows

CLIENTS = (10, 100, 1000)
A_ROUND, ROUNDS = 10, 6
WORDS = ("data=fashion_mnist", "trainer.max_epochs=1", "trainer.limit_val_batches=1",
         "trainer.accelerator=cpu", "evaluate.samples=32", "evaluate.latency_repeats=1",
         "export.onnx=false", "federated.cpus=1", f"federated.rounds={ROUNDS}",
         f"federated.evaluate_every={ROUNDS}", "data.batch_size=16",
         "trainer.limit_train_batches=4")  # fmt: skip


def memory_of(process: int, group: int) -> float:
    """Memory of a process in MiB, shared pages in parts; 0 if it is of another group, or ended."""
    try:
        if os.getpgid(process) != group:
            return 0.0
        text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0.0
    return int(text.split("Pss:")[1].split()[0]) / 1024


def memory(group: int) -> dict[str, float]:
    """Memory in MiB of the server's process, which leads a group, and of the whole group."""
    every = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    whole = sum(memory_of(process, group) for process in every)
    return {"server": round(memory_of(group, group)), "all": round(whole)}


def measure(clients: int, words: Sequence[str]) -> dict[str, Any]:
    """One run: each round's time, the part of it in the codecs, and the memory at its end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lightning_compress.lab.app", "federated", *WORDS]
        command += [f"federated.clients={clients}", f"federated.fraction={A_ROUND / clients}"]
        job = subprocess.Popen(
            [*command, *words, "hydra.run.dir=run"],
            cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert job.stdout is not None
        memories = [memory(job.pid) for line in job.stdout if line.startswith("round ")]
        if job.wait():
            raise RuntimeError(f"{clients} clients: the command ended with {job.returncode}")
        run = Path(folder) / "run"
        told = json.loads((run / "results.json").read_text(encoding="utf-8"))["federated"]
        kept = sum(one.stat().st_size for one in (run / "clients").rglob("*") if one.is_file())
    names = ("seconds", "codec_seconds", "client_codec_seconds", "up", "down", "clients")
    rounds = [
        {name: row[name] for name in names} | {"memory": one}
        for row, one in zip(told["rounds"], memories, strict=True)
    ]
    return {"codec_share": told["codec_share"], "kept_bytes": kept, "rounds": rounds}


def main() -> None:
    """Run what is missing."""
    rows, words = Rows(Path(sys.argv[1]), ["clients", "words"]), sys.argv[2:]
    for clients in CLIENTS:
        key = {"clients": clients, "words": " ".join(words)}
        rows.make(lambda clients=clients: measure(clients, words), **key)


if __name__ == "__main__":
    main()
