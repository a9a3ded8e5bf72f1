"""Bytes and -ELBO of federated methods, each row once: `bench_federated.py rows.jsonl [key=value]`.

Settings: data=fashion_mnist width=32 rounds=30 local_epochs=1 batch_size=128 clients=10
seeds=0,1,2 partitions=iid;dirichlet(0.1) peers=<names of PEERS, by ;>. What the file has is not run
again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from shared.federated_peers import PEERS, Peer, Tensors

from lightning_compress.federated import load_arrays, model_arrays, partition_rows
from lightning_compress.federated.updates import add_update
from lightning_compress.lab.config import config_dir
from lightning_compress.lab.evaluation.likelihood import likelihood
from lightning_compress.lab.workflow.training import build_model

SETTINGS = {"data": "fashion_mnist", "width": "32", "rounds": "30", "local_epochs": "1",
            "batch_size": "128", "clients": "10", "seeds": "0,1,2",
            "partitions": "iid;dirichlet(0.1)", "peers": ";".join(PEERS)}  # fmt: skip
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu",
                         "enable_progress_bar": False, "enable_model_summary": False,
                         "limit_val_batches": 0}  # fmt: skip


def run(peer: Peer, cfg: Any, how: str, s: dict[str, str], fraction: float) -> list[dict]:
    """Train one method: FedAvg over the updates of its rules."""
    data = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup()
    clients, generator = int(s["clients"]), torch.Generator().manual_seed(cfg.seed)
    parts = partition_rows(data.train_dataset[:][1], clients, how, seed=cfg.seed)
    model = build_model(cfg, data, seed=cfg.seed)
    exact: Tensors = {n: one for n, one in model_arrays(model).items() if one.is_floating_point()}
    held, left, rows = exact, {}, []
    for number in range(1, int(s["rounds"]) + 1):
        row = {"round": number, "up": 0, "down": 0, "codec_seconds": 0.0}
        drawn = torch.randperm(clients, generator=generator)[: max(1, round(fraction * clients))]
        total, weight = {name: torch.zeros_like(one) for name, one in exact.items()}, 0
        for client in sorted(drawn.tolist()):
            load_arrays(model.train(), held)
            part = data.part(parts[client], seed=1000 * number + client)
            Trainer(max_epochs=int(s["local_epochs"]), **QUIET).fit(model, part.train_dataloader())
            new, start = model_arrays(model), time.monotonic()
            delta = {name: new[name] - held[name] for name in exact}
            sent, size, left[client] = peer.up(delta, left.get(client, {}), generator)
            row["codec_seconds"] += time.monotonic() - start
            row["up"], weight = row["up"] + size, weight + len(parts[client])
            total = {name: total[name] + len(parts[client]) * sent[name] for name in total}
        exact = add_update(exact, {name: one / weight for name, one in total.items()})
        delta = {name: exact[name] - held[name] for name in exact}
        sent, size, _ = peer.down(delta, {}, generator)  # `held` remembers what is left
        held, row["down"] = add_update(held, sent), size * len(drawn)
        load_arrays(model, exact)
        rows.append(row | likelihood(model.eval(), data.val_dataset[:][0]))
    return rows


def main() -> None:
    """Run the missing rows."""
    path, s = Path(sys.argv[1]), {**SETTINGS, **dict(word.split("=", 1) for word in sys.argv[2:])}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    done = [{**json.loads(line), "rounds": None} for line in lines]
    fixed = {key: s[key] for key in ("data", "width", "local_epochs", "batch_size", "clients")}
    for seed in s["seeds"].split(","):
        for how in s["partitions"].split(";"):
            for name in s["peers"].split(";"):
                key = {**fixed, "of": int(s["rounds"]), "seed": int(seed), "partition": how}
                key |= {"peer": name, "rounds": None}
                if key in done:
                    continue
                with initialize_config_dir(str(config_dir()), version_base="1.3"):
                    words = [f"data={s['data']}", f"model.width={s['width']}", f"seed={seed}"]
                    words.append(f"data.batch_size={s['batch_size']}")
                    cfg = compose("train", overrides=words)
                fraction = 0.5 if name.startswith("FedPAQ") else 1.0
                key["rounds"] = run(PEERS[name], cfg, how, s, fraction)
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(key) + "\n")
                last, sums = (
                    key["rounds"][-1],
                    [sum(r[w] for r in key["rounds"]) for w in ("up", "down")],
                )
                print(name, how, seed, f"up {sums[0]} down {sums[1]} -ELBO {last['neg_elbo']:.2f}")


if __name__ == "__main__":
    main()
