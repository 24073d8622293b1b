"""The drawings of docs/tutorial.md, of what ``rnngrad.tutorial`` has computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnngrad.report.style import COLOURS, DASHES, STYLE

if TYPE_CHECKING:
    from rnngrad.tutorial import Activation, Cliff, Clipping, Depth, Layer, Remedies, Unit

Floats = npt.NDArray[np.float64]

BLUE, VERMILION, GREEN, *_ = COLOURS
LAG = "lag $k$ (steps back from the loss)"
RELATIVE = r"$\log_{10}\,\|\partial L/\partial h_{T-k}\| \,/\, \|\partial L/\partial h_T\|$"


def _line(number: int) -> dict[str, Any]:
    """A colour, and a dash that tells the line apart in grey."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}


def _panels(
    columns: int, height: float = 3.4, width: float = 3.9, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    drawn = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return drawn, drawn.subplots(rows, columns, squeeze=False).ravel().tolist()


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, np.nan)


def activations_figure(activations: Mapping[str, Activation]) -> Figure:
    """``φ`` and ``φ'``, the largest ``φ'`` marked."""
    a = np.linspace(-5, 5, 1001)
    with matplotlib.rc_context(STYLE):
        drawn, (left, right) = _panels(2, 3.6, 4.6)
        for number, (name, (phi, slope, most, _)) in enumerate(activations.items()):
            look = _line(number)
            if name == "relu":  # lies under leaky_relu
                look = {"color": GREEN, "linestyle": "-", "linewidth": 5, "alpha": 0.4}
            left.plot(a, phi(a), **look, label=name)
            # no line across a jump
            right.plot(a, np.where((a == 0) & (slope(a) < most), np.nan, slope(a)), **look)
            if slope(np.zeros(1)) == most:
                right.plot(0, most, "o", color=look["color"])
        for text, place, colour in (
            ("tanh: 1 at a = 0", (-4.9, 1.05), VERMILION),
            ("sigmoid: 1/4 at a = 0", (-4.9, 0.27), BLUE),
            ("relu, leaky_relu: 1 at a > 0", (0.6, 1.05), "black"),
            ("leaky_relu: 0.01, relu: 0 at a < 0", (-4.9, -0.1), "black"),
        ):
            right.annotate(text, place, color=colour, fontsize=8)
        left.set(ylim=(-1.5, 3), title="Activation", ylabel=r"$\varphi(a)$")
        right.set(ylim=(-0.15, 1.15), title="Its derivative", ylabel=r"$\varphi'(a)$")
        for axis in (left, right):
            axis.set_xlabel("pre-activation $a$")
            axis.grid(alpha=0.3)
        left.legend(loc="upper left")
    return drawn


