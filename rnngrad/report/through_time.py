"""One run's gradient through time: against t, the lag, the training step and the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from rnngrad.diagnosis.through_time import VANISHED
from rnngrad.dynamics import TRANSIENT, decay, horizon
from rnngrad.report.exhibit import Exhibit, Table, number
from rnngrad.report.groups import HORIZON
from rnngrad.report.reading import LAYERS, Reading, shown_of
from rnngrad.report.style import (
    CELL,
    COLOURS,
    HIDDEN,
    PIXELS,
    STEP,
    TIME,
    Floats,
    colour_range,
    field,
    grid,
    legend_below,
    moments,
    profile,
    series,
    shades,
    spread,
)

INVISIBLE = -VANISHED[1]
"""Decades between a sum and what float32 cannot add to it: a unit round-off of 2^-24."""


def _omitted(layers: list[str], at_most: int = LAYERS) -> str:
    return "" if len(layers) <= at_most else f" Shown are {at_most} of {len(layers)} layers."


def gradients(run: Reading) -> Exhibit | None:
    """``‖∂L/∂h_t‖`` and ``‖∂L/∂c_t‖`` against ``t``, at several training steps."""
    if not run.bptt:
        return None
    panels = []
    for layer in shown_of(list(run.bptt)):
        history = run.bptt[layer]
        panels.append((f"{layer}, hidden state", HIDDEN, history.step, history.hidden))
        if history.cell is not None:
            panels.append((f"{layer}, cell state", CELL, history.step, history.cell))
    figure, axes = grid(len(panels), across=2, height=3.0)
    for axis, (title, label, step, values) in zip(axes, panels, strict=True):
        chosen = moments(len(step))
        for shade, moment in zip(shades(len(chosen)), chosen, strict=True):
            profile(axis, np.arange(values.shape[1]), values[moment], color=shade,
                    label=f"step {step[moment]}")  # fmt: skip
        axis.set(title=title, xlabel=TIME, ylabel=label)
        axis.grid(alpha=0.3)
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, high)
    legend_below(figure, axes, columns=6)
    text = (
        "The total derivative of the loss with respect to each state: root mean square over the"
        f" batch, {run.norms_are}, the loss being a mean over the batch. Light is the first"
        " update, dark the"
        " last. Ticks at the bottom mark a norm of exactly 0." + _omitted(list(run.bptt))
    )
    return Exhibit("through_time", "Gradient through time, at several training steps", text, figure,
                   data=_fields(run, lambda count: moments(count).tolist()))  # fmt: skip


def _fields(run: Reading, chosen: Callable[[int], Sequence[int]]) -> dict[str, list[Any]]:
    """What was recorded at some of the logged steps, a row a step, layer and ``t``."""
    kinds = ("hidden", "cell", "clipped")
    data: dict[str, list[Any]] = {
        name: [] for name in ("step", "layer", "t", "log10_hidden", "log10_cell", "clipped")
    }
    for layer, history in run.bptt.items():
        rows = list(chosen(len(history.step)))
        width = history.hidden.shape[1]
        data["step"] += np.repeat(history.step[rows], width).tolist()
        data["layer"] += [layer] * (len(rows) * width)
        data["t"] += [*range(width)] * len(rows)
        for column, kind in zip(list(data)[3:], kinds, strict=True):
            values = getattr(history, kind)
            data[column] += (
                [None] * (len(rows) * width) if values is None else values[rows].ravel().tolist()
            )
    return {name: column for name, column in data.items() if any(v is not None for v in column)}


def heatmap(run: Reading) -> Exhibit | None:
    """The field [training step x t] of each layer, for hidden and cell state."""
    if not run.bptt:
        return None
    panels = []
    for layer in shown_of(list(run.bptt)):
        history = run.bptt[layer]
        panels.append((f"{layer}, hidden state", history.step, history.hidden))
        if history.cell is not None:
            panels.append((f"{layer}, cell state", history.step, history.cell))
    low, high = colour_range([values for _, _, values in panels])
    figure, axes = grid(len(panels), across=2, height=2.9)
    for axis, (title, step, values) in zip(axes, panels, strict=True):
        drawn = field(axis, step, values, low, high)
        axis.set(title=title, xlabel=STEP, ylabel=TIME)
    under = any((values[np.isfinite(values)] < low).any() for _, _, values in panels)
    figure.colorbar(
        drawn, ax=axes, extend="min" if under else "neither", shrink=0.9, pad=0.02,
        label=r"$\log_{10}$ of the norm, RMS over the batch",
    )  # fmt: skip
    text = (
        f"All logged training steps, {run.norms_are}: {HIDDEN_PLAIN} for the hidden state, of c_t"
        " for the cell. Black is a norm of exactly 0, grey is beyond the end of a shorter"
        " sequence." + _omitted(list(run.bptt))
    )
    return Exhibit("heatmap", "Gradient through time, over the whole training", text, figure,
                   data=_fields(run, lambda count: spread(count, PIXELS[0])))  # fmt: skip


HIDDEN_PLAIN = "log10 ‖∂L/∂h_t‖"


def lag(run: Reading) -> Exhibit | None:
    """The lag-resolved curve with its line, and slope and horizon against the training step."""
    names = run.with_ending("/lag")
    if not names:
        return None
    layers = [name.split("/")[0] for name in names]
    shown = shown_of(layers)
    figure, axes = grid(3 * len(shown), across=3, height=2.8)
    rows = []
    for row, layer in enumerate(shown):
        step, curves = run.vectors(f"{layer}/lag")
        axis, slope_axis, horizon_axis = axes[3 * row : 3 * row + 3]
        _draw_lags(axis, run, layer)
        slopes = [decay(curve).slope for curve in curves]
        slope_axis.plot(step, slopes, **series(0, len(step)))
        slope_axis.set(title=f"{layer}, slope", ylabel="slope (decades a time step)")
        reach = [horizon(curve, HORIZON) for curve in curves]
        horizon_axis.plot(step, reach, **series(1, len(step)))
        horizon_axis.set(title=f"{layer}, horizon", ylabel="horizon (time steps)")
        horizon_axis.set_ylim(bottom=0)
        for over_training in (slope_axis, horizon_axis):
            over_training.set_xlabel(STEP)
            over_training.grid(alpha=0.3)
        rows.append(_fit_row(layer, int(step[-1]), curves[-1]))
    legend_below(figure, axes[::3], columns=4)
    head = ("layer", "training step", "slope (decades a time step)", "R²",
            "half-life (time steps)", f"horizon: lags over {HORIZON:g} (time steps)")  # fmt: skip
    text = (
        "What is left of an error after k time steps back: it is put in at one time step alone, so"
        " that a loss at every step does not refresh it. Median over sequences and over the steps"
        " it was put in at. The line is least squares beyond the first lags; a slope of -0.1"
        f" loses a factor of 10 in 10 steps. The horizon is the last lag at which {HORIZON:g} of"
        " the error is"
        " left." + _omitted(layers)
    )
    kinds = {"log10_ratio": "lag", "p5": "lag_p5", "p95": "lag_p95", "log10_cell": "lag_cell"}
    data = run.tidy(kinds, "lag")
    return Exhibit("lag", "How far the gradient reaches: the lag-resolved curve", text, figure,
                   tables=[Table(head, rows)], data=data)  # fmt: skip


def _draw_lags(axis: Axes, run: Reading, layer: str) -> None:
    step, curves = run.vectors(f"{layer}/lag")
    lags = np.arange(curves.shape[1])
    edges = [run.vectors(f"{layer}/{name}") for name in ("lag_p5", "lag_p95")]
    if all(len(at) and at[-1] == step[-1] for at, _ in edges):
        low, high = (np.where(np.isfinite(values[-1]), values[-1], np.nan) for _, values in edges)
        axis.fill_between(lags, low, high, color="0.8", linewidth=0,
                          label="5 to 95 % of sequences, last step")  # fmt: skip
    chosen = moments(len(step), 4)
    for shade, moment in zip(shades(len(chosen)), chosen, strict=True):
        profile(axis, lags, curves[moment], color=shade, label=f"step {step[moment]}")
    at, cell = run.vectors(f"{layer}/lag_cell")
    if len(at):
        profile(axis, np.arange(cell.shape[1]), cell[-1], color=COLOURS[3], linestyle="--",
                label="cell state, last step")  # fmt: skip
    fitted = decay(curves[-1], first=TRANSIENT)
    if fitted.points > 1:
        kept = TRANSIENT + np.arange(fitted.points)
        ends = kept[[0, -1]]
        height = np.mean(curves[-1][kept]) + fitted.slope * (ends - np.mean(kept))
        axis.plot(ends, height, color=COLOURS[1], linewidth=1.8, linestyle=(0, (1, 1.5)),
                  label="line through the last step's")  # fmt: skip
    axis.set(title=layer, xlabel="lag $k$ (time steps back)")
    axis.set_ylabel(r"$\log_{10}\,\|\delta_{\tau-k}\|\,/\,\|\delta_\tau\|$")
    axis.grid(alpha=0.3)


def _fit_row(layer: str, step: int, curve: Floats) -> tuple[str, ...]:
    fitted = decay(curve)
    return (layer, str(step), number(fitted.slope), number(fitted.r2), number(fitted.half_life),
            number(horizon(curve, HORIZON), 6))  # fmt: skip


def layers(run: Reading) -> Exhibit | None:
    """The field [layer x t] at the first, a middle and the last logged step."""
    names = list(run.bptt)
    if len(names) < 2:
        return None
    steps = run.bptt[names[0]].step
    chosen = spread(len(steps), 3)
    fields = [np.stack([run.bptt[name].hidden[i] for name in names], 1) for i in chosen]
    low, high = colour_range(fields)
    figure, axes = grid(len(chosen), across=3, height=1.6 + 0.2 * len(names))
    for axis, i, values in zip(axes, chosen, fields, strict=True):
        drawn = field(axis, np.arange(len(values)), values, low, high)
        axis.set(title=f"training step {steps[i]}", xlabel=TIME)
        axis.set_yticks(spread(len(names), 8), [names[k] for k in spread(len(names), 8)])
    axes[0].set_ylabel("layer")
    figure.colorbar(drawn, ax=axes, label=HIDDEN, pad=0.02)
    text = (
        "The gradient at every layer (0 is next to the input) and time step, at three training"
        " steps and on one colour range: going down it fades with depth, going left with time."
    )
    return Exhibit("layers", "Layers and time steps", text, figure,
                   data=_fields(run, lambda count: spread(count, 3)))  # fmt: skip


def contribution(run: Reading) -> Exhibit | None:
    """What each time step adds to the gradient of W_hh, and how much of the loss's fall is its."""
    names = [n.split("/")[0] for n in run.with_ending("/attribution")]
    if not names:
        return None
    shown = shown_of(names, 3)
    figure, axes = grid(2 * len(shown), across=2, height=2.8)
    for row, layer in enumerate(shown):
        for axis, kind in zip(axes[2 * row : 2 * row + 2], ("weight_norm", "attribution"),
                              strict=True):  # fmt: skip
            step, values = run.vectors(f"{layer}/{kind}")
            chosen = moments(len(step), 5)
            for shade, moment in zip(shades(len(chosen)), chosen, strict=True):
                profile(axis, np.arange(values.shape[1]), values[moment], color=shade,
                        label=f"step {step[moment]}")  # fmt: skip
            axis.set(xlabel=TIME, title=layer)
            axis.grid(alpha=0.3)
        axes[2 * row].set_ylabel(r"$\log_{10}\,\|G_t\|_F$")
        axes[2 * row + 1].set_ylabel("share of the gradient\n$s_t$ (sums to 1)")
        axes[2 * row + 1].axhline(0, color="black", linewidth=0.6)
        _draw_invisible(run, axes[2 * row], layer)
    legend_below(figure, axes, columns=6)
    text = (
        "G_t is what time step t adds to ∂L/∂W_hh = Σ G_t. Left, how large it is; below the dotted"
        " line, 2⁻²⁴ of the whole at the last measured step, float32 cannot see it in the sum."
        " Right, s_t = ⟨G_t, g⟩ / ‖g‖²: the share of the next fall of the loss that is this"
        " step's, negative where it pulls the other way."
    )
    data = run.tidy({"log10_weight_norm": "weight_norm", "attribution": "attribution"})
    return Exhibit("contribution", "What each time step contributes", text, figure, data=data)


