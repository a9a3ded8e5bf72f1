"""Experiment: train a dense and a compressed model, measure both, write the results."""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule
from omegaconf import DictConfig, OmegaConf

from lightning_compress.callbacks import (
    CompressionSummary,
    KnowledgeDistillation,
    QualityBudget,
    ScoreMonitor,
)
from lightning_compress.errors import check_choice
from lightning_compress.files import check_writable, write_atomically
from lightning_compress.lab.config import check_types
from lightning_compress.lab.data import SplitDataModule
from lightning_compress.lab.monitoring import GiveUp
from lightning_compress.lab.report.sample_grids import save_comparison, save_grid
from lightning_compress.lab.workflow.costs import (
    check_export,
    deployed_cost,
    int8_bytes,
    int8_records,
    side_by_side_latency,
    tensor_records,
    write_files,
    write_graph_file,
    write_int8_files,
)
from lightning_compress.lab.workflow.quality import (
    METRICS,
    Evaluator,
    irreducible_of,
    rows,
    spread_of,
)
from lightning_compress.lab.workflow.resume import Earlier, shared_checkpoint, sole_run
from lightning_compress.lab.workflow.run_identity import check_same_run, config_hash, dense_recipe
from lightning_compress.lab.workflow.training import (
    Trained,
    build_model,
    compression_callbacks,
    load_trained,
    train,
)
from lightning_compress.quantization.fake_quantize import fake_quantized

__all__ = ["Second", "run_experiment"]

# Trains the second model; returns it and additional entries of `results.json`.
Second = Callable[
    [DictConfig, SplitDataModule, Path, Evaluator, Earlier], tuple[Trained, dict[str, Any]]
]

SHOWN_SAMPLES = 32
STARTS = ("seed", "dense")
WATCHED = {  # metric, better direction, and the loss at which a run is pruned
    "gan": ("val/kid", "min", 4.0),
    "flow": ("val/kid", "min", 4.0),
    "vae": ("val/elbo", "max", 0.25),
    "recurrent_vae": ("val/elbo", "max", 0.25),
    "classifier": ("val/accuracy", "max", 0.25),
}


def run_experiment(
    cfg: DictConfig,
    folder: Path,
    *,
    names: dict[str, str] | None = None,
    begun: Callable[[], None] = lambda: None,
    second: Second | None = None,
) -> dict[str, Any]:
    """Run one experiment and write its files; returns the content of `results.json`.

    Args:
        cfg: the composed config.
        folder: where everything goes; made if it does not exist.
        names: names of "model" and "data" in print; None: their classes.
        begun: called when the folder is this run's, before anything is written there.
        second: trains the model beside the dense one; None: compressed, as `compression` says.

    Raises:
        OSError: when the folder cannot be written to; FolderInUseError when another run does.
    """
    hint = ": choose another one with hydra.run.dir=... (hydra.sweep.dir=... for a sweep)"
    check_writable(folder, hint=hint)
    with sole_run(folder):
        begun()
        return _run(cfg, folder, names or {}, second)


def _run(
    cfg: DictConfig, folder: Path, names: dict[str, str], second: Second | None
) -> dict[str, Any]:
    if cfg.threads is not None:
        if not isinstance(cfg.threads, int) or cfg.threads < 1:
            raise ValueError(
                f"threads={cfg.threads!r} must be an integer from 1 on, or null for all"
            )
        torch.set_num_threads(cfg.threads)
    check_choice("start", cfg.start, STARTS)
    check_export(cfg.export)
    check_types(cfg)
    if second is not None and cfg.start != "seed":
        raise ValueError(f"start={cfg.start}: clients that train together begin with the seed's")
    earlier = Earlier.at(cfg.ckpt_path)
    if earlier.folder is not None:
        check_same_run(cfg, earlier.folder)
    earlier = earlier.carried_to(folder)
    write_atomically(folder / "config.yaml", OmegaConf.to_yaml(cfg), what="the config")
    data: SplitDataModule = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup()
    model: Any = build_model(_of_student(cfg), data, seed=cfg.seed)  # mistakes before training
    compressors = _compressors(cfg, model, data)
    called = {"model": cfg.model._target_, "data": cfg.data._target_, **names}
    evaluator = Evaluator(
        cfg.evaluate,
        data,
        str(model.kind),
        called["data"].rsplit(".", 1)[-1],
        own_metric=getattr(model, "quality_metric", None),
    )

    dense = _dense(cfg, data, folder, evaluator, earlier)
    others = [_other_seed(cfg, data, folder, s, evaluator, earlier) for s in cfg.baseline_seeds]
    for one in compressors:
        if isinstance(one, KnowledgeDistillation):
            one.take_dense(dense.model)
        if isinstance(one, QualityBudget) and one.reference.awaits_curve:
            one.take_dense(dense.rows)
    if second is not None:
        compressed, more = second(cfg, data, folder, evaluator, earlier)
    else:
        more: dict[str, Any] = {}
        callbacks = [*compressors, *_run_pruner(cfg, evaluator, dense), CompressionSummary()]
        home, student = folder / "compressed", _of_student(cfg)
        start = dense.model if cfg.start == "dense" else None
        compressed = _train(student, data, home, callbacks, evaluator, earlier, start)
    qualities = [evaluator.quality(one) for one in (dense.model, *others)]
    results = called | _measure(cfg, folder, evaluator, (dense, compressed), qualities)
    results |= more
    text = json.dumps(results, indent=1, ensure_ascii=False, default=float)
    write_atomically(folder / "results.json", text, what="the results", parents=True)
    _write_curves(folder / "curves.csv", dense, compressed)
    return results


