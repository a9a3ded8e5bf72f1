"""Plans of the dense baselines, and where their files lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["KEPT", "MADE", "PLANS", "Plan", "baseline_file"]

KEPT = Path(__file__).parents[2] / "rows" / "baselines"  # with the repository
MADE = Path("outputs/baselines")
FLAT = 1 / 3
NARROW = ["model.width=32", "evaluate.metric=fid"]
SMALL = ["model.width=16", "model.discriminator_width=16"]
FASHION, DIGITS = ["data=fashion_mnist"], ["data=digits", "data.batch_size=32"]


@dataclass(frozen=True)
class Plan:
    """How a dense baseline is trained.

    Args:
        overrides: of the config: model and data.
        epochs: of it.
        metric: that judges it; lower is better.
        seeds: how many it has.
        flat: fraction of the steps, at the end, that the learning rate stays at its lowest.
        precision: Lightning's, of its training and of the rows that go on from it. All are measured
            in float32.
    """

    overrides: Sequence[str]
    epochs: int
    metric: str
    seeds: int = 5
    flat: float = 0.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


PLANS: dict[str, dict[str, Plan]] = {
    "fashion": {
        "vae": Plan(["model=vae", *FASHION], 24, "neg_elbo", flat=FLAT, precision="bf16-mixed"),
        "dcgan": Plan(
            [
                "model=dcgan",
                "model.spectral_norm=true",
                "model.discriminator_width=16",
                *NARROW,
                *FASHION,
            ],
            60,
            "fid",
        ),
        "wgan_gp": Plan(["model=wgan_gp", "model.lr=2e-4", *NARROW, *FASHION], 20, "fid"),
        "recurrent_vae": Plan(
            ["model=recurrent_vae", "model.hidden=256", "data=fashion_rows"], 60, "neg_elbo"
        ),
    },
    "digits": {
        "vae": Plan(["model=vae", "model.width=16", "model.lr=3e-3", *DIGITS], 100, "neg_elbo"),
        "vae_wide": Plan(["model=vae", *DIGITS], 60, "neg_elbo"),
        "dcgan": Plan(
            ["model=dcgan", "model.spectral_norm=true", "model.lr=1e-3", *SMALL, *DIGITS],
            180,
            "kid",
            flat=FLAT,
        ),
        "wgan_gp": Plan(["model=wgan_gp", *SMALL, *DIGITS], 40, "kid"),
        "recurrent_vae": Plan(
            ["model=recurrent_vae", "model.lr=2e-3", "data=digit_rows", "data.batch_size=32"],
            300,
            "neg_elbo",
            flat=FLAT,
        ),
    },
}


def baseline_file(name: str, model: str, seed: int, folders: Sequence[Path] = (MADE, KEPT)) -> Path:
    """The half-precision file of a converged dense model.

    Raises:
        FileNotFoundError: naming the places and the command that makes it.

    >>> baseline_file("digits", "vae", 99)
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    places = [folder / name / f"{model}-{seed}.lcz" for folder in folders]
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(
        f"no dense baseline of {model!r}, seed {seed}: looked for {', '.join(map(str, places))}; "
        f"python experiments/benchmarks/baselines.py --set {name} --models {model} "
        f"--seeds {seed} makes it"
    )
