"""Clip thresholds to choose from, by the norms that a run has had."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)

PASCANU = (0.5, 10.0)
"""Pascanu, Mikolov & Bengio (2013), section 3.2: a threshold of half to ten times the average norm
over a sufficiently large number of updates still lets the training converge."""


class Threshold(NamedTuple):
    """A threshold that a run's own norms suggest.

    Args:
        percentile: Of the norms seen.
        threshold: Their value there.
        fraction: How many of the norms seen lie above it, and would have been clipped.
    """

    percentile: float
    threshold: float
    fraction: float


def clip_thresholds(log10_norms: npt.NDArray[Any]) -> list[Threshold]:
    """Thresholds for ``clip=norm`` at percentiles of the norms seen, from the lowest.

    Args:
        log10_norms: ``log10`` of the gradient's norms before clipping, as ``Run.updates`` has them;
            what is not finite is left out.

    Returns:
        Nothing, if no norm is finite and more than 0.

    Example:
        >>> import numpy as np
        >>> clip_thresholds(np.log10(np.arange(1, 101)))[2]
        Threshold(percentile=90.0, threshold=90.1, fraction=0.1)
    """
    finite = np.asarray(log10_norms, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return []
    norms = 10.0 ** np.clip(finite, -300, 300)
    found = []
    for percentile in PERCENTILES:
        # between two norms on a line, as numpy does; that of the norms and not of their logarithms
        value = float(np.percentile(norms, percentile))
        fraction = float(np.mean(norms > value * (1 + 1e-12)))
        found.append(Threshold(percentile, float(f"{value:.6g}"), fraction))
    return found


def pascanu_range(log10_norms: npt.NDArray[Any]) -> tuple[float, float] | None:
    """Half to ten times the mean norm (``PASCANU``); ``None`` if there is no norm."""
    finite = np.asarray(log10_norms, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return None
    mean = float(np.mean(10.0 ** np.clip(finite, -300, 300)))
    return PASCANU[0] * mean, PASCANU[1] * mean
