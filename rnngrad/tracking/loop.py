"""TensorBoard from a training loop of one's own."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from rnngrad.bptt import Tape
from rnngrad.dynamics import decay
from rnngrad.norms import log10_rms
from rnngrad.runs import Floats
from rnngrad.tracking.board import GROWTH
from rnngrad.tracking.heatmap import heatmap
from rnngrad.tracking.profile import over_time
from rnngrad.tracking.scalars import of_profile

KEPT = 512
"""Profiles kept of a layer for its heatmap: when there are more, every second one is dropped."""


def log(writer: Any, tape: Tape, step: int, *, draw: bool | None = None) -> None:
    """Shows what ``record`` saw in TensorBoard, under ``bptt_hidden_pre_clip/<layer>...``.

    For each layer ``log10`` of the root mean square over the batch of ``‖∂L/∂h_t‖``: as scalars at
    the first and the last time step, and the slope going back through time (decades a step; under
    0 it vanishes); as a histogram its profile over time; and as an image the heatmap [training step
    x time step] of all profiles that this writer has been given. They are kept as long as the
    writer is, at most ``KEPT`` a layer. A layer called several times in the block is shown as one
    sequence, in call order.

    Args:
        writer: A ``SummaryWriter`` of torch or one that is called like it.
        tape: What ``rnngrad.bptt.record`` gave, after the backward.
        step: The training step.
        draw: Whether to draw the heatmaps now, which costs some 20 ms each. ``None``: when there
            are half as many profiles again as the last time, so ever more rarely.

    Example:
        >>> import tempfile, torch
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from rnngrad.bptt import record
        >>> from rnngrad.nn import GRU
        >>> from rnngrad.tracking import log
        >>> model = GRU(3, 8)
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     with record(model) as tape:
        ...         model(torch.randn(20, 4, 3))[0][-1].sum().backward()
        ...     log(writer, tape, step=1)
    """
    seen = _SEEN.setdefault(writer, _Seen())
    draws = seen.is_due() if draw is None else draw
    for layer in tape:
        records = tape.calls(layer)
        hidden = np.concatenate([log10_rms(record.hidden_norm).numpy() for record in records])
        tag = f"bptt_hidden_pre_clip/{layer}"
        for name, value in of_profile(layer, hidden).items():
            writer.add_scalar(name, value, step)
        slope = decay(_going_back(layer, hidden)).slope
        if not np.isnan(slope):
            writer.add_scalar(f"{tag}_slope_decades_per_step", slope, step)
        name = f"{tag}_over_t_log10_plus_12"
        writer.add_histogram_raw(name, **over_time(hidden), global_step=step)
        seen.add(layer, step, hidden)
        if draws:
            steps, field = seen.field(layer)
            clipped = any(record.clipped is not None for record in records)
            when = "as clipped at every t" if clipped else "before clipping"
            title = f"{layer}: log10 |dL/dh_t|, RMS over the batch, {when}"
            writer.add_image(tag, heatmap(steps, field, title), step, dataformats="HWC")


class _Seen:
    """The profiles that one writer has been given."""

    def __init__(self) -> None:
        self._calls = self._drawn = 0
        self._profiles: dict[str, list[tuple[int, Floats]]] = {}

    def is_due(self) -> bool:
        """Counts a call; whether it should draw."""
        self._calls += 1
        due = self._calls >= GROWTH * self._drawn
        if due:
            self._drawn = self._calls
        return due

    def add(self, layer: str, step: int, hidden: Floats) -> None:
        """Keeps a profile, if need be instead of every second one before it."""
        kept = self._profiles.setdefault(layer, [])
        kept.append((step, hidden))
        if len(kept) > KEPT:
            del kept[1:-1:2]

    def field(self, layer: str) -> tuple[npt.NDArray[np.int64], Floats]:
        """Steps ``[S]`` and profiles ``[S, T]``, with NaN where one is shorter than the longest."""
        kept = self._profiles[layer]
        field = np.full((len(kept), max(len(hidden) for _, hidden in kept)), np.nan)
        for row, (_, hidden) in zip(field, kept, strict=True):
            row[: len(hidden)] = hidden
        return np.array([step for step, _ in kept]), field


_SEEN: WeakKeyDictionary[Any, _Seen] = WeakKeyDictionary()


def _going_back(layer: str, hidden: Floats) -> Floats:
    """The profile by lag, from the end where back-propagation begins."""
    there = hidden[~np.isnan(hidden)]
    return there if layer.endswith("_reverse") else there[::-1]
