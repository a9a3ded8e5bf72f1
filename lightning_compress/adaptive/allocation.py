"""Who gets how many bytes: one choice for each layer within a sum. Pure numbers, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Choice", "allocate", "convex_hull"]


@dataclass(frozen=True)
class Choice:
    """What a layer may become.

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
    """Spend what is left on the single changes that save most, off the hulls too."""
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
