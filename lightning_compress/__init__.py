"""Compress generative models while they train: Lightning callbacks, small files, honest reports."""

from lightning_compress.callbacks import (
    BalanceGuard,
    CompressionSummary,
    GradualPruning,
    Guard,
    KnowledgeDistillation,
    OnlineTeacher,
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
from lightning_compress.distillation.critics import Perceptual, TeacherScore
from lightning_compress.distillation.initialization import initialize_from_teacher
from lightning_compress.distillation.pairs import Pair
from lightning_compress.distillation.teachers import EMATeacher
from lightning_compress.distillation.terms import StepKL
from lightning_compress.distillation.weights import Ramp
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
    "EMATeacher",
    "GradualPruning",
    "Guard",
    "KnowledgeDistillation",
    "Linear",
    "MissingExtraError",
    "OnlineTeacher",
    "OnnxInfo",
    "Pair",
    "Perceptual",
    "Polynomial",
    "PostTrainingQuantization",
    "PosteriorGuard",
    "ProjectedEMA",
    "Projector",
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
    "initialize_from_teacher",
    "inspect_compressed",
    "load_compressed",
    "quantize_weights",
    "save_compressed",
    "sparsity",
]
