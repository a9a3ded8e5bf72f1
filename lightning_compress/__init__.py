"""Compress generative models while they train: Lightning callbacks, small files, honest reports.

Names are imported when they are first asked for: PyTorch and Lightning take seconds to load, which
the command line's `--help` and the launcher of a sweep need not wait for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_compress.callbacks import (
        ArtifactCallback,
        BalanceGuard,
        ChannelPruning,
        CompressionSummary,
        GradualPruning,
        Guard,
        KnowledgeDistillation,
        OnlineTeacher,
        PosteriorGuard,
        PostTrainingQuantization,
        ProjectedEMA,
        QualityBudget,
        QuantizationAwareTraining,
        RandomState,
        Rewinding,
        ScoreMonitor,
        StopOnNonFinite,
        ThresholdPruning,
    )
    from lightning_compress.coding.artifact import (
        inspect_compressed,
        load_compressed,
        read_tensors,
        save_compressed,
        write_tensors,
    )
    from lightning_compress.coding.info import ArtifactInfo
    from lightning_compress.conversion.onnx import OnnxInfo, export_onnx
    from lightning_compress.conversion.parity import Parity
    from lightning_compress.conversion.runtime import onnx_session
    from lightning_compress.distillation.critics import Perceptual, TeacherScore
    from lightning_compress.distillation.initialization import initialize_from_teacher
    from lightning_compress.distillation.pairs import Pair
    from lightning_compress.distillation.teachers import EMATeacher
    from lightning_compress.distillation.terms import StepKL
    from lightning_compress.distillation.weights import Ramp
    from lightning_compress.errors import CorruptArtifactError, MissingExtraError, TargetError
    from lightning_compress.measures import sparsity
    from lightning_compress.projection import Projector
    from lightning_compress.pruning.channel_files import rebuild_channels
    from lightning_compress.pruning.channel_surgery import match_channels
    from lightning_compress.quantization.activations import fake_quantized
    from lightning_compress.quantization.post_training import (
        quantize_dynamic,
        quantize_static,
        quantize_weights,
    )
    from lightning_compress.schedules import Constant, Cosine, Linear, Polynomial, Staircase
    from lightning_compress.state import CompressionState, compression_state

__all__ = [
    "ArtifactCallback",
    "ArtifactInfo",
    "BalanceGuard",
    "ChannelPruning",
    "CompressionState",
    "CompressionSummary",
    "Constant",
    "CorruptArtifactError",
    "Cosine",
    "EMATeacher",
    "GradualPruning",
    "Guard",
    "KnowledgeDistillation",
    "Linear",
    "MissingExtraError",
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
    "Rewinding",
    "ScoreMonitor",
    "Staircase",
    "StepKL",
    "StopOnNonFinite",
    "TargetError",
    "TeacherScore",
    "ThresholdPruning",
    "compression_state",
    "export_onnx",
    "fake_quantized",
    "initialize_from_teacher",
    "inspect_compressed",
    "load_compressed",
    "match_channels",
    "onnx_session",
    "quantize_dynamic",
    "quantize_static",
    "quantize_weights",
    "read_tensors",
    "rebuild_channels",
    "save_compressed",
    "sparsity",
    "write_tensors",
]

# Where the names of `__all__` are; for who reads types the imports above say the same.
_HOMES = {
    "callbacks": (
        "ArtifactCallback BalanceGuard ChannelPruning CompressionSummary GradualPruning "
        "Guard KnowledgeDistillation OnlineTeacher PosteriorGuard "
        "PostTrainingQuantization ProjectedEMA QualityBudget QuantizationAwareTraining "
        "RandomState Rewinding ScoreMonitor StopOnNonFinite ThresholdPruning"
    ),
    "coding.artifact": (
        "inspect_compressed load_compressed read_tensors save_compressed write_tensors"
    ),
    "coding.info": "ArtifactInfo",
    "conversion.onnx": "OnnxInfo export_onnx",
    "conversion.parity": "Parity",
    "conversion.runtime": "onnx_session",
    "distillation.critics": "Perceptual TeacherScore",
    "distillation.initialization": "initialize_from_teacher",
    "distillation.pairs": "Pair",
    "distillation.teachers": "EMATeacher",
    "distillation.terms": "StepKL",
    "distillation.weights": "Ramp",
    "errors": "CorruptArtifactError MissingExtraError TargetError",
    "measures": "sparsity",
    "projection": "Projector",
    "pruning.channel_files": "rebuild_channels",
    "pruning.channel_surgery": "match_channels",
    "quantization.activations": "fake_quantized",
    "quantization.post_training": "quantize_dynamic quantize_static quantize_weights",
    "schedules": "Constant Cosine Linear Polynomial Staircase",
    "state": "CompressionState compression_state",
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


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
