"""When the gradient of an LSTM's cell state reaches the first time step, and when it learns."""

from __future__ import annotations

import math

import numpy as np

from rnngrad.reproduce.drawing import Drawing, Line, Panel, line_each
from rnngrad.reproduce.experiment import (
    Criterion,
    Experiment,
    Published,
    Quick,
    Row,
    Rows,
    Seen,
    extremes,
    first_below,
    thinned,
)
from rnngrad.runs import Run

LOG = (
    "github.com/ratschlab/uRNN, commit 91c4fdf, tf/output/, hidden_gradients.txt of an LSTM of 30 "
    "units on adding, T = 100"
)
LOGGED = {1: 1.05e-12, 500: 8.3e-12, 1000: 7.5e-14, 2000: 7.9e-17, 5000: 0.103, 10_000: 0.229}
"""The ratio there, by updates."""
LOGGED_START = [(1, 8.2e-14), (51, 7.7e-8), (100, 7.83e-2)]
"""The norm there before the first update, by time step."""
LEARNT, HALF = 0.05, 1 / 12
"""Test MSE: a threshold, and half of what chance gives."""
SHUT, OPEN = -9, -3
"""Decades of the ratio: below, the first time step might as well not be there; above, it counts."""
WINDOW = 500
"""Updates at the start, and after the test MSE has come below ``LEARNT``, to take medians over."""


def _digest(run: Run) -> Row:
    metrics, layer = run.metrics, run.bptt["l0"]
    assert layer.cell is not None
    step, ratio = layer.step, layer.cell[:, 0] - layer.cell[:, -1]
    learnt_at, half_at = first_below(run, LEARNT), first_below(run, HALF)
    is_open = ratio >= OPEN
    open_at = int(step[is_open][0]) if is_open.any() else None
    shut = (ratio < SHUT) & (step < (open_at or math.inf))
    after = (step >= (learnt_at or math.inf)) & (step <= (learnt_at or 0) + WINDOW)
    shown = {"before the first update": 1, "at half of chance": half_at, "at the end": step[-1]}
    return {
        "at_start": float(ratio[0]),
        "early": float(np.median(ratio[step <= WINDOW])),
        "shut_until": int(step[shut][-1]) if shut.any() else None,
        "open_at": open_at,
        "half_at": half_at,
        "after": float(np.median(ratio[after])) if after.any() else None,
        "highest": float(ratio.max()),
        "ratio": thinned(step, ratio, 101),
        "curve": thinned(metrics["step"], metrics["eval_loss"], 101),
        "profiles": {
            when: [round(float(x), 2) for x in layer.cell[step == at][0]]
            for when, at in shown.items()
            if at is not None
        },
    }


def _at_start(rows: Rows) -> Seen:
    ratio = rows.of("at_start")
    return Seen(f"10^({extremes(ratio, '.1f')})", bool((ratio < -8).all()))


def _early(rows: Rows) -> Seen:
    ratio = rows.of("early")
    return Seen(f"10^({extremes(ratio, '.1f')})", bool((ratio < -8).all()))


def _after(rows: Rows) -> Seen:
    ratio = np.nan_to_num(rows.of("after"), nan=-np.inf)
    middle = float(np.median(ratio))
    text = f"10^({extremes(ratio, '.1f')}), median 10^{middle:.1f}"
    return Seen(text, middle > -2 and bool((ratio > -3).all()))


def _rise(rows: Rows) -> Seen:
    took = rows.of("open_at") - rows.of("shut_until")
    return Seen(f"{extremes(took, ',.0f', 'never')} updates", bool((took <= 2000).all()))


def _first(rows: Rows) -> Seen:
    lead = rows.of("half_at") - rows.of("open_at")
    text = f"by {extremes(lead, ',.0f')} updates, median {np.median(lead):,.0f}"
    return Seen(text, bool((lead >= 300).all()))


def _quick_rise(rows: Rows) -> Seen:
    risen = rows.of("highest") - rows.of("at_start")
    return Seen(f"{extremes(risen, '.1f')} decades", bool((risen >= 6).all()))


