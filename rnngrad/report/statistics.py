"""Intervals and survival curves, as few as the report needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rnngrad.report.style import Floats

_T975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788,
    2.1604, 2.1448, 2.1314,
)  # fmt: skip
Z975 = 1.959964


def t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom.

    >>> round(t975(2), 3), round(t975(30), 3)
    (4.303, 2.042)
    """
    if freedom < 1:
        return math.nan
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z, n = Z975, freedom  # Abramowitz and Stegun (1964), 26.7.5
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def mean_band(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean over the first axis, and its 95 % confidence interval by Student's t.

    Args:
        values: ``[n, ...]``; NaN is left out, one by one.

    Returns:
        Mean, lower and upper end; the ends are NaN where there are fewer than two values.
    """
    there = np.isfinite(values)
    count = there.sum(0)
    filled = np.where(there, values, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.sum(0) / count
        squares = np.where(there, values - mean, 0.0) ** 2
        error = np.sqrt(squares.sum(0) / (count - 1) / count)
    quantiles = np.array([t975(n) for n in range(len(values))])
    half = np.where(count > 1, quantiles[np.maximum(count - 1, 0)] * error, np.nan)
    return mean, mean - half, mean + half


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion: inside 0 to 1, and of some width at 0 and at 1.

    Reference: Wilson (1927), Probable inference, the law of succession, and statistical inference.

    >>> [round(end, 3) for end in wilson(3, 3)]
    [0.439, 1.0]
    """
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z975**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z975 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == trials else centre + half


class Survival(NamedTuple):
    """What fraction has not yet met its event, by time.

    Args:
        time: Of events, ascending ``[n]``.
        fraction: From each of these times on ``[n]``.
        end: The last time at which anyone was seen: nothing is known beyond.
    """

    time: Floats
    fraction: Floats
    end: float

    @property
    def median(self) -> float:
        """The first time at which at most half are left; infinite if that is never seen."""
        below = self.time[self.fraction <= 0.5 + 1e-12]
        return float(below[0]) if len(below) else math.inf


def kaplan_meier(times: Sequence[float], happened: Sequence[bool]) -> Survival:
    """The product-limit estimate, which uses what is known of those who were not seen to the end.

    Args:
        times: Of the event, or until which there was none.
        happened: Whether it is the event's.

    Reference: Kaplan & Meier (1958), Nonparametric estimation from incomplete observations.

    >>> kaplan_meier([1, 2, 3], [True, False, True]).fraction.round(3).tolist()
    [0.667, 0.0]
    """
    at, event = np.asarray(times, dtype=np.float64), np.asarray(happened, dtype=bool)
    moments = np.unique(at[event])
    at_risk = np.array([(at >= moment).sum() for moment in moments], dtype=np.float64)
    died = np.array([((at == moment) & event).sum() for moment in moments], dtype=np.float64)
    left = np.cumprod(1 - died / at_risk)
    return Survival(moments, left.astype(np.float64), float(at.max()))
