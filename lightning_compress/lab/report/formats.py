"""Number formats of the report: counts, ratios, bytes, times, and what is missing."""

from __future__ import annotations

import math

__all__ = [
    "DASH",
    "MINUS",
    "TIMES",
    "count",
    "kilobytes",
    "milliseconds",
    "number",
    "percent",
    "scalar",
    "signed",
    "times",
]
DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"


def scalar(value: object) -> float | None:
    """Return a plain number as float; None for everything that is not one (bool included)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # JSON allows integers of any length
            return math.inf if value > 0 else -math.inf
    return None


def _special(value: float | None) -> str | None:
    """Return the text of a missing, undefined or infinite value, else None."""
    if value is None:
        return DASH
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else f"{MINUS}\N{INFINITY}"
    return None


def count(value: float | None) -> str:
    """Format an integer with thousands separators.

    >>> count(1234567), count(None)
    ('1,234,567', '–')
    """
    special = _special(value)
    return special if special is not None else f"{value or 0:,.0f}".replace("-", MINUS)


def number(value: float | None, digits: int = 4) -> str:
    """Format with `digits` significant digits and thousands separators.

    >>> number(239.54321), number(0.0312345), number(-12345.6), number(None)
    ('239.5', '0.03123', '−12,346', '–')
    """
    special = _special(value)
    if special is not None or value is None:
        return special or DASH
    if value != 0 and not 1e-4 <= abs(value) < 1e9:
        text = f"{value:.{digits - 1}e}"
    else:
        exponent = math.floor(math.log10(abs(value))) if value else 0
        text = f"{value:,.{max(digits - 1 - exponent, 0)}f}"
    return text.replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """Format a difference, always with its sign.

    >>> signed(0.5), signed(0.0)
    ('+0.500', '0')
    """
    if value == 0:
        return "0"
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 else text


def kilobytes(size: float | None) -> str:
    """Format bytes as kB of 1000 bytes with one decimal.

    >>> kilobytes(1_345_678)
    '1,345.7 kB'
    """
    special = _special(size)
    return special if special is not None else f"{(size or 0) / 1000:,.1f} kB"


def milliseconds(value: float | None) -> str:
    """Format milliseconds with three digits, without the unit.

    >>> milliseconds(0.12345), milliseconds(1.2345), milliseconds(1234.5)
    ('0.123', '1.23', '1,234')
    """
    special = _special(value)
    if special is not None or value is None:
        return special or DASH
    decimals = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{decimals}f}"


def percent(fraction: float | None) -> str:
    """Format a fraction as a percentage with one decimal.

    >>> percent(0.9312)
    '93.1 %'
    """
    special = _special(fraction)
    return special if special is not None else f"{100 * (fraction or 0):.1f} %"


def times(ratio: float | None) -> str:
    """Format a ratio with three digits.

    >>> times(31.234), times(1.0), times(171.3)
    ('31.2×', '1.00×', '171×')
    """
    text = milliseconds(ratio) if ratio is None or abs(ratio) >= 1 else number(ratio, 2)
    special = _special(ratio)
    return special if special is not None else f"{text}{TIMES}"
