"""What detectors share: levels, and findings in one form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from rnngrad.diagnosis.findings import Finding, Level, Remedy

SHOWN = 10
"""Steps that a finding keeps, the last ones."""


def graded(value: float, warning: float, alarm: float) -> tuple[Level, float]:
    """The level of a value and the threshold to name with it.

    The thresholds rise or fall towards ``alarm``; the one named is that which was crossed, or the
    one that was not.
    """
    if math.isnan(value):
        return "unknown", warning
    rising = alarm >= warning
    if value >= alarm if rising else value <= alarm:
        return "alarm", alarm
    if value >= warning if rising else value <= warning:
        return "warning", warning
    return "ok", warning


def finding(
    symptom: str,
    value: float,
    level: tuple[Level, float],
    evidence: str,
    steps: Iterable[Any] = (),
    remedies: Iterable[Remedy] = (),
) -> Finding:
    """A finding, with steps and remedies only if something is wrong.

    Args:
        symptom: What was looked for.
        value: What was found.
        level: Level and threshold, as from ``graded``.
        evidence: One sentence.
        steps: All training steps that show it; the last ones are kept.
        remedies: What to try.
    """
    if level[0] not in ("warning", "alarm"):
        return Finding(symptom, level[0], value, level[1], evidence)
    return Finding(symptom, level[0], value, level[1], evidence, shown(steps), tuple(remedies))


def unknown(symptom: str, threshold: float, why: str) -> Finding:
    """Nothing was there to look at."""
    return Finding(symptom, "unknown", math.nan, threshold, why)


def shown(steps: Iterable[Any]) -> tuple[int, ...]:
    """The last steps of many."""
    return tuple(int(step) for step in list(steps)[-SHOWN:])


def power(exponent: float) -> str:
    """``10^-3.2`` of a logarithm; 0 of minus infinity."""
    return "0" if exponent == -math.inf else f"10^{exponent:.1f}"


def last_finite(values: npt.NDArray[Any]) -> float:
    """The last value that is a number; NaN if none is."""
    there = values[~np.isnan(values)]
    return float(there[-1]) if len(there) else math.nan
