"""What a notebook and a terminal show of the public objects: reprs, and tables as HTML."""

import copy
import inspect
import pickle
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

import lightning_compress
import lightning_compress as lc
from lightning_compress.targets import Coverage, CoverageTable, select
from lightning_compress.terminal import ShownArguments, html_table

TEACHER = nn.Linear(2, 2)
# What a constructor must be given, and two arguments that the repr has to show.
ARGUMENTS = {
    "ArtifactCallback": {"path": "a.lcz", "codec": "huffman"},
    "BalanceGuard": {"monitor": "train/d"},
    "ChannelPruning": {"final_sparsity": 0.25, "round_to": 4},
    "CompressedCheckpoint": {"monitor": "val/loss", "save_top_k": 2},
    "CompressedEarlyStopping": {"monitor": "val/loss", "patience": 7},
    "CompressionSummary": {},
    "GradualPruning": {"final_sparsity": 0.75, "exclude": ["*.head"]},
    "Guard": {"monitor": "val/kl", "warmup": 5},
    "KnowledgeDistillation": {"teacher": TEACHER, "weight": 0.5},
    "LowRank": {"rank": 3, "begin": 10},
    "PostTrainingQuantization": {"weight_bits": 4},
    "PosteriorGuard": {"monitor": "val/kl"},
    "ProjectedEMA": {"decay": 0.9, "update_every_n_steps": 2},
    "QualityBudget": {"monitor": "val/loss", "max_degradation": 0.03},
    "QuantizationAwareTraining": {"weight_bits": 4, "scheme": "affine"},
    "RandomState": {},
    "ScoreMonitor": {"every": 3},
    "StopOnNonFinite": {},
    "ThresholdPruning": {"threshold": 0.02},
}
CALLBACKS = [
    name
    for name in lc.__all__
    if inspect.isclass(getattr(lc, name)) and issubclass(getattr(lc, name), Callback)
]


def text_of(value):
    return "Linear(...)" if value is TEACHER else repr(value)


@pytest.mark.parametrize("name", CALLBACKS)
def test_the_repr_of_a_callback_is_the_call_that_makes_it(name):
    kind, given = getattr(lc, name), dict(ARGUMENTS[name])
    if name == "ScoreMonitor":
        given = {"score": len, **given}
    made = kind(**given)
    shown = {key: "len" if value is len else text_of(value) for key, value in given.items()}
    expected = f"{name}({', '.join(f'{key}={text}' for key, text in shown.items())})"
    assert repr(made) == expected
    if not any(value in (TEACHER, len) for value in given.values()):
        again = eval(repr(made), vars(lightning_compress).copy() | {name: kind})
        assert repr(again) == expected
    if name not in ("CompressionSummary", "ProjectedEMA"):  # hold what cannot be pickled
        assert repr(copy.deepcopy(made)) == repr(pickle.loads(pickle.dumps(made))) == expected


def test_every_public_object_has_a_repr_of_its_own():
    classes = [one for one in map(lc.__dict__.get, lc.__all__) if inspect.isclass(one)]
    classes += [getattr(lc, name) for name in lc.__all__ if inspect.isclass(getattr(lc, name))]
    assert len(classes) > len(CALLBACKS)
    assert [one.__name__ for one in classes if one.__repr__ is object.__repr__] == []


def test_arguments_at_their_default_are_left_out_and_large_ones_are_short():
    assert repr(lc.GradualPruning(final_sparsity=0.9)) == "GradualPruning()"
    shown = repr(lc.KnowledgeDistillation(TEACHER, losses=["x" * 500] and "mse"))
    assert shown == "KnowledgeDistillation(teacher=Linear(...))"

    class Holder(ShownArguments):
        def __init__(self, value, other=None):
            pass

    assert repr(Holder("x" * 500)).endswith("...)")
    assert len(repr(Holder("x" * 500))) < 100
    assert repr(Holder(torch.ones(2), other=None)) == "Holder(value=tensor([1., 1.]))"
    assert "\\x1b" in repr(Holder(Path("a\x1b[2J")))
    with pytest.raises(TypeError, match="required positional argument"):
        Holder()  # the constructor's own message


