"""Channel pruning on Fashion-MNIST: a DCGAN's generator and a VAE at a fraction of their MACs.

Each pruned row starts from the same dense model, loses channels and trains on for equal steps; the
dense row trains on for the same steps, and is the teacher; "from scratch" is the same-size model,
trained for the steps of both together. Finished rows are kept; seeds after the first make the main
rows alone. Then the latency of "pruned, taught" under ONNX Runtime, fp32 and int8, beside the dense
fp32 file, in turn.

python experiments/benchmarks/bench_channels.py [--steps 600] [--seeds 0 1 2] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelPruning
from shared.files import Grid, coded, grid_of, milliseconds_of_parts
from shared.finetuning import EARLY, Start
from shared.pages import insert
from shared.peers import teacher, torch_pruned
from shared.rows import Rows, as_file_name, mean_and_spread, read_rows
from torch import nn

from lightning_compress import ChannelPruning, match_channels
from lightning_compress.conversion.export import export_onnx
from lightning_compress.lab.models.networks import initialize_dcgan
from lightning_compress.lab.workflow.costs import deployed_cost, int8_path, write_int8_files
from lightning_compress.lab.workflow.training import build_model

EPOCHS = 2  # of the dense start
EPOCH = 300  # batches: the schedules see a run of so many steps an epoch


@dataclass(frozen=True)
class Model:
    """What is pruned.

    Args:
        overrides: of its config.
        metric: that judges it; lower is better.
        parts: that ship, the one that draws among them.
        project: the wide first layer of the part that draws.
    """

    overrides: Sequence[str]
    metric: str
    parts: Sequence[str]
    project: str


MODELS = {
    "vae": Model(["model=vae"], "neg_elbo", ("encoder", "decoder"), "decoder.project"),
    "dcgan": Model(
        [
            "model=dcgan",
            "model.width=32",
            "model.discriminator_width=16",
            "evaluate.metric=fid",
        ],
        "fid",
        ("generator",),
        "generator.project",
    ),
}
UNTRAINED: dict[str, tuple[list[str], dict[str, Any], bool]] = {
    "dcgan of width 64": (["model=dcgan"], {}, False),
    "vae of width 96, alike, all parts": (["model=vae", "model.width=96"], EARLY, True),
}  # wider ones, whose speed alone is measured: overrides, how channels go, whether of all parts
_NUMBER = re.compile(r"\d\.\d+")
ENDS = ("mu", "logvar", "up2")  # what makes outputs, for the pruner that does not find it itself


def pruning(left: float, **more: Any) -> ChannelPruning:
    """What is measured."""
    return ChannelPruning(budget={"macs": left}, **{"end": 0.4, **more})


Row = dict[str, Any]


class Bench:
    """One model and seed.

    Args:
        start: its dense start.
        steps: that all train on for.
        folder: of the weights that are kept.
    """

    def __init__(self, start: Start, steps: int, folder: Path) -> None:
        self.start, self.steps, self.folder = start, steps, folder

    def fit(self, model: Any, callbacks: list[Any], *, more: int = 0) -> None:
        batches = min(EPOCH, self.steps)
        epochs = (self.steps + more) // batches
        self.start.fit(model, callbacks, epochs=epochs, steps=batches)

    def weights(self, variant: str) -> Path:
        name = as_file_name(variant)
        return self.folder / f"{self.start.name}-{self.start.seed}-{name}.pt"

    def measured(self, model: Any, variant: str) -> Row:
        model = model.cpu().eval()
        torch.save(model.state_dict(), self.weights(variant))
        cost, dense = deployed_cost(model), deployed_cost(self.start.model())
        return self.start.quality(model) | {
            "macs": round(dense["macs"] / cost["macs"], 2),
            "params": round(dense["params"] / cost["params"], 2),
            "lcz": coded(model).bytes,
        }

    def dense(self, variant: str) -> Row:
        model = self.start.model()
        self.fit(model, [])
        return self.measured(model, variant)

    def pruned(
        self,
        variant: str,
        left: float,
        *,
        taught: bool = False,
        leaves: float | None = None,
        **more: Any,
    ) -> Row:
        model = self.start.model()
        callbacks: list[Any] = [pruning(left, **more)]
        if taught:
            callbacks.append(teacher(self.loaded(self.start.model(), "dense"), leaves=leaves))
        self.fit(model, callbacks)
        return self.measured(model, variant)

    def alike(self, variant: str, left: float, **more: Any) -> Row:
        """Early, and the same fraction of all layers but the drawing part's wide first one.

        That one goes too where little is to be left: alone it is 8 % of the VAE.
        """
        protect = [MODELS[self.start.name].project] if left > 0.1 else []
        return self.pruned(variant, left, protect=protect, **EARLY, **more)

    def loaded(self, model: Any, variant: str) -> Any:
        """A model with the weights that a variant ended with."""
        state = torch.load(self.weights(variant), weights_only=True)
        match_channels(model, state).load_state_dict(state)
        return model

    def scratch(self, variant: str, left: float) -> Row:
        """The same sizes as the pruned model has, other weights, and all the steps."""
        model = self.start.model()
        small = torch.load(self.weights(f"pruned {left}, taught"), weights_only=True)
        match_channels(model, small)
        torch.manual_seed(1000 + self.start.seed)
        for layer in model.modules():
            if isinstance(
                layer, (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
            ):
                layer.reset_parameters()
        if self.start.name == "dcgan":
            initialize_dcgan(model)
        epoch = len(self.start.data.train_dataloader())
        self.fit(model, [], more=self.start.epochs * epoch)
        return self.measured(model, variant)

    def torch_pruning(self, variant: str, left: float) -> Row:
        """Torch-Pruning's high-level pruner at once, its groups and its sizes, then the steps."""
        ends = [f"{part}.{end}" for part in MODELS[self.start.name].parts for end in ENDS]
        model, ratio = torch_pruned(self.start.model(), left, ends)
        self.fit(model, [])
        return self.measured(model, variant) | {"ratio": ratio}

    def ln_structured(self, variant: str, left: float) -> Row:
        """Lightning's own: channels as masks, whose layers keep their sizes."""
        model = self.start.model()
        share = 1 - left**0.5
        callbacks = [
            ModelPruning(
                "ln_structured",
                parameters_to_prune=[(layer, "weight")],
                amount=lambda epoch: share if epoch == 0 else 0,
                use_lottery_ticket_hypothesis=False,
                use_global_unstructured=False,
                pruning_dim=int(isinstance(layer, nn.modules.conv._ConvTransposeNd)),
                pruning_norm=2,
            )
            for path, layer in model.deployed_module().named_modules()
            if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))
            and path.rpartition(".")[2] not in ENDS
        ]
        self.fit(model, list(callbacks))
        return self.measured(model, variant)


