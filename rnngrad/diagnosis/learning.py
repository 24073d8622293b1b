"""Whether a run learns: weights that only shrink, a loss that stands still or stays at chance."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from rnngrad.diagnosis.evidence import AT_CHANCE, STALLED, Evidence, Floats
from rnngrad.diagnosis.findings import Finding, Level, Remedy
from rnngrad.diagnosis.grading import finding, graded, last_finite, unknown
from rnngrad.diagnosis.remedies import Setup, against_decay, faster, longer

SHRUNK = (0.5, 0.1)
"""Parts of its first norm that are left of a weight."""
AS_DECAY = 0.05
"""How near ``ln S`` must be to what weight decay alone makes of it, as a part of that."""
IDLE = 1e-5
"""A ratio of update to weight two decades under the usual 10^-3 (Karpathy, CS231n)."""
CHANCE = 0.02
"""A loss within 2 % of chance is at chance."""


def shrinking_weights(evidence: Evidence, setup: Setup) -> Finding:
    """How much is left of the recurrent layers' weights, beside what decay alone would leave.

    A gradient that has vanished leaves weights as they are: they go to 0 by weight decay or a
    penalty, which nothing holds up any more.
    """
    symptom = "weights shrink by decay alone"
    norms = evidence.by_layer("norm")
    left = {
        layer: last_finite(norm) / norm[0]
        for layer, norm in norms.items()
        if len(norm) > 1 and norm[0] > 0 and math.isfinite(last_finite(norm))
    }
    if not left:
        return unknown(symptom, SHRUNK[0], "no weights were followed")
    layer = min(left, key=lambda name: left[name])
    value, alone = left[layer], _decay_alone(evidence)
    matches = 0 < alone < 1 and value > 0
    matches = matches and abs(math.log(value / alone)) < AS_DECAY * -math.log(alone)
    level: tuple[Level, float] = ("ok", SHRUNK[0])
    if value <= SHRUNK[1]:
        level = ("alarm", SHRUNK[1])
    elif value <= SHRUNK[0] and matches:
        level = ("warning", SHRUNK[0])
    words = f"of the weights of l{layer[1]} {100 * value:.3g} % are left"
    if alone < 1:
        words += f", where weight decay alone would leave {100 * alone:.3g} %"
    steps = evidence.steps[norms[layer] <= level[1] * norms[layer][0]]
    return finding(symptom, value, level, words, steps, against_decay(setup))


def _decay_alone(evidence: Evidence) -> float:
    """What weight decay leaves of a weight without a gradient; 1 where decay is not of that form.

    ``Π(1 - ηλ)`` over the measured steps; with momentum, what the velocity makes of it.
    """
    decay = evidence.number("optim.weight_decay", 0.0)
    name = evidence.setting("optim.name")
    logged, rates = evidence.metrics.get("step", ()), evidence.metrics.get("lr", ())
    if not decay or name not in ("sgd", "adamw") or not len(logged) or len(evidence.steps) < 2:
        return 1.0
    momentum = evidence.number("optim.momentum", 0.0)
    if evidence.steps[-1] - evidence.steps[0] > 10**7:
        return 1.0  # going through them one by one would take longer than the rest together
    steps = np.arange(int(evidence.steps[0]), int(evidence.steps[-1]))
    left, velocity = 1.0, 0.0
    for rate in np.interp(steps, logged, np.nan_to_num(rates)).tolist():
        velocity = momentum * velocity + decay * left
        left -= rate * velocity
    return abs(left)


def stalled(evidence: Evidence, setup: Setup) -> Finding:
    """By what part of itself the loss falls over a tenth of the budget.

    Over the last fifth of the budget (warning) and over the last three (alarm, if they rule out
    more). A loss that has got well under chance has converged instead.
    """
    symptom = "stalled"
    recent, before = evidence.improvement(0.2), evidence.improvement(0.6)
    if math.isnan(recent.fall):
        return unknown(symptom, STALLED, "too few updates to say")
    level: tuple[Level, float] = ("ok", STALLED)
    if not evidence.learns and recent.sure < STALLED:
        level = ("alarm" if before.most < STALLED else "warning", STALLED)
    shows = recent if before.sure >= STALLED and level[0] == "warning" else before
    value, way = shows.fall, "falls" if shows.fall > 0 else "rises"
    words = (
        f"the loss {way} by {100 * abs(value):.2g} ± {100 * shows.error:.2g} % of itself over a "
        "tenth of the updates"
    )
    words = words if any(shows) else "the loss stands still"
    speed = update_ratio(evidence)
    if speed < IDLE:
        words += f", and an update changes the weights by {speed:.0e} of themselves"
    return finding(symptom, value, level, words, evidence.losses[0][-1:], _more(evidence, setup))


def _more(evidence: Evidence, setup: Setup) -> Iterator[Remedy]:
    """What gets a run further of which nothing else is known to be wrong."""
    if update_ratio(evidence) < IDLE:
        yield from faster(setup)
    yield from longer(setup)


def update_ratio(evidence: Evidence) -> float:
    """``‖Δθ‖ / ‖θ‖`` of all parameters, the median of the last measured steps; NaN if unknown."""
    ratios = update_ratios(evidence)
    known = ratios[np.isfinite(ratios)]
    return float(np.median(known[-max(1, len(known) // 3) :])) if len(known) else math.nan


def update_ratios(evidence: Evidence) -> Floats:
    """``‖Δθ‖ / ‖θ‖`` of all parameters at every measured step ``[M]``; empty if unknown."""
    with np.errstate(over="ignore"):
        changes, weights = (
            [np.square(values) for _, values in evidence.parameters(kind)]
            for kind in ("update_norm", "norm")
        )
    if not changes or not weights:
        return np.empty(0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios: Floats = np.sqrt(np.sum(changes, 0) / np.sum(weights, 0))
    return ratios


def at_chance(evidence: Evidence, setup: Setup) -> Finding:
    """How far the loss is under that of a predictor without memory."""
    symptom = "at chance"
    value = evidence.progress
    if math.isnan(value):
        return unknown(symptom, AT_CHANCE, "no chance to compare with")
    if evidence.too_early and value < AT_CHANCE:
        return unknown(symptom, AT_CHANCE, "too few updates to say")
    level = graded(value, AT_CHANCE, CHANCE)
    steps = evidence.metrics.get("step", np.empty(0))
    losses = evidence.metrics.get("eval_loss", np.empty(0))
    return finding(
        symptom,
        value,
        level,
        f"the loss is {evidence.final_loss:.4g} where a predictor without memory has "
        f"{evidence.chance:.4g}",
        steps[losses >= (1 - level[1]) * evidence.chance],
        _more(evidence, setup),
    )
