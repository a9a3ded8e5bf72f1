"""Checks of what quantization is asked for, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_compress.quantization.makers import SCHEMES
from lightning_compress.quantization.observers import OBSERVERS
from lightning_compress.quantization.quantizers import check_bits
from lightning_compress.targets import Pattern

__all__ = ["check_entropy", "check_sides"]


def check_sides(
    weight_bits: int | Mapping[Pattern, int] | None,
    activation_bits: int | None,
    scheme: str,
    observer: str,
) -> None:
    """Check bits (of weights: one for all, or one for each pattern) and names.

    Raises:
        ValueError: naming the value and the valid ones.
    """
    if weight_bits is None and activation_bits is None:
        raise ValueError("weight_bits and activation_bits are both None: nothing is quantized")
    if isinstance(weight_bits, Mapping) and not weight_bits:
        raise ValueError("weight_bits={} names no pattern")
    each = weight_bits.values() if isinstance(weight_bits, Mapping) else [weight_bits]
    for name, given in (
        *(("weight_bits", bits) for bits in each),
        ("activation_bits", activation_bits),
    ):
        if given is not None:
            check_bits(name, given)
    for name, given, valid in (("scheme", scheme, SCHEMES), ("observer", observer, OBSERVERS)):
        if given not in valid:
            raise ValueError(f"{name}={given!r}: valid are {list(valid)}")


def check_entropy(
    scheme: str,
    *,
    step: float,
    dead_zone: float,
    rate: float,
    target_bits: float | None,
    target_bytes: float | None,
) -> None:
    """Check what belongs to entropy grids.

    Raises:
        ValueError: for a value out of range, or given with another scheme.
    """
    if not step > 0:
        raise ValueError(f"step={step!r} must be above 0, in units of the weights' rms")
    if not 0.5 <= dead_zone < 1:
        raise ValueError(f"dead_zone={dead_zone!r} must lie in [0.5, 1)")
    if not rate >= 0:
        raise ValueError(f"rate={rate!r} must be 0 or more")
    if target_bits is not None and target_bytes is not None:
        raise ValueError("target_bits and target_bytes: give one of them")
    targets = {"target_bits": target_bits, "target_bytes": target_bytes}
    own = [name for name, value in targets.items() if value is not None]
    for name in own:
        if not (targets[name] or 0) > 0:
            raise ValueError(f"{name}={targets[name]!r} must be above 0")
    own += ["rate"] * (rate > 0) + ["dead_zone"] * (dead_zone > 0.5)
    if own and scheme != "entropy":
        raise ValueError(f"{', '.join(own)} belongs to scheme='entropy', not to {scheme!r}")
