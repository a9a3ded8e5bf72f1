"""Follow channels through one run of a module: what moves them, what mixes them, what reads them.

The module runs on sample inputs under a torch function mode, so that any Python in its forward
pass will do. Layers have rules of their own (`channel_layers`); what lies between them moves
labels (`MOVES`), leaves them in place (`POINTWISE`, `SPATIAL`), or, where nothing is known, keeps
all channels that it reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_compress.pruning.channel_labels import Labels, Ledger

__all__ = ["Axes", "Trace", "bare", "tensors_in"]

Axes = list["Labels | None"]

MOVES = frozenset(
    """
    H T __getitem__ broadcast_to cat channel_shuffle chunk concat concatenate dstack expand
    expand_as flatten flip gather hstack index_select mH mT moveaxis movedim narrow permute
    pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as roll select
    split split_with_sizes squeeze stack swapaxes swapdims t take_along_dim tensor_split tile
    transpose unbind unflatten unsqueeze view view_as vstack
    """.split()  # noqa: SIM905
)
JOINING = frozenset(
    """
    cat concat concatenate dstack hstack stack vstack
    """.split()  # noqa: SIM905
)
_MERGING = frozenset(
    """
    flatten pixel_shuffle ravel reshape reshape_as unflatten view view_as
    """.split()  # noqa: SIM905
)
POINTWISE = frozenset(
    """
    __abs__ __add__ __and__ __div__ __eq__ __ge__ __gt__ __iadd__ __idiv__ __imul__ __invert__
    __isub__ __itruediv__ __le__ __lt__ __mul__ __ne__ __neg__ __or__ __pow__ __radd__ __rdiv__
    __rmul__ __rpow__ __rsub__ __rtruediv__ __sub__ __truediv__ abs absolute add addcdiv addcmul
    alpha_dropout atan2 bernoulli bfloat16 bool ceil celu clamp clamp_max clamp_min clip clone
    contiguous cos cpu cuda data detach div divide double dropout dropout1d dropout2d dropout3d
    elu empty_like eq erf exp expm1 fake_quantize_per_tensor_affine feature_alpha_dropout
    feature_dropout float floor floor_divide fmax fmin fmod full_like ge gelu gt half hardshrink
    hardsigmoid hardswish hardtanh int isfinite isnan le leaky_relu lerp log log1p log2
    logaddexp logical_and logical_not logical_or logical_xor logsigmoid long lt masked_fill
    maximum minimum mish mul multiply nan_to_num ne neg negative ones_like pow rand_like
    randn_like reciprocal relu relu6 remainder requires_grad requires_grad_ round rrelu rsqrt
    rsub selu sigmoid sign silu sin softplus softshrink softsign sqrt square sub subtract tan
    tanh tanhshrink threshold to true_divide type type_as where zeros_like
    """.split()  # noqa: SIM905
)
ALONG = frozenset(
    """
    cumprod cumsum layer_norm log_softmax normalize rms_norm softmax softmin
    """.split()  # noqa: SIM905
)
REDUCE = frozenset(
    """
    all amax amin any argmax argmin count_nonzero logsumexp max mean median min nanmean nansum
    norm prod std std_mean sum var var_mean
    """.split()  # noqa: SIM905
)
SILENT = frozenset(
    """
    __len__ device dim dtype is_cuda item ndim numel shape size stride tolist
    """.split()  # noqa: SIM905
)
SPATIAL = frozenset({"interpolate", "upsample", "pad", "grid_sample", "instance_norm"})
_POOL = re.compile(r"(?:adaptive_)?(?:avg|max|lp)_pool([123])d(?:_with_indices)?")


class Trace(TorchFunctionMode):
    """One run: labels of each tensor that was seen.

    Args:
        root: the module that is run.
        channelwise: functions and layer classes that treat each channel by itself.
        layers: `layers(trace, path, layer, args, output)` labels the output of a layer that it
            knows and returns True; called first, it says by `output=None` whether it does.
        tapped: paths of modules whose outputs keep their sizes, and why.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: Callable[..., bool],
        channelwise: Sequence[Any] = (),
        tapped: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.tapped = tapped or {}
        self.root, self.ledger = root, Ledger()
        self.layers, self.channelwise = layers, tuple(channelwise)
        self._known: dict[int, tuple[Tensor, Axes]] = {}
        self._own = {
            id(tensor): path
            for named in (root.named_buffers(), root.named_parameters())
            for path, tensor in named
        }
        self._inside = 0
        self.batch = 1
        self.from_inputs = 0  # labels below are those of inputs
        self.input_axes: list[Axes] = []
        self.output_axes: list[Axes] = []
        self.given_states: list[Labels] = []  # of recurrent layers, where the module is given them

    def run(self, inputs: Sequence[Any]) -> Any:
        """Run the module; inputs and outputs keep their sizes."""
        tensors = [one for one in pytree.tree_leaves(tuple(inputs)) if isinstance(one, Tensor)]
        self.batch = next((len(one) for one in tensors if one.dim()), 1)
        for number, tensor in enumerate(tensors):
            axes: Axes = [None]
            for dim in range(1, tensor.dim()):
                labels = self.ledger.fresh(tensor.shape[dim], f"input {number}")
                self.ledger.fix(labels, f"input {number} of the module")
                axes.append(labels)
            self.label(tensor, axes[: tensor.dim()])
            self.input_axes.append(axes[: tensor.dim()])
        self.from_inputs = self.ledger.count
        with self._hooked(), self:
            output = self.root(*inputs)
        for one in tensors_in(output):
            self.output_axes.append(self.axes(one))
            for labels in self.axes(one):
                self.ledger.fix(labels, "output of the module")
                self._release(labels)
        return output

    def _release(self, labels: Labels | None) -> None:
        """A state that goes in and comes out is the caller's, who makes it in the layer's size."""
        for state in self.given_states:
            if labels is not None and np.array_equal(state, labels):
                self.ledger.release(state)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = []
        for path, layer in self.root.named_modules():
            if self._is_leaf(path, layer):
                handles.append(layer.register_forward_pre_hook(self._enter))
                leave = partial(self._leave, path)
                handles.append(layer.register_forward_hook(leave, with_kwargs=True))
        for path, reason in self.tapped.items():
            tap = partial(self._tap, reason)
            handles.append(self.root.get_submodule(path).register_forward_hook(tap))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, _layer: nn.Module, _args: Any) -> None:
        self._inside += 1

    def _leave(self, path: str, layer: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if self._inside == 1:  # rules look at weights, which parametrizations compute
            self._layer(path, layer, (*args, *kwargs.values()), out)
        self._inside -= 1

    def _tap(self, reason: str, _layer: nn.Module, _args: Any, out: Any) -> None:
        for one in tensors_in(out):
            for labels in self.axes(one):
                self.ledger.fix(labels, reason)

    def _is_leaf(self, path: str, layer: nn.Module) -> bool:
        classes = tuple(one for one in self.channelwise if isinstance(one, type))
        return isinstance(layer, classes) or self.layers(self, path, layer, (), None)

    def _layer(self, path: str, layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        classes = tuple(one for one in self.channelwise if isinstance(one, type))
        if isinstance(layer, classes):
            self._pointwise(type(layer).__name__, args, {}, out)
        else:
            self.layers(self, path, layer, args, out)

    def axes(self, tensor: Tensor) -> Axes:
        """Labels of each axis; None where nothing could be removed anyway."""
        known = self._known.get(id(tensor))
        if known is not None:
            return known[1]
        path = self._own.get(id(tensor))
        if path is None or isinstance(tensor, nn.UninitializedParameter):
            return [None] * tensor.dim()
        axes: Axes = []
        for dim, size in enumerate(tensor.shape):
            labels = self.ledger.fresh(size, path) if size > 1 else None
            if labels is not None:
                self.ledger.use(path, dim, labels, "through")
            axes.append(labels)
        self.label(tensor, axes)
        return axes

    def label(self, tensor: Tensor, axes: Axes) -> None:
        """Note the labels of a tensor's axes."""
        self._known[id(tensor)] = tensor, axes  # the tensor is kept, so that its id stays its own

    def unlabel(self, tensor: Tensor) -> None:
        """Note that nothing of a tensor could be removed."""
        self.label(tensor, [None] * tensor.dim())

    def path_of(self, tensor: Tensor | None) -> str | None:
        """The path of a parameter or buffer of the module; the first one, if it has several."""
        return None if tensor is None else self._own.get(id(tensor))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function and label what comes out."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._inside:
            with torch._C.DisableTorchFunction():
                self._function(func, args, kwargs, out)
        return out

    def _function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name = _name(func)
        if func in self.channelwise or name.rstrip("_") in POINTWISE or name in POINTWISE:
            self._pointwise(name, args, kwargs, out)
        elif name in MOVES or name.rstrip("_") in MOVES:
            self._move(func, args, kwargs, out)
        elif (pool := _POOL.fullmatch(name)) or name in SPATIAL:
            self._spatial(name, args[0], out, int(pool[1]) if pool else args[0].dim() - 2)
        elif name in ALONG:
            self._along(name, args, kwargs, out)
        elif name in REDUCE:
            self._reduce(name, args, kwargs, out)
        elif name == "glu":
            self._glu(args, kwargs, out)
        elif name == "linear":
            self._linear(args, kwargs, out)
        elif name not in SILENT:
            self.unknown(name, (args, kwargs))

    def unknown(self, name: str, args: Any) -> None:
        """Keep all channels that something unknown reads."""
        for one in tensors_in(args):
            for labels in self.axes(one):
                self.ledger.fix(labels, f"read by {name}, whose channels are not known")

    def _pointwise(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        operands = tensors_in((args, kwargs))
        for result in tensors_in(out):
            axes: Axes = [None] * result.dim()
            for back in range(1, result.dim() + 1):
                size = result.shape[-back]
                same = [one for one in operands if one.dim() >= back and one.shape[-back] == size]
                found = [self.axes(one)[-back] for one in same]
                known = [one for one in found if one is not None]
                for other in known[1:]:
                    self.ledger.join(known[0], other)
                if known and len(known) < len(found) and size > 1:
                    self.ledger.fix(known[0], f"meets a tensor of fixed size in {name}")
                axes[-back] = known[0] if known else None
            self.label(result, axes)

    def _spatial(self, name: str, x: Tensor, out: Any, dims: int) -> None:
        for result in tensors_in(out):
            axes = self.axes(x)
            kept = x.dim() - dims
            for dim in range(kept):
                if result.shape[dim] != x.shape[dim]:
                    self.ledger.fix(axes[dim], f"resized by {name}")
            for labels in axes[kept:]:
                self.ledger.fix(labels, f"mixed by {name}")
            same = zip(axes[:kept], result.shape, strict=False)
            fitting = [one if one is not None and len(one) == n else None for one, n in same]
            self.label(result, [*fitting, *[None] * dims])

    def _along(self, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
        x = args[0]
        axes, mixed = self.axes(x), kwargs.get("dim", args[1] if len(args) > 1 else -1)
        if name in ("layer_norm", "rms_norm"):
            mixed = list(range(-len(mixed), 0)) if isinstance(mixed, (tuple, list)) else [-1]
        for dim in mixed if isinstance(mixed, (tuple, list)) else [mixed]:
            self.ledger.fix(axes[1 if dim is None else dim], f"{name} is taken over them")
        self.label(out, list(axes))

    def _reduce(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        operands = tensors_in((args, kwargs))
        if name in ("max", "min") and len(operands) == 2:
            self._pointwise(name, args, kwargs, out)
            return
        x = operands[0]
        given = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        dims = given if isinstance(given, (tuple, list)) else [given]
        dims = range(x.dim()) if None in dims or not dims else [dim % x.dim() for dim in dims]
        axes = self.axes(x)
        for dim in dims:
            self.ledger.fix(axes[dim], f"{name} is taken over them")
        for result in tensors_in(out):
            flat = [one for dim, one in enumerate(axes) if dim not in dims]
            full = [None if dim in dims else one for dim, one in enumerate(axes)]
            self.label(result, full if result.dim() == x.dim() else flat[: result.dim()])

    def _glu(self, args: Any, kwargs: Any, out: Tensor) -> None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        axes = list(self.axes(args[0]))
        if (labels := axes[dim]) is not None:
            axes[dim], other = np.split(labels, 2)
            self.ledger.join(axes[dim], other)
        self.label(out, axes)

    def _linear(self, args: Any, kwargs: Any, out: Tensor) -> None:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        x, weight, bias = given["input"], given["weight"], given.get("bias")
        path = self.path_of(weight)
        if path is None:
            self.unknown("linear, by a weight that is computed", (args, kwargs))
            return
        self.reads(path, 1, self.axes(x)[-1])
        made = self.makes(path, 0, out.shape[-1], path.rpartition(".")[0])
        if (name := self.path_of(bias)) is not None:
            self.ledger.use(name, 0, made, "through")
        self.ledger.works(path, out.numel() / out.shape[-1] / self.batch)
        self.label(out, [*self.axes(x)[:-1], made])

    def reads(self, path: str | None, dim: int, labels: Labels | None, copies: int = 1) -> None:
        """Note that a weight reads labelled entries, each `copies` times in a row."""
        if path is not None and labels is not None:
            self.ledger.use(path, dim, np.repeat(labels, copies), "in")

    def makes(self, path: str | None, dim: int, size: int, where: str) -> Labels:
        """Fresh labels of what a weight makes."""
        labels = self.ledger.fresh(size, where)
        if path is not None:
            self.ledger.use(path, dim, labels, "out")
        return labels

    def _move(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Send labels the way that the values went."""
        name, joined = _name(func), _name(func) in JOINING
        sources = [one for one in tensors_in((args, kwargs)) if joined or one is args[0]]
        if joined:
            self._fill(sources)
        axes: list[Axes] = [[None] * one.dim() for one in tensors_in(out)]
        for dim in range(sources[0].dim()):
            labels = [self.axes(one)[dim] for one in sources]
            if all(one is None for one in labels):
                continue
            if joined and dim != _joined_axis(name, sources[0].dim(), args, kwargs):
                for one in labels[1:]:
                    self.ledger.join(labels[0], one)  # type: ignore[arg-type]
                labels = [labels[0]] * len(labels)
            stand_in = {
                id(one): _spread(one, dim, own) for one, own in zip(sources, labels, strict=True)
            }
            moved_args, moved_kwargs = pytree.tree_map(
                lambda one: stand_in.get(id(one), one),  # noqa: B023
                (args, kwargs),
            )
            found = tensors_in(func(*moved_args, **moved_kwargs))
            target = _target_axis(name, dim, sources[0].dim(), moved_args, moved_kwargs)
            carried = [self._carry(one, target) for one in found]
            self._check_whole(name, labels, carried)
            for index, (axis, own) in enumerate(carried):
                if axis is not None and axes[index][axis] is not None:
                    self.ledger.fix(own, f"{name} merges two axes")
                    self.ledger.fix(axes[index][axis], f"{name} merges two axes")
                elif axis is not None:
                    axes[index][axis] = own
            self._equal_pieces(name, [own for _, own in carried])
        for result, one in zip(tensors_in(out), axes, strict=True):
            self.label(result, one)

    def _fill(self, sources: Sequence[Tensor]) -> None:
        """What is joined with channels needs labels of its own, which stay."""
        for dim in range(sources[0].dim()):
            axes = [self.axes(one)[dim] for one in sources]
            if all(one is None for one in axes):
                continue
            for one, labels in zip(sources, axes, strict=True):
                if labels is None:
                    known = list(self.axes(one))
                    known[dim] = self.ledger.fresh(one.shape[dim], "a tensor of fixed size")
                    self.ledger.fix(known[dim], "joined as a tensor of fixed size")
                    self.label(one, known)

    def _carry(self, moved: Tensor, target: int | None) -> tuple[int | None, Labels]:
        """The axis that labels lie along after a move, and the labels; others are joined."""
        values = moved.numpy()
        along = [dim for dim in range(values.ndim) if np.ptp(values, axis=dim).any()]
        if not along:
            single = [dim for dim in range(values.ndim) if values.shape[dim] == 1]
            axis = target if target in single else (single[-1] if single else None)
            return axis, np.unique(values)
        axis = target if target in along else along[0]
        rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        if len(along) > 1:
            self.ledger.join(np.repeat(rows[:, :1], rows.shape[1] - 1, axis=1), rows[:, 1:])
        return axis, np.ascontiguousarray(rows[:, 0])

    def _check_whole(
        self,
        name: str,
        labels: Sequence[Labels | None],
        carried: Sequence[tuple[int | None, Labels]],
    ) -> None:
        kept = [own for axis, own in carried if axis is not None]
        classes = np.concatenate(kept) if kept else np.empty(0, dtype=np.int64)
        for one in labels:
            lost = one is not None and not (kept and len(np.unique(classes)) >= len(np.unique(one)))
            if lost and name not in _MERGING:
                self.ledger.fix(one, f"{name} takes a part of them")

    def _equal_pieces(self, name: str, pieces: Sequence[Labels]) -> None:
        """Pieces are cut to equal sizes again when there are fewer channels."""
        if name not in ("chunk", "split", "tensor_split", "unbind", "split_with_sizes"):
            return
        if len({tuple(one) for one in pieces}) > 1:
            for piece in pieces[1:]:
                if len(piece) == len(pieces[0]):
                    self.ledger.join(pieces[0], piece)
                else:
                    self.ledger.fix(piece, f"{name} cuts them into unequal pieces")


def _spread(tensor: Tensor, dim: int, labels: Labels | None) -> Tensor:
    if labels is None or dim >= tensor.dim():
        return torch.full(tensor.shape, -1, dtype=torch.int64)
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return torch.from_numpy(labels).reshape(shape).expand(tensor.shape).contiguous()


def _joined_axis(name: str, rank: int, args: Any, kwargs: Any) -> int | None:
    """The axis that a function joins end to end; None where it makes one of its own."""
    if name == "stack":
        return None
    if name in ("hstack", "vstack", "dstack"):
        return {"hstack": min(1, rank - 1), "vstack": 0, "dstack": 2}[name]
    return kwargs.get("dim", args[1] if len(args) > 1 else 0) % rank


def _target_axis(name: str, dim: int, rank: int, args: Any, kwargs: Any) -> int | None:
    """Where an axis is after a move, as far as the arguments tell when it is split or stacked."""
    if name == "stack":
        place = kwargs.get("dim", args[1] if len(args) > 1 else 0) % (rank + 1)
        return dim + (place <= dim)
    if name in ("view", "reshape", "unflatten"):
        sizes = next((list(one) for one in args[1:] if isinstance(one, (tuple, list))), None)
        first = args[1] % rank if name == "unflatten" else 0
        sizes = list(args[1:]) if sizes is None else sizes
        return first + sizes.index(-1) if -1 in sizes else None
    return dim


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    return func.__self__.__name__ if name == "__get__" else name


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of a nested structure."""
    return [one for one in pytree.tree_leaves(_plain(tree)) if isinstance(one, Tensor)]


def _plain(tree: Any) -> Any:
    return tuple(tree) if isinstance(tree, nn.utils.rnn.PackedSequence) else tree


@contextmanager
def bare(module: nn.Module) -> Iterator[None]:
    """Without hooks of others, but for those of `torch.nn.utils` that make weights."""
    stored = []
    for layer in module.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            hooks = getattr(layer, name)
            kept = {
                key: hook
                for key, hook in hooks.items()
                if type(hook).__module__.startswith("torch.nn.utils")
            }
            stored.append((layer, name, hooks))
            object.__setattr__(layer, name, type(hooks)(kept))
    try:
        yield
    finally:
        for layer, name, hooks in stored:
            object.__setattr__(layer, name, hooks)
