"""Compress generative models while they train: Lightning callbacks, small files, honest reports."""

from lightning_compress.callbacks import (
    BalanceGuard,
    CompressionSummary,
    GradualPruning,
    Guard,
    PosteriorGuard,
    PostTrainingQuantization,
    ProjectedEMA,
    RandomState,
    Rewinding,
    ScoreMonitor,
    StopOnNonFinite,
    ThresholdPruning,
)
from lightning_compress.coding.artifact import (
    inspect_compressed,
    load_compressed,
    save_compressed,
)
from lightning_compress.coding.info import ArtifactInfo
from lightning_compress.conversion.onnx import OnnxInfo, export_onnx
from lightning_compress.conversion.parity import Parity
from lightning_compress.conversion.runtime import onnx_session
from lightning_compress.errors import CorruptArtifactError, MissingExtraError, TargetError
from lightning_compress.measures import sparsity
from lightning_compress.projection import Projector
from lightning_compress.quantization.post_training import quantize_weights
from lightning_compress.schedules import Constant, Cosine, Linear, Polynomial, Staircase
from lightning_compress.state import CompressionState, compression_state

__all__ = [
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
    "Parity",
    "Polynomial",
    "PostTrainingQuantization",
    "PosteriorGuard",
    "ProjectedEMA",
    "Projector",
    "RandomState",
    "Rewinding",
    "ScoreMonitor",
    "Staircase",
    "StopOnNonFinite",
    "TargetError",
    "ThresholdPruning",
    "compression_state",
    "export_onnx",
    "inspect_compressed",
    "load_compressed",
    "onnx_session",
    "quantize_weights",
    "save_compressed",
    "sparsity",
]
