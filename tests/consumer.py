"""A project that uses the package, for `test_packaging.py`: pyright checks it in strict mode."""

from pathlib import Path

from lightning.pytorch import Callback
from torch import nn

from lightning_compress import (
    ArtifactInfo,
    CompressedCheckpoint,
    Cosine,
    EMATeacher,
    EntropyGrid,
    GradualPruning,
    KnowledgeDistillation,
    QualityBudget,
    QuantizationAwareTraining,
    Recipe,
    compression_recipe,
    inspect_compressed,
    load_compressed,
    prune_weights,
    save_compressed,
    sparsity,
)


def callbacks(teacher: nn.Module | None) -> list[Callback]:
    """Callbacks made by hand."""
    made: list[Callback] = [
        GradualPruning(schedule=Cosine(final_sparsity=0.9, end=0.7), include=["decoder.*"]),
        QuantizationAwareTraining(scheme="entropy", activation_bits=None, entropy=EntropyGrid()),
        KnowledgeDistillation(teacher or EMATeacher(0.99)),
        QualityBudget("val/loss", 0.02),
        CompressedCheckpoint(monitor="val/loss", mode="min"),
    ]
    return made


def recipe(model: nn.Module) -> Recipe:
    """Callbacks of a recipe, with one more."""
    made = compression_recipe("smallest", max_loss=0.02, model=model, monitor="val/loss")
    made.append(QualityBudget("val/loss", max_bytes=1e5))
    held: bool | None = made.held
    reasons: list[str] = made.reasons
    assert held is None or reasons
    return made


def ship(model: nn.Module, path: Path) -> tuple[float, int]:
    """A file, and back."""
    pruned: nn.Module = prune_weights(model, sparsity=0.5)
    info: ArtifactInfo = save_compressed(pruned, path, codec="auto")
    load_compressed(path, model)
    names: list[str] = list(inspect_compressed(path).per_tensor)
    assert names
    return sparsity(model), info.bytes
