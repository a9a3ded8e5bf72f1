"""Exports compared with the PyTorch module under ONNX Runtime, apart from the built-in check."""

import dataclasses
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_compress.conversion import checks
from lightning_compress.conversion.checks import OnnxMismatchError
from lightning_compress.conversion.export import export_onnx
from lightning_compress.errors import MissingExtraError


class Encoder(nn.Module):
    """Two outputs; both parametrizations; BatchNorm with statistics of its own."""

    def __init__(self):
        super().__init__()
        self.conv = parametrizations.spectral_norm(nn.Conv2d(1, 4, 3, bias=False))
        self.norm = nn.BatchNorm2d(4)
        self.mu = nn.Linear(4 * 36, 3)
        self.logvar = parametrizations.weight_norm(nn.Linear(4 * 36, 3))

    def forward(self, x):
        h = self.norm(self.conv(x)).relu().flatten(1)
        return self.mu(h), self.logvar(h)


class Decoder(nn.Module):
    """Sequence decoder: latent and tokens in, logits out."""

    def __init__(self):
        super().__init__()
        self.start, self.embed = nn.Linear(3, 8), nn.Embedding(5, 4)
        self.gru, self.out = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, z, tokens):
        hidden, _ = self.gru(self.embed(tokens), self.start(z).tanh()[None])
        return self.out(hidden)


def generator():
    return nn.Sequential(
        nn.Linear(6, 8 * 16, bias=False),
        nn.BatchNorm1d(8 * 16),
        nn.ReLU(inplace=True),
        nn.Unflatten(1, (8, 4, 4)),
        nn.ConvTranspose2d(8, 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.2, inplace=True),
        nn.ConvTranspose2d(4, 1, 4, 2, 1),
        nn.Tanh(),
    )


def old_norms():
    with pytest.warns(FutureWarning, match="weight_norm"):
        weight = nn.utils.weight_norm(nn.Linear(6, 8))
    return nn.Sequential(weight, nn.Tanh(), nn.utils.spectral_norm(nn.Linear(8, 4)))


class NormedRecurrent(nn.Module):
    """A recurrent layer lists its weights a second time, outside its parameters."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 8, batch_first=True)
        parametrizations.spectral_norm(self.gru, "weight_hh_l0")

    def forward(self, x):
        return self.gru(x)[0]


CASES = {
    "encoder": (Encoder, lambda n: (torch.rand(n, 1, 8, 8),)),
    "decoder": (Decoder, lambda n: (torch.randn(n, 3), torch.randint(0, 5, (n, 6)))),
    "generator": (generator, lambda n: (torch.randn(n, 6),)),
    "normed_recurrent": (NormedRecurrent, lambda n: (torch.randn(n, 5, 4),)),
    "old_norms": (old_norms, lambda n: (torch.randn(n, 6),)),
}


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feed = {name: part.numpy() for name, part in zip(names, inputs, strict=True)}
    return session.run(None, feed)


@pytest.mark.parametrize("case", CASES)
def test_the_file_computes_what_the_module_computes_at_any_batch_size(case, tmp_path):
    torch.manual_seed(0)
    build, inputs = CASES[case]
    module = build().train()
    for _ in range(3):  # statistics and power iterations that are not the initial ones
        module(*inputs(4))
    path = tmp_path / "deep" / "model.onnx"
    info = export_onnx(module, path, inputs(2))

    onnx.checker.check_model(str(path), full_check=True)
    assert info.path == path
    assert info.bytes == path.stat().st_size
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]  # no external data
    assert 0 <= info.max_abs_error < 1e-4
    assert info.int8_ops == {}
    module.eval()
    for count in (1, 2, 5, 33):
        batch = inputs(count)
        with torch.no_grad():
            expected = module(*batch)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for got, want in zip(run(path, batch), expected, strict=True):
            np.testing.assert_allclose(got, want.numpy(), atol=1e-4)


def test_the_module_stays_as_it_is(tmp_path):
    module = Encoder()
    module.norm.eval()
    sample = torch.rand(2, 1, 8, 8)
    random = torch.get_rng_state()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    export_onnx(module, tmp_path / "m.onnx", sample)
    assert (module.training, module.norm.training, module.conv.training) == (True, False, True)
    assert module.mu.weight.requires_grad
    assert list(module.state_dict()) == list(before)  # parametrizations are still there
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    module(sample)  # the copy's class was its own


def test_info_names_inputs_outputs_and_operators_and_batch_norm_is_folded(tmp_path):
    info = export_onnx(generator(), tmp_path / "g.onnx", torch.randn(2, 6))
    assert len(info.inputs) == len(info.outputs) == 1
    assert info.float_ops["ConvTranspose"] == 2
    assert info.float_ops["Gemm"] == 1
    assert "BatchNormalization" not in info.float_ops
    decoder = export_onnx(Decoder(), tmp_path / "d.onnx", CASES["decoder"][1](2))
    assert decoder.inputs == ("z", "tokens")
    assert decoder.float_ops["GRU"] == 1
    assert "Shape" not in decoder.float_ops  # works on integers
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.bytes = 0


def test_a_sample_of_one_still_gives_a_dynamic_batch(tmp_path):
    inputs = CASES["decoder"][1]  # the exporter would fix a recurrent layer at batch size 1
    export_onnx(Decoder(), tmp_path / "m.onnx", inputs(1))
    for count in (1, 3):
        assert run(tmp_path / "m.onnx", inputs(count))[0].shape == (count, 6, 5)


class Star(nn.Module):
    """Takes a first input and any number of others."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, first, *others):
        return self.layer(first) + sum(self.layer(other) for other in others)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("wrap", [nn.Module.eval, nn.DataParallel], ids=["plain", "data_parallel"])
