"""Compression state that a module carries: masks, grids and removed channels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from lightning_compress.grids import AffineGrid, CodebookGrid
from lightning_compress.removed import RemovedChannels
from lightning_compress.sharding import full_tensor
from lightning_compress.terminal import html_table, shape_text

__all__ = [
    "ActivationGrids",
    "CompressionState",
    "Grid",
    "RemovedChannels",
    "activation_grids",
    "clear_grid",
    "compression_state",
    "forget_removed",
    "has_grid",
    "known_grid",
    "known_mask",
    "note_removed",
    "removed_channels",
    "rounds_dynamically",
    "set_activation_grids",
    "set_dynamic",
    "set_grid",
    "set_known_mask",
]

Grid = AffineGrid | CodebookGrid

# Plain attributes of the owning layer: they follow deepcopy and pickle, never enter state_dict.
_ATTRIBUTE = "_compression_grids"
_ACTIVATIONS = "_compression_activations"
_CHANNELS = "_compression_channels"
_MASKS = "_compression_masks"
_DYNAMIC = "_compression_dynamic"


@dataclass(frozen=True)
class ActivationGrids:
    """Grids, one scale a tensor, of a layer's input and output; None: not quantized.

    `dynamic`: the input is rounded over each call's own range in place of a grid.
    """

    input: AffineGrid | None = None
    output: AffineGrid | None = None
    dynamic: bool = False


@dataclass(frozen=True, repr=False)
class CompressionState:
    """Compression state of a module.

    Args:
        masks: True where a weight is not 0, by parameter name as `named_parameters` spells it.
        grids: where weights lie, by parameter name.
        activations: where inputs and outputs of layers lie, by module path.
        channels: what was removed.
        dynamic: paths of layers that round what they read over each call's own range.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    activations: dict[str, ActivationGrids] = field(default_factory=dict)
    channels: RemovedChannels = field(default_factory=RemovedChannels)
    dynamic: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        parts = {
            "masks": len(self.masks),
            "grids": len(self.grids),
            "activations": len(self.rounding),
            "smaller shapes": len(self.channels.shapes),
        }
        return f"CompressionState({', '.join(f'{n} {what}' for what, n in parts.items())})"

    def _repr_html_(self) -> str:
        paths = dict.fromkeys([*self.masks, *self.grids, *self.channels.shapes])
        rows = [(path, *self._row(path)) for path in paths]
        header = ("Parameter", "Zeros", "Grid", "Bits", "Shape after removal")
        text = html_table(repr(self), header, rows)
        if self.rounding:
            sides = [
                (path, *(_bits(grid) for grid in (one.input, one.output)), one.dynamic)
                for path, one in self.rounding.items()
            ]
            text += html_table("Activations", ("Layer", "Input", "Output", "Dynamic"), sides)
        return text

    def _row(self, path: str) -> tuple[str, str, str, str]:
        mask, grid = self.masks.get(path), self.grids.get(path)
        zeros = "" if mask is None else f"{1 - mask.float().mean().item():.2%}"
        kind = "" if grid is None else type(grid).__name__.removesuffix("Grid").lower()
        shape = self.channels.shapes.get(path)
        return zeros, kind, _bits(grid), "" if shape is None else shape_text(shape)

    @property
    def rounding(self) -> dict[str, ActivationGrids]:
        """`activations` and `dynamic` in one, as files hold them."""
        marked = {
            path: replace(self.activations.get(path, ActivationGrids()), dynamic=True)
            for path in self.dynamic
        }
        return self.activations | marked


def _bits(grid: Grid | None) -> str:
    return "" if grid is None else str(grid.bits)


def note_removed(module: nn.Module, lost: RemovedChannels) -> None:
    """Record removed channels at the layers of a module; shapes that are known already stay."""
    for path, shape in lost.shapes.items():
        owner, _, name = path.rpartition(".")
        known = module.get_submodule(owner).__dict__.setdefault(_CHANNELS, {})
        known.setdefault("shapes", {}).setdefault(name, tuple(shape))
    for key, values in (("size", lost.sizes), ("kept", lost.kept)):
        for path, value in values.items():
            module.get_submodule(path).__dict__.setdefault(_CHANNELS, {})[key] = value


def forget_removed(module: nn.Module) -> None:
    """Clear the record of removed channels: the module is as it was made."""
    for layer in module.modules():
        layer.__dict__.pop(_CHANNELS, None)


