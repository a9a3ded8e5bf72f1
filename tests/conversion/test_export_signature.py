"""Inputs and outputs as users' modules have them: names, free axes, dicts, dtypes, and errors."""

import collections
import dataclasses

import numpy as np
import onnx
import pytest
import torch
from exported import run
from torch import nn

from lightning_compress.conversion.checks import OnnxMismatchError
from lightning_compress.conversion.export import export_onnx


class Skip(nn.Module):
    """Only even sizes come out as they went in."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 2, 3, 2, 1), nn.ConvTranspose2d(2, 1, 4, 2, 1)

    def forward(self, x):
        return x + self.up(self.down(x))


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_further_axes_may_have_any_size(int8, tmp_path):
    torch.manual_seed(0)
    module, x = Skip().eval(), torch.randn(2, 1, 8, 8)
    more = {"int8": True, "calibration": [x]} if int8 else {}
    dynamic = {"x": {2: "height", 3: "width"}}
    info = export_onnx(module, tmp_path / "m.onnx", x, dynamic=dynamic, **more)
    shape = onnx.load(info.path).graph.input[0].type.tensor_type.shape.dim
    assert [one.dim_param for one in shape] == ["batch", "", "height", "width"]
    other = torch.randn(3, 1, 12, 6)
    with torch.no_grad():
        expected = module(other).numpy()
    np.testing.assert_allclose(run(info.path, (other,))[0], expected, atol=0.2 if int8 else 1e-4)


class FixedSize(nn.Module):
    def forward(self, x):
        return x + torch.ones(8)


def test_a_file_that_fails_at_a_second_size_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"'width'.*fixed at 8"):
        export_onnx(
            FixedSize(), tmp_path / "m.onnx", torch.randn(2, 8, 8), dynamic={"x": {2: "width"}}
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"y": {2: "height"}}, r"no input \['y'\].*'x'"),
        ({"x": {4: "height"}}, "no axis 4"),
        ({"x": {1: "side", 2: "side"}}, "'side' has the sizes 1 and 8"),
        ({"x": {1: "channels"}}, "'channels' has the size 1"),
        ({"x": {2: 5}}, "5 is no name"),
        (["x"], r"dynamic=\['x'\]: give the axes"),
        ({"x": ["height"]}, "give the axes of each input"),
    ],
)
def test_axes_that_cannot_be_are_refused(dynamic, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(Skip(), tmp_path / "m.onnx", torch.randn(2, 1, 8, 8), dynamic=dynamic)


@dataclasses.dataclass
class Output:
    sample: torch.Tensor
    extra: torch.Tensor | None = None


class Ordered(collections.OrderedDict):
    pass


class Heads(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(4, 3), nn.Linear(4, 3), kind

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return {
            "dict": lambda: {"mean": a, "rest": (b, None)},
            "ordered": lambda: Ordered(mean=a, logvar=b),
            "dataclass": lambda: Output(a),
            "normal": lambda: torch.distributions.Normal(a, b.exp()),
            "input": lambda: {"x": a, "same": x},
        }[self.kind]()


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("dict", ("mean", "rest.0")),
        ("ordered", ("mean", "logvar")),
        ("dataclass", ("sample",)),
        ("normal", ("loc", "scale")),
        ("input", ("x_out", "same")),
    ],
)
def test_outputs_are_named_by_keys_and_fields(kind, names, int8, tmp_path):
    torch.manual_seed(0)
    module, x = Heads(kind).eval(), torch.randn(16, 4)
    more = {"int8": True, "calibration": [x]} if int8 else {}
    info = export_onnx(module, tmp_path / "m.onnx", x, **more)
    assert info.outputs == names
    with torch.no_grad():
        first = module.a(x).numpy()
    np.testing.assert_allclose(run(info.path, (x,))[0], first, atol=0.1 if int8 else 1e-5)


def test_names_may_be_given(tmp_path):
    arguments = {"input_names": ["z"], "output_names": ["mu", "logvar"]}
    info = export_onnx(Heads("ordered"), tmp_path / "m.onnx", torch.randn(2, 4), **arguments)
    assert (info.inputs, info.outputs) == (("z",), ("mu", "logvar"))
    for wrong, message in (
        ({"output_names": ["mu"]}, r"output_names=\['mu'\].* 2"),
        ({"input_names": ["a", "b"]}, "input_names=.* 1"),
        ({"output_names": ["mu", "mu"]}, "equal"),
        ({"output_names": ["x", "y"]}, "names of inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(Heads("ordered"), tmp_path / "n.onnx", torch.randn(2, 4), **wrong)


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x, *, cond, scale=None):
        return self.a(x) + cond * (1 if scale is None else scale)


class FromDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, data):
        return self.a(data["image"]) + data["label"]


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize(
    ("module", "sample", "names"),
    [
        (Conditioned, lambda x: {"x": x, "cond": 2 * x}, ("x", "cond")),
        (Conditioned, lambda x: (x, {"cond": 2 * x}), ("x", "cond")),
        (FromDict, lambda x: {"image": x, "label": x}, ("data.image", "data.label")),
        (FromDict, lambda x: ({"image": x, "label": x},), ("data.image", "data.label")),
    ],
    ids=["keywords", "both", "dict", "tuple"],
)
def test_inputs_may_have_keys(module, sample, names, int8, tmp_path):
    torch.manual_seed(0)
    module, x = module().eval(), torch.randn(16, 4)
    more = {"int8": True, "calibration": [sample(x)]} if int8 else {}
    info = export_onnx(module, tmp_path / "m.onnx", sample(x[:2]), **more)
    assert info.inputs == names
    with torch.no_grad():
        expected = (
            module(**sample(x))
            if isinstance(module, Conditioned) and isinstance(sample(x), dict)
            else (
                module(x, cond=2 * x)
                if isinstance(module, Conditioned)
                else module({"image": x, "label": x})
            )
        )
    factor = 2 if isinstance(module, Conditioned) else 1
    found = run(info.path, (x, factor * x))[0]
    np.testing.assert_allclose(found, expected, atol=0.1 if int8 else 1e-5)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x, time, table):
        return self.a(x) * time + table.sum()


def test_inputs_without_a_batch(tmp_path):
    inputs = torch.randn(3, 4), torch.tensor(0.5), torch.randn(7, 2)
    info = export_onnx(Table(), tmp_path / "m.onnx", inputs, dynamic={"table": {}})
    shapes = [one.type.tensor_type.shape.dim for one in onnx.load(info.path).graph.input]
    assert [[d.dim_param or d.dim_value for d in one] for one in shapes] == [
        ["batch", 4],
        [],
        [7, 2],
    ]
    with pytest.raises(ValueError, match=r"\(7, 2\).*dynamic"):
        export_onnx(Table(), tmp_path / "m.onnx", inputs)


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x.view(1, 4))


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_a_batch_of_one_alone(int8, tmp_path):
    x = torch.randn(1, 4)
    more = {"int8": True, "calibration": [x]} if int8 else {}
    with pytest.raises(ValueError, match=r"test_export_signature\.py:\d+: .*view\(1.*batch=1"):
        export_onnx(One(), tmp_path / "m.onnx", x, **more)
    info = export_onnx(One(), tmp_path / "m.onnx", x, batch=1, **more)
    shape = onnx.load(info.path).graph.input[0].type.tensor_type.shape.dim
    assert [one.dim_value for one in shape] == [1, 4]
    with pytest.raises(ValueError, match="batch=0"):
        export_onnx(One(), tmp_path / "m.onnx", x, batch=0)


def test_half_precision(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 3))
    x = 50 * torch.randn(4, 1, 8, 8)
    wide = export_onnx(module, tmp_path / "w.onnx", x, tolerance=1e-3)
    info = export_onnx(module, tmp_path / "m.onnx", x, dtype="float16")
    assert 1e-4 < info.max_abs_error < 0.2  # of outputs of some tens
    assert info.bytes < wide.bytes
    kinds = [one.type.tensor_type.elem_type for one in onnx.load(info.path).graph.input]
    assert kinds == [onnx.TensorProto.FLOAT16]
    half = export_onnx(module.half(), tmp_path / "h.onnx", x.half())
    assert half.max_abs_error < 0.2
    back = export_onnx(module, tmp_path / "b.onnx", x.half(), dtype="float32", tolerance=1e-3)
    assert onnx.load(back.path).graph.input[0].type.tensor_type.elem_type == 1
    with pytest.raises(OnnxMismatchError, match="tolerance 1e-06"):
        export_onnx(module, tmp_path / "n.onnx", x.half(), tolerance=1e-6)
    for wrong in ({"dtype": "int7"}, {"dtype": "float16", "int8": True}):
        with pytest.raises(ValueError, match="dtype="):
            export_onnx(module, tmp_path / "n.onnx", x.half(), **wrong)


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Draws(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class NoOperator(nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Branch, r"test_export_signature\.py:\d+: `return x if x\.sum\(\).*torch\.where"),
        (Draws, r"randn_like.*draws random numbers \(node '.*RandomNormalLike.*as an input"),
        (NoOperator, "no operator for aten._linalg_svd"),
    ],
)
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_errors_name_the_line_and_what_to_do(module, message, int8, tmp_path, capfd):
    with pytest.raises(ValueError, match=message) as raised:
        export_onnx(module(), tmp_path / "m.onnx", torch.rand(3, 4, 4), int8=int8)
    assert len(str(raised.value)) < 400
    assert capfd.readouterr() == ("", "")


class Density(nn.Module):
    def forward(self, x):
        return torch.distributions.Normal(x, x.exp()).log_prob(0.5 * x)


def test_distributions_inside_are_traced(tmp_path):
    before = torch.distributions.Distribution._validate_args
    info = export_onnx(Density(), tmp_path / "m.onnx", torch.randn(3, 4))
    assert info.max_abs_error < 1e-4
    assert torch.distributions.Distribution._validate_args is before