MAIN = ("dense", "taught", "from scratch")  # how variants end or begin that all seeds make


def variants(left: float) -> dict[str, Callable[[Bench, str], Row]]:
    """What is measured at a fraction of the MACs, in the order in which one needs the other."""
    return {
        f"pruned {left}": lambda b, v: b.pruned(v, left),
        f"pruned {left}, taught": lambda b, v: b.pruned(v, left, taught=True),
        f"pruned {left}, taught, taylor": lambda b, v: b.pruned(
            v, left, taught=True, criterion="taylor"
        ),
        f"pruned {left}, alike": lambda b, v: b.alike(v, left),
        f"pruned {left}, alike, taught to the end": lambda b, v: b.alike(v, left, taught=True),
        f"pruned {left}, alike, taught": lambda b, v: b.alike(v, left, taught=True, leaves=0.5),
        f"from scratch {left}": lambda b, v: b.scratch(v, left),
        f"torch-pruning {left}": lambda b, v: b.torch_pruning(v, left),
        f"ln_structured {left}": lambda b, v: b.ln_structured(v, left),
    }


def timed(bench: Bench, variant: str, rounds: int, *, whole: bool = False) -> Row:
    """Milliseconds of the part that draws, as trained here, or of all deployed parts."""
    dense = bench.loaded(bench.start.model(), "dense")
    small = bench.loaded(bench.start.model(), variant)
    return in_turn(dense, small, bench.start.data, rounds, whole=whole)


def timed_untrained(name: str, left: float, folder: Path, rounds: int) -> Row:
    """The same of a wider model: 20 steps, since the values of weights take no time."""
    overrides, more, whole = UNTRAINED[name]
    start = Start(name, 0, folder, {name: (overrides, 0, [])})
    dense, small = (build_model(start.cfg, start.data, seed=0) for _ in range(2))
    start.fit(small, [pruning(left, **more | {"end": 0.5}, frequency=2, fade=1)], steps=20)
    return in_turn(dense, small.cpu(), start.data, rounds, whole=whole)


def in_turn(dense: Any, small: Any, data: Any, rounds: int, *, whole: bool = False) -> Row:
    """Milliseconds of the dense fp32 file, the pruned one in fp32 and in int8, called in turn.

    Of the part that draws, or the sums over the files of all parts.
    """
    parts = dense.parts()
    with TemporaryDirectory() as folder:
        home = Path(folder)
        write_int8_files(small, home, data)
        names = [*parts] if whole else [*parts][:1]
        sums = milliseconds_of_parts(
            _part_in_turn(dense, small, name, home, rounds) for name in names
        )
    return {
        f"{key} {setting}": {"ms": round(ms, 3), "faster": round(sums[setting, "dense"] / ms, 2)}
        for (setting, key), ms in sums.items()
    }


