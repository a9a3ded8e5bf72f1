"""Activation quantization in training and calibration: ranges, clip values, hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.grids import AffineGrid, grid_of_range, numbers_of_range, range_of_grid
from lightning_compress.hooks import hook_input, hook_output
from lightning_compress.quantization.fake_quantize import (
    clipped_fake_quantize,
    fake_quantize,
    fake_quantize_by,
)
from lightning_compress.quantization.learned_step import LearnedPositive
from lightning_compress.quantization.ranges import RangeObserver, merge_ranges
from lightning_compress.sample_inputs import run_batch
from lightning_compress.state import ActivationGrids, set_activation_grids

__all__ = [
    "Activation",
    "ActivationQuantizer",
    "LastLayers",
    "calibrate",
]

# What hands values on as they are, by autograd's names.
MOVES = ("View", "UnsafeView", "ReshapeAlias", "Reshape", "Transpose", "T", "Permute", "Alias")
MOVES += ("Squeeze", "Unsqueeze", "Slice", "Expand", "Clone", "ToCopy", "NativeDropout")
MOVES += ("MaxPool2DWithIndices", "MaxPool3DWithIndices", "PixelShuffle")
MOVES += ("UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D")
_CHANGED = "changed"  # read through anything but moves, a ReLU or a BatchNorm right behind it
_DIVERGED = (
    "activations of {} are NaN or infinite: training has diverged, or the data hold such values"
)
Reduce = Callable[[Tensor, str], Tensor]


class LastLayers:
    """Finds them in autograd's graph, from forward passes that run anyway.

    An integer product rounds what it gives. Where only moves and a ReLU stand between it and the
    products that read it, their input grids say how; where a LeakyReLU, a norm or an addition
    stands there, it needs a grid of its own: behind its BatchNorm, which is folded into it. So it
    does where its readers come to it in different ways: one through a norm, one past it.

    Args:
        layers: by path.
        parts: paths of the networks that ship; what one of them gives another is an output.
        norms: BatchNorm layers by path.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> finder = LastLayers({"0": net[0], "2": net[2]})
    >>> import torch; _ = net(torch.zeros(1, 2))
    >>> finder.look(), finder.found()
    (True, ['2'])
    >>> finder.stop()
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        parts: Sequence[str] = ("",),
        norms: dict[str, nn.Module] | None = None,
    ) -> None:
        self.part_of = {path: _part(path, parts) for path in layers}
        self._outputs: dict[Any, str] = {}  # autograd nodes of this step
        self._inputs: list[tuple[Any, str]] = []
        self._feeds: set[str] = set()  # layers whose output reaches another one
        self._seen: set[str] = set()
        self._ways: dict[str, set[str]] = {}  # how each is read: "", "relu", "norm", changed
        self._without_kernel: set[str] = set()  # products that give floats in any case
        self._normed: dict[
            Any, tuple[str, Any]
        ] = {}  # what a norm gives -> its path, what it reads
        self._handles: list[RemovableHandle] = []
        for path, layer in layers.items():
            self._hook(path, layer)
        for path, norm in (norms or {}).items():
            self._hook_norm(path, norm)

    def _hook(self, path: str, layer: nn.Module) -> None:
        def entered(x: Tensor) -> Tensor:
            if x.grad_fn is not None:
                self._inputs.append((x.grad_fn, path))
            return x

        def left(x: Tensor) -> Tensor:
            if x.grad_fn is not None:
                self._outputs[x.grad_fn] = path
                if isinstance(layer, nn.Linear) and x.dim() != 2:
                    self._without_kernel.add(path)
                self._seen.add(path)
            return x

        self._handles += [hook_input(layer, entered), hook_output(layer, left)]

    def _hook_norm(self, path: str, norm: nn.Module) -> None:
        given: list[Any] = []

        def entered(x: Tensor) -> Tensor:
            given[:] = [x.grad_fn]
            return x

        def left(x: Tensor) -> Tensor:
            if x.grad_fn is not None and given and given[0] is not None:
                self._normed[x.grad_fn] = (path, given[0])
            given.clear()
            return x

        self._handles += [hook_input(norm, entered), hook_output(norm, left)]

    def look(self) -> bool:
        """Process the layers that ran since the last call; return whether all layers have run."""
        for start, path in self._inputs:
            self._walk(start, path)
            self._find_bare(start)
        self._outputs, self._inputs, self._normed = {}, [], {}
        return self._seen == set(self.part_of)

    def _walk(self, start: Any, path: str) -> None:
        waiting, visited = [start], {start}
        while waiting:
            node = waiting.pop()
            if (source := self._outputs.get(node)) is not None:
                if source != path and self.part_of[source] == self.part_of[path]:
                    self._feeds.add(source)
                continue  # what lies behind it is found from its own input
            for before, _ in node.next_functions:
                if before is not None and before not in visited:
                    visited.add(before)
                    waiting.append(before)

    def _find_bare(self, start: Any) -> None:
        """Trace back from the input of a product; note sources that more than moves follow."""
        waiting, visited = [(start, "")], {(start, "")}
        while waiting:
            node, way = waiting.pop()
            if (source := self._source(node)) is not None:
                self._ways.setdefault(source, set()).add(way)
                continue
            way = _way_through(_kind(node), way)
            for before, _ in node.next_functions:
                if before is not None and (before, way) not in visited:
                    visited.add((before, way))
                    waiting.append((before, way))

    def _source(self, node: Any) -> str | None:
        """The product that a node gives the output of, or the norm right behind one."""
        if node in self._outputs or node not in self._normed:
            return self._outputs.get(node)
        norm, given = self._normed[node]
        product = self._behind_moves(given)
        if product is None:
            return None
        self._ways.setdefault(product, set()).add("norm")
        return norm

    def _behind_moves(self, node: Any) -> str | None:
        """The product that gives a value, through moves; None where there is another operation."""
        while node not in self._outputs:
            if _kind(node) not in MOVES or node.next_functions[0][0] is None:
                return None
            node = node.next_functions[0][0]
        return self._outputs[node]

    def bare(self) -> list[str]:
        """Layers and norms that are not the last, and need a grid of their output."""
        bare = {path for path, ways in self._ways.items() if len(ways) > 1 or _CHANGED in ways}
        return sorted(bare - self._without_kernel - set(self.found()))

    def found(self) -> list[str]:
        """The last layers among those that ran."""
        return [path for path in self.part_of if path in self._seen - self._feeds]

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs, self._inputs = {}, []


