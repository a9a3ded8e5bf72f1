"""Command `sensitivity`: a scan of a dense model as a table, a file and a figure."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_compress.budget.sensitivity import Sensitivity
from lightning_compress.files import write_atomically
from lightning_compress.lab.config import config_dir
from lightning_compress.lab.data import SplitDataModule
from lightning_compress.lab.evaluation.fidelity import fidelity
from lightning_compress.lab.evaluation.likelihood import accuracy, likelihood
from lightning_compress.lab.evaluation.sensitivity import check_scan, scan_sensitivity
from lightning_compress.lab.report.plots import draw, grid, shorten
from lightning_compress.lab.trust import check_targets
from lightning_compress.lab.workflow.quality import METRICS, Evaluator, generate, outputs, rows
from lightning_compress.lab.workflow.run_identity import recorded_overrides
from lightning_compress.lab.workflow.training import build_model, load_trained, train

__all__ = [
    "Subject",
    "find_subject",
    "plot_sensitivity",
    "print_sensitivity",
    "run_sensitivity",
    "scan_subject",
]
_METRIC = {"gan": "fid", "flow": "fid", "classifier": "cross_entropy"}  # all others: neg_elbo


@dataclass(frozen=True)
class Subject:
    """Subject of a scan: a dense model, its data, and its quality metric.

    Args:
        cfg: the whole config.
        overrides: that lead to it, as on the command line.
        data: set up.
        model: trained.
        source: where the weights are from, in words.
    """

    cfg: DictConfig
    overrides: tuple[str, ...]
    data: SplitDataModule
    model: LightningModule
    source: str

    @property
    def kind(self) -> str:
        """Of the model, such as "vae"."""
        return str(self.model.kind)  # type: ignore[attr-defined]

    @property
    def metric(self) -> str:
        """Name of the metric."""
        own = getattr(self.model, "quality_metric", None)
        return str(own or _METRIC.get(self.kind, "neg_elbo"))

    @property
    def better(self) -> str:
        """Better direction of the metric."""
        return METRICS[self.metric].better

    def score(self, count: int) -> Callable[[Any], float]:
        """The metric of a model on so many rows of the validation split, latents always the same.

        Raises:
            ValueError: for a GAN on so little unlabelled data that there is no feature network.
        """
        x, y = rows(self.data.val_dataset)
        x, y = x[:count], y[:count]
        if self.kind == "classifier":
            return lambda model: accuracy(model, x, y)["cross_entropy"]
        if self.kind == "conditional":
            return lambda model: model.distances(outputs(model, x), y)[self.metric]
        if self.metric == "neg_elbo":
            return lambda model: likelihood(model, x)["neg_elbo"]
        evaluator = Evaluator(self.cfg.evaluate, self.data, self.kind, self.name)
        if evaluator.extractor is None:
            raise ValueError(f"the quality of a GAN cannot be measured: {evaluator.notes}")
        feature = evaluator.extractor.module
        return lambda model: fidelity(generate(model, len(x)), x, feature)["fid"]

    @property
    def name(self) -> str:
        """Of the data, as an experiment calls it."""
        chosen = [word.split("=", 1)[1] for word in self.overrides if word.startswith("data=")]
        return chosen[-1] if chosen else str(self.cfg.data._target_).rsplit(".", 1)[-1].lower()


def find_subject(words: Sequence[str], folder: Path, allowed: Sequence[str] = ()) -> Subject:
    """The dense model that the words select.

    Args:
        words: a run's folder, or a checkpoint in one, or the name of a model config, or overrides
            (`model=vae data=digits`): of the last two the dense model is trained first.
        folder: where a model that is trained here goes.
        allowed: names of what a run's config may use beside the classes of known packages.

    Raises:
        FileNotFoundError: for a folder without a run.
        ValueError: for words that select nothing, naming the model configs.
    """
    first = Path(words[0]) if words else Path()
    if words and (first.is_dir() or first.suffix == ".ckpt"):
        return _of_run(first, words[1:], allowed)
    overrides = tuple(_override(word) for word in words)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", list(overrides))
    data = _data(cfg)
    model = train(cfg, data, folder / "dense", seed=cfg.seed).model
    return Subject(cfg, overrides, data, model, f"trained here: {folder / 'dense'}")


def _override(word: str) -> str:
    if "=" in word:
        return word
    known = sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))
    if word not in known:
        raise ValueError(
            f"{word!r} is no run's folder, checkpoint or override, and no model config; "
            f"valid are {', '.join(known)}"
        )
    return f"model={word}"


def _of_run(path: Path, words: Sequence[str], allowed: Sequence[str]) -> Subject:
    home = path if path.is_dir() else path.parent.parent
    config = home / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"{home} is no run's folder: it has no config.yaml")
    if words:
        raise ValueError(f"{list(words)}: the config of a run is what it is; give the path alone")
    recorded = OmegaConf.load(config)
    if not isinstance(recorded, DictConfig):
        raise ValueError(f"{config} holds no config")
    plain: Any = OmegaConf.to_container(recorded, resolve=True)  # what is checked is what is used
    check_targets(plain, str(config), allowed)
    cfg = DictConfig(plain)
    data = _data(cfg)
    weights = home / "dense" / "final.ckpt" if path.is_dir() else path
    if path.is_dir() and not weights.is_file() and cfg.baseline is not None:
        weights = Path(cfg.baseline)
    model = load_trained(cfg, data, weights).model
    return Subject(cfg, tuple(recorded_overrides(home)), data, model, str(weights))


def _data(cfg: DictConfig) -> SplitDataModule:
    data: SplitDataModule = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup()
    build_model(cfg, data, seed=cfg.seed)  # finds mistakes before anything trains
    return data


def run_sensitivity(
    words: Sequence[str],
    folder: Path,
    *,
    sparsities: Sequence[float],
    bits: Sequence[int],
    rows: int,
    allowed: Sequence[str] = (),
) -> Sensitivity:
    """Scan, print, and write `sensitivity.json` and `sensitivity.png` into a folder.

    Args:
        words: what to scan, see `find_subject`.
        folder: of the files.
        sparsities: to try.
        bits: to try.
        rows: of the validation split that each score is measured on.
        allowed: what a run's config may name, see `find_subject`.
    """
    check_scan(sparsities, bits)
    found = scan_subject(
        find_subject(words, folder, allowed), sparsities=sparsities, bits=bits, rows=rows
    )
    print_sensitivity(found)
    print(found.save(folder / "sensitivity.json"))
    print(plot_sensitivity(found, folder / "sensitivity.png"))
    return found


def scan_subject(
    subject: Subject, *, sparsities: Sequence[float], bits: Sequence[int], rows: int
) -> Sensitivity:
    """Scan a dense model; arguments as `run_sensitivity`."""
    return scan_sensitivity(
        subject.model,
        subject.score(rows),
        metric=subject.metric,
        better=subject.better,
        sparsities=sparsities,
        bits=bits,
        progress=lambda path: print(f"scanning {path}", flush=True),
    )


def print_sensitivity(found: Sensitivity, console: Console | None = None) -> None:
    """Print a row a layer: loss of the metric at each sparsity and number of bits."""
    label = METRICS[found.metric].label if found.metric in METRICS else found.metric
    table = Table(title=f"Loss of {label} (dense: {found.dense:.5g}), one layer at a time")
    first = found.layers[0]
    heads = [f"{one:.0%} zeros" for one in first.sparsities] + [f"{one} bits" for one in first.bits]
    for head in ("layer", "weights", *heads):
        table.add_column(head, overflow="fold", justify="left" if head == "layer" else "right")
    for one in found.layers:
        losses = [f"{loss:.3g}" for loss in (*one.sparse_loss, *one.bits_loss)]
        table.add_row(one.path, f"{one.weights:,}", *losses)
    (console or Console(soft_wrap=False)).print(table)


def plot_sensitivity(found: Sensitivity, path: Path) -> Path:
    """Draw a line a layer, over density and over bits, as a PNG file."""
    buffer = io.BytesIO()
    with draw(9.0, 3.6) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for index, one in enumerate(found.layers):
            style = {"marker": "osv^D"[index % 5], "ms": 4, "color": f"C{index % 10}"}
            label = f"{shorten(one.path, 28)} ({one.weights:,})"
            densities = [1 - sparsity for sparsity in one.sparsities]
            left.plot(densities, one.sparse_loss, label=label, **style)
            right.plot(one.bits, one.bits_loss, **style)
        left.set_xscale("log")
        left.invert_xaxis()
        left.set_yscale("symlog", linthresh=_small(found))
        left.set_xlabel("density of the layer that is pruned")
        right.set_xlabel("bits of the layer that is rounded")
        right.invert_xaxis()
        left.set_title(f"loss of {found.metric}, dense {found.dense:.4g}")
        grid(left, "y")
        grid(right, "y")
        figure.legend(loc="outside right upper", fontsize=7)
        figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return write_atomically(path, buffer.getvalue(), what="the plot", parents=True)


def _small(found: Sensitivity) -> float:
    """Losses below this are drawn on a straight scale: a thousandth of the dense value."""
    return max(1e-3 * abs(found.dense), 1e-9)