def _draw_invisible(run: Reading, axis: Axes, layer: str) -> None:
    suffix = layer.removesuffix("_reverse").removeprefix("l")
    ending = f"weight_hh_l{suffix}" + ("_reverse" if layer.endswith("_reverse") else "")
    for name in run.with_start("parameter/"):
        if name.endswith(f"{ending}/grad_norm"):
            whole = run.measured(name)[1][-1]
            if whole > 0:
                axis.axhline(np.log10(whole) - INVISIBLE, color="black", linestyle=":",
                             linewidth=1, label="too small for float32's sum")  # fmt: skip


def inputs(run: Reading) -> Exhibit | None:
    """Which input mattered: ``‖∂L/∂x_t‖`` at several steps, and over the whole training."""
    step, values = run.vectors("input_norm")
    if not len(step):
        return None
    figure, (axis, beside) = grid(2, across=2, height=3.0)
    chosen = moments(len(step), 5)
    for shade, moment in zip(shades(len(chosen)), chosen, strict=True):
        profile(axis, np.arange(values.shape[1]), values[moment], color=shade,
                label=f"step {step[moment]}")  # fmt: skip
    axis.set(xlabel=TIME, ylabel=r"$\log_{10}\,\|\partial L/\partial x_t\|$")
    axis.grid(alpha=0.3)
    low, high = colour_range([values])
    drawn = field(beside, step, values, low, high)
    beside.set(xlabel=STEP, ylabel=TIME)
    figure.colorbar(drawn, ax=beside, label=r"$\log_{10}\,\|\partial L/\partial x_t\|$")
    legend_below(figure, [axis], columns=6)
    text = (
        "The gradient of the loss with respect to each input, root mean square over the batch:"
        " where it is large, the input of that time step matters to the loss."
    )
    data = run.tidy({"log10_input": "input_norm"}, layers=[""])
    del data["layer"]
    return Exhibit("inputs", "Which input mattered", text, figure, data=data)


