"""``rnngrad-report``: one page with figure and table from finished or running runs."""

from __future__ import annotations

import argparse
import base64
import html
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnngrad.report.style import COLOURS, DASHES, STYLE
from rnngrad.runs import Run, differences, find_runs, table

PANELS = 5
"""Runs that get a panel of their own; more share one."""
MOMENTS = 6
"""Training steps shown in a run's panel."""


def figure(runs: Sequence[Run]) -> Figure:
    """Loss against training step, and the gradient through time of the last layer.

    Up to ``PANELS`` runs get a panel each, with the profile ``log10 ‖∂L/∂h_t‖`` against ``t`` at
    several training steps; more share one panel, with each run's last profile.
    """
    apart = len(runs) <= PANELS
    count = 1 + (len(runs) if apart else 1)
    with matplotlib.rc_context(STYLE):
        drawn, axes = plt.subplots(1, count, figsize=(3.6 * count, 3.4), layout="constrained")
        _draw_losses(axes[0], runs)
        if apart:
            for axis, run, name in zip(axes[1:], runs, _names(runs), strict=True):
                _draw_moments(axis, run, name)
            _share_range(axes[1:])
        else:
            _draw_last_profiles(axes[1], runs)
        drawn.suptitle(
            f"Gradient through time of the last layer: RMS over the batch, {_when(runs)}",
            fontsize=9,
        )
    return drawn