def removed_channels(module: nn.Module) -> RemovedChannels:
    """The removed channels that a module's layers record."""
    found = RemovedChannels()
    for path, layer in module.named_modules():
        known = layer.__dict__.get(_CHANNELS, {})
        prefix = f"{path}." if path else ""
        found.shapes.update({prefix + name: one for name, one in known.get("shapes", {}).items()})
        if "size" in known:
            found.sizes[path] = known["size"]
        if "kept" in known:
            found.kept[path] = tuple(known["kept"])
    return found


def set_grid(layer: nn.Module, name: str, grid: Grid) -> None:
    """Record the quantization grid of `layer.<name>`."""
    layer.__dict__.setdefault(_ATTRIBUTE, {})[name] = grid


def has_grid(layer: nn.Module, name: str) -> bool:
    """Whether `set_grid` recorded a grid of `layer.<name>`."""
    return name in layer.__dict__.get(_ATTRIBUTE, {})


def known_grid(layer: nn.Module, name: str) -> Grid | None:
    """The grid of `layer.<name>`, as `set_grid` left it."""
    return layer.__dict__.get(_ATTRIBUTE, {}).get(name)


def clear_grid(layer: nn.Module, name: str) -> None:
    """Clear the grid of `layer.<name>`, if it has one."""
    layer.__dict__.get(_ATTRIBUTE, {}).pop(name, None)


def known_mask(layer: nn.Module, name: str) -> Tensor | None:
    """The mask (True where a weight stays) that was restored for `layer.<name>`, if one was."""
    return layer.__dict__.get(_MASKS, {}).get(name)


def set_known_mask(layer: nn.Module, name: str, mask: Tensor | None) -> None:
    """Attach the mask of `layer.<name>`, so that the next fit keeps its zeros; None removes it.

    >>> import torch
    >>> layer = nn.Linear(2, 1)
    >>> set_known_mask(layer, "weight", torch.tensor([[True, False]]))
    >>> known_mask(layer, "weight").tolist(), known_mask(layer, "bias")
    ([[True, False]], None)
    """
    masks = layer.__dict__.setdefault(_MASKS, {})
    masks.pop(name, None)
    if mask is not None:
        masks[name] = mask


def activation_grids(layer: nn.Module) -> ActivationGrids | None:
    """What `set_activation_grids` left at a layer."""
    return layer.__dict__.get(_ACTIVATIONS)


def set_activation_grids(layer: nn.Module, grids: ActivationGrids | None) -> None:
    """Record the grids of a layer's input and output; None clears them."""
    set_dynamic(layer, grids is not None and grids.dynamic)
    if grids is None or (grids.dynamic and grids.input is None and grids.output is None):
        layer.__dict__.pop(_ACTIVATIONS, None)
    else:
        layer.__dict__[_ACTIVATIONS] = grids


def rounds_dynamically(layer: nn.Module) -> bool:
    """Whether a layer rounds what it reads over each call's own range (`quantize_dynamic`)."""
    return layer.__dict__.get(_DYNAMIC, False)


def set_dynamic(layer: nn.Module, dynamic: bool) -> None:
    """Let a layer round what it reads over each call's own range, or no longer."""
    if dynamic:
        layer.__dict__[_DYNAMIC] = True
    else:
        layer.__dict__.pop(_DYNAMIC, None)


def compression_state(module: nn.Module, *, masks: bool = True) -> CompressionState:
    """Masks (where a weight is not 0) and grids that a module carries.

    A mask is listed for each parameter of two or more axes that holds a zero.

    Args:
        module: of any kind.
        masks: False leaves them out. They are found by looking at all weights; those of a sharded
            module are gathered for it, and all processes must ask.

    >>> layer = nn.Linear(2, 2)
    >>> _ = layer.weight.data.copy_(layer.weight.new_tensor([[0.0, 1.0], [2.0, 0.0]]))
    >>> compression_state(layer).masks["weight"].tolist()
    [[False, True], [True, False]]
    """
    found_masks, grids, activations, dynamic = {}, {}, {}, set()
    for prefix, layer in module.named_modules():
        known = layer.__dict__.get(_ATTRIBUTE, {})
        if (found := activation_grids(layer)) is not None:
            activations[prefix] = found
        if rounds_dynamically(layer):
            dynamic.add(prefix)
        for name, parameter in layer.named_parameters(recurse=False):
            path = f"{prefix}.{name}" if prefix else name
            if name in known:
                grids[path] = known[name]
            if masks and parameter.dim() > 1:
                mask = full_tensor(parameter.detach()) != 0
                if not mask.all():
                    found_masks[path] = mask
    return CompressionState(
        found_masks, grids, activations, removed_channels(module), frozenset(dynamic)
    )
