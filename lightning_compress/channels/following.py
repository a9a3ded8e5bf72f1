"""Compression state on copies of a compressed module: averages, merged models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_compress.channels.graph import Kept, ScaledKept
from lightning_compress.channels.resize import shrink
from lightning_compress.copies import Copy
from lightning_compress.errors import TargetError
from lightning_compress.projection import ProjectedWeight, Projector
from lightning_compress.state import CompressionState, RemovedChannels, note_removed, set_grid
from lightning_compress.targets import clean_path

__all__ = ["FollowedCopies", "apply_compression"]

_PRINT = 64  # values of a tensor that tell whether user code has written to it


class FollowedCopies:
    """Copies inside a module that user code writes to, such as an average kept by hand.

    A copy follows from the moment its values are first seen to change: one that stays as it is, a
    frozen teacher, is left alone. Masks are applied as they are made: the average of zeros is
    zero. On its grids it lies while it is validated and when training has ended; in between the
    average goes on unrounded.

    Args:
        module: the whole.
        copies: as `frozen_copies` found them.
    """

    def __init__(self, module: nn.Module, copies: Sequence[Copy]) -> None:
        self.module, self.copies = module, list(copies)
        self._prints = {one.path: self._print(one) for one in self.copies}
        self._live: set[str] = set()
        self._raw: list[tuple[Tensor, Tensor]] = []
        self._warned: set[str] = set()

    def _print(self, copy: Copy) -> list[Tensor]:
        part = self.module.get_submodule(copy.path)
        return [one.detach().flatten()[:_PRINT].clone() for one in part.parameters()]

    def live(self) -> Iterator[Copy]:
        """Copies that are written to."""
        for one in self.copies:
            if one.path not in self._live:
                now = self._print(one)
                if all(map(torch.equal, now, self._prints[one.path])):
                    continue
                self._live.add(one.path)
            yield one

    def _pairs(self, projector: Projector) -> Iterator[tuple[ProjectedWeight, str, nn.Parameter]]:
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        for one in self.live() if self.copies else ():
            for projected in projector.projected_weights.values():
                path = _moved(projected.target.path, one)
                if path is not None and projected.shards is None and path in parameters:
                    yield projected, path, parameters[path]

    @torch.no_grad()
    def mask(self, projector: Projector) -> None:
        """Zeros of the trained weights are zeros of their averages."""
        for projected, _, parameter in self._pairs(projector):
            if projected.pruned is not None:
                parameter.masked_fill_(projected.pruned, 0.0)

    @torch.no_grad()
    def show(self, projector: Projector) -> None:
        """Put averages onto masks and grids for a while; `hide` brings back what they were."""
        if self._raw:
            return
        for projected, _, parameter in self._pairs(projector):
            self._raw.append((parameter, parameter.detach().clone()))
            parameter.copy_(projected.visible(parameter.detach())[0])

    @torch.no_grad()
    def hide(self) -> None:
        """The reverse of `show`."""
        for parameter, raw in self._raw:
            parameter.copy_(raw)
        self._raw.clear()

    @torch.no_grad()
    def settle(self, projector: Projector) -> None:
        """Leave averages on masks and grids, and let them know the grids."""
        self.hide()
        for projected, path, parameter in self._pairs(projector):
            values, grid = projected.visible(parameter.detach())
            parameter.copy_(values)
            if grid is not None:
                owner, _, name = path.rpartition(".")
                set_grid(self.module.get_submodule(owner), name, grid)

    def cut(self, kept: Kept, sized: Mapping[str, int]) -> None:
        """Remove the channels that the originals lose."""
        live = list(self.live())
        for one in self.copies:
            factors = kept.factors if isinstance(kept, ScaledKept) else {}
            mine = ScaledKept(kept, factors).moved(partial(_moved, copy=one))
            if not mine:
                continue
            if one not in live:
                self._warn(one)
                continue
            tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
            shapes = {path: tuple(tensors[path].shape) for path in mine if path in tensors}
            sizes = {moved: size for path, size in sized.items() if (moved := _moved(path, one))}
            shrink(self.module, mine, sized=sizes)
            note_removed(self.module, RemovedChannels(shapes, sizes, {}))
            self._prints[one.path] = self._print(one)

    def _warn(self, copy: Copy) -> None:
        if copy.path not in self._warned:
            self._warned.add(copy.path)
            warnings.warn(
                f"{copy.path} is a frozen copy of {copy.source} that nobody has written to so far: "
                "it keeps its channels. If it is an average, update it before channels go",
                stacklevel=4,
            )


def _moved(path: str, copy: Copy) -> str | None:
    inside = path.startswith(f"{copy.source}.") or path == copy.source
    return copy.path + path[len(copy.source) :] if inside else None


@torch.no_grad()
def apply_compression(module: nn.Module, state: CompressionState) -> nn.Module:
    """Put masks and weight grids of one module onto another one of the same weights, in place.

    For an average that is kept elsewhere (`AveragedModel`), or a model into which adapters were
    merged, which fills zeros.

    Args:
        module: to change.
        state: `compression_state` of the other. What a wrapper adds to names may be there on one
            side alone: a parameter answers if its name ends with the same word and the words of
            the shorter name stand in the longer one in their order.

    Returns:
        The module.

    Raises:
        TargetError: when no parameter answers to any of it.

    >>> state = CompressionState(masks={"base_layer.weight": torch.tensor([[True, False]])})
    >>> layer = apply_compression(nn.Linear(2, 1), state)
    >>> bool(layer.weight[0, 1] == 0)
    True
    """
    names = {clean_path(name): (name, one) for name, one in module.named_parameters()}
    shapes = {path: tuple(mask.shape) for path, mask in state.masks.items()}
    missing, found = [], 0
    for path in dict.fromkeys([*state.masks, *state.grids]):
        name = _answering(path, shapes.get(path), {key: one for key, (_, one) in names.items()})
        if name is None:
            missing.append(path)
            continue
        found += 1
        own, parameter = names[name]
        if path in state.masks:
            parameter.masked_fill_(~state.masks[path].to(parameter.device), 0.0)
        if path in state.grids:
            grid = state.grids[path]
            parameter.copy_(grid.project(parameter.detach()))
            owner, _, last = own.rpartition(".")
            set_grid(module.get_submodule(owner), last, grid)
    if missing and not found:
        raise TargetError(f"no parameter answers to {missing[:3]}; there are {sorted(names)[:5]}")
    if missing:
        warnings.warn(f"no parameter answers to {missing}: it is left out", stacklevel=3)
    return module


def _answering(
    path: str, shape: tuple[int, ...] | None, names: Mapping[str, nn.Parameter]
) -> str | None:
    words = clean_path(path).split(".")
    fitting = [
        name
        for name, one in names.items()
        if (shape is None or tuple(one.shape) == shape)
        and (_is_part(name.split("."), words) or _is_part(words, name.split(".")))
    ]
    return max(fitting, key=lambda name: (name == clean_path(path), len(name)), default=None)


def _is_part(words: Sequence[str], of: Sequence[str]) -> bool:
    """Whether words stand among others in their order, and end with the same."""
    left = iter(of)
    return words[-1] == of[-1] and all(word in left for word in words)