def _compressors(cfg: DictConfig, model: Any, data: SplitDataModule) -> list[Callback]:
    irreducible: dict[str, float] = {}
    if any(one.get("monitor") == "val/elbo" for one in cfg.compression.values()):
        least = irreducible_of(model, rows(data.val_dataset)[0])
        irreducible = {} if least is None else {"val/elbo": -least}
    return compression_callbacks(cfg.compression, model, irreducible=irreducible)


def _of_student(cfg: DictConfig) -> DictConfig:
    """The config of the compressed run: the model with the changes of `student`."""
    changes = {key: value for key, value in cfg.student.items() if value is not None}
    student = cfg.copy()
    OmegaConf.update(student, "model", changes, merge=True)
    return student


def _run_pruner(cfg: DictConfig, evaluator: Evaluator, dense: Trained) -> list[Callback]:
    """The callback that prunes the run, if the config sets it."""
    most = cfg.hopeless.max_loss
    if most is None:
        return []
    name, mode, usual = WATCHED.get(evaluator.kind) or _watched(evaluator)
    most = usual if most == "auto" else float(most)
    after, patience = cfg.hopeless.after, cfg.hopeless.patience
    pruner = GiveUp(
        dense.rows, monitor=name, mode=mode, max_loss=most, after=after, patience=patience
    )
    return [pruner]


def _watched(evaluator: Evaluator) -> tuple[str, str, float]:
    """Of a conditional model: its own metric on the validation split."""
    if (own := evaluator.own_metric) is None:
        return "val/kid", "min", 4.0
    return f"val/{own}", "max" if METRICS[own].better == "higher" else "min", 0.25


def _train(
    cfg: DictConfig,
    data: SplitDataModule,
    folder: Path,
    callbacks: list[Callback],
    evaluator: Evaluator,
    earlier: Earlier,
    start: LightningModule | None = None,
) -> Trained:
    monitor = ScoreMonitor(evaluator.monitor, every=cfg.evaluate.monitor_every)
    return train(
        cfg,
        data,
        folder,
        seed=cfg.seed,
        callbacks=[monitor, *callbacks],
        ckpt_path=earlier.unfinished(folder.name),
        start=start,
    )


def _dense(
    cfg: DictConfig, data: SplitDataModule, folder: Path, evaluator: Evaluator, earlier: Earlier
) -> Trained:
    if cfg.baseline is not None:
        return load_trained(cfg, data, Path(cfg.baseline))
    if (final := earlier.finished("dense")) is not None:
        return load_trained(cfg, data, final)
    if cfg.dense_cache is not None:
        return _shared(cfg, data, evaluator)
    return _train(cfg, data, folder / "dense", [], evaluator, earlier)


def _shared(cfg: DictConfig, data: SplitDataModule, evaluator: Evaluator) -> Trained:
    """The dense model that all runs with the same dense settings and seed share."""

    def dense(folder: Path, ckpt_path: Path | None) -> Trained:
        monitor = ScoreMonitor(evaluator.monitor, every=cfg.evaluate.monitor_every)
        callbacks = [monitor]
        return train(cfg, data, folder, seed=cfg.seed, callbacks=callbacks, ckpt_path=ckpt_path)

    recipe = dense_recipe(cfg, seed=cfg.seed, dims=data.dims, content=data.fingerprint)
    final, seconds = shared_checkpoint(Path(cfg.dense_cache), recipe, dense)
    return replace(load_trained(cfg, data, final), seconds=seconds)


