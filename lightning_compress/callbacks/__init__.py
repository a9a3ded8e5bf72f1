"""Lightning callbacks: they decide when something happens, never how it is computed.

The callbacks of the experiment harness (`lightning_compress.lab`) are reachable here too, as they
were before it had a folder of its own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_compress.budget.search import SearchRules
from lightning_compress.callbacks.artifact import ArtifactCallback
from lightning_compress.callbacks.channel_pruning import ChannelPruning, Fading
from lightning_compress.callbacks.compressed_scores import (
    CompressedCheckpoint,
    CompressedEarlyStopping,
)
from lightning_compress.callbacks.gradual_pruning import GradualPruning, Rewinding
from lightning_compress.callbacks.guards import BalanceGuard, Guard, PosteriorGuard
from lightning_compress.callbacks.knowledge_distillation import KnowledgeDistillation
from lightning_compress.callbacks.low_rank import LowRank
from lightning_compress.callbacks.online_teacher import OnlineTeacher
from lightning_compress.callbacks.projected_ema import ProjectedEMA
from lightning_compress.callbacks.quality_budget import QualityBudget
from lightning_compress.callbacks.quantization_aware_training import (
    PostTrainingQuantization,
    QuantizationAwareTraining,
)
from lightning_compress.callbacks.recipe import Recipe, RecipeReport, compression_recipe
from lightning_compress.callbacks.safeguards import RandomState, ScoreMonitor, StopOnNonFinite
from lightning_compress.callbacks.summary import CompressionSummary
from lightning_compress.callbacks.threshold_pruning import ThresholdPruning
from lightning_compress.pruning.regrowth import Regrowth

__all__ = [
    "ArtifactCallback",
    "BalanceGuard",
    "ChannelPruning",
    "CompressedCheckpoint",
    "CompressedEarlyStopping",
    "CompressionSummary",
    "EpochCheckpoint",
    "Fading",
    "GiveUp",
    "GradualPruning",
    "Guard",
    "History",
    "HopelessRunError",
    "KnowledgeDistillation",
    "LoggedPictures",
    "LowRank",
    "OnlineTeacher",
    "PlainProgress",
    "PostTrainingQuantization",
    "PosteriorGuard",
    "ProjectedEMA",
    "QualityBudget",
    "QuantizationAwareTraining",
    "RandomState",
    "Recipe",
    "RecipeReport",
    "Regrowth",
    "Rewinding",
    "ScoreMonitor",
    "SearchRules",
    "StopOnNonFinite",
    "ThresholdPruning",
    "compression_recipe",
    "progress_callback",
]

if TYPE_CHECKING:
    from lightning_compress.lab.checkpointing import EpochCheckpoint
    from lightning_compress.lab.monitoring import (
        GiveUp,
        History,
        HopelessRunError,
        LoggedPictures,
        PlainProgress,
        progress_callback,
    )

_OF_THE_LAB = {
    "EpochCheckpoint": "checkpointing",
    "GiveUp": "monitoring",
    "History": "monitoring",
    "HopelessRunError": "monitoring",
    "LoggedPictures": "monitoring",
    "PlainProgress": "monitoring",
    "progress_callback": "monitoring",
}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a callback of the harness when it is asked for, and not with this floor."""
        if name in _OF_THE_LAB:
            return getattr(
                importlib.import_module(f"lightning_compress.lab.{_OF_THE_LAB[name]}"), name
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
