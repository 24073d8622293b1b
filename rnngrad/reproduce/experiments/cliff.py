"""The error surface of one unit, and gradient descent before its wall."""

from __future__ import annotations

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
STEP, START = 0.001, (5.0, -2.45)
"""Learning rate times threshold; where the runs start."""
RUN = "experiment=cliff init.bias=-1.225 optim.lr=0.01 trainer.steps=400 trainer.log_every=1"
PATH = "trainer.checkpoint_every=1 trainer.checkpoint_keep=0"


def _computed(seeds: Sequence[int]) -> Iterator[Row]:
    """The surface along ``w = 5``: the same whatever the seed."""
    for length in LENGTHS:
        norm = surface(WEIGHT, BIAS, length).norm
        yield {
            "clip": None,
            "length": length,
            "seed": seeds[0],
            "height": float(norm.max()),
            "where": float(BIAS[norm.argmax()]),
        }


def _digest(run: Run) -> Row:
    metrics = run.metrics
    path = []
    for step in range(run.summary["steps"] + 1):
        tensors = load(run.path / CHECKPOINTS, step).tensors
        w, b_ih, b_hh = (
            tensors[f"model/rnn.{name}_l0"].item() for name in ("weight_hh", "bias_ih", "bias_hh")
        )
        path.append((w, b_ih + b_hh))
    return {
        "path": path,
        "loss": metrics["loss"].tolist(),
        "longest": float((metrics["lr"] * metrics["grad_norm_post"]).max()),
        "last_gradient": float(metrics["grad_norm_pre"][-1]),
    }


def _wall(rows: Rows) -> Seen:
    (row,) = rows.where(clip=None, length=50)
    text = f"{row['height']:.0f} at b = {row['where']:.4f}"
    return Seen(text, 5e3 <= row["height"] <= 8e3 and abs(row["where"] + 2.612) <= 0.003)


def _grows(rows: Rows) -> Seen:
    low, high = (rows.where(clip=None, length=length)[0]["height"] for length in (20, 50))
    return Seen(f"{high / low:.0f}-fold, from {low:.0f} to {high:.0f}", high > 100 * low)


def _thrown(rows: Rows) -> Seen:
    (row,) = rows.where(clip="none")
    text = (
        f"a step {row['longest']:.1f} long; in the end error {row['loss'][-1]:.3f}, gradient "
        f"{row['last_gradient']:.2g}"
    )
    return Seen(text, row["longest"] > 10 and row["loss"][-1] >= 0.08)


def _kept(rows: Rows) -> Seen:
    (row,) = rows.where(clip="norm")
    far = np.hypot(*(np.array(row["path"]) - START).T).max()
    pairs = np.minimum(row["loss"][-100:-1], row["loss"][-99:]).max()
    return Seen(
        f"steps up to {row['longest']:.6f} long, at most {far:.2f} away from the start; the lower "
        f"error of two updates at most {pairs:.4f}",
        bool(row["longest"] <= STEP * (1 + 1e-5) and far < 0.2 and pairs < 0.01),
    )


def _draw(rows: Rows) -> Drawing:
    w, b = np.linspace(4.85, 5.1, 251), np.linspace(-2.66, -2.42, 241)
    above = surface(w, b[:, None]).norm
    runs = {f"clip={row['clip']}": row for row in rows if row["clip"] is not None}
    paths = [through(row["path"], name) for name, row in runs.items()]
    return Drawing(
        [
            Panel("Surface from above, and two paths", "weight $w$", "bias $b$",
                  [*paths, through([START], "start", points=True)],
                  behind=Field(w, b, np.log10(above), r"$\log_{10}\|\nabla E\|$"),
                  limits=(b[0], b[-1]), x_limits=(w[0], w[-1])),
            Panel("Error on the way", "update", "error $E$",
                  [Line(range(1, len(row["loss"]) + 1), row["loss"], name)
                   for name, row in runs.items()], logarithmic="y"),
            Panel("The wall at w = 5", "bias $b$", r"$\|\nabla E\|$",
                  [Line(BIAS, surface(WEIGHT, BIAS, length).norm, f"T = {length}")
                   for length in LENGTHS], logarithmic="y"),
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
        "without clipping one step is longer than 10, and the run ends with an error of at least "
        "0.08 (it starts from 0.029)",
        _thrown,
        FIGURE,
    ),
    Criterion(
        "with clip.max_norm=0.1 no step is longer than 0.001, the run stays within 0.2 of its "
        "start, and of any two updates among the last 100 one has an error below 0.01",
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
    minutes=0.2,
    sweeps=(f"{RUN} {PATH} clip=none seed=0", f"{RUN} {PATH} clip.max_norm=0.1 seed=0"),
    keys={"clip": "clip.name", "length": "task.length"},
    digest=_digest,
    computed=_computed,
    computed_seeds=(0,),
    criteria=CRITERIA,
    quick=Quick(
        sweeps=(f"{RUN} {PATH} clip=none seed=0", f"{RUN} {PATH} clip.max_norm=0.1 seed=0"),
        criteria=CRITERIA,
    ),
    draw=_draw,
    settings="from (w, b) = (5, -2.45), learning rate 0.01, 400 updates (the paper names none of "
    "these). torch's unit has two biases, which are added: a step moves their sum twice as far as "
    "it would the paper's one, and the clipped path ends on the wall, to and fro from one side to "
    "the other.",
    calibrated="nothing in it is random: the windows were fixed on a gradient descent in numpy, "
    "float64, with two biases, before the first run.",
)