def _other_seed(
    cfg: DictConfig,
    data: SplitDataModule,
    folder: Path,
    seed: int,
    evaluator: Evaluator,
    earlier: Earlier,
) -> LightningModule:
    phase, other = f"dense-seed{seed}", cfg.copy()
    if seed == cfg.seed:
        raise ValueError(f"baseline_seeds={list(cfg.baseline_seeds)} holds the run's own seed")
    other.seed = seed
    if (final := earlier.finished(phase)) is not None:
        return load_trained(cfg, data, final).model
    if cfg.dense_cache is not None:
        return _shared(other, data, evaluator).model
    unfinished = earlier.unfinished(phase)
    return train(cfg, data, folder / phase, seed=seed, ckpt_path=unfinished).model


def _measure(
    cfg: DictConfig,
    folder: Path,
    evaluator: Evaluator,
    pair: tuple[Trained, Trained],
    dense_qualities: list[dict[str, float]],
) -> dict[str, Any]:
    dense, compressed = (one.model.cpu().eval() for one in pair)
    folders = (folder / "dense", folder / "compressed")
    sides, artifacts = [], []
    int8 = bool(cfg.export.onnx and cfg.export.int8)
    for one, home in zip(pair, folders, strict=True):
        home.mkdir(exist_ok=True)
        is_dense = one is pair[0]
        sizes, artifact = write_files(
            one.model, home, cfg.export, evaluator.data, lossy=not is_dense
        )
        quality = dense_qualities[0] if is_dense else evaluator.quality(compressed)
        infos = write_int8_files(one.model, home, evaluator.data) if int8 else {}
        if int8:
            sizes["onnx_int8"] = int8_bytes(infos)
            sizes["lcz_graph"] = write_graph_file(home, infos)
        cost = deployed_cost(one.model)
        side = {"quality": quality, "bytes": sizes, **cost, "train_seconds": one.seconds}
        sides.append({**side, "int8_ops": int8_records(infos)})
        artifacts.append(artifact)
    for side, times in zip(
        sides,
        side_by_side_latency(dense, compressed, folders, cfg.evaluate, onnx=cfg.export.onnx),
        strict=True,
    ):
        side["latency_ms"] = times
    spread = spread_of(dense_qualities)
    return {
        "config_hash": config_hash(cfg),
        "seed": cfg.seed,
        "compression": OmegaConf.to_container(cfg.compression, resolve=True),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "start": cfg.start,
        "steps": {"dense": pair[0].steps, "compressed": pair[1].steps},
        "evaluator": evaluator.describe(),
        "dense": sides[0],
        "compressed": sides[1],
        "ratio": sides[0]["bytes"]["torch"] / sides[1]["bytes"]["lcz"],
        "entropy_bound_bytes": artifacts[1].entropy_bound_bytes,
        "baseline_spread": spread,
        "verdict": evaluator.verdict(dense, dense_qualities, [sides[1]["quality"]]).record(),
        "layers": tensor_records(artifacts[1]),
        "samples": _write_samples(folder, dense, compressed, evaluator),
        "metric_info": {name: vars(metric) for name, metric in METRICS.items()},
    }


def _write_samples(
    folder: Path, dense: Any, compressed: Any, evaluator: Evaluator
) -> dict[str, str]:
    """Grids of samples from the same latents or conditions, for models that generate."""
    if evaluator.kind == "classifier" or evaluator.data.kind == "tokens":
        return {}
    with fake_quantized(compressed):
        made = {
            side: evaluator.shown(model, SHOWN_SAMPLES)
            for side, model in (("dense", dense), ("compressed", compressed))
        }
    made |= evaluator.given(SHOWN_SAMPLES)
    grids = {side: evaluator.data.as_images(samples) for side, samples in made.items()}
    names = {side: f"samples_{side}.png" for side in grids}
    for side, images in grids.items():
        save_grid(images, folder / names[side])
    given = {side: grids[side] for side in ("condition", "real") if side in grids}
    save_comparison(grids["dense"], grids["compressed"], folder / "samples.png", given=given)
    files: dict[str, str] = {}
    for side, samples in made.items():
        for suffix, content in evaluator.data.sample_files(samples).items():
            name = files[f"{side}_{suffix}"] = f"samples_{side}_{suffix}"
            write_atomically(folder / name, content, what="a sample")
    return {**names, "grid": "samples.png", **files}


def _write_curves(path: Path, dense: Trained, compressed: Trained) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("run", "step", "metric", "value"))
    for run, trained in (("dense", dense), ("compressed", compressed)):
        writer.writerows((run, *row) for row in trained.rows)
    write_atomically(path, text.getvalue(), what="the curves")