def _way_through(kind: str, way: str) -> str:
    """How a product is read, seen from one operation closer to it."""
    if kind in MOVES:
        return way
    return "relu" if kind == "Relu" and way != _CHANGED else _CHANGED


def _kind(node: Any) -> str:
    """`"Relu"` of `ReluBackward0`."""
    return type(node).__name__.partition("Backward")[0]


def _part(path: str, parts: Sequence[str]) -> str:
    inside = [one for one in parts if one == "" or path == one or path.startswith(f"{one}.")]
    return max(inside, key=len, default="")


class Activation:
    """One activation: its observer, or the clip value that it learns, and its grid.

    Args:
        bits: 2 to 8.
        observer: a name in `OBSERVERS`.
        clip_lr: relative change of a learned clip value at an update (PACT, arXiv:1805.06085);
            None: the observed range counts. Where values fall below 0 it counts in any case.

    >>> one = Activation(bits=8, observer="minmax")
    >>> one.change(torch.tensor([2.55]), training=True)
    tensor([2.5500])
    >>> merge_ranges([one.observer]); one.grid().scale
    tensor([0.0100])
    """

    def __init__(self, *, bits: int, observer: str, clip_lr: float | None = None) -> None:
        self.bits, self.clip_lr = bits, clip_lr
        self.observer = RangeObserver(observer, bits)
        self.clip: LearnedPositive | None = None
        self.frozen = False
        self._numbers: tuple[Tensor, tuple[float, int, int]] | None = None  # of the bounds
        self._leaf: Tensor | None = None  # the clip value in autograd's graph

    def change(self, x: Tensor, *, training: bool) -> Tensor:
        """Input of the layer instead of x: quantized, or x itself before a range is known."""
        if training and not self.frozen and self.clip is None:
            self.observer.observe(x)
        if self.clip is not None and training and not self.frozen:
            leaf = self._leaf
            if leaf is None:
                leaf = self._leaf = self.clip.value.clone().to(x.device).requires_grad_()
            return clipped_fake_quantize(x, leaf, self.bits)
        if x.device.type == "cpu" and self.clip is None:
            bounds = self.observer.bounds
            if bounds is None:
                return x
            if self._numbers is None or self._numbers[0] is not bounds:
                self._numbers = bounds, self._by_numbers(bounds)
            return fake_quantize_by(x, *self._numbers[1])
        grid = self._grid(x.device)
        return x if grid is None else fake_quantize(x, grid)

    def _by_numbers(self, bounds: Tensor) -> tuple[float, int, int]:
        low, high = bounds.tolist()
        return numbers_of_range(low, high, self.bits)

    def grid(self) -> AffineGrid | None:
        """Current grid, from 0 to 2^bits - 1; None without a range."""
        return self._grid(torch.device("cpu"))

    def _grid(self, device: torch.device) -> AffineGrid | None:
        """The grid in a device's memory: in the activation's own, nothing waits for it."""
        if self.clip is not None:
            low, high = torch.zeros(1, device=device), self.clip.value.detach().to(device)
        elif self.observer.bounds is not None:
            bounds = self.observer.bounds.to(torch.float32).to(device)
            low, high = bounds[:1], bounds[1:]
        else:
            return None
        return grid_of_range(low, high, bits=self.bits, symmetric=False)

    @property
    def zero_width(self) -> bool:
        """Whether nothing but 0 was seen."""
        return self.observer.range == (0.0, 0.0)

    def settled(self) -> None:
        """Initialize a clip value with the end of the observed range."""
        if self.clip_lr is None or self.clip is not None:
            return
        known = self.observer.range
        if known and known[0] >= 0 < known[1]:
            self.clip = LearnedPositive(torch.tensor([known[1]]), self.clip_lr)

    def learn(self, reduce: Reduce | None) -> None:
        """Follow the clip value's gradient, summed over processes."""
        if self.clip is None or self.frozen:
            return
        leaf = self._leaf
        known = leaf is not None and leaf.grad is not None
        gradient = leaf.grad if known else torch.zeros_like(self.clip.value)  # type: ignore[union-attr]
        self._leaf = None
        assert gradient is not None
        self.clip.step(gradient if reduce is None else reduce(gradient, "sum"))

    def forget_gradient(self) -> None:
        """Reset the gradient that another optimizer's loss left at the clip value."""
        self._leaf = None

    def state_dict(self) -> dict[str, Any]:
        """Range and clip value."""
        clip = None if self.clip is None else self.clip.state_dict()
        return {"observer": self.observer.state_dict(), "clip": clip, "frozen": self.frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.observer.load_state_dict(state["observer"])
        self.frozen = state["frozen"]
        if state["clip"] is not None:
            self.clip = LearnedPositive(state["clip"]["value"], self.clip_lr or 0.0)
            self.clip.load_state_dict(state["clip"])


class ActivationQuantizer:
    """Inputs of layers on grids, and outputs of the last ones and of those that no reader rounds.

    Args:
        layers: by path.
        norms: BatchNorm layers by path; what one behind a layer gives may need the grid.
        parts: paths of the networks that ship, each with last layers of its own.
        bits: 2 to 8.
        observer: a name in `OBSERVERS`.
        clip_lr: see `Activation`.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Flatten(), nn.Linear(2, 1))
    >>> side = ActivationQuantizer({"0": net[0], "2": net[2]})
    >>> side.attach()
    >>> _ = net(torch.ones(1, 2)); side.step(); side.freeze(); side.leave_grids(); side.detach()
    >>> from lightning_compress.state import activation_grids
    >>> activation_grids(net[0]).output is None, activation_grids(net[2]).output.bits
    (True, 8)
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        *,
        parts: Sequence[str] = ("",),
        norms: dict[str, nn.Module] | None = None,
        bits: int = 8,
        observer: str = "minmax",
        clip_lr: float | None = None,
    ) -> None:
        self.layers, self.parts = layers, parts
        self.norms = _norms_beside(layers, norms)
        self._rules: dict[str, Any] = {"bits": bits, "observer": observer}
        self._clip_lr = clip_lr
        self.inputs = {path: self._input() for path in layers}
        # All are watched until it is known which give on a grid: the last ones, and the bare.
        self.outputs = {path: self._output() for path in (*layers, *self.norms)}
        self.last: list[str] | None = None
        self.calibrating = False  # only watch, in any mode
        self._searching = True  # for the last layers
        self._finder: LastLayers | None = None
        self._handles: list[RemovableHandle] = []

    def _input(self) -> Activation:
        return Activation(clip_lr=self._clip_lr, **self._rules)

    def _output(self) -> Activation:
        return Activation(**self._rules)

    def begin_from(self, known: Mapping[str, ActivationGrids]) -> None:
        """Start from the grids of an earlier fit, where the bits are the same.

        Args:
            known: by path of the layer.
        """
        for path, pair in known.items():
            for one, grid in (
                (self.inputs.get(path), pair.input),
                (self.outputs.get(path), pair.output),
            ):
                if one is not None and grid is not None and grid.bits == one.bits:
                    low, high = range_of_grid(grid)
                    one.observer.range = (float(low), float(high))

    def change(
        self, layers: dict[str, nn.Module], norms: dict[str, nn.Module] | None = None
    ) -> None:
        """Continue with other layers and norms, by path: known ones keep their ranges.

        Which are the last ones is looked for again; until it is known, those of before count.
        """
        attached = bool(self._handles)
        beside = _norms_beside(layers, norms)
        watched = self.layers | self.norms
        same = {path for path, one in (layers | beside).items() if watched.get(path) is one}
        self.detach()
        self.layers, self.norms = layers, beside
        self.inputs = {
            path: self.inputs[path] if path in same else self._input() for path in layers
        }
        self.outputs = {
            path: self.outputs[path] if path in same else self._output()
            for path in (*layers, *beside)
        }
        if self.last is not None:
            self.last = [path for path in self.last if path in same]
        self._searching = True
        if attached:
            self.attach()

    @property
    def following(self) -> bool:
        """Whether any range is still to settle."""
        return not all(one.frozen for one in self._all())

    def attach(self) -> None:
        """Hook the layers."""
        if self._searching:
            self._finder = LastLayers(self.layers, self.parts, self.norms)
        for path, layer in self.layers.items():
            self._handles.append(hook_input(layer, partial(self._enter, path)))
        for path, layer in (self.layers | self.norms).items():
            if self._searching or path in (self.last or ()):
                self._handles.append(hook_output(layer, partial(self._leave, path)))

    def _enter(self, path: str, x: Tensor) -> Tensor:
        return self._change(self.inputs[path], path, x)

    def _leave(self, path: str, x: Tensor) -> Tensor:
        changed = self._change(self.outputs[path], path, x)
        return changed if path in (self.last or ()) else x

    def _change(self, one: Activation, path: str, x: Tensor) -> Tensor:
        try:
            changed = one.change(x, training=self.calibrating or self._is_training(path))
        except ValueError as error:
            raise FloatingPointError(_DIVERGED.format(path)) from error
        return x if self.calibrating else changed

    def _is_training(self, path: str) -> bool:
        return (self.layers.get(path) or self.norms[path]).training

    def detach(self) -> None:
        """Remove all hooks."""
        if self._finder is not None:
            self._finder.stop()
            self._finder = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _all(self) -> list[Activation]:
        kept = self.outputs if self._searching else self.last or ()
        return [*self.inputs.values(), *(self.outputs[path] for path in kept)]

    def step(self, reduce: Reduce | None = None) -> None:
        """Update the ranges after an optimizer step; all processes must call alike."""
        self._look()
        active = [one for one in self._all() if not one.frozen]
        merge_ranges([one.observer for one in active], reduce)
        for one in active:
            one.learn(reduce)
            one.settled()

    def check(self) -> None:
        """Look at the ranges in other devices' memory, at which no step looks.

        Raises:
            FloatingPointError: naming a layer whose activations were not finite.
        """
        for path, one in [*self.inputs.items(), *self.outputs.items()]:
            bounds = one.observer.bounds
            if bounds is not None and bounds.device.type != "cpu" and not bounds.isfinite().all():
                raise FloatingPointError(_DIVERGED.format(path))

    def _look(self) -> None:
        if self._finder is not None and self._finder.look():
            self._know_last(self._finder)

    def _know_last(self, finder: LastLayers) -> None:
        self.last = [*finder.found(), *finder.bare()] or self.last or []
        self._searching = False
        self.detach()
        self.attach()

    def forget_gradients(self) -> None:
        """Reset the gradients that another optimizer's loss left at the clip values."""
        for one in self.inputs.values():
            one.forget_gradient()

    def without_range(self) -> dict[str, str]:
        """Layers whose inputs have no range: path and reason."""
        dead, unseen = "always 0: the layer before is dead", "never seen in training mode"
        return {
            path: dead if one.zero_width else unseen
            for path, one in self.inputs.items()
            if one.zero_width or one.grid() is None
        }

    def freeze(self, *, spare: bool = False) -> None:
        """Keep all ranges.

        Args:
            spare: layers without a range stay as they are, unless there is no other.

        Raises:
            ValueError: for layers that were never run in training mode, or only on zeros.
        """
        bare = self.without_range()
        if bare and not (spare and len(bare) < len(self.inputs)):
            found = "; ".join(f"{path}: {why}" for path, why in bare.items())
            raise ValueError(
                f"inputs that have no range when ranges are frozen: {found}. Exclude these layers, "
                "or freeze later"
            )
        for path in bare:
            self.inputs[path].observer.range = None
        if self._finder is not None:
            self._know_last(self._finder)
        for one in self._all():
            one.frozen = True

    def thaw(self) -> None:
        """Gather again, in a new fit."""
        for one in self._all():
            one.frozen = False

    def grids(self) -> dict[str, ActivationGrids]:
        """Current grids by path of the layer, without those that are not known yet."""
        last = self.last or ()
        found = {
            path: ActivationGrids(
                self.inputs[path].grid() if path in self.inputs else None,
                self.outputs[path].grid() if path in last else None,
            )
            for path in (*self.layers, *self.norms)
        }
        return {path: grids for path, grids in found.items() if grids != ActivationGrids()}

    def leave_grids(self) -> None:
        """Attach the grids to their layers."""
        grids = self.grids()
        for path, layer in self.layers.items():
            set_activation_grids(layer, grids.get(path))
        for path, norm in self.norms.items():
            set_activation_grids(norm, grids.get(path))

    def state_dict(self) -> dict[str, Any]:
        """All ranges, and which layers are last."""
        return {
            "inputs": {path: one.state_dict() for path, one in self.inputs.items()},
            "outputs": {path: one.state_dict() for path, one in self.outputs.items()},
            "last": self.last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them.

        Raises:
            ValueError: when the state is of other layers.
        """
        if set(state["inputs"]) != set(self.inputs):
            raise ValueError(
                f"the checkpoint quantizes the inputs of {sorted(state['inputs'])}, this run those "
                f"of {sorted(self.inputs)}"
            )
        for path in self.layers:
            self.inputs[path].load_state_dict(state["inputs"][path])
        for path in set(self.outputs) & set(state["outputs"]):
            self.outputs[path].load_state_dict(state["outputs"][path])
        self.last = state["last"]
        self._searching = self.last is None


def _norms_beside(
    layers: Mapping[str, nn.Module], norms: Mapping[str, nn.Module] | None
) -> dict[str, nn.Module]:
    return {path: one for path, one in (norms or {}).items() if path not in layers}


def calibrate(module: nn.Module, side: ActivationQuantizer, batches: Sequence[object]) -> None:
    """Run all batches through the module in eval mode, for an attached quantizer to observe.

    Raises:
        ValueError: for layers that no batch went through, and for activations that are not finite
            or always 0.
    """
    side.calibrating = True
    side.attach()
    try:
        for batch in batches:
            # Only the graph of a pass with gradients tells which layers are the last ones.
            with torch.set_grad_enabled(side.last is None):
                run_batch(module, batch)
            side.step()
        side.freeze()
    except FloatingPointError as error:
        raise ValueError(f"calibration: {error}") from error
    finally:
        side.detach()
        side.calibrating = False