def unit_figure(unit: Unit) -> Figure:
    """Products over time, and where a unit comes to rest."""
    with matplotlib.rc_context(STYLE):
        drawn, (left, right) = _panels(2, 3.6, 4.6)
        for number, (weight, product) in enumerate(unit.products.items()):
            left.semilogy(product, **_line(number))
            left.annotate(
                f"w = {weight:g}: {product[1]:.4g}$^k$", (len(product) - 1, product[-1]),
                xytext=(3, 0), textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        left.set(title="tanh unit held at h = 0.6, where φ' = 0.64", xlim=(0, 42))
        left.set(xlabel=LAG, ylabel=r"$|\partial h_T / \partial h_{T-k}|$")
        for number, (name, factors) in enumerate(unit.factors.items()):
            right.plot(unit.weights, factors, **_line(number), label=name)
        right.axhline(1, color="0.5", linewidth=0.8)
        right.annotate("above: explodes", (0.05, 1.03), fontsize=8, color="0.3")
        right.annotate("below: vanishes", (0.05, 0.91), fontsize=8, color="0.3")
        right.set(title="The same without input, at rest", ylim=(0, 2.1), xlim=(0, 3))
        right.set(xlabel="recurrent weight $w$", ylabel=r"factor a step, $w\,\varphi'(a)$")
        right.legend(loc="center right")
        for axis in (left, right):
            axis.grid(alpha=0.3)
    return drawn


def layer_figure(layer: Layer) -> Figure:
    """Eigenvalues of ``W_hh``, and bounds beside what is measured."""
    lags = np.arange(len(layer.gradient))
    with matplotlib.rc_context(STYLE):
        drawn, (left, right) = _panels(2, 4.0, 4.6)
        turn = np.linspace(0, 2 * np.pi, 200)
        for radius, dash, text in ((1, "-", "1"), (3**-0.5, "--", r"$1/\sqrt{3}$")):
            left.plot(radius * np.cos(turn), radius * np.sin(turn), dash, color="0.5", linewidth=1)
            left.annotate(text, (0.72 * radius, 0.74 * radius), color="0.3", fontsize=8)
        left.plot(layer.eigenvalues.real, layer.eigenvalues.imag, "o", color=BLUE, markersize=3.5)
        left.set(title="Eigenvalues of $W_{hh}$, H = 64", aspect="equal")
        left.set(xlabel="real part", ylabel="imaginary part")
        right.plot(lags, lags * np.log10(layer.largest), **_line(1),
                   label=r"bound: $\sigma_{\max}(W)^k$")  # fmt: skip
        right.plot(lags, lags * np.log10(layer.radius), **_line(2), label=r"$\rho(W)^k$")
        right.plot(lags, -lags * np.log10(3) / 2, **_line(3), label=r"$(1/\sqrt{3})^k$")
        right.plot(lags, np.log10(layer.jacobian), color="0.55", linewidth=3, label=(
            r"measured: $\sigma_{\max}(\partial h_T/\partial h_{T-k})$"))  # fmt: skip
        right.plot(lags, layer.gradient, **_line(0), label="measured: gradient")
        right.set(title="tanh layer as torch.nn starts it", xlabel=LAG)
        right.set_ylabel(r"$\log_{10}$ of what $k$ steps leave")
        right.legend(fontsize=8, loc="lower left")
        for axis in (left, right):
            axis.grid(alpha=0.3)
    return drawn


def depth_figure(depth: Depth) -> Figure:
    """A deep stack beside a recurrence, and a stacked RNN over layers and time."""
    with matplotlib.rc_context(STYLE):
        drawn, (left, right) = _panels(2, 3.6, 4.8)
        for rows, number, label in (
            (depth.stacks, 0, "100 layers, each with its own W"),
            (depth.recurrences, 1, "100 steps, one W for all"),
        ):
            look = _line(number) | {"linewidth": 0.9}
            for row, name in zip(rows, [label, *[None] * (len(rows) - 1)], strict=True):
                left.plot(row, **look, label=name)
        left.set(title="10 tanh networks of each kind, H = 64", xlabel="layers or steps back $k$")
        left.set_ylabel(r"$\log_{10}$ of what $k$ layers or steps leave")
        left.legend(fontsize=8, loc="lower left")
        left.grid(alpha=0.3)
        layers, steps = depth.field.shape
        edges = (np.arange(steps + 1) + 0.5, np.arange(layers + 1) + 0.5)
        mesh = right.pcolormesh(*edges, depth.field, cmap="viridis")
        bar = drawn.colorbar(mesh, ax=right)
        bar.set_label(
            r"$\log_{10}\,\|\partial L/\partial h_t^l\| \,/\, \|\partial L/\partial h_T^L\|$"
        )
        levels = range(int(np.floor(depth.field.min())), 0, 2)
        lines = right.contour(np.arange(1, steps + 1), np.arange(1, layers + 1), depth.field,
                              levels=[*levels], colors="white", linewidths=0.8,
                              linestyles="solid")  # fmt: skip
        right.clabel(lines, fontsize=7)
        right.set(title="RNN of 6 layers, loss at the upper right", xlabel="time step $t$")
        right.set_ylabel("layer $l$")
    return drawn


def remedies_figure(remedies: Remedies) -> Figure:
    """A panel a kind of remedy."""
    with matplotlib.rc_context(STYLE):
        drawn, axes = _panels(3, 3.7, 4.2, rows=2)
        for axis, (kind, rows) in zip(axes, remedies.profiles.items(), strict=False):
            for number, (command, profiles) in enumerate(rows.items()):
                axis.plot(np.median(profiles, axis=0), **_line(number), label=command)
            axis.set(title=kind, ylim=(-60, 12))
        _draw_shorter(axes[4], remedies.shorter)
        _draw_penalty(axes[5], remedies.penalty)
        for axis in axes:
            axis.set_xlabel(LAG)
            axis.legend(fontsize=7, loc="upper right" if axis is axes[0] else "lower left")
            axis.grid(alpha=0.3)
        for axis in (axes[0], axes[3]):
            axis.set_ylabel(RELATIVE)
    return drawn


def _draw_shorter(axis: Axes, profiles: Mapping[str, Floats]) -> None:
    for number, (command, profile) in enumerate(profiles.items()):
        wide = {"linewidth": 5, "alpha": 0.4} if number == 0 else {}
        axis.plot(_finite(profile), **_line(number) | wide, label=command)
        end = int(np.isfinite(profile).sum()) - 1
        cut = end < len(profile) - 1
        axis.plot(end, profile[end], "x" if cut else "|", color=COLOURS[number], markersize=10)
        if cut:
            axis.annotate("exactly 0 beyond", (end, profile[end]), (8, 0), fontsize=8,
                          textcoords="offset points", color=COLOURS[number])  # fmt: skip
    axis.set(title="shorter sequences, truncation", ylim=(-30, 3))


def _draw_penalty(axis: Axes, found: Mapping[str, Mapping[int, Floats]]) -> None:
    lines = [("none", min(found["none"])), *((name, max(steps)) for name, steps in found.items())]
    for number, (name, step) in enumerate(lines):
        label = f"regularizer={name}, step {step}" if number else f"both, step {step}"
        axis.plot(_finite(found[name][step]), **_line(number), label=label)
    axis.set(title="penalty, while it trains", ylim=(-30, 3))


def cliff_figure(cliff: Cliff) -> Figure:
    """The surface, and two runs into it."""
    with matplotlib.rc_context(STYLE):
        drawn, (surface, loss, norm) = _panels(3, 3.5, 4.0)
        surface.plot(cliff.bias, cliff.error, **_line(0), label="error")
        surface.set(title="Error surface at w = 5, T = 50", xlabel="bias $b$")
        surface.set_ylabel(r"error $(s_T - 0.7)^2$")
        slope = surface.twinx()
        slope.semilogy(cliff.bias, np.abs(cliff.slope), **_line(1), linewidth=0.9)
        slope.set_ylabel(r"dashed: $|\partial\,\mathrm{error}/\partial b|$")
        slope.spines["right"].set_visible(True)
        for number, name in enumerate(cliff.loss):
            look = _line(number) | {"linewidth": 1.8 - number}
            steps = np.arange(1, len(cliff.loss[name]) + 1)
            loss.semilogy(steps, cliff.loss[name], **look, label=f"clip={name}")
            there = np.where(cliff.norm[name] > 0, cliff.norm[name], np.nan)
            norm.semilogy(steps, there, **look, label=f"clip={name}")
        loss.set(title="Two runs into it", xlabel="training step", ylabel="error")
        norm.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
        norm.annotate("threshold of clip=norm", (0.02, 1.15), fontsize=8,
                      xycoords=("axes fraction", "data"), color="0.2")  # fmt: skip
        norm.set(title="Gradient norm before clipping", xlabel="training step")
        norm.set_ylabel(r"$\|\partial\,\mathrm{error}/\partial(w, b)\|$; not drawn: exactly 0")
        for axis in (loss, norm):
            axis.legend(fontsize=8)
        for axis in (surface, loss, norm):
            axis.grid(alpha=0.3)
    return drawn


def clipping_figure(clipping: Clipping, visible: float) -> Figure:
    """What each time step adds before and after; profiles and losses of four runs."""
    with matplotlib.rc_context(STYLE):
        drawn, (share, profiles, losses) = _panels(3, 3.7, 4.2)
        time = np.arange(1, len(clipping.before) + 1)
        share.plot(time, _finite(clipping.before), **_line(0), label="before clipping")
        share.plot(time, _finite(clipping.after), **_line(1), label="after clipping")
        floor = np.log10(clipping.norm * visible)
        share.axhline(floor, color="0.4", linewidth=0.9, linestyle=":")
        share.annotate(r"$2^{-24}$ of the sum, before clipping",
                       (2, floor), (0, 3), textcoords="offset points", fontsize=8)  # fmt: skip
        share.set(title="One gradient of a tanh RNN, untrained", xlabel="time step $t$")
        share.set_ylabel(r"$\log_{10}$ of step $t$'s part of $\partial L/\partial W_{hh}$")
        for number, (name, profile) in enumerate(clipping.profiles.items()):
            look = _line(number) | {"linewidth": 1.5}
            profiles.plot(time, _finite(profile), **look, label=name)
            marker = "o" if len(clipping.steps[name]) == 1 else None
            losses.semilogy(clipping.steps[name], clipping.losses[name], **look, label=name,
                            marker=marker)  # fmt: skip
        profiles.set(title="At the end of training", xlabel="time step $t$")
        profiles.set_ylabel(
            r"$\log_{10}\,\|\partial L/\partial h_t\| \,/\, \|\partial L/\partial h_T\|$"
        )
        losses.axhline(clipping.chance, color="0.4", linewidth=0.9, linestyle=":")
        losses.annotate("chance", (0.99, clipping.chance * 1.06), ha="right", fontsize=8,
                        xycoords=("axes fraction", "data"))  # fmt: skip
        losses.set(title="Adding problem (lines as in the middle)", xlabel="training step")
        losses.set_ylabel("mean squared error (evaluation)")
        for axis in (share, profiles, losses):
            axis.grid(alpha=0.3)
        for axis in (share, profiles):
            axis.legend(fontsize=8, loc="lower right")
    return drawn
