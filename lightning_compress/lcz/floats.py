"""Casts of bfloat16 and float8 bit patterns, which NumPy lacks.

The casts equal those of torch on the CPU: to nearest, ties to even, by way of float32.
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from lightning_compress.lcz.bits import map_in_chunks
from lightning_compress.lcz.raw_bits import DTYPES, Patterns

__all__ = ["cast_words", "narrowed", "widened"]

_NATIVE = {"float64": "<f8", "float32": "<f4", "float16": "<f2"}


def cast_words(words: Patterns, source: str, target: str) -> Patterns:
    """The patterns of floats of one dtype as patterns of another.

    >>> cast_words(np.array([0x3F80], np.uint16), "bfloat16", "float32").view(np.float32)
    array([1.], dtype=float32)
    """
    if source == target:
        return words
    return map_in_chunks(
        lambda piece: narrowed(widened(piece, source), target), words, _word(target)
    )


def _word(name: str) -> np.dtype[np.unsignedinteger]:
    return np.dtype(f"<u{DTYPES[name].itemsize}")


def widened(words: Patterns, name: str) -> NDArray[np.floating]:
    """The values of patterns of a floating dtype: float64 as it is, all others as float32."""
    if name in _NATIVE:
        return words.view(_NATIVE[name]).astype(np.float64 if name == "float64" else np.float32)
    if name == "bfloat16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    magnitudes = np.append(_magnitudes(name), np.full(128 - len(_magnitudes(name)), np.nan))
    if name == "float8_e5m2":
        magnitudes[124] = np.inf
    else:
        magnitudes[127] = np.nan
    signs = np.where(words & 128, np.float32(-1), np.float32(1))
    return magnitudes.astype(np.float32)[words & 127] * signs


def narrowed(values: NDArray[np.floating], name: str) -> Patterns:
    """The patterns of values in a floating dtype, rounded to nearest, ties to even."""
    if name == "float32":
        return values.astype(np.float32, copy=False).view("<u4")
    return map_in_chunks(partial(_narrowed, name=name), values, _word(name))


def _narrowed(values: NDArray[np.floating], name: str) -> Patterns:
    if name == "float64":
        return values.astype(np.float64).view("<u8")
    with np.errstate(over="ignore", invalid="ignore"):
        single = values.astype(np.float32)
        if name in _NATIVE:
            words = single.astype(_NATIVE[name])
            return words.view(f"<u{words.itemsize}")
    bits = single.view(np.uint32)
    if name == "bfloat16":
        words = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16  # only NaNs overflow
        words[np.isnan(single)] = 0x7FC0
        return words.astype(np.uint16)
    return _to_eight_bits(single, name) | (bits >> 24 & 128).astype(np.uint8)


def _to_eight_bits(values: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    """Magnitudes to the nearest pattern; float8_e4m3fn, which has no inf, ends at 448."""
    table = _magnitudes(name)
    size = np.abs(values).astype(np.float64)
    low = np.clip(np.searchsorted(table, size, "right") - 1, 0, len(table) - 2)
    middle = (table[low] + table[low + 1]) / 2
    above = (size > middle) | ((size == middle) & (low % 2 == 1))
    nearest = low + above if name == "float8_e5m2" else np.minimum(low + above, 126)
    return np.where(np.isnan(values), 127, nearest).astype(np.uint8)


@cache
def _magnitudes(name: str) -> NDArray[np.float64]:
    """The numbers that patterns 0, 1, 2 ... stand for, and where the next one would be."""
    mantissa, bias, count = (3, 7, 128) if name == "float8_e4m3fn" else (2, 15, 125)
    words = np.arange(count)
    exponent, fraction = words >> mantissa, (words & (1 << mantissa) - 1) / (1 << mantissa)
    normal = np.ldexp(1 + fraction, exponent - bias)
    return np.where(exponent > 0, normal, np.ldexp(fraction, 1 - bias))
