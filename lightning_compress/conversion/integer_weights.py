"""Integer weights with their scales, in the form that an ONNX file stores."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_compress.grids import AffineGrid, CodebookGrid, channel_axis
from lightning_compress.quantization.bias_rounding import stretch
from lightning_compress.quantization.ranges import affine_grid
from lightning_compress.state import Grid, compression_state
from lightning_compress.targets import is_foreign, split_path

__all__ = [
    "CodebookWeight",
    "IntegerWeight",
    "StoredWeight",
    "Summed",
    "put_on_grids",
    "stored_weight",
    "weight_grids",
]
INT4, UINT4, INT8, UINT8 = (-8, 7), (0, 15), (-128, 127), (0, 255)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
HOOKED = ("_orig", "_v")  # what the older spectral_norm and weight_norm make a weight from
SAME_FACTOR = 1e-5  # of a tensor: what float rounding explains
OFF_GRID = 1e-2  # of a step: what float rounding explains


@dataclass(frozen=True)
class Summed:
    """How `enlarged_as_conv` lays out its kernel: `rows @ weight @ columns^T`, then moved.

    Args:
        factor: of the enlargement.
        kernel: rows and columns of the weight.
        groups: of the convolution.

    >>> layout = Summed(2, (3, 3), 1)
    >>> weight = np.arange(18, dtype=np.int32).reshape(2, 1, 3, 3)
    >>> layout.expand(weight).shape, bool((layout.weights(layout.expand(weight)) == weight).all())
    ((8, 1, 2, 2), True)
    """

    factor: int
    kernel: tuple[int, int]
    groups: int

    @property
    def taps(self) -> tuple[int, int]:
        """Rows and columns of the summed kernel."""
        high, wide = (-(-(size + self.factor - 1) // self.factor) for size in self.kernel)
        return high, wide

    def matrix(self, axis: int) -> NDArray[np.float32]:
        """(factor * taps, kernel) of 0 and 1: which weights add up, by offset and tap."""
        size, taps = self.kernel[axis], self.taps[axis]
        offset, tap = np.divmod(np.arange(self.factor * taps), taps)
        first = size - 1 - (self.factor * (taps - 1 - tap) + offset)
        place = np.arange(size)[None] - first[:, None]
        return ((place >= 0) & (place < self.factor)).astype(np.float32)

    def expand(self, weight: NDArray) -> NDArray[np.int32]:
        """The kernel, (out * factor^2, in / groups, taps, taps), of a weight of integers."""
        sums = self.matrix(0) @ weight.astype(np.float32) @ self.matrix(1).T
        split = sums.reshape(self.split(weight.shape[0], weight.shape[1]))
        shape = (-1, weight.shape[1], *self.taps)
        return split.transpose(self.order).reshape(shape).astype(np.int32)

    def weights(self, kernel: NDArray[np.int32]) -> NDArray[np.int32] | None:
        """The weight, (out, in / groups, rows, columns), of a kernel; None when there is none."""
        outputs, inputs = kernel.shape[0] // self.factor**2, kernel.shape[1]
        split = self.split(outputs, inputs)
        moved = kernel.reshape([split[axis] for axis in self.order])
        high, wide = (self.factor * taps for taps in self.taps)
        sums = moved.transpose(np.argsort(self.order)).reshape(outputs, inputs, high, wide)
        one, other = (np.linalg.pinv(self.matrix(axis)) for axis in (0, 1))
        found = np.rint(one @ sums @ other.T).astype(np.int32)
        return found if (self.expand(found) == kernel).all() else None

    def split(self, outputs: int, inputs: int) -> tuple[int, ...]:
        """The shape of the sums with offsets and taps apart."""
        (high, wide), factor = self.taps, self.factor
        return self.groups, outputs // self.groups, inputs, factor, high, factor, wide

    @property
    def order(self) -> tuple[int, ...]:
        """Offsets come first among the channels, but behind the groups where there are several."""
        return (3, 5, 0, 1, 2, 4, 6) if self.groups == 1 else (0, 1, 3, 5, 2, 4, 6)


@dataclass(frozen=True)
class IntegerWeight:
    """`scale * symbols`, with 0 standing for 0.

    Args:
        symbols: int32, the grid's q minus its zero point.
        scale: float32, broadcasts against `symbols`; the same rank.
        zero: the grid's zero point, int32, of the scale's shape.
        source: where the grid comes from, in words.
        stretch: what `symbols` were multiplied with, and `scale` divided by; a power of 2.
        summed: how the symbols are sums of fewer numbers; None where they are not.
    """

    symbols: NDArray[np.int32]
    scale: NDArray[np.float32]
    zero: NDArray[np.int32]
    source: str
    stretch: int = 1
    summed: Summed | None = None

    @property
    def values(self) -> NDArray[np.float32]:
        """The weights themselves."""
        return self.symbols.astype(np.float32) * self.scale

    @property
    def axis(self) -> int | None:
        """The one axis that the scale runs along; None when one scale serves all.

        Raises:
            ValueError: when it runs along several.
        """
        axes = [axis for axis, size in enumerate(self.scale.shape) if size > 1]
        if len(axes) > 1:
            raise ValueError(f"a scale of shape {self.scale.shape} runs along several axes")
        return axes[0] if axes else None

    def scaled(self, factor: NDArray[np.float32]) -> IntegerWeight:
        """The weight times a factor, exactly: signs go into the symbols, the rest into the scale.

        Args:
            factor: broadcasts against `symbols`, of the same rank. A factor of 0 empties its
                channel and leaves it the step 1.
        """
        sign = np.sign(factor).astype(np.int32)
        size = np.where(sign == 0, np.float32(1), np.abs(factor) * self.scale)
        return replace(
            self,
            symbols=self.symbols * sign,
            scale=size.astype(np.float32),
            zero=np.broadcast_to(self.zero, size.shape).copy(),
        )

    def moved(self, move: Callable[[NDArray], NDArray]) -> IntegerWeight:
        """After a function that only reorders, cuts or repeats elements.

        Raises:
            ValueError: when no single axis of the result carries the steps.
        """
        symbols = move(self.symbols)
        scale, zero = (
            move(np.broadcast_to(part, self.symbols.shape)) for part in (self.scale, self.zero)
        )
        for axis in (None, *range(symbols.ndim)):
            short = tuple(slice(None) if one == axis else slice(1) for one in range(symbols.ndim))
            if (scale == scale[short]).all() and (zero == zero[short]).all():
                return replace(
                    self, symbols=symbols, scale=scale[short], zero=zero[short], summed=None
                )
        raise ValueError("the moved scale runs along several axes")

    def nibbles(self) -> tuple[str, NDArray[np.int32], NDArray[np.int32] | None] | None:
        """4-bit storage of the unstretched symbols, as `encoded` says; None for more bits."""
        small = self.symbols // self.stretch
        if INT4[0] <= small.min(initial=0) and small.max(initial=0) <= INT4[1]:
            return "int4", small, None
        low = small.min(self._rest, keepdims=True, initial=0)
        if (small.max(self._rest, keepdims=True, initial=0) - low > UINT4[1]).any():
            return None
        return "uint4", small - low, -low

    def encoded(self) -> tuple[str, NDArray[np.integer], NDArray[np.int32] | None]:
        """Storage type ("int8" or "uint8"), what is stored, zero points (None: all 0).

        Symbols that fit into signed integers need no zero point: runtimes are fastest so.
        """
        if INT8[0] <= self.symbols.min(initial=0) and self.symbols.max(initial=0) <= INT8[1]:
            return "int8", self.symbols.astype(np.int8), None
        zero = np.where((self.symbols < 0).any(self._rest, keepdims=True), self.zero, 0)
        zero = self._fitting_zero(zero)
        return "uint8", (self.symbols + zero).astype(np.uint8), zero

    def stretched(self) -> IntegerWeight:
        """The same weight with few bits spread over 7, exactly: others stay as they are.

        Biases are stored in steps of input times weight, too coarse where both have few bits.
        """
        factor = stretch(int(np.abs(self.symbols).max(initial=0)))
        if factor == 1:
            return self
        scale = (self.scale / factor).astype(np.float32)
        return replace(self, symbols=self.symbols * factor, scale=scale, stretch=factor)

    def may_be_cut_off(self, op: str) -> bool:
        """Whether uint8 inputs times two neighbouring weights may exceed 16 bits with their sum.

        CPUs without VNNI add products in such pairs, and cut them off at 32,767. Neighbours are
        those that a product of type `op` reads one after the other: along the input channels.
        """
        rows = self.symbols.T if op == "MatMul" else self.symbols
        if rows.ndim > 2:
            rows = np.moveaxis(rows, 1, -1)
        rows = rows.reshape(rows.shape[0], -1)
        rows = rows[:, : rows.shape[1] // 2 * 2].reshape(rows.shape[0], -1, 2)
        positive = rows.clip(min=0).sum(-1).max(initial=0)
        return 255 * int(max(positive, -rows.clip(max=0).sum(-1).min(initial=0))) > 32767

    @property
    def _rest(self) -> tuple[int, ...]:
        return tuple(axis for axis, size in enumerate(self.scale.shape) if size == 1)

    def _fitting_zero(self, zero: NDArray[np.int32]) -> NDArray[np.int32]:
        """Zero points that hold all symbols; a flipped channel has its range mirrored."""
        low = self.symbols.min(self._rest, keepdims=True, initial=0)
        high = self.symbols.max(self._rest, keepdims=True, initial=0)
        return np.clip(zero, -low, UINT8[1] - high).astype(np.int32)


@dataclass(frozen=True)
class CodebookWeight:
    """`centres[index]`.

    Args:
        index: which centre, int32.
        centres: float32, at most 256.
        source: where the grid comes from, in words.
    """

    index: NDArray[np.int32]
    centres: NDArray[np.float32]
    source: str

    @property
    def values(self) -> NDArray[np.float32]:
        """The weights themselves."""
        return self.centres[self.index]

    def moved(self, move: Callable[[NDArray], NDArray]) -> CodebookWeight:
        """After a function that only reorders, cuts or repeats elements."""
        return replace(self, index=move(self.index))


StoredWeight = IntegerWeight | CodebookWeight


def stored_weight(layer: nn.Module, weight: Tensor, grid: Grid | None) -> StoredWeight:
    """A layer's weight on its own grid; without one, on 8 bits over its min/max range.

    >>> import torch
    >>> layer = nn.Linear(1, 2)
    >>> stored = stored_weight(layer, torch.tensor([[2.54], [-1.27]]), None)
    >>> stored.symbols.tolist(), stored.source
    ([[127], [-127]], 'min/max range, symmetric, per channel, 8 bits')
    """
    if isinstance(grid, CodebookGrid):
        index = grid.quantize(weight).numpy() + grid.zero_index
        return CodebookWeight(index, grid.centres.cpu().numpy(), f"codebook, {grid.bits} bits")
    source = "trained grid"
    if grid is None:
        grid = affine_grid(weight, bits=8, axis=channel_axis(layer))
        source = "min/max range"
    return IntegerWeight(
        symbols=grid.quantize(weight).numpy(),
        scale=_along(grid, grid.scale, weight).astype(np.float32),
        zero=_along(grid, grid.zero_point, weight).astype(np.int32),
        source=f"{source}, {_described(grid)}",
    )


def _described(grid: AffineGrid) -> str:
    kind = "symmetric" if grid.symmetric else "affine"
    return f"{kind}, per {'tensor' if grid.axis is None else 'channel'}, {grid.bits} bits"


def _along(grid: AffineGrid, values: Tensor, weight: Tensor) -> NDArray:
    shape = [1] * weight.dim()
    if grid.axis is not None:
        shape[grid.axis] = -1
    return values.detach().cpu().numpy().reshape(shape)


def weight_grids(module: nn.Module, plain: nn.Module) -> dict[str, Grid]:
    """Grids by the names that parameters have in the plain copy.

    A spectral_norm or weight_norm, of the new form (a parametrization) or the older, scales a
    weight, and so its steps.
    """
    weights = dict(plain.named_parameters(remove_duplicate=False))
    grids: dict[str, Grid] = {}
    for path, grid in compression_state(module).grids.items():
        name = _plain_name(path, weights)
        if name == path:
            grids[path] = grid
            continue
        original = module.get_parameter(path).detach().cpu().float()
        scaled = _scaled(grid, original, weights[name].detach().float())
        if scaled is not None:
            grids[name] = scaled
    return grids


def _plain_name(path: str, known: Container[str]) -> str:
    """What a parameter is called once its norms are folded into it."""
    if "parametrizations." in path:
        return ".".join(filter(None, split_path(path)))
    folded = (path.removesuffix(end) for end in HOOKED if path.endswith(end))
    return path if path in known else next((name for name in folded if name in known), path)


def _scaled(grid: Grid, original: Tensor, weight: Tensor) -> AffineGrid | None:
    """The grid of `weight`, a multiple of `original` in each channel.

    Where the channels of a weight_norm share a step before it, they have one each behind it, along
    the axis that the norm leaves out (its `dim`): the one whose factors explain the weight best.
    """
    if not isinstance(grid, AffineGrid) or original.shape != weight.shape:
        return None
    axes = range(weight.dim()) if grid.axis is None else (grid.axis,)
    axis, factor = min(
        ((axis, _factor(original, weight, axis)) for axis in axes),
        key=lambda one: float((original * _spread(one[1], one[0], weight) - weight).abs().max()),
    )
    if grid.axis is None and torch.allclose(factor, factor[0], rtol=SAME_FACTOR, atol=0.0):
        axis, factor = None, factor[:1]
    scale = grid.scale.cpu() * factor
    zero = grid.zero_point.cpu().expand_as(scale)
    return AffineGrid(scale, zero, grid.bits, grid.symmetric, axis)


def _factor(original: Tensor, weight: Tensor, axis: int) -> Tensor:
    """What each channel along an axis was multiplied by; one without weights: the largest."""
    before, after = (part.transpose(0, axis).flatten(1) for part in (original, weight))
    factor = after.abs().amax(1) / before.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    most = factor.max()
    return torch.where(factor > 0, factor, most if most > 0 else torch.ones_like(most))


def _spread(values: Tensor, axis: int, weight: Tensor) -> Tensor:
    return values.view([-1 if at == axis else 1 for at in range(weight.dim())])


@torch.no_grad()
def put_on_grids(
    plain: nn.Module, grids: dict[str, Grid], *, everything: bool
) -> tuple[dict[str, StoredWeight], dict[str, str]]:
    """Put a module's weights on their grids in place; (what is stored, why others are not).

    Args:
        plain: a copy with ordinary parameters.
        grids: by parameter name.
        everything: whether weights without a grid get one over their min/max range.
    """
    stored: dict[str, StoredWeight] = {}
    left: dict[str, str] = {}
    done: dict[int, StoredWeight] = {}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        layer = plain.get_submodule(name.rpartition(".")[0])
        if _is_scale(layer, parameter) or not parameter.is_floating_point():
            continue
        grid = _fresh(grids.get(name), parameter)
        if grid is None and not everything and id(parameter) not in done:
            left[name] = (
                _why_off_grid(layer)
                if name in grids
                else "it has no grid, while other weights have: it was left out on purpose"
            )
            continue
        if not parameter.isfinite().all():
            raise ValueError(f"{name} holds values that are NaN or infinite")
        found = done.get(id(parameter)) or stored_weight(layer, parameter, grid)
        if name in grids and grid is None:
            found = _restated(found)
        done[id(parameter)] = stored[name] = found
        parameter.copy_(torch.from_numpy(found.values))
    return stored, left


def _is_scale(layer: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter scales or shifts channels: one axis of it, of a layer of any library."""
    axes = sum(size > 1 for size in parameter.shape) if is_foreign(layer) else parameter.dim()
    return axes < 2 or isinstance(layer, NORMS)


def _why_off_grid(layer: nn.Module) -> str:
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return (
            "it has left its grid, as under a weight_norm that scales each input channel of a "
            "transposed convolution apart: no int8 product does; weight_norm(dim=1) keeps it"
        )
    return "it has left its grid, or has none behind the norm that is folded into it"


def _fresh(grid: Grid | None, parameter: Tensor) -> Grid | None:
    """The grid, unless the weights have left it since."""
    if grid is None:
        return None
    weight = parameter.float()
    gaps = grid.scale if isinstance(grid, AffineGrid) else grid.centres.diff()
    away = (grid.project(weight) - weight).abs().max() if weight.numel() else 0.0
    return grid if away <= OFF_GRID * float(gaps.max()) else None


def _restated(weight: StoredWeight) -> StoredWeight:
    assert isinstance(weight, IntegerWeight)
    return IntegerWeight(
        weight.symbols, weight.scale, weight.zero, f"{weight.source}: it had left its own grid"
    )
