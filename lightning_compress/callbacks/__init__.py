"""Lightning callbacks: they decide when something happens, never how it is computed."""

from lightning_compress.callbacks.artifact import ArtifactCallback
from lightning_compress.callbacks.averaging import ProjectedEMA
from lightning_compress.callbacks.budget import QualityBudget
from lightning_compress.callbacks.channels import ChannelPruning
from lightning_compress.callbacks.distillation import KnowledgeDistillation
from lightning_compress.callbacks.guards import BalanceGuard, Guard, PosteriorGuard
from lightning_compress.callbacks.history import History
from lightning_compress.callbacks.hopeless import GiveUp, HopelessRunError
from lightning_compress.callbacks.monitor import ScoreMonitor
from lightning_compress.callbacks.online import OnlineTeacher
from lightning_compress.callbacks.pictures import LoggedPictures
from lightning_compress.callbacks.post_training import PostTrainingQuantization
from lightning_compress.callbacks.progress import PlainProgress, progress_callback
from lightning_compress.callbacks.pruning import GradualPruning
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.callbacks.rewinding import Rewinding
from lightning_compress.callbacks.safety import EpochCheckpoint, RandomState, StopOnNonFinite
from lightning_compress.callbacks.summary import CompressionSummary
from lightning_compress.callbacks.threshold import ThresholdPruning

__all__ = [
    "ArtifactCallback",
    "BalanceGuard",
    "ChannelPruning",
    "CompressionSummary",
    "EpochCheckpoint",
    "GiveUp",
    "GradualPruning",
    "Guard",
    "History",
    "HopelessRunError",
    "KnowledgeDistillation",
    "LoggedPictures",
    "OnlineTeacher",
    "PlainProgress",
    "PostTrainingQuantization",
    "PosteriorGuard",
    "ProjectedEMA",
    "QualityBudget",
    "QuantizationAwareTraining",
    "RandomState",
    "Rewinding",
    "ScoreMonitor",
    "StopOnNonFinite",
    "ThresholdPruning",
    "progress_callback",
]
