"""Times as people read them: texts, and round places on an axis."""

from __future__ import annotations

import math


def time_text(value_s: float) -> str:
    """Three digits and the unit that suits them: '850 µs', '12.5 ms', '3.2 s', '5 min', '2.5 h'."""
    for least_s, unit_s, unit in (
        (7200.0, 3600.0, "h"),
        (300.0, 60.0, "min"),
        (0.9995, 1.0, "s"),
        (0.9995e-3, 1e-3, "ms"),
    ):
        if value_s >= least_s:
            return f"{_digits(value_s / unit_s)} {unit}"
    return f"{_digits(value_s / 1e-6)} µs"


def _digits(value: float) -> str:
    """Three significant digits, no more than one of them a trailing 0 behind the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values from `low` to `high` for a logarithmic axis, as many of each decade as there is room for."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    for factors, every in (
        (fine, 1),
        ((1, 1.5, 2, 3, 5, 7), 1),
        ((1, 2, 5), 1),
        ((1, 3), 1),
        ((1,), 1),
        ((1,), 2),
        ((1,), 3),
    ):
        ticks = [factor * 10.0**decade for decade in decades if decade % every == 0 for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= most:
            return inside
    return inside


def duration_ticks(length_s: float, most: int = 8) -> tuple[list[float], list[str], str]:
    """Places in seconds on an axis from 0 to `length_s`, what stands at them, and in which unit."""
    unit_s, unit = (3600.0, "hours") if length_s > 10_800 else (60.0, "minutes") if length_s > 300 else (1.0, "seconds")
    length = length_s / unit_s
    step = 10.0 ** math.floor(math.log10(length / most))
    step = next(step * factor for factor in (1, 2, 5, 10) if length / (step * factor) <= most)
    count = math.floor(length / step + 1e-9)
    return [k * step * unit_s for k in range(count + 1)], [f"{k * step:g}" for k in range(count + 1)], unit
