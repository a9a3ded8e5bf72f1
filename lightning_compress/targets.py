"""Targets: which parameters of a module are compressed, and why the others are not."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_compress.errors import TargetError

__all__ = [
    "Coverage",
    "Pattern",
    "Selection",
    "Target",
    "clean_path",
    "deployed_part",
    "select",
    "sparsity",
    "split_path",
    "unselected",
]
Pattern = str | type[nn.Module]
_MATMUL_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)

# What torch.nn.utils.parametrizations and the older weight_norm / spectral_norm hooks call the
# free tensor behind `weight`. `original0` and `weight_g` hold magnitudes, not weights.
_FREE_TENSOR = {"original", "original1", "weight_orig", "weight_v"}
_MAGNITUDE = {"original0", "weight_g"}

# What the two sides of a GAN are called elsewhere: netG and netD, G and D, gen and disc, g_AB ...
_CALLED = r"(net_?)?({})(\d*|_.*|[A-Z]{{1,2}})"
_DRAWS = re.compile(_CALLED.format("g|gen|generator"))
_JUDGES = re.compile(_CALLED.format("d|dis|disc|discriminator|critic"))
_SURELY_JUDGES = re.compile(_CALLED.format("discriminator|critic"))


@dataclass(frozen=True)
class Target:
    """One parameter to compress.

    Args:
        path: its first one.
        layer: that holds it there.
        name: of the layer's attribute.
        parameter: itself.
        tied: paths in other layers that hold it and would be selected.
    """

    path: str
    layer: nn.Module
    name: str
    parameter: nn.Parameter
    tied: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.parameter.numel()


@dataclass(frozen=True)
class Coverage:
    """One line of the coverage table; `reason` says why a parameter is skipped."""

    path: str
    shape: tuple[int, ...]
    selected: bool
    reason: str = ""


@dataclass(frozen=True)
class Selection:
    """The targets found in a module and the coverage table of all its parameters."""

    targets: list[Target] = field(default_factory=list)
    coverage: list[Coverage] = field(default_factory=list)


def split_path(path: str) -> tuple[str, str]:
    """The path of the layer that a parameter or buffer is of, past parametrizations, and its name.

    >>> split_path("net.0.parametrizations.weight.original1"), split_path("net.0.bias")
    (('net.0', 'weight'), ('net.0', 'bias'))
    """
    parts = path.split(".")
    at = parts.index("parametrizations") if "parametrizations" in parts[:-1] else len(parts) - 1
    name = parts[at + 1] if at + 1 < len(parts) else parts[at]
    return ".".join(parts[:at]), name


def clean_path(path: str) -> str:
    """A parameter's path as its author wrote it: no compile wrapper, no parametrization.

    >>> clean_path("_orig_mod.generator.0.parametrizations.weight.original1")
    'generator.0.weight'
    """
    parts = [part for part in path.split(".") if part != "_orig_mod"]
    if len(parts) >= 3 and parts[-3] == "parametrizations":
        parts = [*parts[:-3], parts[-2]]
    return ".".join(parts)


def deployed_part(module: nn.Module) -> tuple[str, ...]:
    """Child modules that are deployed: a GAN's generator, a VAE's encoder and decoder, else all.

    A module says so itself by an attribute `deployed`; otherwise its children's names tell: those
    of this package, then what GANs call their two sides elsewhere.

    >>> deployed_part(nn.ModuleDict({"generator": nn.Linear(1, 1), "critic": nn.Linear(1, 1)}))
    ('generator',)
    >>> deployed_part(nn.ModuleDict({"netG": nn.Linear(1, 1), "netD": nn.Linear(1, 1)}))
    ('netG',)
    """
    inner = getattr(module, "_orig_mod", module)
    declared = getattr(inner, "deployed", None)
    if declared is not None:
        return (declared,) if isinstance(declared, str) else tuple(declared)
    children = {name for name, _ in inner.named_children()}
    for part in (("generator",), ("encoder", "decoder"), ("decoder",)):
        if children.issuperset(part):
            return part
    return _beside_a_judge(inner) or ("",)


def _beside_a_judge(module: nn.Module) -> tuple[str, ...]:
    """The networks of a GAN that draw, where its discriminator goes by a usual name; else none.

    One letter says nothing alone: `d1` may be a layer, `D` beside `G` is a discriminator.
    """
    names = [
        name for name, one in module.named_children() if next(one.parameters(), None) is not None
    ]
    draw = [name for name in names if _named(_DRAWS, name)]
    if draw and any(_named(_JUDGES, name) for name in names):
        return tuple(draw)
    if any(_named(_SURELY_JUDGES, name) for name in names):
        return tuple(name for name in names if not _named(_SURELY_JUDGES, name))
    return ()


def unselected(module: nn.Module) -> list[str]:
    """Child modules with weights to compress that are neither deployed by name nor a discriminator.

    A VAE's heads beside its encoder, say. None where the module declares what is `deployed`.

    >>> names = ("encoder", "decoder", "fc_mu", "discriminator")
    >>> unselected(nn.ModuleDict({name: nn.Linear(1, 1) for name in names}))
    ['fc_mu']
    """
    inner = getattr(module, "_orig_mod", module)
    parts = deployed_part(module)
    if getattr(inner, "deployed", None) is not None or parts == ("",):
        return []
    return [
        name
        for name, child in inner.named_children()
        if name not in parts and not _named(_JUDGES, name) and _holds_weights(child)
    ]


def _holds_weights(module: nn.Module) -> bool:
    return any(
        isinstance(layer, _MATMUL_LAYERS) and parameter.requires_grad
        for layer in module.modules()
        for parameter in layer.parameters(recurse=False)
    )


def _named(pattern: re.Pattern[str], name: str) -> bool:
    # netG and NetG are one name; so are G and g.
    return any(pattern.fullmatch(form) for form in (name, name.lower()))


def select(
    module: nn.Module,
    include: Sequence[Pattern] | Pattern | None = None,
    exclude: Sequence[Pattern] | Pattern = (),
) -> Selection:
    """Find the parameters to compress.

    Args:
        module: the model.
        include: path globs (`"generator.*"`, a layer's or a parameter's path) or layer classes;
            None stands for the weights of the matmul, convolution and recurrent layers in the
            deployed part (`deployed_part`).
        exclude: the same, taken away again.

    Raises:
        TargetError: for a pattern that matches nothing (the closest paths are named), for
            nothing left to compress, and for a lazy layer that has no weights yet.

    >>> select(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))).targets[0].path
    '0.weight'
    """
    wanted = None if include is None else _patterns(include)
    unwanted = _patterns(exclude)
    _check_patterns(module, [*(wanted or ()), *unwanted])
    parts = deployed_part(module) if wanted is None else ()
    selection, seen, tied = Selection(), {}, defaultdict(list)
    for owner, layer in module.named_modules(remove_duplicate=True):
        for name, parameter in layer.named_parameters(recurse=False):
            path = f"{owner}.{name}" if owner else name
            reason = _why_not(path, layer, name, parameter, wanted, unwanted, parts)
            first = seen.setdefault(id(parameter), path)
            if first != path:
                tied[first] += [] if reason else [path]
                reason = f"tied to {first}"
            if not reason:
                selection.targets.append(Target(path, layer, name, parameter))
            shape = () if isinstance(parameter, UninitializedParameter) else tuple(parameter.shape)
            selection.coverage.append(Coverage(path, shape, not reason, reason))
    if not selection.targets:
        lines = "; ".join(f"{row.path}: {row.reason}" for row in selection.coverage[:8])
        raise TargetError(f"no parameter is left to compress ({lines or 'no parameters at all'})")
    targets = [replace(one, tied=tuple(tied[one.path])) for one in selection.targets]
    return Selection(targets, selection.coverage)


def _patterns(given: Sequence[Pattern] | Pattern) -> list[Pattern]:
    patterns = [given] if isinstance(given, (str, type)) else list(given)
    for pattern in patterns:
        if not isinstance(pattern, str) and not (
            isinstance(pattern, type) and issubclass(pattern, nn.Module)
        ):
            raise TargetError(f"{pattern!r} is neither a path glob nor a layer class")
    return patterns


def _matches(pattern: Pattern, path: str, layer: nn.Module) -> bool:
    if isinstance(pattern, type):
        return isinstance(layer, pattern)
    return any(_glob(pattern, name) for name in {path, clean_path(path)})


def _glob(pattern: str, path: str) -> bool:
    # "generator" and "generator.*" both mean everything below; "" is the module itself. A path is
    # itself whatever it holds, brackets of a key such as "x[0]" too.
    written = pattern in ("", path) or path.startswith(f"{pattern.removesuffix('.*')}.")
    return written or fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")


def _check_patterns(module: nn.Module, patterns: Iterable[Pattern]) -> None:
    paths = [
        (f"{owner}.{name}" if owner else name, layer)
        for owner, layer in module.named_modules()
        for name, _ in layer.named_parameters(recurse=False)
    ]
    for pattern in patterns:
        if any(_matches(pattern, path, layer) for path, layer in paths):
            continue
        if isinstance(pattern, type):
            known = sorted({type(layer).__name__ for _, layer in paths})
            raise TargetError(f"no layer is a {pattern.__name__}; the module has {known}")
        names = sorted({clean_path(path) for path, _ in paths})
        names += sorted({name.rsplit(".", 1)[0] for name in names if "." in name})
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
        raise TargetError(f"the pattern {pattern!r} matches no parameter; closest: {close}")


def _why_not(
    path: str,
    layer: nn.Module,
    name: str,
    parameter: nn.Parameter,
    wanted: list[Pattern] | None,
    unwanted: list[Pattern],
    parts: tuple[str, ...],
) -> str:
    """The reason to skip a parameter; empty when it is a target."""
    if wanted is None:
        if not any(_glob(part, clean_path(path)) for part in parts):
            return f"outside the deployed part {list(parts)}"
    elif not any(_matches(pattern, path, layer) for pattern in wanted):
        return "not included"
    if any(_matches(pattern, path, layer) for pattern in unwanted):
        return "excluded"
    if isinstance(parameter, UninitializedParameter):
        raise TargetError(f"{path} has no shape yet: run one batch through the lazy layer first")
    exact = wanted is not None and any(w in (path, clean_path(path)) for w in wanted)
    return _why_unfit(path, layer, name, parameter, by_default=wanted is None, exact=exact)


def _why_unfit(
    path: str,
    layer: nn.Module,
    name: str,
    parameter: nn.Parameter,
    *,
    by_default: bool,
    exact: bool,
) -> str:
    if not parameter.is_floating_point() or parameter.numel() == 0:
        return "not a floating-point tensor, or empty"
    if not parameter.requires_grad:
        return "frozen (requires_grad is False)"
    if getattr(layer, "sparse", False) and isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return "its gradients are sparse (sparse=True), which no mask can follow"
    if name in _MAGNITUDE:
        return "magnitude of a weight_norm"
    if ".parametrizations." in path and (reason := _why_not_parametrized(layer)):
        return reason
    if exact:
        return ""
    if isinstance(layer, _NORMS):
        return "norm parameter"
    if parameter.dim() < 2:
        return "bias or vector"
    if by_default and name not in _FREE_TENSOR and not isinstance(layer, _MATMUL_LAYERS):
        return f"{type(layer).__name__} is no matmul, conv or recurrent layer: include it by name"
    return ""


def _why_not_parametrized(layer: nn.Module) -> str:
    kinds = {type(step).__name__ for step in layer.children()} or {type(layer).__name__}
    unknown = sorted(kinds - {"_SpectralNorm", "_WeightNorm"})
    return f"parametrization {unknown} is not supported: it moves zeros" if unknown else ""


def sparsity(module: nn.Module, include: Sequence[Pattern] | Pattern | None = None) -> float:
    """Fraction of zeros in the compressible weights, in [0, 1].

    Args:
        module: any module.
        include: path globs or layer classes; None: the weights of the deployed part.

    Raises:
        TargetError: for a pattern that matches nothing.

    >>> layer = nn.Linear(2, 2)
    >>> _ = layer.weight.data.fill_(0.0)[0].fill_(1.0)
    >>> sparsity(layer)
    0.5
    """
    targets = select(module, include).targets
    zeros = sum(int((target.parameter == 0).sum()) for target in targets)
    return zeros / sum(target.numel for target in targets)
