"""Checks of constructor arguments: each error names the value and the valid range."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["check_choice", "check_fractions", "check_whole"]


def check_whole(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """Return `value` when it is a whole number in `[minimum, maximum]`.

    Raises:
        ValueError: naming the argument, the value and the range.

    >>> check_whole("batch_size", 0, 1)
    Traceback (most recent call last):
    ValueError: batch_size must be a whole number >= 1, got 0
    """
    highest = float("inf") if maximum is None else maximum
    if isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= highest:
        return value
    valid = f">= {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    raise ValueError(f"{name} must be a whole number {valid}, got {value!r}")


def check_choice(name: str, value: str, valid: Collection[str]) -> str:
    """Return `value` when it is one of `valid`.

    Raises:
        ValueError: naming the argument, the value and the choices.

    >>> check_choice("fit", "pad", ("pad", "resize"))
    'pad'
    """
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(valid)}; got {value!r}")
    return value


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Check that two parts of a data set leave something to train on.

    Raises:
        ValueError: when one is not between 0 and 1, or both together reach 1.

    >>> check_fractions(0.1, 1.5)
    Traceback (most recent call last):
    ValueError: test_fraction must be above 0 and below 1, got 1.5
    """
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise ValueError(f"{name} must be above 0 and below 1, got {value!r}")
    if val_fraction + test_fraction >= 1:
        raise ValueError(
            "val_fraction + test_fraction must be below 1,"
            f" got {val_fraction} + {test_fraction} = {val_fraction + test_fraction}"
        )
