"""What clipping does that is called before the gradient is there: nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rnngrad.clipping import CLIPS, Clipper
from rnngrad.reproduce.drawing import Drawing, Line, Panel, through
from rnngrad.reproduce.experiment import (
    Criterion,
    Experiment,
    Published,
    Quick,
    Row,
    Rows,
    Seen,
    thinned,
)
from rnngrad.task import TASKS

CODE = Published(
    "zero_grad(), forward, clip_grad_norm_(), loss.backward(), step(), in this order",
    "github.com/locuslab/TCN, commit 2f8c2b8, TCN/copy_memory/copymem_test.py",
    "code",
)
PLACES = ("never", "before backward", "after backward")
"""Where ``clip_grad_norm_`` stands."""
MAX_NORM, STEPS = 1.0, 200


def _computed(seeds: Sequence[int]) -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of matrices this small more would only wait for each other
    try:
        for seed in seeds:
            for place in PLACES:
                yield _trained(place, seed)
    finally:
        torch.set_num_threads(threads)


def _trained(place: str, seed: int) -> Row:
    """A loop by hand, all of it torch's: losses, and the norms of the gradients it steps with."""
    task = TASKS.default("adding", length=50)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rnn, readout = nn.RNN(2, 128), nn.Linear(128, 1)
    model = nn.ModuleList([rnn, readout])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    for step in range(1, STEPS + 1):
        inputs, targets, _ = task.training_batch(seed, step, 20)
        optimizer.zero_grad()
        loss = task.loss(readout(rnn(inputs)[0][-1]), targets)
        if place == "before backward":
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        loss.backward()
        if place == "after backward":
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        norms.append(
            nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        )
        losses.append(loss.detach())
        optimizer.step()
    loss_of, norm_of = (torch.stack(values).numpy() for values in (losses, norms))
    weights = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    optimizer.zero_grad()
    return {
        "place": place,
        "seed": seed,
        "bits": hashlib.sha256(loss_of.tobytes() + weights.tobytes()).hexdigest()[:16],
        "largest_norm": float(norm_of.max()),
        "above": float((norm_of > MAX_NORM * (1 + 1e-5)).mean()),
        "refused": _refuses(model),
        "loss": thinned(np.arange(1, STEPS + 1), loss_of),
        "norm": thinned(np.arange(1, STEPS + 1), norm_of),
    }


def _refuses(model: nn.Module) -> bool:
    """Whether ``Clipper`` says something where there is no gradient."""
    try:
        Clipper(CLIPS.default("norm"), model.named_parameters())()
    except RuntimeError as error:
        return "clip between loss.backward() and optimizer.step()" in str(error)
    return False


def _same(rows: Rows) -> Seen:
    same, seeds = _as_never(rows, "before backward")
    return Seen(f"losses and weights after {STEPS} updates the same in {same} of {seeds} seeds",
                same == seeds)  # fmt: skip


def _other(rows: Rows) -> Seen:
    same, seeds = _as_never(rows, "after backward")
    return Seen(f"others in {seeds - same} of {seeds} seeds", same == 0)


def _as_never(rows: Rows, place: str) -> tuple[int, int]:
    """In how many seeds every bit is that of the loop without clipping, and how many there are."""
    never = {row["seed"]: row["bits"] for row in rows.where(place="never")}
    return sum(row["bits"] == never[row["seed"]] for row in rows.where(place=place)), len(never)


def _norms(rows: Rows) -> Seen:
    before, after = (rows.where(place=f"{where} backward") for where in ("before", "after"))
    largest, least = after.of("largest_norm").max(), before.of("largest_norm").min()
    share = before.of("above").mean()
    return Seen(
        f"up to {before.of('largest_norm').max():.2f}, above 1 in {share:.0%} of updates; "
        f"in the right place at most {largest:.6f}",
        bool(least > 2 * MAX_NORM and largest <= MAX_NORM * (1 + 1e-5)),
    )


def _refused(rows: Rows) -> Seen:
    refused = sum(row["refused"] for row in rows)
    return Seen(f"raises in {refused} of {len(rows)} loops", refused == len(rows))


def _draw(rows: Rows) -> Drawing:
    first = rows.where(seed=min(rows.values("seed")))
    curves = {row["place"]: row for row in first}

    def lines(key: str) -> list[Line]:
        return [
            through(curves[place][key], place, points=place == "before backward")
            for place in PLACES
        ]

    return Drawing(
        [
            Panel("Gradient norm that is stepped with", "update", r"$\|g\|$", lines("norm"),
                  levels={"max_norm": MAX_NORM}, logarithmic="y"),
            Panel("Training loss", "update", "MSE", lines("loss"),
                  levels={"chance": 1 / 6}, logarithmic="y"),
        ],
        across=2,
    )  # fmt: skip


CRITERIA = (
    Criterion(
        "called before backward, every loss and weight is bit for bit that of no clipping",
        _same,
        CODE,
    ),
    Criterion("called after backward they are others", _other, CODE),
    Criterion(
        "called before backward, each seed steps with a norm above twice the threshold; called "
        "after it, none above the threshold",
        _norms,
        CODE,
    ),
    Criterion("in the wrong place rnngrad's Clipper raises instead", _refused, CODE),
)
EXPERIMENT = Experiment(
    name="clip_before_backward",
    title="Clipping before backward clips nothing",
    paper="Bai, Kolter & Koltun 2018, the code of their copy memory experiment",
    claim="Between zero_grad() and loss.backward() there is no gradient that clip_grad_norm_ could "
    "clip: the published baseline was trained without clipping.",
    minutes=0.2,
    computed=_computed,
    computed_seeds=range(5),
    keys={"place": "place"},
    criteria=CRITERIA,
    quick=Quick(criteria=CRITERIA),
    draw=_draw,
    settings="the same order of calls around torch's own RNN of 128 units and its clip_grad_norm_, "
    "on adding with T = 50, batch 20, SGD at 0.05 (theirs: a TCN on copy memory, RMSprop).",
    calibrated="the threshold 1 is their default; that norms pass twice of it was seen on seeds "
    "100 to 104, judged on seeds 0 to 4.",
)
