"""Fidelity metrics: distances between generated and real images in a feature space."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from lightning_compress.modes import evaluating

__all__ = ["extract_features", "fidelity", "noise_floor", "precision_recall"]

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
CHUNK = 1000


def fidelity(
    generated: Tensor,
    real: Tensor,
    feature: nn.Module,
    *,
    batch_size: int = 256,
    kid_subset_size: int | None = None,
    k: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """Distances of generated images from real ones, in the feature space of `feature`.

    Args:
        generated: images (N, C, H, W) in the range that `feature` takes.
        real: images (M, C, H, W).
        feature: maps (N, C, H, W) to (N, D), such as `FeatureExtractor.module`.
        batch_size: images in one call of `feature`.
        kid_subset_size: of the 100 subsets of the kernel distance; None takes 1,000, or half of
            the smaller set where that is less (a subset of all images would hide the spread).
        k: neighbours that span the manifold of precision and recall.
        seed: of the kernel distance's subsets; no global random stream moves.

    Returns:
        `fid` (Heusel et al. 2017, arXiv:1706.08500, in float64), `kid` and `kid_std` (mean and
        spread over subsets, Binkowski et al. 2018, arXiv:1801.01401), `precision` and `recall`
        (Kynkäänniemi et al. 2019, arXiv:1904.06991), and `samples`, the number N of generated
        images: the Fréchet distance falls with it, so it belongs beside each number.

    Raises:
        ValueError: for too few images, different shapes, or values that are not finite.
    """
    needed = max(4, k + 1)
    for name, images in (("generated", generated), ("real", real)):
        _check_images(name, images, needed)
    if generated.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"generated and real images differ in shape: {tuple(generated.shape[1:])} "
            f"and {tuple(real.shape[1:])}"
        )
    fake = extract_features(generated, feature, batch_size=batch_size)
    true = extract_features(real, feature, batch_size=batch_size)
    mean, spread = _kernel_distance(fake, true, kid_subset_size, seed)
    precision, recall = precision_recall(fake, true, k=k)
    return {
        "fid": _frechet_distance(fake, true),
        "kid": mean,
        "kid_std": spread,
        "precision": precision,
        "recall": recall,
        "samples": len(generated),
    }


def noise_floor(
    real: Tensor,
    feature: nn.Module,
    *,
    batch_size: int = 256,
    kid_subset_size: int | None = None,
    k: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """The same metrics between two disjoint random halves of real images: what noise alone gives.

    `samples` is the size of one half. The Fréchet distance of a half lies above what a perfect
    generator would get with all images.

    Raises:
        ValueError: for too few images, or values that are not finite.
    """
    _check_images("real", real, 2 * max(4, k + 1))
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    order = order.to(real.device)
    half = len(real) // 2
    return fidelity(
        real[order[:half]],
        real[order[half:]],
        feature,
        batch_size=batch_size,
        kid_subset_size=kid_subset_size,
        k=k,
        seed=seed,
    )


def extract_features(images: Tensor, feature: nn.Module, *, batch_size: int = 256) -> Tensor:
    """Features (N, D) of images (N, C, H, W), in float64 on the CPU; `feature` in eval mode.

    Raises:
        ValueError: when `feature` does not return (N, D), or returns values that are not finite.
    """
    device = next((p.device for p in feature.parameters()), images.device)
    with evaluating(feature):
        parts = [feature(rows.to(device)).double().cpu() for rows in images.split(batch_size)]
    features = torch.cat(parts)
    if features.dim() != 2 or len(features) != len(images):
        raise ValueError(f"feature must return (N, D), got {tuple(features.shape)}")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("feature returned values that are not finite")
    return features


def precision_recall(fake: Tensor, true: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of features (N, D) and (M, D); needs O(N + M) memory.

    Precision: share of fakes within the k-th neighbour's radius of some real one; recall: the
    reverse. Kynkäänniemi et al. 2019, arXiv:1904.06991.

    >>> points = torch.arange(8.0)[:, None]
    >>> precision_recall(points, points), precision_recall(points + 100, points)
    ((1.0, 1.0), (0.0, 0.0))
    """
    fake_radii, true_radii = _radii(fake, k), _radii(true, k)
    hits, covered = 0, torch.zeros(len(true), dtype=torch.bool)
    for rows, radii in zip(fake.split(CHUNK), fake_radii.split(CHUNK), strict=True):
        distances = _distances(rows, true)
        hits += int((distances <= true_radii).any(dim=1).sum())
        covered |= (distances <= radii[:, None]).any(dim=0)
    return hits / len(fake), float(covered.double().mean())


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    # without the matrix product: its cancellation makes the distance of equal points not zero
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th neighbour; the nearest of k + 1 is the point itself."""
    nearest = [
        _distances(rows, points).topk(k + 1, largest=False).values for rows in points.split(CHUNK)
    ]
    return torch.cat(nearest)[:, -1]


class _Identity(nn.Identity):
    """Stands in for the network where torchmetrics is fed with features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _frechet_distance(fake: Tensor, true: Tensor) -> float:
    # no synchronisation: one process may evaluate while the others wait
    metric = FrechetInceptionDistance(feature=_Identity(true.shape[1]), sync_on_compute=False)
    metric.update(true, real=True)
    metric.update(fake, real=False)
    return float(metric.compute())


def _kernel_distance(
    fake: Tensor, true: Tensor, subset_size: int | None, seed: int
) -> tuple[float, float]:
    smaller = min(len(fake), len(true))
    size = min(KID_SUBSET_SIZE, smaller // 2) if subset_size is None else subset_size
    if not 2 <= size <= smaller:
        raise ValueError(f"kid_subset_size must lie in [2, {smaller}], got {subset_size}")
    with warnings.catch_warnings():
        # we ask for exactly that
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer.*")
        metric = KernelInceptionDistance(
            feature=_Identity(true.shape[1]),
            subsets=KID_SUBSETS,
            subset_size=size,
            sync_on_compute=False,
        )
    metric.update(true, real=True)
    metric.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs too
        mean, spread = metric.compute()
    return float(mean), float(spread)


def _check_images(name: str, images: Tensor, needed: int) -> None:
    if images.dim() != 4:
        raise ValueError(f"{name} images must be (N, C, H, W), got {tuple(images.shape)}")
    if len(images) < needed:
        raise ValueError(f"{name}: at least {needed} images are needed, got {len(images)}")
    if not bool(torch.isfinite(images).all()):
        raise ValueError(f"{name} images have values that are not finite")