def _part_in_turn(dense: Any, small: Any, name: str, home: Path, rounds: int) -> Grid:
    inputs = dense.parts()[name][1]
    export_onnx(dense.eval().parts()[name][0], home / "dense.onnx", inputs)
    export_onnx(small.eval().parts()[name][0], home / "small.onnx", inputs)
    files = {"dense": home / "dense.onnx", "fp32": home / "small.onnx"}
    if int8_path(home, name).exists():
        files["int8"] = int8_path(home, name)
    return grid_of(files, inputs, rounds)


def timings(name: str, left: float) -> list[tuple[str, str, bool]]:
    """What is timed of a model: its name in the table, a variant, and whether all parts are."""
    alike = f"pruned {left}, alike, taught"
    both = [(f"{name}, alike", alike, False), (f"{name}, alike, all parts", alike, True)]
    return [(name, f"pruned {left}, taught", False), *(both if name == "vae" else [])]


def make_rows(name: str, seed: int, rows: Rows, times: Rows, args: argparse.Namespace) -> None:
    """The missing rows of a model and seed; all there are of the first seed."""
    start = {name: ([*MODELS[name].overrides], args.epochs or EPOCHS, [])}
    bench = Bench(Start(name, seed, args.out, start), args.steps, args.out)
    key = {"model": name, "seed": seed, "steps": args.steps}
    made = {"dense": lambda b, v: b.dense(v)}
    for left in args.left:
        made |= variants(left)
    first = seed == args.seeds[0]
    for variant, make in made.items():
        if first or variant.startswith(MAIN) or variant.endswith(MAIN):
            rows.make(partial(make, bench, variant), **key, variant=variant)
    for left in args.left if first else []:
        for what, variant, whole in timings(name, left):
            make = partial(timed, bench, variant, args.rounds, whole=whole)
            times.make(make, **key | {"model": what}, left=left)


def main() -> None:
    """Makes the missing rows, seed after seed, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--left", type=float, nargs="+", default=[0.25, 0.0625])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--epochs", type=int, help="of the dense start")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/channels"))
    parser.add_argument(
        "--page", type=Path, help="only put the tables so far into docs/channels.md"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.page is not None:
        insert(args.page, tables(args.out, args.steps))
        return
    rows = Rows(args.out / "rows.jsonl", keys=("model", "seed", "steps", "variant"))
    times = Rows(args.out / "latency.jsonl", keys=("model", "seed", "steps", "left"))
    for seed in args.seeds:
        for name in args.models:
            make_rows(name, seed, rows, times, args)
    for name in UNTRAINED:
        for left in args.left if name.split()[0] in args.models else []:
            key = {"model": name, "seed": 0, "steps": args.steps, "left": left}
            times.make(partial(timed_untrained, name, left, args.out, args.rounds), **key)
    print(tables(args.out, args.steps))


def tables(folder: Path, steps: int) -> str:
    """Quality by variant, then latency."""
    times = [row for row in read_rows(folder / "latency.jsonl") if row["steps"] == steps]
    lines = [
        "| model | MACs | batch | dense fp32 | pruned fp32 | pruned int8 |",
        "|---|---|---|---|---|---|",
    ]
    for row in times:
        for batch in (1, 16):
            kinds = [row.get(f"{kind} batch{batch}_threads1") for kind in ("dense", "fp32", "int8")]
            cells = [f"{at['ms']:.2f} ms, {at['faster']:.1f}×" if at else "–" for at in kinds]
            left = f"1/{1 / row['left']:.0f}"
            lines.append(f"| {row['model']} | {left} | {batch} | " + " | ".join(cells) + " |")
    return table(read_rows(folder / "rows.jsonl"), steps) + "\n\n" + "\n".join(lines)


def table(rows: list[Row], steps: int) -> str:
    """Means and spreads over seeds."""
    lines = [
        "| model | variant | MACs | parameters | quality (lower is better) | seeds |",
        "|---|---|---|---|---|---|",
    ]
    wanted = [row for row in rows if row["steps"] == steps]
    lefts = sorted({float(n) for row in wanted for n in _NUMBER.findall(row["variant"])})
    order = ["dense", *(variant for left in lefts[::-1] for variant in variants(left))]
    wanted.sort(key=lambda row: (list(MODELS).index(row["model"]), order.index(row["variant"])))
    for model, variant in dict.fromkeys((row["model"], row["variant"]) for row in wanted):
        own = [row for row in wanted if (row["model"], row["variant"]) == (model, variant)]
        values = [row[MODELS[model].metric] for row in own]
        macs, params = (mean(row[one] for row in own) for one in ("macs", "params"))
        lines.append(
            f"| {model} | {variant} | {macs:.1f}× fewer | {params:.1f}× fewer "
            f"| {MODELS[model].metric} {mean_and_spread(values)} | {len(own)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
