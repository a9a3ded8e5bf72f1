"""Files for phones: what runs here is compared, and a missing converter is named."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import MissingExtraError, export_mobile, quantize_static
from lightning_compress.conversion import mobile

EXTRAS = {".pte": "executorch", ".mlpackage": "coreml", ".tflite": "litert"}
PACKAGES = {".pte": "executorch", ".mlpackage": "coremltools", ".tflite": "litert_torch"}


def generator():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(6, 4 * 9),
        nn.Unflatten(1, (4, 3, 3)),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 4, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(2, 1, 3, padding=1),
        nn.Sigmoid(),
    )
    x = torch.randn(16, 6)
    module(x)
    return module.eval(), x


@pytest.mark.parametrize("suffix", EXTRAS)
def test_a_missing_converter_is_named_with_its_install_line(suffix, tmp_path, monkeypatch):
    module, x = generator()

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("lightning_compress.errors.importlib.import_module", missing)
    with pytest.raises(MissingExtraError, match=rf"lightning-compress\[{EXTRAS[suffix]}\]"):
        export_mobile(module, tmp_path / f"m{suffix}", x)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "more", "named"), [("m.onnx", {}, "mlpackage"), ("m.pte", {"tolerance": -1}, "-1")]
)
def test_bad_arguments_are_named(name, more, named, tmp_path):
    module, x = generator()
    with pytest.raises(ValueError, match=named):
        export_mobile(module, tmp_path / name, x, **more)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_runtime_with_other_numbers_leaves_no_file(quantized, tmp_path, monkeypatch):
    module, x = generator()
    if quantized:
        quantize_static(module, [x])

    def write(off, computed, arguments, path):
        path.write_bytes(b"file")
        return lambda: [np.asarray(computed(*arguments[0]).detach()) + off]

    def writer(off):
        monkeypatch.setitem(
            mobile._WRITERS, ".pte", ("executorch", (), lambda *given: write(off, *given))
        )

    writer(0.05)
    with pytest.raises(mobile.MobileMismatchError, match=r"m\.pte.*0\.05"):
        export_mobile(module, tmp_path / "m.pte", x)
    assert not list(tmp_path.iterdir())
    assert export_mobile(module, tmp_path / "m.pte", x, tolerance=0.1).bytes == 4
    writer(0.0)
    info = export_mobile(module, tmp_path / "m.pte", x)
    assert info.parity.equal == 1.0
    assert info.quantized == quantized


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("suffix", EXTRAS)
def test_each_route_converts_and_runs_where_it_can(suffix, quantized, tmp_path):
    if importlib.util.find_spec(PACKAGES[suffix]) is None:
        pytest.skip(f"lightning-compress[{EXTRAS[suffix]}] is not installed")
    module, x = generator()
    if quantized:
        quantize_static(module, [x])
    info = export_mobile(module, tmp_path / f"m{suffix}", x)
    assert info.bytes > 0
    assert info.path.exists()
    assert info.quantized == (quantized and suffix != ".tflite")
    parity = info.parity or SimpleNamespace(equal=1.0, more=0.0)
    assert parity.equal > 0.9
    assert parity.more < 0.03
