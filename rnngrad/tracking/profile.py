"""A gradient's norm over time as a histogram, which TensorBoard stacks over training."""

from __future__ import annotations

from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import HistogramProto

from rnngrad.runs import Floats
from rnngrad.tracking.heatmap import HIGH, LOW

BINS = 30
"""As many as TensorBoard shows: it would make as many of any other number."""


def over_time(hidden: Floats) -> dict[str, Any]:
    """The arguments of ``SummaryWriter.add_histogram_raw`` for a profile.

    From left to right runs the time step. The height is the mean of ``log10 ‖∂L/∂h_t‖`` over a
    bin's steps, in decades above ``LOW``; what lies outside of the heatmaps' range is drawn at
    its end, as one step far off would flatten all others.

    Args:
        hidden: ``log10`` of the norm ``[T]``.
    """
    steps = len(hidden)
    heights = np.clip(np.nan_to_num(hidden, nan=LOW, posinf=HIGH, neginf=LOW), LOW, HIGH) - LOW
    edges = np.linspace(0, steps, BINS + 1)
    first = np.floor(edges[:-1] + 1e-9).astype(int)
    last = np.maximum(first + 1, np.ceil(edges[1:] - 1e-9).astype(int))
    total = np.concatenate([[0.0], heights.cumsum()])
    counts = (total[last] - total[first]) / (last - first)
    middle = (edges[:-1] + edges[1:]) / 2
    return {
        "min": 0.0,
        "max": float(steps),
        "num": float(counts.sum()),
        "sum": float(counts @ middle),
        "sum_squares": float(counts @ middle**2),
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": counts.tolist(),
    }


def histogram(hidden: Floats) -> HistogramProto:
    """The same for an event file."""
    values = over_time(hidden)
    limits, counts = values.pop("bucket_limits"), values.pop("bucket_counts")
    return HistogramProto(**values, bucket_limit=limits, bucket=counts)