def test_inputs_may_be_taken_in_by_a_star(wrap, count, tmp_path):
    module = wrap(Star()).eval()
    info = export_onnx(module, tmp_path / "m.onnx", (torch.randn(2, 4),) * count)
    inputs = tuple(torch.randn(5, 4) for _ in range(count))
    with torch.no_grad():
        expected = module(*inputs)
    np.testing.assert_allclose(run(info.path, inputs)[0], expected, atol=1e-5)


def test_the_opset_can_be_asked_for(tmp_path):
    export_onnx(nn.Linear(3, 2), tmp_path / "m.onnx", torch.randn(2, 3), opset=18)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 18


def test_an_opset_that_cannot_be_reached_raises(tmp_path, capfd):
    with pytest.raises(ValueError, match=r"opset 99 cannot be reached"):
        export_onnx(nn.Linear(3, 2), tmp_path / "m.onnx", torch.randn(2, 3), opset=99)
    capfd.readouterr()  # the exporter's own traceback


def test_a_module_that_fixes_the_batch_size_raises(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x + x.new_zeros(len(x), 3)

    with pytest.raises(ValueError, match=r"'x' has its batch size fixed at 2"):
        export_onnx(Fixed(), tmp_path / "m.onnx", torch.randn(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_printed(tmp_path, capfd):
    export_onnx(Decoder(), tmp_path / "d.onnx", CASES["decoder"][1](2))
    assert capfd.readouterr() == ("", "")


class Huge(nn.Module):
    def forward(self, x):
        return torch.tanh(x) * 1e6  # kernels differ in the last bits, so by more than 1e-4


@pytest.mark.parametrize("older", [None, b"an older export"])
def test_a_difference_above_the_tolerance_raises_and_leaves_no_new_file(older, tmp_path):
    path = tmp_path / "m.onnx"
    if older:
        path.write_bytes(older)
    torch.manual_seed(0)
    message = re.escape(str(path)) + r".*differs from PyTorch by .* batch size 1\b.*tolerance 1e-12"
    with pytest.raises(OnnxMismatchError, match=message):
        export_onnx(Huge(), path, torch.randn(64, 64), tolerance=1e-12)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([older] if older else [])


def test_values_that_are_not_numbers_on_both_sides_count_as_equal(tmp_path):
    class Log(nn.Module):
        def forward(self, x):
            return x.log()

    sample = torch.tensor([[-1.0], [0.0], [1.0]])  # NaN, -inf, 0
    assert export_onnx(Log(), tmp_path / "m.onnx", sample).max_abs_error == 0


def test_inputs_with_different_batch_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\(2, 3\), \(4, 6\)"):
        export_onnx(Decoder(), tmp_path / "m.onnx", (torch.randn(2, 3), torch.zeros(4, 6)))


def test_missing_onnx_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"lightning-compress\[onnx\]"):
        export_onnx(nn.Linear(3, 2), tmp_path / "m.onnx", torch.randn(2, 3))


def test_an_onnx_runtime_without_a_kernel_is_named(tmp_path, monkeypatch):
    """As 1.23 does for weights of several zero points, or the least of two uint8."""
    errors = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")

    def make_session(*_):
        raise errors.NotImplemented("no implementation\nfor Min(13)")

    monkeypatch.setattr(checks, "make_session", make_session)
    message = r"m\.onnx: onnxruntime [\d.]+ cannot run .*\(no implementation for Min.*from 1\.27 on"
    for int8 in (False, True):
        with pytest.raises(RuntimeError, match=message):
            export_onnx(nn.Linear(3, 2), tmp_path / "m.onnx", torch.randn(4, 3), int8=int8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize(
    ("module", "sample", "message"),
    [
        (nn.Linear(4, 2).bfloat16(), torch.ones(2, 4).bfloat16(), r"'weight' is torch\.bfloat16"),
        (nn.LSTM(4, 8, proj_size=3), torch.ones(2, 5, 4), "LSTM with proj_size=3.*train it with"),
    ],
    ids=["bfloat16", "projection"],
)
def test_what_no_file_holds_is_refused_by_name(module, sample, message, int8, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(module, tmp_path / "m.onnx", sample, int8=int8)


def test_float64_is_for_float_files_alone(tmp_path):
    module, sample = nn.Linear(4, 2).double(), torch.ones(2, 4).double()
    export_onnx(module, tmp_path / "m.onnx", sample)
    with pytest.raises(ValueError, match=r"'weight' is torch\.float64.*module\.float\(\)"):
        export_onnx(module, tmp_path / "q.onnx", sample, int8=True)
    with pytest.raises(ValueError, match=r"input 0 is torch\.float64"):
        export_onnx(nn.Linear(4, 2), tmp_path / "q.onnx", sample, int8=True)
