"""Means over seeds, and how sure they are."""

import math
import statistics

CONFIDENCE = 0.95


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, None for a single value; NaN where there is no value."""
    if not values:
        return math.nan, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def half_interval(values: list[float]) -> float | None:
    """Half the width of Student's t-interval of the mean at CONFIDENCE: t * s / sqrt(n). None for fewer than 2 values.

    The values are seeds, which are independent. Two give a wide interval: 9 standard deviations to each side.
    """
    if len(values) < 2:
        return None
    from scipy.special import stdtrit  # the quantile of Student's distribution

    quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
