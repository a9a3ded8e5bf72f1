"""Targets: which parameters of a module are compressed, and why the others are not."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_compress.copies import adapters, frozen_copies
from lightning_compress.deployment import deployed_part, unnamed_networks
from lightning_compress.errors import TargetError
from lightning_compress.terminal import html_table, shape_text

__all__ = [
    "Coverage",
    "CoverageTable",
    "Pattern",
    "Selection",
    "Target",
    "clean_path",
    "deployed_part",
    "is_foreign",
    "is_normed",
    "low_coverage",
    "magnitude_path",
    "older_norm",
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
_TABLES = (nn.Embedding, nn.EmbeddingBag)
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
_Place = tuple[str, nn.Module, str, nn.Parameter]


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


class CoverageTable(list[Coverage]):
    """Coverage of the parameters or layers of a module, a row each; a table in a notebook.

    >>> CoverageTable([Coverage("bias", (2,), False, "a bias")])._repr_html_()[:48]
    '<table><caption>Coverage: 0 of 1 compressed</cap'
    """

    def _repr_html_(self) -> str:
        rows = [
            (
                clean_path(row.path),
                shape_text(row.shape),
                "yes" if row.selected else "no",
                row.reason,
            )
            for row in self
        ]
        title = f"Coverage: {sum(row.selected for row in self)} of {len(self)} compressed"
        return html_table(title, ("Parameter", "Shape", "Compressed", "Why not"), rows)


@dataclass(frozen=True)
class Selection:
    """The targets found in a module and the coverage table of all its parameters."""

    targets: list[Target] = field(default_factory=list)
    coverage: CoverageTable = field(default_factory=CoverageTable)

    def _repr_html_(self) -> str:
        return self.coverage._repr_html_()


def split_path(path: str) -> tuple[str, str]:
    """The path of the layer that a parameter or buffer is of, past parametrizations, and its name.

    >>> split_path("net.0.parametrizations.weight.original1"), split_path("net.0.bias")
    (('net.0', 'weight'), ('net.0', 'bias'))
    """
    parts = path.split(".")
    at = parts.index("parametrizations") if "parametrizations" in parts[:-1] else len(parts) - 1
    name = parts[at + 1] if at + 1 < len(parts) else parts[at]
    return ".".join(parts[:at]), name


def magnitude_path(path: str) -> str:
    """Where a weight_norm keeps the magnitudes beside its directions; empty for other parameters.

    >>> magnitude_path("net.0.parametrizations.weight.original1"), magnitude_path("net.0.weight_v")
    ('net.0.parametrizations.weight.original0', 'net.0.weight_g')
    >>> magnitude_path("net.0.weight")
    ''
    """
    for directions, magnitudes in ((".original1", ".original0"), ("_v", "_g")):
        if path.endswith(directions):
            return path.removesuffix(directions) + magnitudes
    return ""


def is_normed(path: str) -> bool:
    """Whether a parameter is what a parametrization, or an older norm, computes a weight from.

    >>> is_normed("0.parametrizations.weight.original"), is_normed("0.weight_orig"), is_normed("w")
    (True, True, False)
    """
    return ".parametrizations." in path or path.endswith(("_orig", "_v", "_g"))


def older_norm(layer: nn.Module, name: str = "weight") -> WeightNorm | SpectralNorm | None:
    """The hook of the older weight_norm or spectral_norm that computes a layer's weight, if any.

    >>> older_norm(nn.utils.spectral_norm(nn.Linear(2, 2))).name
    'weight'
    """
    return next(
        (
            hook
            for hook in layer._forward_pre_hooks.values()
            if isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == name
        ),
        None,
    )


def clean_path(path: str) -> str:
    """A parameter's path as its author wrote it: no compile wrapper, no parametrization.

    >>> clean_path("_orig_mod.generator.0.parametrizations.weight.original1")
    'generator.0.weight'
    """
    parts = [part for part in path.split(".") if part != "_orig_mod"]
    if len(parts) >= 3 and parts[-3] == "parametrizations":
        parts = [*parts[:-3], parts[-2]]
    return ".".join(parts)


def unselected(module: nn.Module) -> list[str]:
    """Networks with weights to train that are neither deployed by name nor judges.

    >>> names = ("encoder", "decoder", "fc_mu", "discriminator")
    >>> unselected(nn.ModuleDict({name: nn.Linear(1, 1) for name in names}))
    ['fc_mu']
    """
    return unnamed_networks(module)


def select(
    module: nn.Module,
    include: Sequence[Pattern] | Pattern | None = None,
    exclude: Sequence[Pattern] | Pattern = (),
    *,
    frozen: bool | None = None,
    any_layer: bool = False,
    apart: Mapping[str, str] | None = None,
) -> Selection:
    """Find the parameters to compress.

    A glob over a module takes the kinds of layers that the default takes; the exact path of a
    parameter, or of the layer that holds it, takes anything.

    Args:
        module: the model.
        include: path globs (`"generator.*"`, a layer's or a parameter's path) or layer classes;
            None stands for the weights of the matmul, convolution and recurrent layers in the
            deployed part (`deployed_part`), and for what a layer of another library holds as
            `weight`, as modulated convolutions do.
        exclude: the same, taken away again.
        frozen: whether weights that do not train are targets. None: those under adapters (LoRA),
            which train in their place, and those that `include` must mean: by an exact path, or
            by a pattern that matches nothing else.
        any_layer: whether matrices of layers of any kind are targets, Embeddings apart.
        apart: modules that are skipped, by path, and why.

    Raises:
        TargetError: for a pattern that matches nothing (the closest paths are named), for
            nothing left to compress, and for a lazy layer that has no weights yet.

    >>> select(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))).targets[0].path
    '0.weight'
    """
    wanted = None if include is None else _patterns(include)
    unwanted = _patterns(exclude)
    _check_patterns(module, [*(wanted or ()), *unwanted])
    rules = _Rules(wanted, unwanted, deployed_part(module) if wanted is None else ())
    rules.any_layer, rules.apart = any_layer, apart or {}
    rules.frozen = bool(frozen)
    rules.adapted = adapters(module) if frozen is None else {}
    selection = Selection()
    rules.meant = _all_frozen(module, wanted or ()) if frozen is None else []
    for places in _places(module):
        reasons = [rules.why_not(*place) for place in places]
        fit = [place for place, reason in zip(places, reasons, strict=True) if not reason]
        # One place where it fits is enough: an output layer that is tied to an Embedding, say.
        if reasons[0] == "excluded":
            fit = []
        path, layer, name, parameter = places[0]
        if fit:
            tied = tuple(other for other, *_ in fit if other != path)
            selection.targets.append(Target(path, layer, name, parameter, tied))
        shape = () if isinstance(parameter, UninitializedParameter) else tuple(parameter.shape)
        selection.coverage.append(Coverage(path, shape, bool(fit), "" if fit else reasons[0]))
        selection.coverage.extend(
            Coverage(other, shape, False, f"tied to {path}") for other, *_ in places[1:]
        )
    if not selection.targets:
        lines = "; ".join(f"{row.path}: {row.reason}" for row in selection.coverage[:8])
        raise TargetError(f"no parameter is left to compress ({lines or 'no parameters at all'})")
    return selection


def _all_frozen(module: nn.Module, patterns: Sequence[Pattern]) -> list[Pattern]:
    """Patterns that match no weight that trains."""
    places = [place for same in _places(module) for place in same if _is_matrix(place[3])]
    return [
        one
        for one in patterns
        if not any(p.requires_grad and _matches(one, path, layer) for path, layer, _, p in places)
    ]


def _is_matrix(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, UninitializedParameter) or parameter.dim() > 1


def _places(module: nn.Module) -> list[list[_Place]]:
    """Each parameter with all places that hold it: path, layer, name."""
    found: dict[int, list[_Place]] = {}
    for owner, layer in module.named_modules(remove_duplicate=True):
        for name, parameter in layer.named_parameters(recurse=False):
            path = f"{owner}.{name}" if owner else name
            found.setdefault(id(parameter), []).append((path, layer, name, parameter))
    return list(found.values())


def low_coverage(module: nn.Module, coverage: Sequence[Coverage]) -> str:
    """Warning where less than half of the deployed part's weights are targets; else empty.

    Weights are matrices and kernels; those that `exclude` names are no one's surprise, and those
    of a frozen copy (an average kept by hand) follow their original.

    >>> net = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 2))
    >>> low_coverage(net, select(net).coverage)[:52]
    'only 2 % of the weights of the deployed part are com'
    """
    parts = deployed_part(module)
    copies = tuple(f"{one.path}." for one in frozen_copies(module))
    rows = [
        row
        for row in coverage
        if len(row.shape) > 1
        and any(_glob(part, clean_path(row.path)) for part in parts)
        and not row.reason.startswith(("excluded", "norm", "tied", "an adapter"))
        and not row.path.startswith(copies)
    ]
    sizes = {row.path: math.prod(row.shape) for row in rows}
    taken = sum(sizes[row.path] for row in rows if row.selected)
    if 2 * taken >= sum(sizes.values()):
        return ""
    largest = sorted((row for row in rows if not row.selected), key=lambda row: -sizes[row.path])
    named = "; ".join(f"{clean_path(row.path)} ({row.reason})" for row in largest[:3])
    return (
        f"only {100 * taken / sum(sizes.values()):.0f} % of the weights of the deployed part are "
        f"compressed. The largest that are skipped: {named}. Name those that are deployed in "
        "include=[...] by path, beside what is compressed now, and the others in exclude"
    )


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


def _exact(pattern: Pattern, path: str, layer: nn.Module) -> bool:
    """Whether a pattern is a layer's class, a parameter's path, or that of a layer of no others."""
    if isinstance(pattern, type):
        return isinstance(layer, pattern)
    clean = clean_path(path)
    alone = all(name == "parametrizations" for name, _ in layer.named_children())
    owners = {path.rpartition(".")[0], clean.rpartition(".")[0]} if alone else set()
    return pattern in (path, clean) or pattern.removesuffix(".*") in owners - {""}


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


class _Rules:
    """Rules of why parameters are skipped."""

    def __init__(
        self, wanted: list[Pattern] | None, unwanted: list[Pattern], parts: tuple[str, ...]
    ) -> None:
        self.wanted, self.unwanted, self.parts = wanted, unwanted, parts
        self.frozen = self.any_layer = False
        self.apart: Mapping[str, str] = {}
        self.adapted: Mapping[int, bool] = {}  # a parameter's id -> whether it is the base
        self.meant: Sequence[Pattern] = ()  # patterns whose weights are all frozen

    def why_not(self, path: str, layer: nn.Module, name: str, parameter: nn.Parameter) -> str:
        """Reason to skip a parameter; empty when it is a target."""
        if self.wanted is None:
            if not any(_glob(part, clean_path(path)) for part in self.parts):
                return f"outside the deployed part {list(self.parts)}"
        elif not any(_matches(pattern, path, layer) for pattern in self.wanted):
            return "not included"
        if any(_matches(pattern, path, layer) for pattern in self.unwanted):
            return "excluded"
        for inside, why in self.apart.items():
            if path.startswith(f"{inside}."):
                return why
        if isinstance(parameter, UninitializedParameter):
            raise TargetError(
                f"{path} has no shape yet: run one batch through the lazy layer first"
            )
        exact = (self.any_layer and not isinstance(layer, _TABLES)) or any(
            _exact(one, path, layer) for one in self.wanted or ()
        )
        itself = any(one in (path, clean_path(path)) for one in self.wanted or ())
        named = exact or any(_matches(one, path, layer) for one in self.meant)
        return self._why_untrained(parameter, named=named) or _why_unfit(
            path, layer, name, parameter, exact=exact, itself=itself
        )

    def _why_untrained(self, parameter: nn.Parameter, *, named: bool) -> str:
        base = self.adapted.get(id(parameter))
        if base is False and not named:
            return "an adapter of a frozen weight: small, and merged into it"
        if parameter.requires_grad or self.frozen or base or named:
            return ""
        return "frozen (requires_grad is False)"


def _why_unfit(
    path: str,
    layer: nn.Module,
    name: str,
    parameter: nn.Parameter,
    *,
    exact: bool,
    itself: bool,
) -> str:
    if not parameter.is_floating_point() or parameter.numel() == 0:
        return "not a floating-point tensor, or empty"
    if getattr(layer, "sparse", False) and isinstance(layer, _TABLES):
        return "its gradients are sparse (sparse=True), which no mask can follow"
    if name in _MAGNITUDE:
        return "magnitude of a weight_norm"
    if ".parametrizations." in path and (reason := _why_not_parametrized(layer)):
        return reason
    return "" if itself else _why_odd(layer, name, parameter, exact=exact)


def _why_odd(layer: nn.Module, name: str, parameter: nn.Parameter, *, exact: bool) -> str:
    if isinstance(layer, _NORMS):
        return "norm parameter"
    if parameter.dim() < 2:
        return "bias or vector"
    known = name in _FREE_TENSOR or isinstance(layer, _MATMUL_LAYERS)
    if not exact and not known and not _is_own_weight(layer, name, parameter):
        return f"{type(layer).__name__} is no matmul, conv or recurrent layer: include it by name"
    return ""


def _is_own_weight(layer: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a layer that PyTorch does not have multiplies with a raw parameter.

    Its name says so; with one axis alone, it scales channels, as a norm does.
    """
    own = is_foreign(layer) and not isinstance(layer, _TABLES)
    return own and name == "weight" and sum(size > 1 for size in parameter.shape) > 1


def is_foreign(layer: nn.Module) -> bool:
    """Whether a layer's class is none of PyTorch's."""
    return not type(layer).__module__.startswith("torch.nn.")


def _why_not_parametrized(layer: nn.Module) -> str:
    kinds = {type(step).__name__ for step in layer.children()} or {type(layer).__name__}
    unknown = sorted(kinds - {"_SpectralNorm", "_WeightNorm"})
    return f"parametrization {unknown} is not supported: it moves zeros" if unknown else ""


def sparsity(module: nn.Module, include: Sequence[Pattern] | Pattern | None = None) -> float:
    """Fraction of zeros in the weights, in [0, 1].

    Weights are all matrices and kernels, whether they train or not and whatever layer holds them.
    Norms, biases, vectors and Embeddings that `include` does not name by their paths are left out.
    What a callback reports is the sparsity of its targets alone.

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
    targets = select(module, include, frozen=True, any_layer=True).targets
    zeros = sum(int((target.parameter == 0).sum()) for target in targets)
    return zeros / sum(target.numel for target in targets)
