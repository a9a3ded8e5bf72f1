"""Post-training quantization: quantizes trained weights and activations without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_compress.deployment import deployed_part
from lightning_compress.grids import channel_axis, check_bits
from lightning_compress.modes import evaluating
from lightning_compress.projection import ProjectedWeight
from lightning_compress.quantization.activation_ranges import ActivationQuantizer, calibrate
from lightning_compress.quantization.bias_rounding import round_biases
from lightning_compress.quantization.corrections import (
    channel_means,
    correct_biases,
    equalize_layers,
)
from lightning_compress.quantization.fake_quantize import activation_layers, batch_norms
from lightning_compress.quantization.ranges import OBSERVERS
from lightning_compress.quantization.upsampled_conv import EnlargedReaders
from lightning_compress.quantization.weight_quantizers import RangeGrids, make_quantizer
from lightning_compress.sample_inputs import calibration_batches, run_batch
from lightning_compress.sharding import to_shards
from lightning_compress.state import set_activation_grids, set_dynamic
from lightning_compress.targets import Coverage, CoverageTable, Pattern, Selection, select

__all__ = [
    "POST_TRAINING_SCHEMES",
    "PostTrainingReport",
    "quantize_dynamic",
    "quantize_static",
    "quantize_weights",
]

POST_TRAINING_SCHEMES = ("symmetric", "affine", "codebook", "entropy")


@dataclass(frozen=True)
class PostTrainingReport:
    """Report of post-training quantization: quantized layers, and why others were skipped.

    Args:
        weights: a row a parameter.
        activations: a row a layer with quantized weights.
        equalized: a row a layer that was looked at.
        corrected: the same, for biases.
        rounded: the same, for biases that stand on the steps of int8 kernels.
    """

    weights: CoverageTable
    activations: CoverageTable = field(default_factory=CoverageTable)
    equalized: CoverageTable = field(default_factory=CoverageTable)
    corrected: CoverageTable = field(default_factory=CoverageTable)
    rounded: CoverageTable = field(default_factory=CoverageTable)

    def _repr_html_(self) -> str:
        tables = {
            "Weights": self.weights,
            "Activations": self.activations,
            "Equalized": self.equalized,
            "Biases corrected": self.corrected,
            "Biases on steps": self.rounded,
        }
        return "".join(
            f"<p>{title}</p>{table._repr_html_()}" for title, table in tables.items() if table
        )


@torch.no_grad()
def quantize_weights(
    module: nn.Module,
    bits: int = 8,
    *,
    scheme: str = "symmetric",
    per_channel: bool = True,
    observer: str = "minmax",
    step: float = 0.5,
    include: Sequence[Pattern] | Pattern | None = None,
    exclude: Sequence[Pattern] | Pattern = (),
) -> Selection:
    """Round weights in place to a grid over their range; zeros stay zero.

    The grids are attached to the module (`compression_state`), so that a saved file holds whole
    numbers. Activations are left alone. Of a sharded module (FSDP2) all processes must call.
    Jacob et al. 2018, arXiv:1712.05877.

    Args:
        module: the trained model.
        bits: 2 to 8.
        scheme: "symmetric" (around 0), "affine" (from the minimum to the maximum), "codebook"
            (k-means) or "entropy" (a step in units of the rms); the last two: one grid a tensor.
        per_channel: one scale an output channel, else one a tensor.
        observer: "minmax", "percentile" or "mse": of "symmetric" and "affine".
        step: of "entropy", in units of the rms of the non-zero weights.
        include: path globs or layer classes; None: the weights of the deployed part.
        exclude: the same, taken away again.

    Raises:
        ValueError: for bits, a scheme or an observer out of range, or weights that are not finite.
        TargetError: for patterns that match nothing.

    >>> layer = nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.1, 1.0]]))
    >>> _ = quantize_weights(layer, 4)
    >>> layer.weight.data
    tensor([[0.1429, 1.0000]])
    """
    check_bits("bits", bits)
    _check_names(scheme, observer)
    if not step > 0:
        raise ValueError(f"step={step!r} must be above 0, in units of the weights' rms")
    return _put_on_grids(
        module,
        bits,
        scheme=scheme,
        per_channel=per_channel,
        observer=observer,
        step=step,
        include=include,
        exclude=exclude,
    )


def _put_on_grids(
    module: nn.Module,
    bits: int,
    *,
    scheme: str,
    per_channel: bool,
    observer: str,
    include: Sequence[Pattern] | Pattern | None,
    exclude: Sequence[Pattern] | Pattern,
    step: float = 0.5,
    enlarged: Mapping[str, int] | None = None,
) -> Selection:
    """`enlarged`: weight -> factor of the image that it reads, for sums that fit int8."""
    to_shards(module)
    selection = select(module, include, exclude, frozen=True)
    for target in selection.targets:
        axis = channel_axis(target.layer) if per_channel else None
        projected = ProjectedWeight(target)
        quantizer = make_quantizer(
            scheme,
            bits=bits,
            axis=axis,
            observer=observer,
            lr=0.0,
            entropy={"relative_step": step},
            partition=projected.partition,
        )
        if isinstance(quantizer, RangeGrids) and enlarged:
            quantizer.enlarged = enlarged.get(target.path, 1)
        if int(projected.partition.all_reduce_sum((~torch.isfinite(projected.data)).sum())):
            raise ValueError(f"{target.path}: cannot find the range of NaN or infinite weights")
        quantizer.start(projected.data)
        projected.set_quantizer(quantizer.grid)
        projected.project()
    return selection


def quantize_dynamic(
    module: nn.Module,
    bits: int = 8,
    *,
    scheme: str = "symmetric",
    per_channel: bool = True,
    equalize: bool = False,
    include: Sequence[Pattern] | Pattern | None = None,
    exclude: Sequence[Pattern] | Pattern = (),
) -> PostTrainingReport:
    """Round weights in place; the ranges of activations are left to be found when it runs.

    Args:
        module: the trained model.
        bits: of the weights, 2 to 8.
        scheme: as for `quantize_weights`.
        per_channel: one scale an output channel, else one a tensor.
        equalize: first let layers share their ranges (`equalize_layers`).
        include: path globs or layer classes; None: the weights of the deployed part.
        exclude: the same, taken away again.

    Raises:
        ValueError, TargetError: as `quantize_weights` does.

    >>> report = quantize_dynamic(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
    >>> [row.path for row in report.weights if row.selected]
    ['0.weight', '2.weight']
    """
    check_bits("bits", bits)
    _check_names(scheme)
    selection = select(module, include, exclude, frozen=True)
    layers, _ = activation_layers(module, selection.targets)
    with evaluating(module, gradients=True):
        equalized = equalize_layers(module, layers) if equalize else []
    rules = {"scheme": scheme, "per_channel": per_channel, "include": include, "exclude": exclude}
    quantize_weights(module, bits, **rules)
    for layer in layers.values():
        set_activation_grids(layer, None)
        set_dynamic(layer, True)
    why = "its range is found when it runs"
    activations = [Coverage(path, (), False, why) for path in layers]
    return PostTrainingReport(
        selection.coverage, CoverageTable(activations), CoverageTable(equalized)
    )


def quantize_static(
    module: nn.Module,
    data: Iterable[object] | Tensor,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    scheme: str = "symmetric",
    per_channel: bool = True,
    observer: str = "minmax",
    bias_correction: bool = False,
    equalize: bool = False,
    batch_to_args: Callable[[Any], Any] | None = None,
    include: Sequence[Pattern] | Pattern | None = None,
    exclude: Sequence[Pattern] | Pattern = (),
) -> PostTrainingReport:
    """Round weights in place, and find the ranges of activations on calibration data.

    The grids of activations are attached to the layers: `fake_quantized` computes with them. Biases
    are rounded as int8 kernels hold them, to steps of input times weight. Behind nearest-neighbour
    upsampling, steps leave room for sums of weights: see `export_onnx`.

    Args:
        module: the trained model, called on each batch; a GAN's generator, a VAE's decoder.
        data: batches of inputs, each a tensor, a tuple or list of arguments, or a dict.
        weight_bits: 2 to 8.
        activation_bits: 2 to 8.
        scheme: of the weights, as for `quantize_weights`.
        per_channel: one scale an output channel, else one a tensor.
        observer: "minmax", "moving_average", "percentile" or "mse", of both sides.
        bias_correction: take the mean shift of each layer's output from its bias.
        equalize: first let layers share their ranges (`equalize_layers`).
        batch_to_args: from a batch to what the module is called with, where it holds more: of a
            loader of (x, label) pairs `lambda batch: batch[0]`.
        include: path globs or layer classes; None: the weights of the deployed part.
        exclude: the same, taken away again.

    Raises:
        ValueError: for arguments out of range, and data that are empty, not finite, or pass a layer
            by.
        TargetError: for patterns that match nothing.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> report = quantize_static(net, [torch.rand(8, 2)])
    >>> [row.path for row in report.activations if row.selected]
    ['0', '2']
    """
    check_bits("weight_bits", weight_bits)
    check_bits("activation_bits", activation_bits)
    _check_names(scheme, observer)
    batches, selection = (
        calibration_batches(data, batch_to_args),
        select(module, include, exclude, frozen=True),
    )
    layers, activations = activation_layers(module, selection.targets)
    with evaluating(module, gradients=True):
        equalized = equalize_layers(module, layers) if equalize else []
        means = channel_means(module, layers, batches) if bias_correction else {}
        _put_on_grids(
            module,
            weight_bits,
            scheme=scheme,
            per_channel=per_channel,
            observer=observer,
            include=include,
            exclude=exclude,
            enlarged=_enlarged(module, selection, batches[0]),
        )
        corrected = correct_biases(module, layers, batches, means)
        parts = deployed_part(module)
        side = ActivationQuantizer(
            layers,
            parts=parts,
            norms=batch_norms(module),
            bits=activation_bits,
            observer=observer,
        )
        calibrate(module, side, batches)
        side.leave_grids()
    rounded = round_biases(module, layers)
    tables = map(CoverageTable, (equalized, corrected, rounded))
    return PostTrainingReport(selection.coverage, activations, *tables)


@torch.enable_grad()
def _enlarged(module: nn.Module, selection: Selection, batch: object) -> dict[str, int]:
    """Weights that read an enlarged image -> how often it repeats a pixel."""
    found: dict[str, int] = {}
    layers = {target.path: target.layer for target in selection.targets}
    finder = EnlargedReaders(layers, found.__setitem__)
    try:
        if finder.looking:
            run_batch(module, tree_map(_differentiable, batch))
    finally:
        finder.stop()
    return found


def _differentiable(value: Any) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if floats else value


def _check_names(scheme: str, observer: str = "minmax") -> None:
    for name, given, valid in (
        ("scheme", scheme, POST_TRAINING_SCHEMES),
        ("observer", observer, OBSERVERS),
    ):
        if given not in valid:
            raise ValueError(f"{name}={given!r}: valid are {list(valid)}")
