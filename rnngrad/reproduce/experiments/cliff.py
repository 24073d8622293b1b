"""The error surface of one unit, and gradient descent before its wall."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from rnngrad.checkpoint import load
from rnngrad.cliff import surface
from rnngrad.reproduce.drawing import Drawing, Field, Line, Panel, through
from rnngrad.reproduce.experiment import Criterion, Experiment, Published, Quick, Row, Rows, Seen
from rnngrad.runs import CHECKPOINTS, Run

FIGURE = Published(
    "a wall of high curvature, which throws plain gradient descent far away; with clipping the "
    "step on it stays short",
    "Pascanu, Mikolov & Bengio, ICML 2013, section 2.3 and figure 6",
    "paper",
)
FORMULA = Published(
    "the gradient's norm at w = 5 over b, by equation and its derivative",
    "Pascanu, Mikolov & Bengio, ICML 2013, section 2.3",
    "derived",
)
WEIGHT, LENGTHS = 5.0, (10, 20, 30, 50)
BIAS = np.union1d(np.linspace(-3, -2.2, 1_601), np.linspace(-2.613, -2.612, 10_001))
STEP = 0.001
"""Learning rate times threshold: the longest step that clipping leaves."""
DRAWN, STARTS = -1.225, tuple(np.linspace(-1.249, -1.2015, 20).round(4).tolist())
"""What both biases start from: in the run whose path is drawn, and in those that are judged."""
RUN = "experiment=cliff optim.lr=0.01 trainer.steps=400 trainer.log_every=1 seed=0"
CLIPS = ("clip=none", "clip.max_norm=0.1")
PATHS = tuple(
    f"{RUN} {clip} init.bias={DRAWN} trainer.checkpoint_every=1 trainer.checkpoint_keep=0"
    for clip in CLIPS
)


def _computed(seeds: Sequence[int]) -> Iterator[Row]:
    """The surface along ``w = 5``: the same whatever the seed."""
    for length in LENGTHS:
        norm = surface(WEIGHT, BIAS, length).norm
        yield {
            "clip": None,
            "bias": None,
            "length": length,
            "seed": seeds[0],
            "height": float(norm.max()),
            "where": float(BIAS[norm.argmax()]),
        }


def _digest(run: Run) -> Row:
    metrics, bias = run.metrics, run.config["init"]["bias"]
    loss, drawn = metrics["loss"], bias == DRAWN
    path = [_place(run, step) for step in (range(401) if drawn else (400,))]
    return {
        "longest": float((metrics["lr"] * metrics["grad_norm_post"]).max()),
        "end_loss": float(loss[-1]),
        "lower_of_two": float(np.minimum(loss[-100:-1], loss[-99:]).max()),
        "distance": math.dist(path[-1], (WEIGHT, 2 * bias)),
        "path": path if drawn else None,
        "loss": loss.tolist() if drawn else None,
    }


def _place(run: Run, step: int) -> tuple[float, float]:
    """``(w, b)`` after so many updates, from a checkpoint."""
    tensors = load(run.path / CHECKPOINTS, step).tensors
    w, b_ih, b_hh = (
        tensors[f"model/rnn.{name}_l0"].item() for name in ("weight_hh", "bias_ih", "bias_hh")
    )
    return w, b_ih + b_hh


def _wall(rows: Rows) -> Seen:
    (row,) = rows.where(clip=None, length=50)
    text = f"{row['height']:.0f} at b = {row['where']:.4f}"
    return Seen(text, 5e3 <= row["height"] <= 8e3 and abs(row["where"] + 2.612) <= 0.003)


def _grows(rows: Rows) -> Seen:
    low, high = (rows.where(clip=None, length=length)[0]["height"] for length in (20, 50))
    return Seen(f"{high / low:.0f}-fold, from {low:.0f} to {high:.0f}", high > 100 * low)


def _thrown(rows: Rows) -> Seen:
    there = rows.where(clip="none", bias=STARTS)
    longest, end = there.of("longest"), there.of("end_loss")
    far, over = int((longest > 1).sum()), int((end >= 0.08).sum())
    text = (
        f"longer than 1 from {far} of {len(there)} starts (median {np.median(longest):.1f}, "
        f"at most {longest.max():.0f}); {over} end with an error of at least 0.08"
    )
    return Seen(text, 2 * min(far, over) >= len(there))


def _kept(rows: Rows) -> Seen:
    there = rows.where(clip="norm", bias=STARTS)
    longest, lower, far = (
        float(there.of(key).max()) for key in ("longest", "lower_of_two", "distance")
    )
    return Seen(
        f"steps at most {longest:.6f} long; the lower error of two updates at most {lower:.4f}; "
        f"at most {far:.2f} away at the end",
        longest <= STEP * (1 + 1e-5) and far < 0.2 and lower < 0.08,
    )


def _longer(rows: Rows) -> Seen:
    none, norm = (rows.where(clip=clip, bias=DRAWN).of("longest")[0] for clip in ("none", "norm"))
    return Seen(f"{none:.3g} beside {norm:.6f}", none > 100 * norm and norm <= STEP * (1 + 1e-5))


def _draw(rows: Rows) -> Drawing:
    w, b = np.linspace(4.85, 5.1, 251), np.linspace(-2.66, -2.42, 241)
    above = surface(w, b[:, None]).norm
    runs = {f"clip={row['clip']}": row for row in rows.where(bias=DRAWN)}
    paths = [through(row["path"], name) for name, row in runs.items()]
    return Drawing(
        [
            Panel("Surface from above, and two paths", "weight $w$", "bias $b$",
                  [*paths, through([(WEIGHT, 2 * DRAWN)], "start", points=True)],
                  behind=Field(w, b, np.log10(above), r"$\log_{10}\|\nabla E\|$"),
                  limits=(b[0], b[-1]), x_limits=(w[0], w[-1])),
            Panel("Error on the way", "update", "error $E$",
                  [Line(range(1, len(row["loss"]) + 1), row["loss"], name)
                   for name, row in runs.items()], logarithmic="y", x_limits=(40, 140)),
            Panel("The wall at w = 5", "bias $b$", r"$\|\nabla E\|$",
                  [Line(BIAS, surface(WEIGHT, BIAS, length).norm, f"T = {length}")
                   for length in LENGTHS], logarithmic="y", x_limits=(-2.72, -2.52)),
        ],
    )  # fmt: skip


CRITERIA = (
    Criterion(
        "at w = 5 and T = 50 the gradient's norm has its maximum over b within 0.003 of -2.612, of "
        "5,000 to 8,000",
        _wall,
        FORMULA,
    ),
    Criterion("that maximum grows more than 100-fold from T = 20 to T = 50", _grows, FORMULA),
    Criterion(
        "without clipping, from at least half of 20 starts one step is longer than 1, and at least "
        "half of the runs end with an error of 0.08 or more (they start below 0.04)",
        _thrown,
        FIGURE,
    ),
    Criterion(
        "with clip.max_norm=0.1 no step is longer than 0.001, all runs end within 0.2 of their "
        "start, and of any two updates among the last 100 one has an error below 0.08",
        _kept,
        FIGURE,
    ),
)
EXPERIMENT = Experiment(
    name="cliff",
    title="A wall in the error surface, with clipping and without",
    paper="Pascanu, Mikolov & Bengio, ICML 2013, section 2.3 and figure 6",
    claim="The error of one unit over 50 steps has a wall; gradient descent that meets it is "
    "thrown far away, and with its gradient's norm clipped it stays near the wall's foot.",
    minutes=0.6,
    sweeps=(
        *PATHS,
        *(f"{RUN} {clip} init.bias={','.join(map(str, STARTS))}" for clip in CLIPS),
    ),
    keys={"clip": "clip.name", "length": "task.length", "bias": "init.bias"},
    digest=_digest,
    computed=_computed,
    computed_seeds=(0,),
    criteria=CRITERIA,
    quick=Quick(
        sweeps=PATHS,
        criteria=(
            *CRITERIA[:2],
            Criterion(
                "from one start, the longest step without clipping is over 100 times as long as "
                "that with clip.max_norm=0.1, which is 0.001 at most",
                _longer,
                FIGURE,
            ),
        ),
    ),
    draw=_draw,
    settings="w = 5 and 20 values of b within 0.05 of -2.45, learning rate 0.01, 400 updates (the "
    "paper names none of these). torch's unit has two biases, which are added: a step moves their "
    "sum twice as far as it would the paper's one.",
    calibrated="nothing in it is random but where on the wall a path arrives: the windows were "
    "fixed on gradient descent in numpy, with two biases, in float64 and float32, from 200 other "
    "starts. A first form had one start, b = -2.45, and asked for a step longer than 10, as in "
    "float64; it was given up when the run, in float32, made one of 1.7.",
    found="How far the unclipped step throws is chance: it hangs on where on a wall 0.001 wide the "
    "path arrives, which float32 and float64 disagree on. From 200 starts in numpy the longest "
    "step was between 0.1 and 60. And clipping does not bring the path over the wall: it ends on "
    "it, to and fro from one side to the other.",
)