def initial_figure(profiles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """``log10 ‖∂L/∂h_{T-k}‖`` against the lag, a panel an activation, a line an initialisation.

    Args:
        profiles: By activation and scheme, as from ``rnngrad.initial.lag_profile``.
    """
    with matplotlib.rc_context(STYLE):
        rows = -(-len(profiles) // 4)
        drawn, axes = plt.subplots(
            rows, 4, figsize=(13, 3.2 * rows), layout="constrained", sharex=True, squeeze=False
        )
        for axis, (activation, lines) in zip(axes.flat, profiles.items(), strict=False):
            for number, (scheme, profile) in enumerate(lines.items()):
                style = DASHES[number // len(COLOURS)]
                colour = COLOURS[number % len(COLOURS)]
                axis.plot(np.where(np.isfinite(profile), profile, np.nan), style,
                          color=colour, label=scheme)  # fmt: skip
            axis.set_title(activation)
            axis.set_ylim(-40, 10)
            axis.grid(alpha=0.3)
        for axis in axes[-1]:
            axis.set_xlabel("lag $k$ (steps back from the loss)")
        for axis in axes[:, 0]:
            axis.set_ylabel(r"$\log_{10}\,\|\partial L/\partial h_{T-k}\|$")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return drawn


def bench_figure(tables: Sequence[Any], conditions: Mapping[str, str]) -> Figure:
    """How many times faster than each rival, by layer and shape; tables of ``rnngrad.bench``."""
    chosen = [table for table in tables if "JAX (ms)" in table.columns]
    with matplotlib.rc_context(STYLE):
        drawn, axes = plt.subplots(
            1, len(chosen), figsize=(6.4 * len(chosen), 4.2), layout="constrained", squeeze=False
        )
        for axis, table in zip(axes[0], chosen, strict=True):
            _draw_speeds(axis, table)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=3)
        drawn.suptitle("; ".join(f"{k}: {v}" for k, v in conditions.items()), fontsize=7)
    return drawn


def _draw_speeds(axis: Axes, table: Any) -> None:
    names = [f"{row[0]} {row[1]}, {row[2]}, {row[3]}" for row in table.rows]
    places = np.arange(len(names))
    for rival, column in enumerate((7, 9, 11)):
        ratios = [np.nan if row[column] is None else row[column] for row in table.rows]
        label = table.columns[column - 1].removesuffix(" (ms)")
        label = {"cells": "a loop of cells, retain_grad", "JAX": "jitted JAX scan"}.get(
            label, label
        )
        axis.plot(ratios, places, "osD"[rival], color=COLOURS[rival], label=label, markersize=5)
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("times faster, with recording on (right of 1: rnngrad)")
    axis.set_ylabel("layer T, B, H")
    axis.set_title(table.title, fontsize=9)


def _draw_losses(axis: Axes, runs: Sequence[Run]) -> None:
    for number, (run, name) in enumerate(zip(runs, _names(runs), strict=True)):
        metrics = run.metrics
        there = ~np.isnan(metrics["eval_loss"])
        axis.plot(
            metrics["step"][there],
            metrics["eval_loss"][there],
            DASHES[number // len(COLOURS) % len(DASHES)],
            color=COLOURS[number % len(COLOURS)],
            marker="o" if there.sum() == 1 else None,  # a line of one point cannot be seen
            label=name,
        )
    for chance in sorted({run.summary["chance_loss"] for run in runs}):
        axis.axhline(chance, color="0.5", linewidth=0.8, linestyle=":")
        axis.annotate(
            f"chance {chance:.4f}", (1, chance), xycoords=("axes fraction", "data"),
            ha="right", va="bottom", color="0.4", fontsize=8,
        )  # fmt: skip
    axis.set(xlabel="training step", ylabel="evaluation loss", yscale="log", title="Loss")
    if len(runs) <= 2 * len(COLOURS):
        axis.legend(fontsize=7, loc="lower left")


def _draw_moments(axis: Axes, run: Run, name: str) -> None:
    layers = [layer for layer in run.bptt if not layer.endswith("_reverse")]
    if layers:
        history = run.bptt[layers[-1]]
        last = len(history.step) - 1
        moments = np.unique(np.geomspace(1, last + 1, MOMENTS).round().astype(int) - 1)
        shades = matplotlib.colormaps["viridis"](np.linspace(0.9, 0, len(moments)))
        for shade, moment in zip(shades, moments, strict=True):
            profile = np.where(np.isfinite(history.hidden[moment]), history.hidden[moment], np.nan)
            axis.plot(profile, color=shade, label=f"step {history.step[moment]}")
        axis.legend(fontsize=7, loc="lower right")
    axis.set(xlabel="time step $t$", title=name)
    axis.set_ylabel(r"$\log_{10}\,\|\partial L/\partial h_t\|$")


def _draw_last_profiles(axis: Axes, runs: Sequence[Run]) -> None:
    for number, (run, name) in enumerate(zip(runs, _names(runs), strict=True)):
        for layer in [layer for layer in run.bptt if not layer.endswith("_reverse")][-1:]:
            profile = run.bptt[layer].hidden[-1]
            axis.plot(
                np.where(np.isfinite(profile), profile, np.nan),
                DASHES[number // len(COLOURS) % len(DASHES)],
                color=COLOURS[number % len(COLOURS)],
                label=name,
            )
    axis.set(xlabel="time step $t$", title="Gradient through time, last logged step")
    axis.set_ylabel(r"$\log_{10}\,\|\partial L/\partial h_t\|$")


def _share_range(axes: Sequence[Axes]) -> None:
    limits = [axis.get_ylim() for axis in axes]
    for axis in axes:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _when(runs: Sequence[Run]) -> str:
    """What the norms are of: with ``bptt_clip``, of the error as it was clipped on its way."""
    within = [any(layer.clipped is not None for layer in run.bptt.values()) for run in runs]
    if not any(within):
        return "before clipping"
    return "as clipped at every t" + ("" if all(within) else " (runs with bptt_clip)")


def _names(runs: Sequence[Run]) -> list[str]:
    """Short names that tell the runs apart."""
    short = [run.path.resolve().name for run in runs]
    return [
        " ".join([name.rpartition("-")[0] or name, *([different] if different else [])])
        for name, different in zip(short, differences(runs), strict=True)
    ]


def write(runs: Sequence[Run], out: Path) -> Path:
    """The page ``index.html``, self-contained, beside its figure; returns the figure's path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gradients.png"
    drawn = figure(runs)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
    picture = base64.b64encode(path.read_bytes()).decode()
    style = "body{font:15px/1.5 sans-serif;margin:2em auto;max-width:75em}img{max-width:100%}"
    (out / "index.html").write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><title>rnngrad report</title>"
        f"<style>{style}pre{{overflow-x:auto}}</style><h1>rnngrad report</h1>"
        "<p>Loss, and the gradient of the loss with respect to each hidden state of the last layer."
        f" Norms are {_when(runs)}; the loss is a mean over the batch.</p>"
        f'<img alt="Loss and gradient through time" src="data:image/png;base64,{picture}">'
        f"<pre>{html.escape(table(runs))}</pre></html>\n",
        encoding="utf-8",
    )
    return path


def main() -> None:
    """Writes the report of the runs in the given directories and prints their table."""
    parser = argparse.ArgumentParser(prog="rnngrad-report", description=main.__doc__)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a run, or a folder of runs")
    parser.add_argument("--out", help="default: DIR/report, or ./report for several")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    runs: dict[Path, Run] = {}
    for directory in arguments.directories:
        found = {path.resolve(): Run(path) for path in find_runs(directory)} if directory else {}
        if not found:
            _refuse(f"{directory!r}: no run in this directory")
        runs |= found
    single = len(arguments.directories) == 1
    out = Path(arguments.out or (Path(arguments.directories[0], "report") if single else "report"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _refuse(f"--out={out}: cannot be written ({error.strerror})")
    try:
        path = write(list(runs.values()), out)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _refuse(f"{', '.join(arguments.directories)}: a run's files cannot be read ({error})")
    print(table(runs.values()))
    print(f"\nfigure       {path}\nreport       {out / 'index.html'}")
    print(f"TensorBoard  {' '.join(arguments.directories)}")
    print(f"  open it with: {_tensorboard()} --logdir {arguments.directories[0]}")


def _refuse(line: str) -> NoReturn:
    print(f"rnngrad-report: {line}", file=sys.stderr)
    sys.exit(2)


def _tensorboard() -> str:
    """The command as it can be typed here: by its path, if its folder is not on PATH."""
    beside = Path(sys.executable).parent / "tensorboard"
    if shutil.which("tensorboard") or not beside.exists():
        return "tensorboard"
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
