"""Points of the figures: seeds become one, and every bar is a spread that was measured."""

import math
from pathlib import Path
from statistics import stdev

import pytest
from reporting import make_results

from lightning_compress.lab.report.loading import Run
from lightning_compress.lab.report.scatter import latency_axis, point_of, scatter_plots, size_axis
from lightning_compress.lab.report.tables import int8_rows


def run(*, value=26.0, seed=0, **changes):
    results = make_results(**changes)
    results["verdict"]["compressed"] = value
    results["seed"] = seed
    return Run(Path("r"), results)


def test_runs_that_differ_in_their_seed_are_one_point_with_its_deviation():
    runs = [run(value=26.0), run(value=26.5, seed=1), run(value=27.3, seed=2)]
    point = point_of(list(enumerate(runs, 1)), size_axis)
    assert point.label == "1,2,3"
    assert point.mark.y == pytest.approx((26.0 + 26.5 + 27.3) / 3)
    assert point.mark.spread == pytest.approx(stdev([26.0, 26.5, 27.3]))
    assert (point.mark.x, point.mark.low) == (43131, 0.0)
    assert (point.dense.x, point.dense.y, point.dense.spread) == (1_345_678, 25.431, 0.3134)


def test_pictures_join_seeds_and_keep_settings_apart():
    runs = [run(), run(seed=1), run(place=1, ratio=60.0, value=27.0)]
    plots, notes = scatter_plots(runs)
    assert [plot.name for plot in plots] == ["pareto_01", "latency_01"]
    assert "3 runs by size" in plots[0].alt
    assert plots[0].alt.endswith("on the Pareto front: 3, 1,2.")
    assert notes == []


def test_latency_is_of_the_fastest_runtime_at_batch_one_in_one_thread():
    results = make_results()
    results["compressed"]["latency_ms"] = {
        "torch, 1 thread, batch 1": {"median": 2.0, "p10": 1.9, "p90": 2.4},
        "onnxruntime int8, 1 thread, batch 1": {"median": 0.5, "p10": 0.45, "p90": 0.8},
        "torch, 2 threads, batch 1": {"median": 0.1, "p10": 0.1, "p90": 0.1},
        "torch, 1 thread, batch 16": {"median": 0.2, "p10": 0.1, "p90": 0.3},
    }
    assert latency_axis(results, "compressed") == pytest.approx((0.5, 0.05, 0.3))
    results["compressed"]["latency_ms"] = {"torch, 1 thread, batch 1": {"median": 2.0}}
    assert latency_axis(results, "compressed") == (2.0, 0.0, 0.0)
    results["compressed"]["latency_ms"] = {"torch, 1 thread, batch 1": {"median": math.nan}}
    assert latency_axis(results, "compressed") is None


def test_runs_without_latency_have_the_picture_of_sizes_alone():
    one = run()
    one.results["compressed"]["latency_ms"] = {}
    assert [plot.name for plot in scatter_plots([one])[0]] == ["pareto_01"]


def test_the_floor_is_drawn_where_it_is_known():
    one = run()
    assert "floor" not in scatter_plots([one])[0][0].svg
    one.results["evaluator"]["floor"]["neg_elbo"] = 25.1
    assert "floor: real against real, 25.1" in scatter_plots([one])[0][0].svg


def test_operators_of_the_int8_files_are_told_with_their_reasons():
    ops = {
        "int8_ops": {"QLinearConv": 3, "QGemm": 1},
        "float_ops": {"Sigmoid": 1},
        "reasons": {"Sigmoid": "stays in floating point"},
        "parity": {"onnxruntime": {"max_abs_error": 0.0039}},
    }
    results = make_results()
    results["compressed"]["int8_ops"] = {"generator": ops, "encoder": {"refused": "they differ"}}
    assert int8_rows(results) == [
        ("generator", "compressed", "3 QLinearConv, 1 QGemm", "1 Sigmoid",
         "Sigmoid: stays in floating point", "0.0039 (onnxruntime)"),
        ("encoder", "compressed", "–", "–", "no file: they differ", "–"),
    ]  # fmt: skip
