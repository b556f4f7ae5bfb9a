"""Numbers as people read them."""

from __future__ import annotations

import math


def size(count: float) -> str:
    """Bytes in powers of 1000, as ``--size`` takes them: "17.4 MB"."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(count) >= power:
            return f"{count / power:.1f} {unit}" if abs(count) < 100 * power else f"{count / power:.0f} {unit}"
    return f"{count:.0f} B"


def bits(value: float | None) -> str:
    """Bits per weight: "2.25"; a dash where unknown."""
    return "-" if value is None else f"{value:.2f}"


def percent(share: float) -> str:
    """A share of one: "12.5 %"."""
    return f"{100 * share:.1f} %"


def ratio(part: float, whole: float) -> str:
    """How many times smaller: "7.9x"."""
    return f"{whole / part:.1f}x" if part else "-"


def decibels(relative_error: float | None) -> str:
    """Signal-to-noise of a squared relative error ||W - W'||^2 / ||W||^2: "21.3 dB"; a dash where unknown."""
    if relative_error is None:
        return "-"
    value = noise_decibels(relative_error)
    return "exact" if math.isinf(value) else f"{value:.1f} dB"


def noise_decibels(relative_error: float) -> float:
    """Signal-to-noise in dB of a squared relative error; infinite where there is no error."""
    return math.inf if relative_error <= 0 else -10 * math.log10(relative_error)


def duration(seconds: float) -> str:
    """A time: "0.17 ms", "12.3 s", "4 min 10 s"."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def count(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 weight", "3 weights"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def shape(dims: tuple[int, ...]) -> str:
    """A shape: "384 x 1536"."""
    return " x ".join(str(dim) for dim in dims) or "scalar"
