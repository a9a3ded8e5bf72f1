"""Compress generative models while they train: Lightning callbacks, small files, honest reports."""

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
