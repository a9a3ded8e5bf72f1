"""A tensor that says `cuda:0` and computes on the CPU: it refuses mixed devices and counts waits.

No CUDA is needed. What CUDA refuses (operations on two devices, a CPU generator, NumPy)
raises `MixedDeviceError`; what makes the host wait for the device is counted by the place in this
package that asked: `item()` and what calls it, `nonzero`, boolean indexing, `bincount`, copies to
the CPU.
"""

import collections
import contextlib
import traceback
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA, PACKAGE = torch.device("cuda", 0), "lightning_compress/"
WAITS = collections.Counter()  # (what, place)

_WAITING = {
    aten._local_scalar_dense.default: "item", aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select", aten.bincount.default: "bincount",
    aten._unique2.default: "unique", aten.equal.default: "equal",
    aten.is_nonzero.default: "is_nonzero", aten.histc.default: "histc",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}  # fmt: skip
_INDEXING = (
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
    aten._index_put_impl_.default,
)  # fmt: skip
_ACROSS = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor, *_INDEXING}


class MixedDeviceError(RuntimeError):
    """What CUDA would say of tensors in two places."""


def place():
    """Where in the package, outside of tests, the innermost frame is."""
    for frame in reversed(traceback.extract_stack(limit=80)):
        if PACKAGE in frame.filename and "/site-packages/" not in frame.filename:
            return f"{frame.filename.rsplit(PACKAGE, 1)[1]}:{frame.lineno} {frame.name}"
    return "elsewhere"


def wait(what):
    WAITS[what, place()] += 1


def is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


class Away(torch.Tensor):
    """Says that it is on `cuda:0`; its values are those of `here`."""

    @staticmethod
    def __new__(cls, here, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(),
            dtype=here.dtype, layout=here.layout, device="cpu", requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, here, requires_grad=False):
        self.here = here

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self):
        return f"Away({self.here})"

    def get_device(self):
        return 0

    def cpu(self, *_, **__):
        wait("to the CPU")
        return _ToCPU.apply(self)

    def cuda(self, *_, **__):
        return self

    def to(self, *args, **kwargs):
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for one in args:
            if isinstance(one, (str, torch.device)):
                device = one
            elif isinstance(one, torch.dtype):
                dtype = one
            elif isinstance(one, torch.Tensor):
                device, dtype = one.device, one.dtype
        found = self.cpu() if device is not None and not is_cuda(device) else self
        if dtype is not None and dtype != found.dtype:
            return torch.Tensor.type(found, dtype)
        return found.clone() if kwargs.get("copy") and found is self else found

    def tolist(self):
        wait("tolist")
        return self.here.detach().tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __deepcopy__(self, memo):
        copied = Away(self.here.clone().detach())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol):
        return self.here.detach().clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class _ToCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.here.detach().clone()

    @staticmethod
    def backward(ctx, gradient):
        return Away(gradient)


def _check(function, args, kwargs):
    flat = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    away = [one for one in flat if isinstance(one, Away)]
    near = [one for one in flat if not isinstance(one, Away) and one.dim()]
    if away and near and function not in _ACROSS:
        shapes = [tuple(one.shape) for one in near]
        raise MixedDeviceError(f"{function}: cuda:0 and cpu {shapes} at {place()}")
    if away and function is aten.index.Tensor and not isinstance(args[0], Away):
        raise MixedDeviceError(f"a CPU tensor is indexed from cuda:0 at {place()}")
    return bool(away)


def _count(function, args, device):
    if function in _WAITING:
        wait(_WAITING[function])
    elif function in _INDEXING:
        found = [one for one in tree_leaves(args[1]) if isinstance(one, torch.Tensor)]
        if any(one.dtype == torch.bool for one in found):
            wait("boolean index")
    copied = function is aten._to_copy.default and device is not None and not is_cuda(device)
    if copied or (function is aten.copy_.default and not isinstance(args[0], Away)):
        wait("to the CPU")


def run(function, args, kwargs):
    """An operation, on the values here; its results are where CUDA would leave them."""
    if function is torch.ops.prim.device.default:
        return CUDA
    away, device = _check(function, args, kwargs), kwargs.get("device")
    goes = is_cuda(device) if device is not None else away
    generator = kwargs.get("generator")
    if generator is not None and goes:
        raise MixedDeviceError(f"{function}: a CPU generator for cuda:0 at {place()}")
    if away:
        _count(function, args, device)
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    args_here, kwargs_here = tree_map(
        lambda one: one.here if isinstance(one, Away) else one, (args, kwargs)
    )
    found = function(*args_here, **kwargs_here)
    name = function._schema.name.split("::")[1]
    if name.startswith("_foreach") and name.endswith("_"):
        return None
    if name.endswith("_") and not name.endswith("__") and isinstance(args[0], torch.Tensor):
        return args[0]
    if isinstance(kwargs.get("out"), torch.Tensor):
        return kwargs["out"]
    return tree_map(
        lambda one: (
            Away(one)
            if goes and isinstance(one, torch.Tensor) and not isinstance(one, Away)
            else one
        ),
        found,
    )


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        here = not any(isinstance(one, Away) for one in tree_leaves((args, kwargs)))
        if here and not is_cuda(kwargs.get("device")):
            return function(*args, **kwargs)
        return run(function, args, kwargs)


def _made(plain):
    """`torch.tensor` and `torch.as_tensor`, which look for a driver before anything is asked."""

    def make(data, *args, device=None, **kwargs):
        if isinstance(data, Away):
            return data if plain is torch.as_tensor else data.clone()
        found = plain(data, *args, **kwargs)
        return Away(found.detach()) if is_cuda(device) else found

    return make


def _moved(plain):
    def to(self, *args, **kwargs):
        if args and isinstance(args[0], Away) and not isinstance(self, Away):
            return plain(self, CUDA, args[0].dtype)
        return plain(self, *args, **kwargs)

    return to


@contextlib.contextmanager
def pretended():
    """Within the block tensors can be made on `cuda:0`, or moved there."""
    fork = torch.random.fork_rng
    with (
        mock.patch.object(torch.cuda, "_lazy_init", return_value=None),
        mock.patch.object(torch, "tensor", _made(torch.tensor)),
        mock.patch.object(torch, "as_tensor", _made(torch.as_tensor)),
        mock.patch.object(torch.Tensor, "to", _moved(torch.Tensor.to)),
        mock.patch.object(
            torch.random, "fork_rng", lambda devices=None, *a, **k: fork([], *a, **k)
        ),
        # The state of a GPU's generator lies on the host: reading it waits for nothing.
        mock.patch.object(torch.cuda, "get_rng_state", return_value=torch.get_rng_state()),
        mock.patch.object(torch.cuda, "set_rng_state", return_value=None),
        _Mode(),
    ):
        yield


def away(module):
    """A module whose parameters and buffers say that they are on `cuda:0`."""
    for one in module.modules():
        for name, value in one._parameters.items():
            if value is not None:
                moved = Away(value.detach().clone())
                one._parameters[name] = torch.nn.Parameter(moved, value.requires_grad)
        for name, value in one._buffers.items():
            if value is not None:
                one._buffers[name] = Away(value.clone())
    return module
