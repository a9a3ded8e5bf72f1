"""Logarithms and logistic functions in whole numbers, so that every machine gets the same ones.

Logits are base 2, in units of 1/256: `256 * log2(p / (1 - p))`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ONE", "WEIGHT_ONE", "fit_weights", "log2_256", "log2_256_of", "probability"]

ONE = 1 << 20  # probabilities are in units of 1 / ONE
WEIGHT_ONE = 32  # a feature's weight is in units of 1 / WEIGHT_ONE
_LIMIT = 16 * 256  # logits beyond it are cut
_MANY = 1 << 12  # bits that weights are first fitted to a few of
_FRACTION = 10  # bits of the mantissa that choose an entry of the logarithm's table

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

_LOG_TABLE = np.rint(256 * np.log2(1 + np.arange(1 << _FRACTION) / (1 << _FRACTION)))
_LOG_TABLE = _LOG_TABLE.astype(np.int64)
_LOGS: list[int] = _LOG_TABLE.tolist()
_PROBABILITY = np.rint(ONE / (1 + np.exp2(-np.arange(-_LIMIT, _LIMIT + 1) / 256))) / ONE


def log2_256(values: Ints) -> Ints:
    """256 times the base-2 logarithm of whole numbers from 1 to 2^53, rounded.

    The exponent, and the ten bits after the leading one by a table.

    >>> log2_256(np.array([1, 2, 3, 1 << 40]))
    array([    0,   256,   406, 10240])
    """
    top = values.astype(np.float64).view(np.int64) >> 52 - _FRACTION  # exact: 11 + 10 bits
    exponent = (top >> _FRACTION) - 1023
    return 256 * exponent + _LOG_TABLE.take(top & (1 << _FRACTION) - 1)


def log2_256_of(value: int) -> int:
    """`log2_256` of one number, which NumPy would take twenty times as long for.

    >>> [log2_256_of(value) for value in (1, 2, 3, 1 << 40)]
    [0, 256, 406, 10240]
    """
    exponent = value.bit_length() - 1
    return 256 * exponent + _LOGS[(value << _FRACTION >> exponent) - (1 << _FRACTION)]


def probability(logits: Ints) -> NDArray[np.float64]:
    """Probabilities of (N,) logits: exact multiples of 1 / ONE, from 2^-16 to 1 - 2^-16.

    >>> probability(np.array([0, 256])).tolist()[0]
    0.5
    """
    return _PROBABILITY.take(logits + _LIMIT, mode="clip")


def fit_weights(
    features: NDArray[Any], offset: Ints, bits: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], float]:
    """Weights of least code length, by Newton's method, and how many bits they save.

    Args:
        features: (F, N) logits to be weighed.
        offset: (N,) logits that they are added to.
        bits: (N,) what is coded.

    Returns:
        (F,) whole numbers from -128 to 127, `WEIGHT_ONE` standing for 1.
    """
    unit = math.log(2) / 256
    # Half the bits of a double are plenty: the weights end in steps of 1 / WEIGHT_ONE.
    x = np.multiply(features, unit, dtype=np.float32)
    base, y = np.multiply(offset, unit, dtype=np.float32), bits.astype(np.float32)
    weights = np.zeros(len(x), np.float32)
    for step in (8, 1) if len(y) > _MANY else (1,):  # close by means of a few, then to the point
        weights = _newton(weights, np.ascontiguousarray(x[:, ::step]), base[::step], y[::step])
    whole = np.clip(np.rint(weights * WEIGHT_ONE), -128, 127).astype(np.int64)
    after = base + (whole / WEIGHT_ONE).astype(np.float32) @ x
    saved = _nats(base, bits) - _nats(after, bits)
    return whole, saved / math.log(2)


def _newton(weights: Floats, x: Floats, base: Floats, y: Floats) -> Floats:
    """Weights of less code length, from some on."""
    ridge = np.eye(len(x), dtype=np.float32)
    for _ in range(8):
        p = 1 / (1 + np.exp(-(base + weights @ x)))
        gradient = x @ (p - y) + ridge @ weights
        step = np.linalg.solve((x * (p * (1 - p))) @ x.T + ridge, gradient)
        weights = weights - np.clip(step, -1, 1)
        if np.abs(step).max() < 0.05:  # what is left to do is about the square of it
            break
    return weights


def _nats(logits: Floats, bits: NDArray[np.bool_]) -> float:
    """What it costs to code bits with these natural logits."""
    wrong = np.where(bits, -logits, logits)
    costs = np.maximum(wrong, 0) + np.log(1 + np.exp(-np.abs(wrong)))
    return float(costs.sum(dtype=np.float64))
