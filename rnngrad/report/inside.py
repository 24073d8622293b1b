"""The state of one run's model while it trains: gates, updates, spectrum."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from rnngrad.report.exhibit import Exhibit, Table, number
from rnngrad.report.reading import Reading, shown_of
from rnngrad.report.style import (
    STEP,
    TIME,
    grid,
    legend_below,
    legend_beside,
    moments,
    plain,
    profile,
    series,
    shades,
)


def gates(run: Reading) -> Exhibit | None:
    """Fractions of gates and units that are saturated or dead, against the training step."""
    layers = [
        layer
        for layer in run.layers
        for start in ("saturated", "dead", "gate_low/")
        if run.with_start(f"{layer}/{start}")
    ]
    layers = shown_of(list(dict.fromkeys(layers)))
    if not layers:
        return None
    kinds = {
        "gates under 0.1": "gate_low/",
        "gates over 0.9": "gate_high/",
        "units": ("saturated", "dead"),
    }
    there = {
        title: kind
        for title, kind in kinds.items()
        if any(_fractions(run, layer, kind) for layer in layers)
    }
    figure, axes = grid(len(layers) * len(there), across=len(there), height=2.5,
                        width=3.3 + 3.1 * (len(there) - 1))  # fmt: skip
    names: list[str] = []
    for number_, axis in enumerate(axes):
        layer, title = layers[number_ // len(there)], list(there)[number_ % len(there)]
        for label, name in _fractions(run, layer, there[title]).items():
            names += [label] if label not in names else []
            step, values = run.measured(name)
            axis.plot(step, 100 * values, label=label, **series(names.index(label), len(step)))
        axis.set(title=f"{layer}, {title}", xlabel=STEP, ylim=(-3, 103))
        axis.grid(alpha=0.3)
        if number_ % len(there) == 0:
            axis.set_ylabel("of units, time steps\nand sequences (%)")
    legend_below(figure, axes, columns=6)
    text = (
        "A unit counts as saturated where |h| is over 0.97 (a sigmoid: outside 0.03 to 0.97), and"
        " as dead where it is never above 0. A gate over 0.9 lets nearly all through, under 0.1"
        " nearly nothing: a forget gate that is high is memory, not a fault."
    )
    return Exhibit("gates", "Saturation of gates and units", text, figure)


def _fractions(run: Reading, layer: str, kind: str | Sequence[str]) -> dict[str, str]:
    """Names of measured fractions by their label."""
    if isinstance(kind, str):
        return {f"gate {n.rpartition('/')[2]}": n for n in run.with_start(f"{layer}/{kind}")}
    return {f"units {end}": f"{layer}/{end}" for end in kind
            if len(run.measured(f"{layer}/{end}")[0])}  # fmt: skip


def updates(run: Reading) -> Exhibit | None:
    """What an update changes beside what is there, and the gradient, by layer."""
    names = [n[10:-12] for n in run.with_start("parameter/") if n.endswith("/update_norm")]
    if not names:
        return None
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind, _ = _kind(name)
        if "bias" not in kind:
            kinds.setdefault(kind, []).append(name)
    kinds = dict(list(kinds.items())[:4])
    figure, axes = grid(2 * len(kinds), across=len(kinds), height=2.6,
                        width=min(9.6, 4 + 2.8 * (len(kinds) - 1)))  # fmt: skip
    for column, (kind, members) in enumerate(kinds.items()):
        above, below = axes[column], axes[len(kinds) + column]
        for place, name in enumerate(shown_of(members)):
            step, relative, grads = _speeds(run, name)
            label = _kind(name)[1]
            looks = series(place, len(step)) | {"label": None if label == kind else plain(label)}
            above.plot(step, relative, **looks)
            below.plot(step, grads, **looks)
        above.axhline(1e-3, color="black", linestyle=":", linewidth=1,
                      label="1/1000" if column == 0 else None)  # fmt: skip
        above.set(title=plain(kind), yscale="log", xlabel=STEP)
        below.set(title=plain(kind), yscale="log", xlabel=STEP)
    axes[0].set_ylabel("‖update‖ / ‖parameter‖")
    axes[len(kinds)].set_ylabel("‖gradient‖, before clipping")
    for row in (axes[: len(kinds)], axes[len(kinds) :]):
        _share(row)
    legend_below(figure, axes, columns=6)
    rows = []
    for name in names:
        size = run.measures[f"parameter/{name}/norm"]
        step, relative, _ = _speeds(run, name)
        middle = float(np.nanmedian(relative)) if np.isfinite(relative).any() else np.nan
        rows.append((name, number(float(size[0])), number(float(size[-1])), number(middle)))
    text = (
        "L2 norms by parameter; the biases are in the table. About a thousandth an update is what"
        " is usually called healthy; where the first layers lie decades under the last, these"
        " learn and those do not."
    )
    head = ("parameter", "norm at first", "norm at last", "median ‖update‖ / ‖parameter‖")
    return Exhibit("updates", "How fast each layer learns", text, figure,
                   tables=[Table(head, rows)])  # fmt: skip


def _kind(name: str) -> tuple[str, str]:
    """A parameter's kind and layer: ``rnn.weight_hh_l1_reverse`` as ``weight_hh``, ``l1_reverse``.

    >>> _kind("rnn.weight_hh_l1"), _kind("rnn.cells.0.weight_hh"), _kind("readout.weight")
    (('weight_hh', 'l1'), ('weight_hh', 'l0'), ('readout.weight', 'readout.weight'))
    """
    if found := re.search(r"(\w+?)_(l\d+(?:_reverse)?)$", name):
        return found[1], found[2]
    if found := re.search(r"cells\.(\d+)\.(.+)$", name):
        return found[2], f"l{found[1]}"
    return name, name


def _speeds(run: Reading, name: str) -> tuple[Any, Any, Any]:
    """Steps, ``‖update‖ / ‖parameter‖`` and ``‖gradient‖``; NaN where not positive."""
    step, change = run.measured(f"parameter/{name}/update_norm")
    at = np.isin(run.measures["step"], step)
    missing = np.full(len(at), np.nan)
    size, grad = (
        run.measures.get(f"parameter/{name}/{kind}", missing)[at] for kind in ("norm", "grad_norm")
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = change / size
    positive = np.isfinite(relative) & (relative > 0)
    return step, np.where(positive, relative, np.nan), np.where(grad > 0, grad, np.nan)


def _share(axes: Sequence[Axes]) -> None:
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, high)
        axis.grid(alpha=0.3)


def spectrum(run: Reading) -> Exhibit | None:
    """Spectral radius, largest singular value and non-normality of W_hh over the training."""
    kinds = {
        "spectral_radius": "spectral radius",
        "sigma_max": "largest singular value",
        "nonnormality": "non-normality",
    }
    layers = shown_of([layer for layer in run.layers if run.with_start(f"{layer}/spectral_radius")])
    if not layers:
        return None
    figure, axes = grid(3 * len(layers), across=3, height=2.5)
    labels: list[str] = []
    for number_, axis in enumerate(axes):
        layer, kind = layers[number_ // 3], list(kinds)[number_ % 3]
        for name in run.with_start(f"{layer}/{kind}"):
            gate = name.removeprefix(f"{layer}/{kind}").strip("/")
            label = f"gate {gate}" if gate else "$W_{hh}$"
            labels += [label] if label not in labels else []
            step, values = run.measured(name)
            axis.plot(step, values, label=label, **series(labels.index(label), len(step)))
        if kind != "nonnormality":
            axis.axhline(1, color="black", linestyle=":", linewidth=1)
        axis.set(title=f"{layer}, {kinds[kind]}", xlabel=STEP, ylabel=f"{kinds[kind]} (1)")
        axis.grid(alpha=0.3)
    legend_below(figure, axes, columns=6)
    text = (
        "Of the recurrent weights, gate by gate where there are gates. With tanh, a largest"
        " singular value under 1 is enough for the gradient to vanish, and over 1 is needed for"
        " it to explode (Pascanu et al., 2013); what it really does is the lag-resolved curve's"
        " to say. Non-normality is Henrici's, as a fraction of the Frobenius norm: 0 to 1."
    )
    return Exhibit("spectrum", "Recurrent weights", text, figure)


def lyapunov(run: Reading) -> Exhibit | None:
    """Leading Lyapunov exponents over the training, and the one-step Jacobian's norm against t."""
    exponents = shown_of(run.with_ending("/lyapunov"))
    jacobians = shown_of(run.with_ending("/jacobian_norm"))
    if not exponents and not jacobians:
        return None
    figure, axes = grid(len(exponents) + len(jacobians), across=2, height=2.9)
    for axis, name in zip(axes, exponents, strict=False):
        step, values = run.vectors(name)
        for k in range(min(values.shape[1], 6)):
            axis.plot(step, values[:, k], label=f"exponent {k + 1}", **series(k, len(step)))
        axis.axhline(0, color="black", linestyle=":", linewidth=1)
        axis.set(title=name.split("/")[0], xlabel=STEP)
        axis.set_ylabel("Lyapunov exponents\n(nats per time step)")
        axis.grid(alpha=0.3)
    for axis, name in zip(axes[len(exponents) :], jacobians, strict=True):
        step, values = run.vectors(name)
        length = max((h.hidden.shape[1] for h in run.bptt.values()), default=values.shape[1])
        places = np.linspace(0, length - 1, values.shape[1])
        chosen = moments(len(step), 5)
        for shade, moment in zip(shades(len(chosen)), chosen, strict=True):
            profile(axis, places, values[moment], color=shade, label=f"step {step[moment]}")
        axis.axhline(1, color="black", linestyle=":", linewidth=1)
        axis.set(title=name.split("/")[0], xlabel=TIME, yscale="log")
        axis.set_ylabel("largest singular value of\n$\\partial s_t/\\partial s_{t-1}$")
        axis.grid(alpha=0.3)
    for axis in axes:
        legend_beside(axis)
    text = (
        "A largest exponent under 0: what is put into the state dies away, and so does the"
        " gradient on its way back; over 0 it grows. An exponent of λ is a slope of λ / ln 10"
        " decades a step. The Jacobian of one step is of the whole state, (h, c) for an LSTM."
    )
    data = run.tidy({"lyapunov": "lyapunov", "jacobian_norm": "jacobian_norm"}, "index")
    return Exhibit("lyapunov", "Lyapunov exponents and one-step Jacobian", text, figure,
                   data=data)  # fmt: skip
