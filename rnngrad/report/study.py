"""A study's trials as a figure: how good they were in turn, and where they lie.

``python -m rnngrad.report.study DIR OUT.png [RUN...]``: DIR is the sweep's directory, of a study of
two keys, and each RUN a run to compare with, such as that of the defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from rnngrad.report.style import COLOURS, FIELDS, STYLE
from rnngrad.runs import Run
from rnngrad.stored import flat

Trial = tuple[float, float, float]
"""The values of both keys, and the loss."""


def study_figure(
    trials: Sequence[Trial], keys: tuple[str, str], beside: Mapping[str, Trial]
) -> Figure:
    """Evaluation loss by trial and over both keys; all axes are logarithmic.

    Args:
        trials: In the order in which they were begun.
        keys: What is on the axes.
        beside: To compare with, by label.
    """
    first, second, losses = np.array(trials).T
    best = int(np.argmin(losses))
    with matplotlib.rc_context(STYLE):
        drawn, (turns, plane) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        turns.plot(losses, "o", color=COLOURS[0], markersize=4, label="trials")
        turns.plot(np.minimum.accumulate(losses), color=COLOURS[0], label="the best so far")
        points = plane.scatter(first, second, c=np.log10(losses), cmap=FIELDS, s=36)
        ring = {"markersize": 13, "fillstyle": "none", "linestyle": "none"}
        plane.plot(first[best], second[best], "o", color=COLOURS[1], **ring,
                   label=f"the best: {losses[best]:.2g}")  # fmt: skip
        for colour, (label, (x, y, loss)) in zip(COLOURS[1:], beside.items(), strict=False):
            turns.axhline(loss, linestyle="--", color=colour, label=label)
            plane.plot(x, y, "X", color=colour, markersize=9, label=f"{label}: {loss:.2g}")
        turns.set(yscale="log", xlabel="trial", ylabel="evaluation loss")
        plane.set(xscale="log", yscale="log", xlabel=keys[0], ylabel=keys[1])
        drawn.colorbar(points, ax=plane, label=r"$\log_{10}$ evaluation loss")
        turns.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
        plane.legend()
    return drawn


def trials_of(directory: Path) -> tuple[list[Trial], tuple[str, str]]:
    """The finished trials of a sweep's study, and the two keys it is over."""
    import optuna

    storage = f"sqlite:///{directory / 'study.db'}"
    (summary,) = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(study_name=summary.study_name, storage=storage)
    finished = [t for t in study.get_trials() if t.state == optuna.trial.TrialState.COMPLETE]
    first, second = sorted(finished[0].params)
    points = [(t.params[first], t.params[second], t.value) for t in finished if t.value is not None]
    return points, (first, second)


def main(arguments: Sequence[str]) -> None:
    """Draws the figure that the command line asks for."""
    directory, out, *others = map(Path, arguments)
    trials, (first, second) = trials_of(directory)
    beside = {}
    for run in map(Run, others):
        values = flat(run.config)
        x, y = float(values[first]), float(values[second])
        beside[f"{first}={x:g}, {second}={y:g}"] = (x, y, float(run.summary["eval_loss"]))
    study_figure(trials, (first, second), beside).savefig(out, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
