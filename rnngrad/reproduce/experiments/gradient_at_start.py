"""What a step back through time leaves of the gradient before any training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rnngrad.dynamics import step_factor
from rnngrad.reproduce.drawing import Drawing, Line, Panel
from rnngrad.reproduce.experiment import Criterion, Experiment, Published, Quick, Row, Rows, Seen
from rnngrad.runs import Run

RERUN = "github.com/ratschlab/uRNN, commit 91c4fdf, tf/output/, before training, one seed"
LSTM_LOG = Published(
    "0.757 a step: from 7.83e-2 at the last of 100 steps to 8.20e-14 at the first (LSTM-30, cell "
    "state, forget bias 0)",
    RERUN,
    "log",
)
URNN_LOG = Published("1.000 a step (uRNN-30, unitary recurrence)", RERUN, "log")
PAPER = Published(
    "the uRNN propagates gradients perfectly at first, the gradients of all others vanish "
    "exponentially",
    "Arjovsky, Shah & Bengio, ICML 2016, figure 4 and its text",
    "paper",
)
ARMS: dict[str, Mapping[str, Any]] = {
    "LSTM, torch": {"cell": "lstm", "recurrent": "torch", "forget_bias": None},
    "LSTM, Glorot, forget bias 0": {
        "cell": "lstm",
        "recurrent": "xavier_uniform",
        "forget_bias": None,
    },
    "LSTM, Glorot, forget bias 1": {
        "cell": "lstm",
        "recurrent": "xavier_uniform",
        "forget_bias": 1.0,
    },
    "tanh, Glorot": {"cell": "rnn", "recurrent": "xavier_uniform", "nonlinearity": "tanh"},
    "tanh, orthogonal": {"cell": "rnn", "recurrent": "orthogonal", "nonlinearity": "tanh"},
    "modReLU, orthogonal": {"cell": "rnn", "recurrent": "orthogonal", "nonlinearity": "modrelu"},
    "linear, orthogonal": {"cell": "rnn", "recurrent": "orthogonal", "nonlinearity": "linear"},
}
"""By its name in the figure, what tells an arm from the others."""
FIRST = "LSTM, Glorot, forget bias 0"


def _digest(run: Run) -> Row:
    layer = run.bptt["l0"]
    levels = (layer.hidden_mean if layer.cell is None else layer.cell)[0]
    return {"factor": step_factor(levels), "log10_norm": levels[[*range(0, 99, 3), 99]].tolist()}


def factors(rows: Rows, arm: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of each seed."""
    return rows.where(**ARMS[arm]).of("factor")


def _within(arm: str, low: float, high: float) -> Any:
    def judge(rows: Rows) -> Seen:
        found = factors(rows, arm)
        text = f"median {np.median(found):.4f}, {found.min():.4f} to {found.max():.4f}"
        return Seen(text, bool(low <= np.median(found) <= high))

    return judge


def _ordered(rows: Rows) -> Seen:
    order = (FIRST, "LSTM, Glorot, forget bias 1", "linear, orthogonal")
    found = np.array([factors(rows, arm) for arm in order])
    held = int((np.diff(found, axis=0) > 0).all(0).sum())
    return Seen(f"in {held} of {found.shape[1]} seeds", held == found.shape[1])


def _draw(rows: Rows) -> Drawing:
    step = np.array([*range(1, 100, 3), 100])
    lines, factor = [], []
    for number, arm in enumerate(ARMS):
        there = rows.where(**ARMS[arm])
        if not there:
            continue
        levels = np.array([row["log10_norm"] for row in there], np.float64)
        low, middle, high = np.quantile(levels, [0, 0.5, 1], axis=0)
        lines.append(Line(step, middle, arm, band=(low, high)))
        factor.append(Line(np.full(len(there), number), there.of("factor"), arm, points=True))
    return Drawing(
        [
            Panel(
                "Gradient by time step, before training",
                "time step",
                r"$\log_{10}$ norm ($c_t$ of an LSTM, else $h_t$)",
                lines,
                published={
                    "log of the rerun, LSTM-30": [
                        (1, np.log10(8.2e-14)),
                        (100, np.log10(7.83e-2)),
                    ]
                },
            ),
            Panel(
                "What a step back leaves, each seed",
                "number of the model, in the legend's order",
                "factor a step",
                factor,
                published={
                    "log of the rerun, LSTM-30": [(list(ARMS).index(FIRST), 0.757)],
                    "log of the rerun, uRNN-30": [(list(ARMS).index("linear, orthogonal"), 1.0)],
                },
            ),
        ],
        across=2,
    )


CRITERIA = (
    Criterion(
        "LSTM, Glorot, forget bias 0: the median factor lies in 0.68 to 0.79",
        _within(FIRST, 0.68, 0.79),
        LSTM_LOG,
    ),
    Criterion(
        "forget bias 1 instead: in 0.86 to 0.98",
        _within("LSTM, Glorot, forget bias 1", 0.86, 0.98),
        PAPER,
    ),
    Criterion(
        "as torch.nn initialises an LSTM: in 0.58 to 0.70", _within("LSTM, torch", 0.58, 0.7), PAPER
    ),
    Criterion(
        "orthogonal and linear: in 0.999 to 1.001",
        _within("linear, orthogonal", 0.999, 1.001),
        URNN_LOG,
    ),
    Criterion(
        "orthogonal with modReLU, as in the uRNN: in 0.99 to 1.005",
        _within("modReLU, orthogonal", 0.99, 1.005),
        URNN_LOG,
    ),
    Criterion(
        "orthogonal with tanh, which vanishes all the same: in 0.84 to 0.97",
        _within("tanh, orthogonal", 0.84, 0.97),
        PAPER,
    ),
    Criterion("forget bias 0 < forget bias 1 < orthogonal, in every seed", _ordered, PAPER),
)
EXPERIMENT = Experiment(
    name="gradient_at_start",
    title="Gradient by time step before training: the forget bias and orthogonality",
    paper="Arjovsky, Shah & Bengio, ICML 2016, figure 4 (at the start)",
    claim="Before training an LSTM's gradient vanishes exponentially on its way back through 100 "
    "steps; an orthogonal recurrence keeps it, and a forget bias of 1 most of it.",
    minutes=0.5,
    sweeps=("experiment=gradient_at_start", "experiment=gradient_at_start_rnn"),
    keys={
        "cell": "cell.name",
        "recurrent": "init.recurrent",
        "forget_bias": "cell.forget_bias",
        "nonlinearity": "cell.nonlinearity",
    },
    digest=_digest,
    criteria=CRITERIA,
    quick=Quick(
        sweeps=(
            "experiment=gradient_at_start init=glorot cell.forget_bias=null seed=0,1,2",
            "experiment=gradient_at_start_rnn init.recurrent=orthogonal cell.nonlinearity=linear "
            "seed=0,1,2",
        ),
        criteria=(CRITERIA[0], CRITERIA[3]),
    ),
    draw=_draw,
    settings="30 units, adding with T = 100, batch 20, the task's own loss, one batch a seed, "
    "float32. Norms over units; over the batch, of h_t the mean as published, of c_t the root mean "
    "square (published: the mean; on seeds 100 to 103 that moves a factor by less than 0.0005). "
    "Orthogonal matrices are uniformly drawn real ones (paper: a unitary parametrisation), biases "
    "0; tanh from Glorot is drawn and not judged.",
    calibrated="windows from a numpy program and from seeds 0 to 9 in docs/initial_gradients.md, "
    "that of tanh, which hangs on the biases, from seeds 100 to 109; judged on seeds 10 to 19.",
)
