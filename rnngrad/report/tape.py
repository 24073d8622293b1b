"""One backward of a model of one's own, as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnngrad.norms import log10_rms
from rnngrad.report.style import COLOURS, STYLE, TIME, Floats, legend_below, moments, plain, shades
from rnngrad.report.style import profile as draw_profile

if TYPE_CHECKING:
    from rnngrad.bptt import LayerRecord, Tape

PANELS = 12
"""Layers and directions that get a panel of their own; more share one."""


def plot(tape: Tape) -> Figure:
    """``log10 ‖∂L/∂h_t‖`` against ``t``, a panel a layer and direction.

    The norms are root mean squares over the sequences of the batch that have a step ``t``. Beside
    the total derivative stand the direct part (what arrives from outside the layer's own
    recurrence) and, of an LSTM, ``‖∂L/∂c_t‖``. A tick at the bottom is a norm of exactly 0. Of a
    layer that was called several times, up to six calls are shown; steps of a decoder that calls
    its layer with one input at a time make one curve.

    Args:
        tape: Of a ``record`` block that has seen its backward.

    Returns:
        A figure of pyplot's, so that ``plt.show()`` shows it; ``plt.close(figure)`` frees it.

    Raises:
        ValueError: There is nothing on the tape.
        RuntimeError: There is no backward on it yet.

    Example:
        >>> import torch
        >>> from rnngrad.bptt import record
        >>> from rnngrad.nn import LSTM
        >>> lstm = LSTM(3, 4, num_layers=2)
        >>> with record(lstm) as tape:
        ...     lstm(torch.randn(10, 2, 3))[0][-1].sum().backward()
        >>> [axis.get_title() for axis in plot(tape).axes]
        ['l0', 'l1']
    """
    calls = {name: tape.calls(name) for name in tape}
    if not calls:
        raise ValueError("plot: the tape is empty: no recorded layer was called in its block")
    with matplotlib.rc_context(STYLE):
        if len(calls) > PANELS:
            return _together(calls)
        columns = min(3, len(calls))
        rows = -(-len(calls) // columns)
        figure, axes = plt.subplots(
            rows, columns, figsize=(1.2 + 3.2 * columns, 1.0 + 2.5 * rows), layout="constrained",
            squeeze=False, sharey=True,
        )  # fmt: skip
        for axis in list(axes.flat)[len(calls) :]:
            axis.remove()
        for axis, (name, records) in zip(axes.flat, calls.items(), strict=False):
            _draw(axis, name, records)
        for row in axes:
            row[0].set_ylabel("$\\log_{10}$ of the gradient's norm,\nRMS over the batch")
        legend_below(figure, list(axes.flat)[: len(calls)])
    return figure


def _draw(axis: Axes, name: str, records: list[LayerRecord]) -> None:
    stepwise = len(records) > 1 and all(len(record.hidden_norm) == 1 for record in records)
    axis.set_title(plain(name) + (f" ({len(records)} calls)" if len(records) > 1 else ""))
    axis.set_xlabel("call (one time step each)" if stepwise else TIME)
    axis.grid(alpha=0.3)
    if len(records) > 1 and not stepwise:
        chosen = moments(len(records))
        for shade, number in zip(shades(len(chosen)), chosen, strict=True):
            levels = rms(records[number].hidden_norm.numpy())
            label = rf"$\partial L/\partial h_t$, call {number + 1}"
            draw_profile(axis, np.arange(len(levels)), levels, color=shade, label=label)
        return
    kinds = {
        "hidden_norm": (r"total, $\partial L/\partial h_t$", COLOURS[0], "-"),
        "cell_norm": (r"cell, $\partial L/\partial c_t$", COLOURS[1], "--"),
        "direct_norm": ("direct: from outside the layer's recurrence", "0.4", ":"),
    }
    for kind, (label, colour, dashes) in kinds.items():
        parts = [getattr(record, kind) for record in records]
        if all(part is not None for part in parts):
            levels = rms(np.concatenate([part.numpy() for part in parts]))
            draw_profile(axis, np.arange(len(levels)), levels, label=label, color=colour,
                         linestyle=dashes)  # fmt: skip


def _together(calls: dict[str, list[LayerRecord]]) -> Figure:
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for shade, (name, records) in zip(shades(len(calls)), calls.items(), strict=True):
        levels = rms(records[-1].hidden_norm.numpy())
        draw_profile(
            axis, np.arange(len(levels)), levels, color=shade, label=plain(name), linewidth=1
        )
    axis.set(xlabel=TIME, ylabel=r"$\log_{10}\,\|\partial L/\partial h_t\|$, RMS over the batch")
    axis.set_title(f"{len(calls)} layers and directions; of several calls, the last")
    axis.grid(alpha=0.3)
    legend_below(figure, [axis], columns=6)
    return figure


def rms(norm: Floats) -> Floats:
    """``log10`` of the root mean square ``[T]`` of norms ``[T, B]``, ``-inf`` where all are 0.

    Beyond a packed sequence's end stands NaN: there the mean is over the others. A NaN before it
    makes the mean NaN.
    """
    missing = np.isnan(norm)
    beyond = np.logical_and.accumulate(missing[::-1])[::-1] & ~missing.all(0)
    there = (~beyond).mean(1)
    filled = log10_rms(torch.from_numpy(np.where(beyond, 0.0, norm)))
    level: Floats = filled.numpy() - np.log10(there) / 2  # not the whole batch is there
    return level
