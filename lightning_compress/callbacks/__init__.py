"""Lightning callbacks: they decide when something happens, never how it is computed."""

from lightning_compress.callbacks.averaging import ProjectedEMA
from lightning_compress.callbacks.history import History
from lightning_compress.callbacks.monitor import ScoreMonitor
from lightning_compress.callbacks.post_training import PostTrainingQuantization
from lightning_compress.callbacks.progress import PlainProgress, progress_callback
from lightning_compress.callbacks.pruning import GradualPruning
from lightning_compress.callbacks.safety import EpochCheckpoint, RandomState, StopOnNonFinite
from lightning_compress.callbacks.summary import CompressionSummary

__all__ = [
    "CompressionSummary",
    "EpochCheckpoint",
    "GradualPruning",
    "History",
    "PlainProgress",
    "PostTrainingQuantization",
    "ProjectedEMA",
    "RandomState",
    "ScoreMonitor",
    "StopOnNonFinite",
    "progress_callback",
]