def within(run: Reading) -> Exhibit | None:
    """The fraction that ``bptt_clip`` clipped of the error, [training step x t]."""
    found = {k: h for k, h in run.bptt.items() if h.clipped is not None}
    if not found:
        return None
    shown = shown_of(list(found))
    figure, axes = grid(len(shown), across=2, height=2.9)
    for axis, layer in zip(axes, shown, strict=True):
        clipped = found[layer].clipped
        assert clipped is not None
        drawn = field(axis, found[layer].step, 100 * clipped, 0, 100, colours="cividis")
        axis.set(title=layer, xlabel=STEP, ylabel=TIME)
    figure.colorbar(drawn, ax=axes, label="clipped (% of the batch)", pad=0.02)
    text = "Where clipping inside back-propagation changed the error on its way back."
    data = _fields(run, lambda count: spread(count, PIXELS[0]))
    return Exhibit("bptt_clip", "Clipping inside back-propagation", text, figure, data=data)


def gate_norms(run: Reading) -> Exhibit | None:
    """Each gate's part of what a time step adds to the gradient, at the last measured step."""
    layers = list(dict.fromkeys(n.split("/")[0] for n in run.measures if "/gate_norm/" in n))
    if not layers:
        return None
    shown = shown_of(layers)
    figure, axes = grid(len(shown), across=2, height=2.8)
    for axis, layer in zip(axes, shown, strict=True):
        for place, name in enumerate(run.with_start(f"{layer}/gate_norm/")):
            step, values = run.vectors(name)
            profile(axis, np.arange(values.shape[1]), values[-1],
                    label=f"gate {name.rpartition('/')[2]}",
                    **series(place, values.shape[1]))  # fmt: skip
        axis.set(title=f"{layer}, training step {step[-1]}", xlabel=TIME)
        axis.set_ylabel(r"$\log_{10}\,\|G_t\|_F$ of the gate's rows")
        axis.grid(alpha=0.3)
    legend_below(figure, axes, columns=4)
    text = "The rows of G_t that belong to each gate: through which of them the gradient comes."
    gates = {name.rpartition("/")[2]: None for name in run.measures if "/gate_norm/" in name}
    data = run.tidy({f"log10_{gate}": f"gate_norm/{gate}" for gate in gates})
    return Exhibit("gate_norms", "Gradient by gate", text, figure, data=data)
