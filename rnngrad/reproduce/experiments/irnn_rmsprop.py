"""Whether clipping stops the blow-up of an IRNN's first update."""

from __future__ import annotations

import numpy as np

from rnngrad.reproduce.drawing import Drawing, Line, Panel
from rnngrad.reproduce.experiment import Criterion, Experiment, Published, Quick, Row, Rows, Seen
from rnngrad.runs import Run

LOG = Published(
    "3.6e9 after one update at T = 100 (seed 1234, value clipping at 1)",
    "github.com/ratschlab/uRNN, commit 91c4fdf, output/, a rerun of Arjovsky, Shah & Bengio's code",
    "log",
)
CODE = Published(
    "clipped elementwise at 1 before RMSProp, whose mean square starts from 0.001",
    "github.com/amarshah/complex_RNN, commit 3537fbf, adding_problem.py",
    "code",
)
THEANO, TORCH = 0.001, 0.0
"""What the mean square starts from."""


def _digest(run: Run) -> Row:
    metrics, measures = run.metrics, run.measures
    after = measures["step"] == 2  # what is measured there is measured before that update
    return {
        "loss_after_one": float(metrics["eval_loss"][0]),
        "spectral_radius": float(measures["l0/spectral_radius"][after][0]) if after.any() else None,
    }


def decades(rows: Rows) -> float:
    """``log10`` of the median loss after the update; what overflowed counts as infinite."""
    loss = np.nan_to_num(rows.of("loss_after_one"), nan=np.inf)
    return float(np.log10(np.median(loss)))


def _explodes(rows: Rows) -> Seen:
    by_length = {
        length: decades(there)
        for length, there in rows.where(start=THEANO, clip="none").sets("length").items()
    }
    levels = list(by_length.values())
    finite = [level for level in levels if level < np.inf]
    grows = levels == sorted(levels) and len(finite) == len({*finite})
    told = ", ".join(
        f"{f'10^{d:.1f}' if d < np.inf else 'overflow'} at T = {length}"
        for length, d in by_length.items()
    )
    return Seen(f"median {told}", levels[0] >= 7 and grows)


def _value(rows: Rows) -> Seen:
    moved = _moved(rows, THEANO, 0.9, "value")
    return Seen(f"median moved by {moved:+.2f} decades", abs(moved) < 0.5)


def _norm(rows: Rows) -> Seen:
    level = decades(rows.where(start=THEANO, clip="norm", length=100))
    return Seen(f"median 10^{level:.1f}", level < 5)


def _scale_free(rows: Rows) -> Seen:
    moved = {
        (alpha, clip): _moved(rows, TORCH, alpha, clip)
        for alpha in (0.9, 0.99)
        for clip in ("value", "norm")
    }
    text = ", ".join(f"{d:+.2f} ({clip}, decay {alpha})" for (alpha, clip), d in moved.items())
    return Seen(f"moved by {text} decades", all(abs(d) <= 1 for d in moved.values()))


def _unseen(rows: Rows) -> Seen:
    radius = np.nanmax(rows.where(start=THEANO, length=100).of("spectral_radius"))
    return Seen(f"largest spectral radius {radius:.3f}", bool(radius < 1.05))


def _moved(rows: Rows, start: float, alpha: float, clip: str) -> float:
    there = rows.where(start=start, alpha=alpha, length=100)
    return decades(there.where(clip=clip)) - decades(there.where(clip="none"))


def _draw(rows: Rows) -> Drawing:
    lines, points = [], []
    arms = [(THEANO, 0.9), (TORCH, 0.9), (TORCH, 0.99)]
    for i, clip in enumerate(("none", "value", "norm")):
        there = rows.where(start=THEANO, clip=clip)
        level = np.array([decades(there.where(length=length)) for length in there.values("length")])
        level[np.isinf(level)] = np.nan  # beyond float32
        lines.append(Line(there.values("length"), level, f"clip={clip}"))
        for place, (start, alpha) in enumerate(arms):
            one = rows.where(start=start, alpha=alpha, clip=clip, length=100)
            if one:
                x = [place + 0.15 * (i - 1)]
                points.append(Line(x, [decades(one)], f"clip={clip}", points=True))
    y = r"$\log_{10}$ median test MSE"
    anchor = {"log of the code, clip=value": [(100, np.log10(3.627e9))]}
    ticks = ["from 0.001,\ndecay 0.9", "from 0,\ndecay 0.9", "from 0,\ndecay 0.99"]
    return Drawing(
        [
            Panel("RMSProp of the paper's code", "length $T$", y, lines, published=anchor),
            Panel("T = 100, by RMSProp's mean square", "", y, points, ticks=ticks),
        ],
        across=2,
    )


EXPERIMENT = Experiment(
    name="irnn_rmsprop",
    title="Clipping before RMSProp does not stop an IRNN from blowing up",
    paper="Arjovsky, Shah & Bengio, ICML 2016, section 5.2 (IRNN, adding)",
    claim="One update takes the test error of a ReLU RNN from the identity up by ten decades; "
    "whether clipping helps hangs on what RMSProp's mean square starts from.",
    minutes=1,
    sweeps=("experiment=irnn_rmsprop", "experiment=irnn_rmsprop_torch"),
    keys={
        "clip": "clip.name",
        "length": "task.length",
        "start": "optim.initial_accumulator",
        "alpha": "optim.alpha",
    },
    digest=_digest,
    criteria=(
        Criterion(
            "unclipped, the median test MSE after one update is at least 10^7 at T = 100, and "
            "grows with T until float32 overflows",
            _explodes,
            LOG,
        ),
        Criterion("clipping by value at 1 moves its logarithm by less than 0.5", _value, LOG),
        Criterion("clipping by norm at 1 brings it below 10^5 at T = 100", _norm, CODE),
        Criterion(
            "with torch's RMSProp, mean square from 0, neither moves it by more than a decade",
            _scale_free,
            CODE,
        ),
        Criterion(
            "the spectral radius of W_hh does not show it: below 1.05 throughout", _unseen, CODE
        ),
    ),
    quick=Quick(
        sweeps=("experiment=irnn_rmsprop task.length=100 seed=0,1,2",),
        criteria=(
            Criterion(
                "unclipped, the median test MSE after one update is at least 10^6",
                lambda rows: Seen(
                    f"10^{decades(rows.where(clip='none')):.1f}",
                    decades(rows.where(clip="none")) >= 6,
                ),
                LOG,
            ),
            Criterion("clipping by norm at 1 brings it below 10^5", _norm, CODE),
        ),
    ),
    draw=_draw,
    settings="128 units, batch 20, W_hh = I, other weights Glorot uniform, learning rate 0.001, "
    "test set of 1,000 sequences (paper: 10,000).",
    calibrated="windows from a numpy program and from seeds 0 to 9 here, judged on seeds 10 to 19.",
)