def _draw(rows: Rows) -> Drawing:
    profiles = rows[0]["profiles"]
    steps = range(1, 1 + len(profiles["before the first update"]))
    ratio = r"$\log_{10}\ \|\partial L/\partial c_1\|\,/\,\|\partial L/\partial c_T\|$"
    logged = [(step, math.log10(value)) for step, value in LOGGED.items()]
    at_start = [(t, math.log10(value)) for t, value in LOGGED_START]
    return Drawing(
        [
            Panel("The first cell state's gradient beside the last's", "updates", ratio,
                  line_each(rows, "ratio", "a run"),
                  published={"log of the rerun": logged}),
            Panel("Test error", "updates", "test MSE", line_each(rows, "curve", "a run"),
                  levels={"chance": 1 / 6}, limits=(0, 0.25)),
            Panel(f"Through time, seed {rows[0]['seed']}", "time step $t$",
                  r"$\log_{10}\ \|\partial L/\partial c_t\|$",
                  [Line(steps, profile, when) for when, profile in profiles.items()],
                  published={"log of the rerun": at_start}),
        ]
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="gradient_ratio",
    title="An LSTM learns once its gradient reaches the first time step",
    paper="Arjovsky, Shah & Bengio, ICML 2016, figure 4 (gradients through time), in Hyland's "
    "rerun",
    claim="Before training, 10^-12 of the gradient at the last cell state reaches the first one; a "
    "tenth or more does once the task is learnt.",
    minutes=2,
    sweeps=("experiment=gradient_ratio",),
    digest=_digest,
    criteria=(
        Criterion(
            "before the first update, the ratio of the norms at the first and the last cell state "
            "is below 10^-8 in every run",
            _at_start,
            Published("10^-12.0", LOG, "log"),
        ),
        Criterion(
            "its median over the first 500 updates is, too",
            _early,
            Published("10^-11.1 at 500", LOG, "log"),
        ),
        Criterion(
            "its median over the 500 updates after the test MSE has come below 0.05 is above 10^-3 "
            "in every run, and above 10^-2 in the median run",
            _after,
            Published("10^-1.0 at 5,000, 10^-0.6 at 10,000", LOG, "log"),
        ),
        Criterion(
            "from the last record below 10^-9 to the first above 10^-3 there are at most 2,000 "
            "updates in every run",
            _rise,
            Published("10^-16.1 at 2,000, 10^-1.0 at 5,000", LOG, "log"),
        ),
        Criterion(
            "it comes above 10^-3 at least 300 updates before the test MSE comes below half of "
            "chance, in every run",
            _first,
            Published("between 2,000 and 5,000", LOG, "log"),
        ),
    ),
    quick=Quick(
        sweeps=(
            "experiment=gradient_ratio seed=0,1 trainer.steps=4000 trainer.eval_every=2000 "
            "trainer.eval_size=500",
        ),
        criteria=(
            Criterion(
                "before the first update, the ratio of the norms at the first and the last cell "
                "state is below 10^-8",
                _at_start,
                Published("10^-12.0", LOG, "log"),
            ),
            Criterion(
                "within 4,000 updates it rises by at least 6 decades",
                _quick_rise,
                Published("10^-16.1 at 2,000, 10^-1.0 at 5,000", LOG, "log"),
            ),
        ),
    ),
    draw=_draw,
    settings="30 units, forget bias 0, batch 20, all weights Glorot uniform, gradients clipped by "
    "value at 1, RMSProp as TensorFlow has it (0.001, decay 0.9, mean square from 1), fresh "
    "sequences for every batch, test set of 4,000. The norm is the root mean square over the "
    "training batch of 20, the log's the mean.",
    calibrated="windows from runs of seeds 100 to 104, committed before seeds 0 to 4 ran.",
    found="The ratio does not rise while the test error falls but before: when it comes above "
    "10^-3 the test MSE is still from 0.146 to 0.176, chance being 0.167, and half of that comes "
    "700 to 2,500 updates later. The log, without a record between 2,000 and 5,000, cannot tell.",
)