class Cells(HTMLParser):
    """The cells of tables, and a check that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.open, self.tags = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert not any(name.startswith("on") for name, _ in attrs)
        self.open.append(tag)
        self.tags.append(tag)
        if tag in ("td", "th", "caption"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th", "caption"):
            self.cells[-1] += data


HOSTILE = "<script>alert(1)</script><b onclick=x>"


def test_names_are_escaped_in_every_table():
    found = Cells(CoverageTable([Coverage(HOSTILE, (2, 3), False, HOSTILE)])._repr_html_())
    assert found.cells[-4:] == [HOSTILE, "2x3", "no", HOSTILE]
    assert set(found.tags) == {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    layer = nn.Module()
    layer.add_module(HOSTILE, nn.Linear(2, 2))
    lc.prune_weights(layer, sparsity=0.5)
    assert HOSTILE + ".weight" in Cells(lc.compression_state(layer)._repr_html_()).cells


def test_a_long_table_counts_what_it_leaves_out():
    found = Cells(html_table("t", ["a", "b"], [(n, "x") for n in range(1234)]))
    assert found.cells[-1] == "and 1034 more"


def test_coverage_says_what_is_skipped_and_why():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    selection = select(net)
    cells = Cells(selection._repr_html_()).cells
    assert cells[0] == f"Coverage: 1 of {len(selection.coverage)} compressed"
    assert cells[cells.index("0.weight") :][:4] == ["0.weight", "4x4", "yes", ""]
    callback = lc.GradualPruning()
    assert isinstance(callback.coverage, CoverageTable)


def test_state_and_artifact_show_their_numbers(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    lc.prune_weights(net, sparsity=0.5)
    lc.quantize_weights(net, 4)
    state = lc.compression_state(net)
    assert repr(state).startswith("CompressionState(2 masks, 2 grids, ")
    cells = Cells(state._repr_html_()).cells
    row = cells[cells.index("0.weight") :][:4]
    zeros = (net[0].weight == 0).float().mean().item()
    assert row == ["0.weight", f"{zeros:.2%}", "affine", "4"]
    info = lc.save_compressed(net, tmp_path / "a.lcz")
    cells = Cells(info._repr_html_()).cells
    assert cells[0].startswith(f"a.lcz: {info.bytes:,} bytes")
    tensor = info.per_tensor["0.weight"]
    row = cells[cells.index("0.weight") :][:9]
    assert row[4:6] == [str(tensor.bits), str(tensor.nonzero)]


def test_a_recipe_shows_each_callback_with_its_reason():
    recipe = lc.compression_recipe("fastest", model="vae")
    cells = Cells(recipe._repr_html_()).cells
    for callback, reason in zip(recipe, recipe.reasons, strict=True):
        assert cells[cells.index(repr(callback)) + 1] == reason
    assert recipe.notes
    assert cells[-1] == recipe.notes[-1]


def test_an_exported_file_shows_its_operators_and_its_parity(tmp_path):
    pytest.importorskip("onnxruntime")
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(16, 8)
    info = lc.export_onnx(net, tmp_path / "a.onnx", x, int8=True, calibration=[x])
    cells = Cells(info._repr_html_()).cells
    assert cells[0] == "a.onnx"
    assert f"{info.bytes:,}" in cells
    for runtime, parity in info.parity.items():
        table = cells[cells.index(f"Parity with PyTorch, in {runtime}") :]
        assert table[table.index("numbers compared") + 1] == f"{parity.elements:,}"
    assert ", ".join(f"{n} {name}" for name, n in info.int8_ops.items()) in cells


def test_a_post_training_report_shows_each_of_its_tables():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    report = lc.quantize_static(net, [torch.randn(4, 8)])
    found = Cells(report._repr_html_())
    assert found.tags.count("table") >= 2
    assert "0.weight" in found.cells
