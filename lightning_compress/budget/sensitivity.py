"""Layer sensitivities: measured losses by sparsity and bits, and the allocation that follows."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_compress.files import write_atomically

__all__ = [
    "Choice",
    "LayerScan",
    "Sensitivity",
    "allocate",
    "convex_hull",
]
_GRID = [math.exp(-0.1 * step) for step in range(54)]  # densities from 1 down to 0.005


@dataclass(frozen=True)
class Choice:
    """A candidate for one layer: its size and its loss.

    Args:
        size: bytes, or anything else whose sum is bounded.
        loss: of quality, that adds up over layers.
    """

    size: float
    loss: float


def convex_hull(choices: Sequence[Choice]) -> list[int]:
    """Choices that are best for some price of a byte, from the smallest on: indices.

    >>> convex_hull([Choice(4, 0.0), Choice(1, 3.0), Choice(2, 1.0), Choice(3, 0.9), Choice(9, 1)])
    [1, 2, 0]
    """
    hull: list[int] = []
    for index in sorted(range(len(choices)), key=lambda i: (choices[i].size, choices[i].loss)):
        one = choices[index]
        if hull and one.loss >= choices[hull[-1]].loss:
            continue  # larger and no better
        while len(hull) > 1 and _gain(choices, hull[-2], hull[-1]) <= _gain(
            choices, hull[-2], index
        ):
            hull.pop()
        hull.append(index)
    return hull


def _gain(choices: Sequence[Choice], small: int, large: int) -> float:
    """Loss that is saved for a byte more."""
    one, other = choices[small], choices[large]
    return (one.loss - other.loss) / max(other.size - one.size, 1e-300)


def allocate(layers: Sequence[Sequence[Choice]], budget: float) -> list[int]:
    """One choice for each layer, of a small sum of losses, with sizes that fit together.

    Lagrange's condition (Shoham & Gersho 1988): at one price of a byte, each layer takes the
    choice that is best for it. Raising all from their smallest choices along their convex hulls,
    the steepest step first, goes through these solutions; what the last step leaves over is filled
    greedily. The loss is never above the optimum by more than the one step that did not fit.

    Args:
        layers: the choices of each layer.
        budget: that the sizes of those chosen may add up to.

    Returns:
        The index of each layer's choice.

    Raises:
        ValueError: when even the smallest choices do not fit.

    >>> layer = [Choice(4, 0.0), Choice(2, 1.0), Choice(1, 3.0)]
    >>> allocate([layer, layer], 6)
    [0, 1]
    """
    hulls = [convex_hull(choices) for choices in layers]
    at = [0] * len(layers)
    chosen = [hull[0] for hull in hulls]
    used = sum(choices[one].size for choices, one in zip(layers, chosen, strict=True))
    if used > budget * (1 + 1e-12):
        raise ValueError(f"budget={budget:g} is too small: the smallest choices need {used:g}")
    open_layers = {index for index, hull in enumerate(hulls) if len(hull) > 1}
    while open_layers:
        steps = {i: (hulls[i][at[i]], hulls[i][at[i] + 1]) for i in open_layers}
        best = max(open_layers, key=lambda i: (_gain(layers[i], *steps[i]), -i))
        small, large = steps[best]
        more = layers[best][large].size - layers[best][small].size
        if used + more > budget + 1e-12 * abs(budget):
            open_layers.discard(best)
            continue
        used, at[best], chosen[best] = used + more, at[best] + 1, large
        if at[best] + 1 == len(hulls[best]):
            open_layers.discard(best)
    return _filled(layers, chosen, budget - used)


def _filled(layers: Sequence[Sequence[Choice]], chosen: list[int], left: float) -> list[int]:
    """Spend the remaining bytes on the single changes that save most, off the hulls too."""
    chosen = list(chosen)
    while True:
        moves = [
            (layers[layer][now].loss - choice.loss, layer, index)
            for layer, now in enumerate(chosen)
            for index, choice in enumerate(layers[layer])
            if choice.size - layers[layer][now].size <= left
            and choice.loss < layers[layer][now].loss
        ]
        if not moves:
            return chosen
        _, layer, index = max(moves, key=lambda move: (move[0], -move[1], -move[2]))
        left -= layers[layer][index].size - layers[layer][chosen[layer]].size
        chosen[layer] = index


@dataclass(frozen=True)
class LayerScan:
    """Sensitivity scan of one layer, compressed alone.

    Args:
        path: of the parameter.
        weights: how many it has.
        sparsities: fractions of zeros that were tried, each alone.
        sparse_loss: how much worse the metric got, for each.
        bits: that were tried, each alone.
        bits_loss: how much worse the metric got, for each.
        bytes: entropy of the symbols at each sparsity (rows, the first one 0) and number of bits.
    """

    path: str
    weights: int
    sparsities: tuple[float, ...]
    sparse_loss: tuple[float, ...]
    bits: tuple[int, ...]
    bits_loss: tuple[float, ...]
    bytes: tuple[tuple[float, ...], ...]

    def loss_at(self, sparsity: float) -> float:
        """Loss at any sparsity: linear in the logarithm of the density, never falling.

        >>> scan = LayerScan("a", 10, (0.5, 0.75), (1.0, 3.0), (), (), ())
        >>> scan.loss_at(0.0), round(scan.loss_at(1 - 2**-1.5), 6), round(scan.loss_at(0.875), 6)
        (0.0, 2.0, 5.0)
        """
        x = [0.0, *(-math.log1p(-one) for one in self.sparsities)]
        y = [0.0]
        for one in self.sparse_loss:
            y.append(max(y[-1], one))
        wanted = -math.log1p(-sparsity)
        if len(x) == 1:
            return 0.0
        right = min(max(bisect.bisect_left(x, wanted), 1), len(x) - 1)
        slope = (y[right] - y[right - 1]) / (x[right] - x[right - 1])
        return y[right - 1] + slope * (wanted - x[right - 1])

    def choices(self) -> list[tuple[float, int, Choice]]:
        """All pairs of sparsity and bits that were tried, their losses added."""
        found = []
        losses = [0.0, *self.sparse_loss]
        for row, sparsity in enumerate([0.0, *self.sparsities]):
            for column, bits in enumerate(self.bits):
                loss = max(losses[row], 0.0) + max(self.bits_loss[column], 0.0)
                found.append((sparsity, bits, Choice(self.bytes[row][column], loss)))
        return found


@dataclass(frozen=True)
class Sensitivity:
    """A scan of all layers.

    Args:
        metric: what was measured.
        dense: its value with nothing compressed.
        better: "lower" or "higher".
        layers: a scan of each.
    """

    metric: str
    dense: float
    better: str
    layers: list[LayerScan] = field(default_factory=list)

    def sparsities(self, sparsity: float) -> dict[str, float]:
        """One sparsity for all layers allocated by the sensitivity of each, by path.

        Densities are chosen so that the losses of all, measured one by one, add up to the least.
        """
        layers = [
            [Choice(one.weights * d, one.loss_at(1 - d)) for d in _GRID] for one in self.layers
        ]
        total = sum(one.weights for one in self.layers)
        least = sum(choices[-1].size for choices in layers)
        chosen = allocate(layers, max((1 - sparsity) * total, least))
        pairs = zip(self.layers, chosen, strict=True)
        return {one.path: 1 - _GRID[index] for one, index in pairs}

    def recipe(self, max_bytes: float) -> dict[str, tuple[float, int]]:
        """Sparsity and bits of each layer within so many bytes, by path.

        Raises:
            ValueError: when the smallest that was tried does not fit.
        """
        choices = [one.choices() for one in self.layers]
        found = allocate([[choice for _, _, choice in each] for each in choices], max_bytes)
        rows = zip(self.layers, choices, found, strict=True)
        return {one.path: each[index][:2] for one, each, index in rows}

    def of(self, paths: Sequence[str]) -> Sensitivity:
        """Sensitivities of these layers alone.

        Raises:
            ValueError: naming those that were not scanned.
        """
        known = {one.path: one for one in self.layers}
        if missing := [path for path in paths if path not in known]:
            raise ValueError(f"the sensitivities of {missing} are not known, only of {list(known)}")
        return replace(self, layers=[known[path] for path in paths])

    def save(self, path: Path) -> Path:
        """Write a JSON file."""
        text = json.dumps(asdict(self), indent=1)
        return write_atomically(path, text, what="the sensitivities", parents=True)

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Load the file of `save`.

        Raises:
            ValueError: naming the file, when it holds something else.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            layers = [
                LayerScan(**{key: _tuples(value) for key, value in one.items()})
                for one in state.pop("layers")
            ]
            return cls(**state, layers=layers)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no sensitivities: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
