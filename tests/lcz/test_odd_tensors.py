"""Each dtype and kind of tensor that torch has: saved exactly, or refused by its name."""

import inspect

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_compress.lcz.artifact import load_compressed, read_tensors, save_compressed
from lightning_compress.lcz.raw_bits import DTYPES, dtype_name

ALL = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
BITS = [0x00, 0x80, 0x7F, 0xFF, 0x01, 0x7C, 0xFC, 0x55]


def bits_of(tensor):
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).tolist() if flat.numel() else []


def every_pattern(dtype):
    """Zeros, minus zeros, infinities, NaNs of several kinds and numbers between, as bits."""
    raw = torch.tensor(BITS * 3 + [0] * 24 * dtype.itemsize, dtype=torch.uint8)
    raw = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
    return raw.view(dtype) if dtype is not torch.bool else raw > 100


@pytest.mark.parametrize("dtype", ALL, ids=dtype_name)
def test_each_dtype_is_saved_exactly_or_refused_by_name(tmp_path, dtype):
    module = nn.Module()
    try:
        value = every_pattern(dtype)
    except (RuntimeError, TypeError, NotImplementedError):
        value = torch.empty(3, dtype=dtype)
    module.register_buffer("odd_one", value)
    path = tmp_path / "a.lcz"
    if dtype_name(dtype) not in DTYPES:
        with pytest.raises(TypeError, match=f"'odd_one' is torch.{dtype_name(dtype)}"):
            save_compressed(module, path)
        assert not path.exists()
        return
    before = bits_of(value)
    save_compressed(module, path, **kept_signs())
    found = read_tensors(path)["odd_one"]
    assert found.dtype == dtype
    assert bits_of(found) == before
    other = nn.Module()
    other.register_buffer("odd_one", torch.zeros_like(value))
    assert bits_of(load_compressed(path, other).odd_one) == before


def kept_signs():
    """Where minus zeros may be stored as zeros, ask for their signs."""
    known = inspect.signature(save_compressed).parameters
    return {"signed_zeros": True} if "signed_zeros" in known else {}


def quantized():
    return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


def nested(layout):
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


def fake():
    with FakeTensorMode():
        return torch.ones(3)


ODD = {
    "meta": lambda: torch.ones(3, device="meta"),
    "sparse coo": lambda: torch.eye(3).to_sparse(),
    "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(3).to_mkldnn(),
    "nested": lambda: nested(torch.jagged),
    "strided nested": lambda: nested(torch.strided),
    "quantized": quantized,
    "fake": fake,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(ODD))
def test_what_is_no_dense_tensor_is_refused_by_name(tmp_path, kind):
    module = nn.Module()
    module._buffers["odd"] = ODD[kind]()
    with pytest.raises(TypeError, match="'odd'"):
        save_compressed(module, tmp_path / "a.lcz")
    assert not list(tmp_path.iterdir())


def test_lazy_layers_are_refused_by_name(tmp_path):
    for layer in (nn.LazyLinear(3), nn.LazyBatchNorm1d()):
        with pytest.raises(TypeError, match=r"'0.* has no shape yet"):
            save_compressed(nn.Sequential(layer), tmp_path / "a.lcz")


def views():
    base = torch.randn(6, 4, dtype=torch.complex64)
    return {
        "conj": base.conj(),
        "neg": base.conj().imag,
        "real": base.real,
        "strided": torch.randn(8, 8)[::2, 1::3],
        "transposed": torch.randn(3, 5).t(),
        "expanded": torch.randn(1, 3).expand(4, 3),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(2.5),
        "one": torch.ones(1, 1, 1),
        "none": torch.empty(0),
        "no columns": torch.empty(5, 0, 3, dtype=torch.float64),
        "no flags": torch.empty(0, dtype=torch.bool),
        "subclass": nn.Buffer(torch.ones(3)),
    }


def test_views_and_empty_tensors_come_back_exactly(tmp_path):
    module, want = nn.Module(), views()
    for name, value in want.items():
        module.register_buffer(name.replace(" ", "_"), value)
    save_compressed(module, tmp_path / "a.lcz", **kept_signs())
    found = read_tensors(tmp_path / "a.lcz")
    for name, value in want.items():
        one = found[name.replace(" ", "_")]
        plain = value.detach().resolve_conj().resolve_neg()
        assert (one.dtype, one.shape) == (value.dtype, value.shape), name
        assert bits_of(one) == bits_of(plain), name


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_layers_without_elements_come_back(tmp_path):
    def build():
        return nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 0), nn.Embedding(0, 4), nn.Linear(2, 1))

    module = build()
    save_compressed(module, tmp_path / "a.lcz")
    again = load_compressed(tmp_path / "a.lcz", build())
    for one, other in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
