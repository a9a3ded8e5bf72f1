"""Rate-distortion optimized quantization at save: the grid point that pays, not the nearest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.grids import AffineGrid
from lightning_compress.hooks import tensors_of
from lightning_compress.lcz.module_state import Contents, shared_memory, stored_name
from lightning_compress.lcz.rdoq_compensation import compensated, layer_hessians, symbol_bits
from lightning_compress.modes import evaluating, own_random_stream
from lightning_compress.quantization.corrections import Dataflow, channel_means, correct_biases
from lightning_compress.quantization.rate_distortion import RateTable
from lightning_compress.sample_inputs import calibration_batches, run_batch

__all__ = ["cheaper", "cheaper_contents", "check_rdoq", "output_fisher"]

_ROUNDS = 3  # of choosing with the lengths that the last choice has made
_SEED = 0
_NORMS = nn.modules.batchnorm._BatchNorm
Data = Iterable[object] | Tensor | Mapping[str, Any]


def check_rdoq(rdoq: float | None, *, has_data: bool) -> None:
    """Check a multiplier.

    Raises:
        ValueError: unless it is None, or a finite number above 0; for data without one.
    """
    if rdoq is None:
        if has_data:
            raise ValueError("data= is for rdoq=, which is None: give a multiplier above 0")
    elif isinstance(rdoq, bool | str) or not 0 < rdoq < float("inf"):
        raise ValueError(f"rdoq={rdoq!r} must be a finite number above 0, such as 0.01")


def code_lengths(symbols: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Bits of a zero at each place, and of |q| = 0, 1, 2, ... where it is not one.

    The chance of a zero is that of its row (axis 0) and its column (axis 1) together, as the
    adaptive coder's contexts have it: their logits add, less the whole tensor's.

    Args:
        symbols: steps from 0.
        most: largest |q| that gets a length; None: the largest there is.

    >>> zero, size = code_lengths(torch.tensor([[0, 0, 1], [0, 0, -2]]))
    >>> zero.shape, bool(zero[0, 0] < zero[0, 2])
    (torch.Size([2, 3]), True)
    """
    zeros = (symbols == 0).float()

    def logit(dim: int | None) -> Tensor:
        if dim is None:
            ones, count = zeros.sum(), zeros.numel()
        else:
            others = [one for one in range(zeros.dim()) if one != dim]
            ones, count = zeros.sum(others, keepdim=True), zeros.numel() // zeros.shape[dim]
        return ((ones + 0.5) / (count - ones + 0.5)).log()

    logits = logit(0) + (logit(1) - logit(None) if zeros.dim() > 1 else 0.0)
    zero = torch.nn.functional.softplus(-logits) / torch.log(torch.tensor(2.0))
    table = RateTable(int(symbols.abs().max()) if most is None else most)
    counts = torch.bincount(symbols.abs().reshape(-1).long(), minlength=table.most + 1)
    counts[0] = 0
    table.look(counts)
    size = table.lengths()
    return zero.expand_as(zeros), size


def cheaper(symbols: Tensor, importance: Tensor, rdoq: float) -> Tensor:
    """Of q, one step nearer to 0, and 0 itself, what costs least.

    Minimizes `importance / 2 * (change in steps)^2 + rdoq * bits` weight by weight, three times
    over with the lengths of the last choice (RDOQ as in MPEG's DeepCABAC, Wiedemann et al. 2020,
    arXiv:1907.11900, section 3).

    Args:
        symbols: (rows, columns, ...) whole steps from 0.
        importance: of a change of one step of each weight, of the same shape.
        rdoq: what a bit is worth.

    >>> symbols = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 5]])
    >>> cheaper(symbols, torch.ones(1, 8), 0.5)
    tensor([[0, 0, 0, 0, 0, 0, 0, 5]])
    """
    first = symbols.abs().long()
    chosen, most = first, int(first.max())
    for _ in range(_ROUNDS):
        zero, size = code_lengths(chosen, most)
        best, taken = torch.full_like(importance, float("inf")), first
        for candidate in (first, (first - 1).clamp(min=0), torch.zeros_like(first)):
            bits = rdoq * symbol_bits(candidate, zero, size)
            cost = importance / 2 * (first - candidate).float().square() + bits
            better = cost < best
            best, taken = torch.where(better, cost, best), torch.where(better, candidate, taken)
        chosen = taken
    return chosen * symbols.sign()


