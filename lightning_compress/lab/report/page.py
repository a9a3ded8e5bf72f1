"""HTML page of the report: one self-contained file of text, tables, images and data."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lightning_compress.files import write_atomically
from lightning_compress.lab.report import federated, plots, scatter, tables, wording
from lightning_compress.lab.report.deployed import deployed_file
from lightning_compress.lab.report.loading import (
    RESULTS,
    Run,
    Unreadable,
    common_root,
    load_runs,
    run_name,
)
from lightning_compress.lab.report.media import data_uri, samples
from lightning_compress.lab.report.pooled import pooled_verdicts
from lightning_compress.lab.report.wording import (
    DASH,
    kilobytes,
    notes,
    percent,
    scalar,
    section,
    times,
)

__all__ = ["write_report"]

FILE_NAME, PLOT_FOLDER = "report.html", "plots"


@dataclass(frozen=True)
class ReportImage:
    """A figure of the page as an inline SVG."""

    caption: str
    alt: str
    svg: Markup


def write_report(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one self-contained HTML page about all runs in or beneath the folders.

    The figures are also saved as SVG: those of a run in its own `plots` folder, those over
    several runs in `plots` beside the page.

    Args:
        run_dirs: run folders, multirun folders, or parents of these.
        out: file or existing folder to write to; by default `report.html` in the common parent
            of `run_dirs`, which for one folder is the folder itself.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: when a folder holds no `results.json`. A damaged one does not raise:
            the page names it under "Could not be read".
    """
    runs, unreadable = load_runs(run_dirs)
    root = common_root(run_dirs)
    path = Path(out) if out is not None else root / FILE_NAME
    path = path / FILE_NAME if path.is_dir() else path
    content = _render(runs, unreadable, root, path.parent).encode("utf-8", "backslashreplace")
    return write_atomically(path, content, what="the report", parents=True)


