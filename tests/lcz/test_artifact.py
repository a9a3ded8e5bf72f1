import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.grids import AffineGrid, channel_axis
from lightning_compress.lcz.arrays import inspect_compressed
from lightning_compress.lcz.artifact import load_compressed, save_compressed, write_tensors
from lightning_compress.lcz.codecs import CODECS
from lightning_compress.lcz.raw_bits import DTYPES, patterns
from lightning_compress.quantization.ranges import affine_grid
from lightning_compress.state import compression_state, set_grid


class Model(nn.Module):
    """Every kind of layer that generative models here are made of."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 12, 4, groups=2)
        self.rnn = nn.GRU(12, 16)
        self.embed = nn.Embedding(20, 16)
        self.out = nn.Linear(16, 20)


def compressed(model=None, *, bits=4, symmetric=True, seed=0):
    """A model pruned to 80 % and put on grids, with used statistics."""
    torch.manual_seed(seed)
    model = Model() if model is None else model
    known = {}  # a tied weight has one grid
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.num_batches_tracked.fill_(1234)
        for name, weight in layer.named_parameters(recurse=False):
            if weight.dim() > 1:
                if weight not in known:
                    known[weight] = put_on_grid(weight, channel_axis(layer), bits, symmetric)
                set_grid(layer, name, known[weight])
    return model


def put_on_grid(weight, axis, bits, symmetric):
    values = weight.detach().float()
    pruned = values.masked_fill(values.abs() < values.abs().quantile(0.8), 0)
    grid = affine_grid(pruned, bits=bits, symmetric=symmetric, axis=axis)
    with torch.no_grad():
        weight.copy_(grid.project(pruned))
    return grid


def assert_same(one, other):
    assert list(one.state_dict()) == list(other.state_dict())
    for name, value in one.state_dict().items():
        found = other.state_dict()[name]
        assert found.dtype == value.dtype
        assert found.shape == value.shape
        assert (patterns(found) == patterns(value)).all(), name


@pytest.mark.parametrize("codec", ["auto", *CODECS])
@pytest.mark.parametrize(
    ("bits", "symmetric"), [(2, True), (4, True), (8, True), (3, False), (8, False)]
)
def test_a_model_comes_back_with_its_grids(tmp_path, codec, bits, symmetric):
    model, fresh = compressed(bits=bits, symmetric=symmetric), Model()
    info = save_compressed(model, tmp_path / "a.lcz", codec)
    assert load_compressed(tmp_path / "a.lcz", fresh) is fresh
    assert_same(model, fresh)
    before, after = compression_state(model).grids, compression_state(fresh).grids
    assert list(before) == list(after)
    assert before["up.weight"].axis == after["up.weight"].axis == 1
    for name, grid in before.items():
        assert torch.equal(grid.scale, after[name].scale)
        assert torch.equal(grid.zero_point, after[name].zero_point)
        assert info.per_tensor[name].kind == "grid"
        assert info.per_tensor[name].bits == bits
    save_compressed(fresh, tmp_path / "b.lcz", codec)
    assert (tmp_path / "a.lcz").read_bytes() == (tmp_path / "b.lcz").read_bytes()


def test_info_adds_up_and_needs_the_header_only(tmp_path):
    model, path = compressed(), tmp_path / "a.lcz"
    info = save_compressed(model, path)
    data = path.read_bytes()
    payloads = sum(tensor.bytes for tensor in info.per_tensor.values())
    assert info.bytes == len(data) == payloads + info.header_bytes
    path.write_bytes(data[: info.header_bytes - 32].ljust(len(data), b"\0"))  # payloads blanked
    assert inspect_compressed(str(path)) == info
    state = model.state_dict()
    assert list(info.per_tensor) == list(state)
    plain = sum(value.numel() * value.element_size() for value in state.values())
    assert info.ratio == plain / len(data)
    for name, value in state.items():
        tensor = info.per_tensor[name]
        assert (tensor.shape, tensor.elements) == (tuple(value.shape), value.numel())
        assert tensor.nonzero == int((value != 0).sum())
        assert tensor.dtype == str(value.dtype).removeprefix("torch.")
    assert info.entropy_bound_bytes == sum(t.bound_bytes for t in info.per_tensor.values())
    grid = info.per_tensor["out.weight"]
    symbols = compression_state(model).grids["out.weight"].quantize(state["out.weight"])
    _, counts = np.unique(symbols, return_counts=True)
    entropy = -(counts @ np.log2(counts / counts.sum())) / 8
    assert 0 <= grid.bound_bytes - math.ceil(entropy) <= 4 * 20  # and the scales


def test_the_header_of_a_small_model_is_small(tmp_path):
    info = save_compressed(compressed(), tmp_path / "a.lcz")
    assert len(info.per_tensor) == 16
    assert info.header_bytes < 600


def tensors_of(dtype, shape, style, seed):
    """Random bits, few values, mostly zeros of both signs, or one value."""
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    rng = np.random.default_rng(seed)
    size = math.prod(shape) * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    bits = torch.from_numpy(rng.integers(0, high, size).astype(np.uint8)).view(dtype)
    few = bits[rng.integers(0, min(len(bits), 5), len(bits))]
    sparse = bits.clone()
    gaps = torch.from_numpy(rng.random(len(bits)))
    sparse.view(torch.uint8).reshape(len(bits), -1)[gaps < 0.9] = 0
    if dtype.is_floating_point:
        sparse.view(torch.uint8).reshape(len(bits), -1)[gaps < 0.2, -1] = 128
    styles = {"random": bits, "few": few, "sparse": sparse, "constant": few[:1].repeat(len(bits))}
    return styles[style].reshape(shape)


class Holder(nn.Module):
    def __init__(self, *tensors):
        super().__init__()
        for index, tensor in enumerate(tensors):
            self.register_buffer(f"t{index}", tensor)


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in DTYPES], ids=list(DTYPES))
@given(
    shape=st.sampled_from([(), (0,), (3, 0, 2), (1,), (7,), (3, 5), (700,), (2, 3, 4, 5), (5000,)]),
    style=st.sampled_from(["random", "few", "sparse", "constant"]),
    codec=st.sampled_from(["auto", *CODECS]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_any_tensor_comes_back_bit_for_bit(tmp_path_factory, dtype, shape, style, codec, seed):
    path = tmp_path_factory.getbasetemp() / "any.lcz"
    model = Holder(tensors_of(dtype, shape, style, seed))
    info = save_compressed(model, path, codec, signed_zeros=True)
    fresh = Holder(torch.empty_like(model.t0))
    load_compressed(path, fresh)
    assert_same(model, fresh)
    assert info.per_tensor["t0"].bytes <= max(model.t0.numel() * dtype.itemsize, 0)


def test_forms_are_chosen_by_size(tmp_path):
    torch.manual_seed(0)
    sparse = torch.randn(5000).masked_fill(torch.rand(5000) < 0.9, 0.0)
    masked = torch.randn(5000) * (torch.rand(5000) > 0.9)  # leaves -0.0
    few = torch.randint(0, 9, (5000,)) * 0.1
    pixels = torch.tensor(load_digits().images[:100], dtype=torch.float64)
    nans = torch.randn(50) * torch.nan
    model = Holder(sparse, masked, few, pixels, torch.randn(50), nans, torch.ones(9).bool())
    info = save_compressed(model, tmp_path / "a.lcz", signed_zeros=True).per_tensor
    kinds = [info[f"t{i}"].kind for i in range(5)]
    assert kinds == ["mask", "mask", "codebook", "codebook", "plain"]
    assert info["t0"].bytes < 5000 * (0.469 + 0.1 * 32) / 8 * 1.05
    assert info["t1"].bytes < 5000 * (0.469 + 0.9 + 0.1 * 32) / 8 * 1.05
    assert info["t1"].nonzero == int(masked.count_nonzero())
    assert (info["t2"].bits, info["t4"].bits) == (4, 32)
    fresh = copy.deepcopy(model)
    for buffer in fresh.buffers():
        buffer.zero_()
    assert_same(load_compressed(tmp_path / "a.lcz", fresh), model)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda module: module])
def test_tied_weights_are_stored_once(tmp_path, make):
    model = Model()
    model.out.weight = model.embed.weight
    model = make(compressed(model))
    grids = compression_state(model).grids
    info = save_compressed(model, tmp_path / "a.lcz")
    assert info.per_tensor["out.weight"].bytes == 0
    assert info.per_tensor["out.weight"].codec == "tied"
    assert info.per_tensor["out.weight"].nonzero == info.per_tensor["embed.weight"].nonzero
    tied, apart = Model(), Model()
    tied.out.weight = tied.embed.weight
    for fresh in (tied, apart):
        load_compressed(tmp_path / "a.lcz", fresh)
        assert_same(fresh, model)
        assert list(compression_state(fresh).grids) == list(grids)
    save_compressed(tied, tmp_path / "b.lcz")
    assert (tmp_path / "a.lcz").read_bytes() == (tmp_path / "b.lcz").read_bytes()


@pytest.mark.parametrize("owner", ["embed", "out"])
def test_a_grid_on_one_of_two_tied_names(tmp_path, owner):
    model = Model()
    model.out.weight = model.embed.weight
    grid = affine_grid(model.out.weight, bits=4)
    with torch.no_grad():
        model.out.weight.copy_(grid.project(model.out.weight))
    set_grid(getattr(model, owner), "weight", grid)
    info = save_compressed(model, tmp_path / "a.lcz").per_tensor
    assert {info[f"{name}.weight"].kind for name in ("embed", "out")} == {"grid", "tied"}
    fresh = load_compressed(tmp_path / "a.lcz", Model())
    assert list(compression_state(fresh).grids) == [f"{owner}.weight"]
    assert_same(fresh, model)


def test_a_shared_module_keeps_its_grid(tmp_path):
    layer = compressed(nn.Linear(8, 8))
    save_compressed(nn.Sequential(layer, layer), tmp_path / "a.lcz")
    other = nn.Linear(8, 8)
    fresh = load_compressed(tmp_path / "a.lcz", nn.Sequential(other, other))
    assert list(compression_state(fresh).grids) == ["0.weight"]
    assert torch.equal(other.weight, layer.weight)


def test_tied_names_with_different_values_are_refused(tmp_path):
    model, fresh = Model(), Model()
    save_compressed(model, tmp_path / "a.lcz")
    fresh.out.weight = fresh.embed.weight
    before = fresh.out.weight.clone()
    with pytest.raises(CorruptArtifactError, match=r"'out.weight' and 'embed.weight' are one"):
        load_compressed(tmp_path / "a.lcz", fresh)
    assert torch.equal(fresh.out.weight, before)


def test_stale_grids_go(tmp_path):
    save_compressed(Model(), tmp_path / "a.lcz")
    model = compressed()
    assert compression_state(model).grids
    load_compressed(tmp_path / "a.lcz", model)
    assert not compression_state(model).grids


@pytest.mark.parametrize("value", [0.1234, -0.0, math.nan])
def test_values_off_the_grid_warn_and_survive(tmp_path, value):
    model = compressed()
    with torch.no_grad():
        model.out.weight[0, 0] = value
    with pytest.warns(UserWarning, match=r"'out.weight' is not bit for bit on its grid") as caught:
        info = save_compressed(model, tmp_path / "a.lcz", signed_zeros=True)
    assert caught[0].filename == __file__
    assert info.per_tensor["out.weight"].kind == "mask"
    fresh = load_compressed(tmp_path / "a.lcz", compressed(seed=1))
    assert_same(fresh, model)
    assert "out.weight" not in compression_state(fresh).grids


@pytest.mark.parametrize(
    "change",
    [
        {"scale": torch.ones(3)},
        {"scale": torch.ones(20).double()},
        {"scale": torch.full((20,), math.inf)},
        {"zero_point": torch.ones(20, dtype=torch.int32)},
        {"axis": None},
        {"bits": 9},
    ],
    ids=str,
)
def test_grids_that_make_no_sense_are_not_stored(tmp_path, change):
    model = compressed()
    grid = compression_state(model).grids["out.weight"]
    set_grid(model.out, "weight", AffineGrid(**{**vars(grid), **change}))
    with pytest.warns(UserWarning, match="without it"):
        save_compressed(model, tmp_path / "a.lcz")
    assert_same(load_compressed(tmp_path / "a.lcz", Model()), model)


def test_an_axis_may_count_from_the_end(tmp_path):
    model = nn.Linear(4, 3)
    grid = affine_grid(model.weight, bits=8, axis=-1)
    with torch.no_grad():
        model.weight.copy_(grid.project(model.weight))
    set_grid(model, "weight", grid)
    save_compressed(model, tmp_path / "a.lcz")
    fresh = load_compressed(tmp_path / "a.lcz", nn.Linear(4, 3))
    assert compression_state(fresh).grids["weight"].axis == 1
    assert_same(fresh, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_grids_of_other_float_types(tmp_path, dtype):
    model = compressed(Model().to(dtype))
    assert {t.kind for n, t in save_compressed(model, tmp_path / "a.lcz").per_tensor.items()
            if n in compression_state(model).grids} == {"grid"}  # fmt: skip
    assert_same(load_compressed(tmp_path / "a.lcz", Model().to(dtype)), model)


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_floats_off_the_grid_can_be_cast(tmp_path, name, dtype):
    model = compressed()
    info = save_compressed(model, tmp_path / "a.lcz", float_dtype=name)
    assert info.bytes < save_compressed(model, tmp_path / "b.lcz").bytes
    assert info.per_tensor["out.bias"].dtype == "float32"
    assert info.per_tensor["out.bias"].bits == 16
    fresh = load_compressed(tmp_path / "a.lcz", Model())
    for key, value in model.state_dict().items():
        cast = value.is_floating_point() and key not in compression_state(model).grids
        expected = value.to(dtype).to(value.dtype) if cast else value
        assert torch.equal(fresh.state_dict()[key], expected), key
    save_compressed(fresh, tmp_path / "b.lcz", float_dtype=name)
    assert (tmp_path / "a.lcz").read_bytes() == (tmp_path / "b.lcz").read_bytes()


def test_values_that_a_cast_would_lose_are_kept(tmp_path):
    model = Holder(torch.tensor([1e6, 1.0, math.inf]), torch.ones(3, dtype=torch.int64))
    with pytest.warns(UserWarning, match="'t0' .*float16.*float32"):
        save_compressed(model, tmp_path / "a.lcz", float_dtype="fp16")
    fresh = load_compressed(tmp_path / "a.lcz", Holder(torch.zeros(3), torch.zeros(3).long()))
    assert_same(fresh, model)


def test_compiled_and_plain_modules_exchange_files(tmp_path):
    plain = compressed(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    inner = nn.Sequential(torch.compile(copy.deepcopy(plain[0])), copy.deepcopy(plain[1]))
    whole = torch.compile(copy.deepcopy(plain))
    files = []
    for index, model in enumerate((plain, inner, whole)):
        save_compressed(model, tmp_path / f"{index}.lcz")
        files.append((tmp_path / f"{index}.lcz").read_bytes())
    assert files[0] == files[1] == files[2]
    for model in (plain, inner, whole):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7)
        load_compressed(tmp_path / "0.lcz", model)
        save_compressed(model, tmp_path / "again.lcz")
        assert (tmp_path / "again.lcz").read_bytes() == files[0]


def test_what_does_not_fit_is_listed_and_nothing_changes(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    save_compressed(model, tmp_path / "a.lcz")
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 2).half(), nn.BatchNorm1d(2))
    set_grid(other[0], "weight", affine_grid(other[0].weight))
    before = copy.deepcopy(other)
    with pytest.raises(CorruptArtifactError) as caught:
        load_compressed(tmp_path / "a.lcz", other)
    for text in (
        str(tmp_path / "a.lcz"),
        "missing in the file: '2.running_mean', '2.running_var', '2.num_batches_tracked'",
        "'1.weight' is ('float32', (2, 2)) in the file and ('float16', (2, 3)) in the module",
        "'1.bias' is ('float32', (2,)) in the file and ('float16', (2,))",
        "'2.weight' is ('float32', (2, 2)) in the file and ('float32', (2,))",
    ):
        assert text in str(caught.value)
    with pytest.raises(CorruptArtifactError, match=r"unexpected in the file: '1.weight'"):
        load_compressed(tmp_path / "a.lcz", other[:1])
    assert_same(other, before)
    assert list(compression_state(other).grids) == ["0.weight"]


def test_a_grid_belongs_to_a_parameter(tmp_path):
    save_compressed(compressed(nn.Linear(4, 4, bias=False)), tmp_path / "a.lcz")
    buffer = nn.Module()
    buffer.register_buffer("weight", torch.zeros(4, 4))
    with pytest.raises(CorruptArtifactError, match="a grid, but no parameter"):
        load_compressed(tmp_path / "a.lcz", buffer)


@pytest.mark.parametrize(("key", "text"), [("codec", "'rle_huffman'"), ("float_dtype", "'bf16'")])
def test_unknown_options_name_the_valid_ones(tmp_path, key, text):
    with pytest.raises(ValueError, match=f"{key}='best': valid are .*{text}"):
        save_compressed(nn.Linear(1, 1), tmp_path / "a.lcz", **{key: "best"})
    assert not list(tmp_path.iterdir())


class WithExtra(nn.Linear):
    def get_extra_state(self):
        return {"any": "thing"}


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (WithExtra(1, 1), "'_extra_state' is no dense tensor"),
        (nn.Linear(1, 1, device="meta"), "'weight' is no dense tensor with values"),
        (Holder(torch.eye(2).to_sparse()), "'t0' is no dense tensor"),
        (nn.Sequential(nn.LazyLinear(2)), "'0.weight' has no shape yet: run one batch"),
    ],
)
def test_entries_that_cannot_be_stored_are_named(tmp_path, module, text):
    with pytest.raises(TypeError, match=text):
        save_compressed(module, tmp_path / "a.lcz")


def test_a_state_dict_is_told_what_takes_it(tmp_path):
    state = nn.Linear(2, 2).state_dict()
    with pytest.raises(TypeError, match=r"got OrderedDict; .* `write_tensors`"):
        save_compressed(state, tmp_path / "model.lcz")
    assert not list(tmp_path.iterdir())
    write_tensors(state, tmp_path / "model.lcz")
    with pytest.raises(TypeError, match=r"got OrderedDict; .* `read_tensors`"):
        load_compressed(tmp_path / "model.lcz", state)


def test_a_module_without_tensors(tmp_path):
    info = save_compressed(nn.ReLU(), tmp_path / "a.lcz")
    assert (info.ratio, info.per_tensor, info.bytes) == (0, {}, info.header_bytes)
    load_compressed(tmp_path / "a.lcz", nn.ReLU())


def test_views_of_one_memory_are_not_taken_for_ties(tmp_path):
    memory = torch.arange(6.0)
    model = Holder(memory[:3], memory[3:], memory.view(2, 3), memory.view(2, 3).t(), memory[:3])
    info = save_compressed(model, tmp_path / "a.lcz")
    assert [t.kind == "tied" for t in info.per_tensor.values()] == [False] * 4 + [True]
    fresh = Holder(*(torch.zeros(t.shape) for t in model.buffers()))
    assert_same(load_compressed(tmp_path / "a.lcz", fresh), model)


def test_views_with_other_values_in_the_same_memory(tmp_path):
    a = torch.randn(3, 3, dtype=torch.complex64)
    model = Holder(a, a.conj(), a.imag, a.conj().imag)
    save_compressed(model, tmp_path / "a.lcz")
    kinds = [torch.complex64] * 2 + [torch.float32] * 2
    fresh = Holder(*(torch.zeros(3, 3, dtype=kind) for kind in kinds))
    for one, other in zip(
        load_compressed(tmp_path / "a.lcz", fresh).buffers(), model.buffers(), strict=True
    ):
        assert torch.equal(one, other)


def test_missing_files_are_an_os_error(tmp_path):
    for call in (inspect_compressed, lambda path: load_compressed(path, nn.ReLU())):
        with pytest.raises(FileNotFoundError):
            call(tmp_path / "none.lcz")


def test_names_may_only_collide_by_error(tmp_path):
    model = nn.ModuleDict(
        {"a": nn.Linear(1, 1), "_orig_mod": nn.ModuleDict({"a": nn.Linear(1, 1)})}
    )
    with pytest.raises(
        ValueError, match=r"'a.weight' and '_orig_mod.a.weight'|both stored as 'a.w"
    ):
        save_compressed(model, tmp_path / "a.lcz")


def test_saving_is_deterministic(tmp_path):
    for index, _ in enumerate(itertools.repeat(None, 2)):
        save_compressed(compressed(), tmp_path / f"{index}.lcz")
    assert (tmp_path / "0.lcz").read_bytes() == (tmp_path / "1.lcz").read_bytes()