def output_fisher(
    module: nn.Module, batches: Sequence[object], names: Iterable[str]
) -> dict[str, Tensor]:
    """Mean square slope of a module's outputs by each weight: a Fisher diagonal.

    That of a Gaussian likelihood around the outputs (the diagonal of the Gauss-Newton matrix):
    `E[(d <output, r> / dw)^2]` with random signs r, one draw a batch.

    Args:
        module: in any mode; called in eval mode.
        batches: as `calibration_batches` has them.
        names: of the parameters.

    Returns:
        By name; parameters that no output depends on are 0.
    """
    weights = {name: module.get_parameter(name) for name in names}
    found = {name: torch.zeros_like(one, dtype=torch.float32) for name, one in weights.items()}
    asked = {name: one.requires_grad for name, one in weights.items()}
    with evaluating(module, gradients=True), own_random_stream(module):
        torch.manual_seed(_SEED)
        for one in weights.values():
            one.requires_grad_(True)
        try:
            for batch in batches:
                with torch.enable_grad():
                    outputs = tensors_of(run_batch(module, batch))
                    outputs = [one for one in outputs if one.is_floating_point()]
                    signed = [(one * torch.randn_like(one).sign()).sum() for one in outputs]
                    total = torch.stack([one.float() for one in signed]).sum()
                    slopes = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
                for name, slope in zip(weights, slopes, strict=True):
                    if slope is not None:
                        found[name] += slope.float().square()
        finally:
            for name, one in weights.items():
                one.requires_grad_(asked[name])
    return found


def cheaper_contents(
    contents: Contents,
    rdoq: float,
    module: nn.Module | None = None,
    data: Data | None = None,
    batch_to_args: Callable[[Any], Any] | None = None,
) -> Contents:
    """Contents whose weights on uniform grids lie on the points that `cheaper` chooses.

    Importances of all weights together are scaled to a mean of 1, so that `rdoq` means the same
    with and without data: squared steps a bit.

    Args:
        contents: of the file.
        rdoq: what a bit is worth.
        module: that the contents are of; for data.
        data: inputs of the module; for a Fisher diagonal, compensation, and what is fitted anew. Of
            a container without a forward (ModuleDict): path of each network in it -> its inputs.
        batch_to_args: from a batch to what the module is called with.

    Raises:
        ValueError: where nothing lies on a uniform grid, or the module cannot take the data.
    """
    grids = {name: one for name, one in contents.grids.items() if isinstance(one, AffineGrid)}
    if not grids:
        raise ValueError(
            "rdoq= chooses among the points of uniform grids, and no tensor lies on one: train "
            "with QuantizationAwareTraining, or call quantize_weights(module, scheme='entropy')"
        )
    if module is not None and data is not None and not _is_called(module):
        return _of_networks(contents, rdoq, module, data, batch_to_args)
    batches = [] if data is None or module is None else calibration_batches(data, batch_to_args)
    importance = _importance(contents, grids, module, batches)
    tensors = dict(contents.tensors)
    tied = shared_memory(contents.tensors, first=contents.grids)
    chosen: dict[str, tuple[Tensor, Tensor]] = {}  # before, after
    for name, grid in grids.items():
        value = tensors[name].detach()
        symbols = grid.quantize(value)
        if name in tied or not symbols.numel():
            continue
        if torch.equal(grid.dequantize(symbols, value.dtype), value):
            chosen[name] = (symbols, cheaper(symbols, importance[name], rdoq).to(symbols.dtype))
    if module is not None and batches:
        keys = {stored_name(key): key for key, _ in module.named_parameters()}
        names = {keys[one]: one for one in chosen if grids[one].symmetric and one in keys}
        for path, layer in layer_hessians(module, batches, list(names)):
            name = names[path]
            grid, (symbols, plain) = grids[name], chosen[name]
            scale = grid._along_axis(grid.scale, symbols).expand(symbols.shape)
            most = int(symbols.abs().max())  # the range stays: a file has the fewest bits for it
            lengths = code_lengths(plain, most)
            limits = -most, most
            better = compensated(
                symbols, plain, scale, importance[name], layer, lengths, rdoq, limits
            )
            chosen[name] = (symbols, better)
    for name, (_, symbols) in chosen.items():
        tensors[name] = grids[name].dequantize(symbols, tensors[name].dtype)
    tensors |= {name: tensors[source] for name, source in tied.items() if source in grids}
    contents = replace(contents, tensors=tensors)
    return _refitted(contents, module, batches) if module is not None and batches else contents


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _of_networks(
    contents: Contents,
    rdoq: float,
    module: nn.Module,
    data: Data,
    batch_to_args: Callable[[Any], Any] | None,
) -> Contents:
    """Choices in each network of a container by itself: rdoq means the same in all of them."""
    if not isinstance(data, Mapping):
        raise ValueError(
            f"rdoq: a {type(module).__name__} has no forward, so that data= cannot go through it: "
            "give a dict of the inputs of each network in it, such as "
            f"{{{next((repr(name) for name, _ in module.named_children()), repr('decoder'))}: [x]}}"
        )
    networks: dict[str, nn.Module] = dict(module.named_modules())
    given: dict[str, Any] = {str(path): inputs for path, inputs in data.items()}
    if unknown := [path for path in given if not path or path not in networks]:
        raise ValueError(f"rdoq: data= names {unknown}, and there are {list(networks)[1:]}")
    rest, tensors = dict(contents.grids), dict(contents.tensors)
    for path, inputs in given.items():
        inside = f"{stored_name(path)}."
        part = replace(
            contents,
            tensors={k[len(inside) :]: v for k, v in tensors.items() if k.startswith(inside)},
            grids={k[len(inside) :]: v for k, v in contents.grids.items() if k.startswith(inside)},
        )
        found = cheaper_contents(part, rdoq, networks[path], inputs, batch_to_args)
        tensors |= {f"{inside}{name}": one for name, one in found.tensors.items()}
        rest = {name: one for name, one in rest.items() if not name.startswith(inside)}
    if rest:
        raise ValueError(f"rdoq: data= has no inputs of the networks that hold {sorted(rest)[:4]}")
    tied = shared_memory(contents.tensors, first=contents.grids)
    tensors |= {name: tensors[source] for name, source in tied.items()}
    return replace(contents, tensors=tensors)