def _render(
    loaded: Sequence[Run], unreadable: Sequence[Unreadable], root: Path, folder: Path
) -> str:
    environment = Environment(
        loader=PackageLoader("lightning_compress.lab.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs, names, views, broken = _views(loaded, root)
    script, style = (_source(environment, name) for name in ("page.js", "style.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return environment.get_template("page.html.j2").render(
        title=_title(runs),
        script=script,
        script_hash=f"sha256-{digest}",
        style=style,
        runs=views,
        several=_several_view(runs, names, folder) if len(runs) > 1 else None,
        unreadable=[*unreadable, *broken],
        csv_uri=data_uri(tables.csv_table([run.results for run in runs]), "text/csv"),
        main_header=tables.HEADER,
        layer_header=tables.LAYER_HEADER,
        int8_header=tables.INT8_HEADER,
    )


def _views(
    loaded: Sequence[Run], root: Path
) -> tuple[list[Run], list[str], list[dict[str, Any]], list[Unreadable]]:
    """The readable runs, their names and views, and the runs that cannot be shown."""
    runs: list[Run] = []
    names: list[str] = []
    views: list[dict[str, Any]] = []
    broken: list[Unreadable] = []
    for run in loaded:
        name = run_name(run.folder, root)
        try:
            view = _run_view(len(runs) + 1, run, name)
            _check_alone(run, name)
        except OSError:  # our own files: the disk is full, say
            raise
        except Exception as error:  # one bad folder does not end the report: it is named
            reason = f"cannot be shown: {type(error).__name__}: {error}"
            broken.append(Unreadable(run.folder / RESULTS, reason))
            continue
        runs.append(run)
        names.append(name)
        views.append(view)
    return runs, names, views, broken


def _check_alone(run: Run, name: str) -> None:
    """Try the views over several runs with one run, so that a fault is attributed to it."""
    tables.overview_rows([run], [name])
    scatter.scatter_plots([run])
    tables.csv_table([run.results])
    wording.verdict_of(run.results)


def _source(environment: Environment, name: str) -> Markup:
    """Return a script or style sheet of the package, which needs no escaping."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def _title(runs: Sequence[Run]) -> str:
    if not runs:
        return "No run could be read"
    if len(runs) == 1:
        return wording.headline(runs[0].results)
    verdicts = [wording.verdict_of(run.results) for run in runs]
    counts = Counter(one.banner[0].lower() + one.banner[1:] for one in verdicts)
    fallen = sum(bool(one.fallen) for one in verdicts)
    beside = f"; in {fallen} a measure beside it fell" if fallen else ""
    return f"{len(runs)} runs: {', '.join(f'{n} {words}' for words, n in counts.items())}{beside}"


def _several_view(runs: Sequence[Run], names: Sequence[str], folder: Path) -> dict[str, Any]:
    images, notes = scatter.scatter_plots(runs)
    place, unsaved = _plot_folder(folder / PLOT_FOLDER)
    return {
        "header": tables.OVERVIEW_HEADER,
        "rows": tables.overview_rows(runs, names),
        "states": [wording.verdict_of(run.results).tone for run in runs],
        "plots": _inlined(images, place, "all"),
        "notes": [*notes, *unsaved],
        "pooled": pooled_verdicts(runs),
    }


def _run_view(place: int, run: Run, name: str) -> dict[str, Any]:
    """Return everything the template shows about one run."""
    results = run.results
    prefix, folder = f"run{place}", run.folder / PLOT_FOLDER
    views, sample_notes = samples(run)
    details = [plots.layer_plot(results), plots.bytes_plot(results), plots.files_plot(results)]
    folder, unsaved = _plot_folder(folder)
    curves = [*federated.round_plots(results), *plots.curve_plots(run.curves, results)]
    return {
        "id": f"run-{place}",
        "place": place,
        "name": name,
        "headline": wording.headline(results),
        "verdict": wording.verdict_of(results),
        "meta": _meta(results),
        "facts": _facts(run),
        "samples": views,
        "deployed": deployed_file(results),
        "groups": tables.main_groups(results),
        "curves": _inlined(curves, folder, prefix),
        "details": _inlined([plot for plot in details if plot is not None], folder, prefix),
        "layers": tables.layer_rows(results),
        "int8": tables.int8_rows(results),
        "notes": notes(results),
        "missing": [*run.notes, *unsaved, *sample_notes, *_missing(run)],
        "command": run.command,
        "config": run.config or _compression(results),
        "json_uri": data_uri(json.dumps(results, indent=1), "application/json"),
    }


def _plot_folder(folder: Path) -> tuple[Path | None, list[str]]:
    """A run's own folder of figures; None and why, where it is none or cannot be written to."""
    if folder.is_symlink():
        return None, [f"{PLOT_FOLDER} is a link out of the run folder: no figure is saved there."]
    if os.path.lexists(folder) and not folder.is_dir():
        return None, [f"{PLOT_FOLDER} is no folder: no figure is saved there."]
    place = folder if folder.is_dir() else folder.parent
    if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
        return None, [f"{PLOT_FOLDER} cannot be written to: no figure is saved there."]
    return folder, []


def _inlined(figures: Sequence[plots.Plot], folder: Path | None, prefix: str) -> list[ReportImage]:
    images = []
    for figure in figures:
        if folder is not None:
            figure.save(folder)
        svg = plots.inline(figure, f"{prefix}-{figure.name}")
        # matplotlib escapes every text it draws; nothing else in the SVG comes from the run.
        images.append(ReportImage(figure.caption, figure.alt, svg=Markup(svg)))
    return images


def _missing(run: Run) -> list[str]:
    """Name what results.json does not hold, one line each."""
    both = {side: run.results[side] for side in ("dense", "compressed")}
    texts = [
        f"No {what} of the {side} model in results.json."
        for key, what in (
            ("quality", "quality"),
            ("bytes", "file sizes"),
            ("latency_ms", "latency"),
        )
        for side, values in both.items()
        if not values.get(key)
    ]
    if (curves := len(run.curves)) > plots.MAX_CURVES:
        texts.append(f"curves.csv holds {curves} metrics: the first {plots.MAX_CURVES} are drawn.")
    if not run.curves and not any(note.startswith("curves.csv") for note in run.notes):
        texts.append("curves.csv holds no rows: no training curves.")
    for key, what in (("layers", "per-layer list"), ("samples", "sample images")):
        if not run.results.get(key):
            texts.append(f"No {what} in results.json.")
    return texts


def _compression(results: wording.Results) -> str:
    """Return the compression settings as text, for runs without Hydra's record."""
    settings = results.get("compression")
    return json.dumps(settings, indent=2, ensure_ascii=False) if settings else "not recorded"


def _meta(results: wording.Results) -> list[tuple[str, str]]:
    pairs = [
        ("Model", wording.model_name(results)),
        ("Data", results["data"]),
        ("Compression", " + ".join(wording.methods(results)) or "none recorded"),
        ("Seed", results.get("seed")),
        ("Created", results.get("created")),
    ]
    return [(key, str(value)) for key, value in pairs if value is not None]


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return the key figures at the top: (value, description)."""
    results = run.results
    dense = scalar(section(results["dense"], "bytes").get("torch"))
    size = scalar(section(results["compressed"], "bytes").get("lcz"))
    params = scalar(results["compressed"].get("params"))
    bits = f"{8 * size / params:.2f}" if size and params else DASH
    return [
        (times(wording.size_ratio(results)), "dense torch.save file ÷ .lcz file"),
        (kilobytes(size), f"the .lcz file, from {kilobytes(dense)}"),
        (percent(tables.zeros(results)), "of the parameters are zero"),
        (bits, "bits stored a parameter"),
        *federated.facts(results),
    ]
