"""Compress generative models while they train: Lightning callbacks, small files, honest reports.

Names are imported when they are first asked for: PyTorch and Lightning take seconds to load, which
the command line's `--help` and the launcher of a sweep need not wait for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_compress.callbacks import (
        ArtifactCallback,
        BalanceGuard,
        ChannelPruning,
        CompressedCheckpoint,
        CompressedEarlyStopping,
        CompressionSummary,
        Fading,
        GradualPruning,
        Guard,
        KnowledgeDistillation,
        LowRank,
        OnlineTeacher,
        PosteriorGuard,
        PostTrainingQuantization,
        ProjectedEMA,
        QualityBudget,
        QuantizationAwareTraining,
        RandomState,
        Recipe,
        Regrowth,
        Rewinding,
        ScoreMonitor,
        SearchRules,
        StopOnNonFinite,
        ThresholdPruning,
        compression_recipe,
    )
    from lightning_compress.channels.following import apply_compression
    from lightning_compress.channels.low_rank import match_factors
    from lightning_compress.channels.resize import match_channels, rebuild_channels
    from lightning_compress.channels.student import initialize_from_teacher
    from lightning_compress.conversion.checks import Parity
    from lightning_compress.conversion.export import OnnxInfo, export_onnx
    from lightning_compress.conversion.mobile import MobileInfo, export_mobile
    from lightning_compress.conversion.quantized_program import quantized_program
    from lightning_compress.conversion.session import onnx_session
    from lightning_compress.copies import copy_module
    from lightning_compress.distillation.discriminator_losses import Perceptual, TeacherScore
    from lightning_compress.distillation.losses import StepKL
    from lightning_compress.distillation.pairs import Pair, Ramp
    from lightning_compress.distillation.teachers import EMATeacher
    from lightning_compress.errors import CorruptArtifactError, MissingExtraError, TargetError
    from lightning_compress.lcz.arrays import inspect_compressed, onnx_model, read_arrays
    from lightning_compress.lcz.artifact import (
        load_compressed,
        read_tensors,
        save_compressed,
        write_graph,
        write_tensors,
    )
    from lightning_compress.lcz.info import ArtifactInfo, GraphInfo
    from lightning_compress.lcz.restoring import restore_compression
    from lightning_compress.projection import Projector
    from lightning_compress.pruning.one_shot import prune_weights
    from lightning_compress.quantization.entropy import EntropyGrid
    from lightning_compress.quantization.fake_quantize import fake_quantized
    from lightning_compress.quantization.post_training import (
        quantize_dynamic,
        quantize_static,
        quantize_weights,
    )
    from lightning_compress.schedules import Constant, Cosine, Linear, Polynomial, Staircase
    from lightning_compress.state import CompressionState, compression_state
    from lightning_compress.targets import sparsity

__all__ = [
    "ArtifactCallback",
    "ArtifactInfo",
    "BalanceGuard",
    "ChannelPruning",
    "CompressedCheckpoint",
    "CompressedEarlyStopping",
    "CompressionState",
    "CompressionSummary",
    "Constant",
    "CorruptArtifactError",
    "Cosine",
    "EMATeacher",
    "EntropyGrid",
    "Fading",
    "GradualPruning",
    "GraphInfo",
    "Guard",
    "KnowledgeDistillation",
    "Linear",
    "LowRank",
    "MissingExtraError",
    "MobileInfo",
    "OnlineTeacher",
    "OnnxInfo",
    "Pair",
    "Parity",
    "Perceptual",
    "Polynomial",
    "PostTrainingQuantization",
    "PosteriorGuard",
    "ProjectedEMA",
    "Projector",
    "QualityBudget",
    "QuantizationAwareTraining",
    "Ramp",
    "RandomState",
    "Recipe",
    "Regrowth",
    "Rewinding",
    "ScoreMonitor",
    "SearchRules",
    "Staircase",
    "StepKL",
    "StopOnNonFinite",
    "TargetError",
    "TeacherScore",
    "ThresholdPruning",
    "apply_compression",
    "compression_recipe",
    "compression_state",
    "copy_module",
    "export_mobile",
    "export_onnx",
    "fake_quantized",
    "initialize_from_teacher",
    "inspect_compressed",
    "load_compressed",
    "match_channels",
    "match_factors",
    "onnx_model",
    "onnx_session",
    "prune_weights",
    "quantize_dynamic",
    "quantize_static",
    "quantize_weights",
    "quantized_program",
    "read_arrays",
    "read_tensors",
    "rebuild_channels",
    "restore_compression",
    "save_compressed",
    "sparsity",
    "write_graph",
    "write_tensors",
]

# Where the names of `__all__` are; for who reads types the imports above say the same.
_HOMES = {
    "callbacks": (
        "ArtifactCallback BalanceGuard ChannelPruning CompressedCheckpoint "
        "CompressedEarlyStopping CompressionSummary Fading GradualPruning Guard "
        "KnowledgeDistillation LowRank OnlineTeacher PosteriorGuard PostTrainingQuantization "
        "ProjectedEMA QualityBudget QuantizationAwareTraining RandomState Recipe Regrowth "
        "Rewinding ScoreMonitor SearchRules StopOnNonFinite ThresholdPruning "
        "compression_recipe"
    ),
    "channels.following": "apply_compression",
    "channels.low_rank": "match_factors",
    "channels.resize": "match_channels rebuild_channels",
    "channels.student": "initialize_from_teacher",
    "conversion.checks": "Parity",
    "conversion.export": "export_onnx OnnxInfo",
    "conversion.mobile": "export_mobile MobileInfo",
    "conversion.quantized_program": "quantized_program",
    "conversion.session": "onnx_session",
    "copies": "copy_module",
    "distillation.discriminator_losses": "Perceptual TeacherScore",
    "distillation.losses": "StepKL",
    "distillation.pairs": "Pair Ramp",
    "distillation.teachers": "EMATeacher",
    "errors": "CorruptArtifactError MissingExtraError TargetError",
    "lcz.arrays": "inspect_compressed onnx_model read_arrays",
    "lcz.artifact": "load_compressed read_tensors save_compressed write_graph write_tensors",
    "lcz.info": "ArtifactInfo GraphInfo",
    "lcz.restoring": "restore_compression",
    "projection": "Projector",
    "pruning.one_shot": "prune_weights",
    "quantization.entropy": "EntropyGrid",
    "quantization.fake_quantize": "fake_quantized",
    "quantization.post_training": "quantize_dynamic quantize_static quantize_weights",
    "schedules": "Constant Cosine Linear Polynomial Staircase",
    "state": "compression_state CompressionState",
    "targets": "sparsity",
}
__version__: str  # found when it is asked for
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


if not TYPE_CHECKING:  # so that a mistyped name is still found where types are checked

    def __getattr__(name: str) -> Any:
        """Import a public name, or the part of the package that some of them lie in."""
        if name in _HOME_OF:
            found = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
            globals()[name] = found
            return found
        if name in {home.split(".")[0] for home in _HOMES}:
            return importlib.import_module(f"{__name__}.{name}")
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("lightning-compress")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _find_configs() -> None:
    """Make `pkg://lightning_compress.conf` known in a checkout: `conf/` lies beside the package."""
    name, here = f"{__name__}.conf", Path(__file__).parent
    if not (here / "conf").is_dir() and (here.parent / "conf").is_dir():
        spec = PathFinder.find_spec(name, [str(here.parent)])
        if spec is not None:
            sys.modules[name] = importlib.util.module_from_spec(spec)


_find_configs()


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
