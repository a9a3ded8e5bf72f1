"""The reader without torch: the same values and errors, in a process that cannot import it."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import (
    export_onnx,
    load_compressed,
    read_arrays,
    read_tensors,
    save_compressed,
)
from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lab.models import DCGAN
from lightning_compress.lcz.floats import cast_words
from lightning_compress.lcz.raw_bits import DTYPES, dtype_name, patterns
from lightning_compress.quantization.ranges import affine_grid
from lightning_compress.state import set_grid

GOLDEN = sorted((Path(__file__).parent / "golden").glob("v2_*.lcz"))
FLOATS = [name for name, dtype in DTYPES.items() if dtype.is_floating_point]

# What `pip install --no-deps` of the wheel with NumPy, constriction and onnxruntime has not.
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "onnx", "onnx_ir", "onnxscript", "lightning", "rich",
                                  "safetensors", "ml_dtypes", "hydra", "omegaconf", "scipy"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def without_torch(code, *arguments):
    """Run a program that cannot import torch, nor anything else but what the reader needs."""
    command = [sys.executable, "-c", BLOCKED + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_arrays_hold_the_bits_of_the_tensors(path):
    tensors, arrays = read_tensors(path), read_arrays(path)
    assert list(arrays) == list(tensors)
    for name, tensor in tensors.items():
        assert arrays[name].shape == tuple(tensor.shape)
        assert np.array_equal(bits(arrays[name]), patterns(tensor).view(np.uint8)), name


def test_arrays_have_the_dtypes_of_numpy_where_it_has_them():
    arrays, tensors = read_arrays(GOLDEN[0]), read_tensors(GOLDEN[0])
    raw = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
    for name, tensor in tensors.items():
        kind = dtype_name(tensor.dtype)
        assert arrays[name].dtype == raw.get(kind, kind)


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_casts_are_those_of_torch(source, target):
    torch.manual_seed(0)
    values = torch.cat([torch.randn(500) * 10.0**power for power in range(-9, 6)])
    edges = [0.0, -0.0, 448.0, 464.0, 465.0, 480.0, 57344.0, 61440.0, 65504.0, 2**-10, 3 * 2**-10]
    every = torch.arange(256).to(torch.uint8)
    given = torch.cat([values, torch.tensor([*edges, float("inf"), -float("inf")])])
    given = given.to(getattr(torch, source))
    if given.dtype.itemsize == 1:
        given = torch.cat([given, every.view(given.dtype)])
    given = given[~given.isnan()]
    expected = given.to(getattr(torch, target))
    found = cast_words(patterns(given), source, target)
    nans = torch.from_numpy(found.view(np.uint8)).view(expected.dtype).isnan()
    assert torch.equal(nans, expected.isnan())
    numbers = ~nans.numpy()  # the bits of a NaN are its own business
    assert np.array_equal(found[numbers], patterns(expected)[numbers])


@pytest.mark.parametrize("float_dtype", ["fp16", "bf16"])
def test_floats_that_were_cast_for_storage_are_cast_back(tmp_path, float_dtype):
    layer = nn.Linear(5, 3)
    save_compressed(layer, tmp_path / "a.lcz", float_dtype=float_dtype)
    loaded = load_compressed(tmp_path / "a.lcz", nn.Linear(5, 3)).state_dict()["weight"]
    assert np.array_equal(read_arrays(tmp_path / "a.lcz")["weight"], loaded.numpy())


def test_a_process_that_cannot_import_torch_reads_and_refuses_files(tmp_path):
    damaged = tmp_path / "damaged.lcz"
    data = bytearray(GOLDEN[0].read_bytes())
    data[-100] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CorruptArtifactError) as caught:
        read_tensors(damaged)
    code = """
    from lightning_compress.lcz import CorruptArtifactError, inspect_compressed, read_arrays
    arrays = read_arrays(sys.argv[1])
    assert list(arrays) == list(inspect_compressed(sys.argv[1]).per_tensor)
    print(arrays["0.weight"].dtype, arrays["0.weight"].astype("f8").sum().hex())
    try:
        read_arrays(sys.argv[2])
    except CorruptArtifactError as error:
        print(error)
    assert not {"torch", "onnx", "rich"} & set(sys.modules)
    """
    done = without_torch(code, GOLDEN[0], damaged)
    assert done.returncode == 0, done.stderr
    total = read_arrays(GOLDEN[0])["0.weight"].astype("f8").sum().hex()
    assert done.stdout.splitlines() == [f"float32 {total}", str(caught.value)]


def test_a_limit_on_bytes_holds_without_torch_too():
    with pytest.raises(CorruptArtifactError, match="max_bytes=10"):
        read_arrays(GOLDEN[0], max_bytes=10)


@pytest.fixture(scope="module")
def dcgan(tmp_path_factory):
    """The files of a DCGAN's generator of 1.3 million weights, and its int8 ONNX file."""
    folder = tmp_path_factory.mktemp("dcgan")
    torch.manual_seed(0)
    net = DCGAN(image_size=28, channels=1).generator.eval()
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):
            weight = layer.weight.detach() * (torch.rand_like(layer.weight) < 0.1)
            grid = affine_grid(weight, bits=4)
            layer.weight.data = grid.project(weight)
            set_grid(layer, "weight", grid)
    z = torch.randn(4, 64)
    export_onnx(net, folder / "m.onnx", z, int8=True, calibration=[z])
    save_compressed(net, folder / "m.lcz", graph=folder / "m.onnx")
    return folder


def test_a_process_without_torch_and_onnx_runs_a_graph(dcgan):
    code = """
    from pathlib import Path
    import numpy as np
    from lightning_compress import onnx_session
    from lightning_compress.lcz import onnx_model
    folder = Path(sys.argv[1])
    assert onnx_model(folder / "m.lcz") == (folder / "m.onnx").read_bytes()
    z = np.random.default_rng(0).standard_normal((2, 64)).astype("f4")
    one, other = (onnx_session(folder / name) for name in ("m.lcz", "m.onnx"))
    feed = {one.get_inputs()[0].name: z}
    assert np.array_equal(one.run(None, feed)[0], other.run(None, feed)[0])
    assert not {"torch", "onnx"} & set(sys.modules)
    """
    done = without_torch(code, dcgan)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of its memory from /proc")
@pytest.mark.parametrize("call", ["read_arrays", "onnx_model"])
def test_a_process_that_decodes_a_dcgan_is_small_and_quick(dcgan, call):
    """60 MB and 0.7 s, of which torch alone would take 0.7 GB and 2 s."""
    code = f"""
    import time
    from lightning_compress.lcz import {call}
    {call}(sys.argv[1])
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024, time.process_time())
    """
    done = without_torch(code, dcgan / "m.lcz")
    assert done.returncode == 0, done.stderr
    peak, seconds = map(float, done.stdout.split())
    assert peak < 66e6  # 60 MB measured; NumPy itself takes 26 to 30
    assert seconds < 0.7  # of the CPU: others work on it too
