"""Stands in for ``rnngrad.diagnosis`` until it is here."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rnngrad.report.style import Floats


class Threshold(NamedTuple):
    """As in ``rnngrad.diagnosis``."""

    percentile: float
    threshold: float
    fraction: float


def clip_thresholds(log10_norms: Floats) -> list[Threshold]:
    """As in ``rnngrad.diagnosis``."""
    norms = 10.0 ** log10_norms[np.isfinite(log10_norms)]
    return [
        Threshold(p, float(t), float((norms > t).mean()))
        for p in (10.0, 50.0, 90.0, 99.0)
        for t in [np.percentile(norms, p)]
    ]
