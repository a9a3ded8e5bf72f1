"""Compress generative models while they train: Lightning callbacks, small files, honest reports."""

from lightning_compress.callbacks import (
    ArtifactCallback,
    BalanceGuard,
    CompressionSummary,
    GradualPruning,
    Guard,
    PosteriorGuard,
    PostTrainingQuantization,
    ProjectedEMA,
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
from lightning_compress.errors import CorruptArtifactError, MissingExtraError, TargetError
from lightning_compress.measures import sparsity
from lightning_compress.projection import Projector
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
    "CompressionState",
    "CompressionSummary",
    "Constant",
    "CorruptArtifactError",
    "Cosine",
    "GradualPruning",
    "Guard",
    "Linear",
    "MissingExtraError",
    "OnnxInfo",
    "Polynomial",
    "PostTrainingQuantization",
    "PosteriorGuard",
    "ProjectedEMA",
    "Projector",
    "QuantizationAwareTraining",
    "RandomState",
    "Rewinding",
    "ScoreMonitor",
    "Staircase",
    "StopOnNonFinite",
    "TargetError",
    "ThresholdPruning",
    "compression_state",
    "export_onnx",
    "fake_quantized",
    "inspect_compressed",
    "load_compressed",
    "quantize_dynamic",
    "quantize_static",
    "quantize_weights",
    "read_tensors",
    "save_compressed",
    "sparsity",
    "write_tensors",
]