def _importance(
    contents: Contents,
    grids: Mapping[str, AffineGrid],
    module: nn.Module | None,
    batches: Sequence[object],
) -> dict[str, Tensor]:
    if module is None or not batches:
        tensors = {name: contents.tensors[name] for name in grids}
        return {name: torch.ones_like(one, dtype=torch.float32) for name, one in tensors.items()}
    keys = {stored_name(key): key for key, _ in module.named_parameters(remove_duplicate=False)}
    found = output_fisher(module, batches, [keys[name] for name in grids])
    scaled = {
        name: found[keys[name]] * grid._along_axis(grid.scale, found[keys[name]]).square()
        for name, grid in grids.items()
    }
    total = sum(float(one.sum()) for one in scaled.values())
    mean = total / sum(one.numel() for one in scaled.values())
    if not mean > 0:
        raise ValueError("rdoq: no output of the module depends on its weights for this data")
    return {name: one / mean for name, one in scaled.items()}


@torch.no_grad()
def _refitted(contents: Contents, module: nn.Module, batches: Sequence[object]) -> Contents:
    """BatchNorm's statistics and the biases re-fitted to the weights of the file.

    Statistics are those of the data; then biases shift until layers have the mean outputs that
    they had before, where no BatchNorm has taken it away (arXiv:1906.04721, section 4.2).
    """
    clone = copy.deepcopy(module).eval()
    layers = {
        path: layer
        for path, layer in clone.named_modules()
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) and layer.bias is not None
    }
    with own_random_stream(clone):
        torch.manual_seed(_SEED)
        means = channel_means(clone, layers, batches)
        keys = {stored_name(key): key for key in clone.state_dict()}
        clone.load_state_dict({keys[name]: one for name, one in contents.tensors.items()})
        changed = _refit_norms(clone, batches)
        flow = Dataflow.of(clone)
        if "" in flow.stopped:  # it cannot be traced: which layers a BatchNorm reads is unknown
            means = {}
        means = {path: one for path, one in means.items() if path not in flow.norms}
        correct_biases(clone, layers, batches, means)
        changed |= {f"{path}.bias" if path else "bias" for path in means}
    state, tensors = clone.state_dict(), dict(contents.tensors)
    for name in tensors:
        if keys[name] in changed:
            tensors[name] = state[keys[name]].to(tensors[name].dtype)
    return replace(contents, tensors=tensors)


def _refit_norms(clone: nn.Module, batches: Sequence[object]) -> set[str]:
    """Give BatchNorms the statistics of the data; return the names of the buffers."""
    norms = {path: one for path, one in clone.named_modules() if isinstance(one, _NORMS)}
    norms = {path: one for path, one in norms.items() if one.track_running_stats}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for batch in batches if norms else ():
        run_batch(clone, batch)
    for norm in norms.values():
        norm.eval()
    return {
        f"{path}.{key}" if path else key
        for path, norm in norms.items()
        for key in ("running_mean", "running_var")
    }
