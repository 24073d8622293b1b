"""Steps that are too large, and numbers that are none any more."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rnngrad.diagnosis.evidence import Evidence, Floats
from rnngrad.diagnosis.findings import LEVELS, Finding, Level
from rnngrad.diagnosis.grading import finding, graded, power, shown, unknown
from rnngrad.diagnosis.learning import update_ratios
from rnngrad.diagnosis.remedies import (
    Setup,
    against_jumps,
    against_nonfinite,
    against_underflow,
)

JUMP = 0.1
"""An ordinary update, as a part of the weights: a hundred times the 10^-3 of Karpathy's CS231n. Not
ten times: in runs that solve their task Adam at 0.01 moves up to 6 % of the weights at a time."""
REPLACED = 1.0
"""One update as large as the weights are. Not less: Adam's first is the learning rate in every
entry, which with 0.01 is a tenth of torch.nn's weights."""
SPIKE = (1.0, 2.0)
"""Decades above the median: 10 times is the upper end of what Pascanu, Mikolov & Bengio (2013)
would clip at; Huang et al., "SPAM" (2025), report spikes of up to 1,000 times."""
OUTLIER = (2.5, 6.0)
"""Robust deviations above the median: z* of ZClip (2025), sigma_factor of OLMo-core."""
WORSE = 1.5
"""Times chance: a loss that is further off than that has been thrown there."""
WINDOW = 128
"""Norms that median and deviation are of, as in OLMo-core."""

OVERFLOW = 18.0
"""``log10`` of what has a square near float32's end, 3.4e38."""
UNDERFLOW = math.log10(2) * -126
"""``log10`` of float32's least normal number, 1.2e-38: what is smaller loses digits, then all."""


def jumps(evidence: Evidence, setup: Setup) -> Finding:
    """Updates out of proportion to the weights, and norms out of proportion to those before.

    A norm is a spike if it is both an outlier and many times the median of the last ``WINDOW``. It
    is an alarm only where it did harm: the run diverged, is further off than chance, or is back
    there from where it had got to.
    """
    ratios = update_ratios(evidence)
    worst = max(_ordinary(evidence, ratios), _largest(evidence, ratios), _spike(evidence))
    largest = float(np.nanmax(ratios)) if not np.isnan(ratios).all() else 0.0
    remedies = against_jumps(setup, largest)
    level = (LEVELS[worst.level], worst.threshold)
    return finding("jumps", worst.value, level, worst.words, worst.steps, remedies)


class _Jump(NamedTuple):
    """What one way of looking finds; the most serious is the largest."""

    level: int
    value: float
    threshold: float
    words: str
    steps: tuple[int, ...] = ()


_NOTHING = _Jump(0, math.nan, JUMP, "too few updates to say")


def _ordinary(evidence: Evidence, ratios: Floats) -> _Jump:
    if np.isnan(ratios).all():
        return _NOTHING
    value = float(np.nanmedian(ratios))
    level: Level = "warning" if value >= JUMP else "ok"
    words = f"an update changes the weights by {100 * value:.2g} % of themselves"
    steps = shown(evidence.steps[ratios >= JUMP])
    return _Jump(LEVELS.index(level), value, JUMP, words, steps)


def _largest(evidence: Evidence, ratios: Floats) -> _Jump:
    if np.isnan(ratios).all() or not np.nanmax(ratios) >= REPLACED:
        return _NOTHING
    value = float(np.nanmax(ratios))
    steps = evidence.steps[ratios >= REPLACED]
    words = f"the update of step {steps[0]} is {value:.2g} times as large as the weights"
    return _Jump(3, value, REPLACED, words, shown(steps))


def _spike(evidence: Evidence) -> _Jump:
    steps, norms = evidence.log10_grad_norm
    above, deviations = spikes(norms)
    if np.isnan(above).all():
        return _NOTHING
    value = float(np.max(above, initial=-math.inf, where=deviations >= OUTLIER[0]))
    if value < SPIKE[0]:
        return _Jump(1, -math.inf, SPIKE[0], "no norm is out of proportion to those before")
    threshold, level = SPIKE[0], 2
    harmed = evidence.outcome == "diverged" or evidence.progress < 1 - WORSE or evidence.forgot
    if harmed and ((above >= SPIKE[1]) & (deviations >= OUTLIER[1])).any():
        threshold, level = SPIKE[1], 3
    words = f"the gradient's norm spikes to {power(value)} times its running median"
    if evidence.forgot:
        words += ", and what had been learnt is lost"
    where = steps[(above >= threshold) & (deviations >= OUTLIER[0])]
    return _Jump(level, value, threshold, words, shown(where))


def spikes(norms: Floats) -> tuple[Floats, Floats]:
    """How many decades, and robust deviations, each norm lies above the median before it.

    Args:
        norms: ``log10 [N]``.

    Returns:
        Both ``[N]``; NaN until half a window has gone by, and for what is not finite.
    """
    above, deviations = np.full(len(norms), np.nan), np.full(len(norms), np.nan)
    half = WINDOW // 2
    for start in range(half, len(norms), half):  # the window before the block
        before = norms[max(0, start - WINDOW) : start]
        before = before[np.isfinite(before)]
        if len(before) < half // 2:
            continue
        median = np.median(before)
        deviation = max(1.4826 * float(np.median(np.abs(before - median))), 0.05)
        block = slice(start, start + half)
        above[block] = norms[block] - median
        deviations[block] = above[block] / deviation
    lost = ~np.isfinite(norms)
    above[lost], deviations[lost] = np.nan, np.nan
    return above, deviations


def nonfinite_weights(evidence: Evidence, setup: Setup) -> Finding:
    """Parameters with a NaN or an infinity, which never recover."""
    symptom = "weights not finite"
    named = dict(evidence.parameters("norm"))
    said = re.search(r"parameter (\S+) is not finite", str(evidence.summary.get("reason")))
    if not named and not evidence.summary:
        return unknown(symptom, 0.0, "no weights were followed")
    there = _measured(evidence, [*named.values()])
    bad = {name: evidence.steps[~np.isfinite(norm) & there] for name, norm in named.items()}
    bad = {name: steps for name, steps in bad.items() if len(steps)}
    names = list(bad) or ([said[1]] if said else [])
    if not names:
        return finding(symptom, 0.0, ("ok", 0.0), "all weights are finite")
    first = min((int(steps[0]) for steps in bad.values()), default=evidence.first_nonfinite)
    words = f"{', '.join(names[:3])} {'is' if len(names) == 1 else 'are'} not finite"
    return finding(
        symptom,
        float(len(names)),
        ("alarm", 0.0),
        words if first is None else f"{words} from step {first} on",
        () if first is None else (first,),
        against_nonfinite(setup),
    )


def _measured(evidence: Evidence, norms: Sequence[Floats]) -> npt.NDArray[np.bool_]:
    """At which steps a norm that is NaN is that of a weight ``[M]``.

    Where all are NaN, either nothing was measured or all weights are NaN: these never recover, and
    no loss after them is finite.
    """
    seen = np.zeros(len(evidence.steps), dtype=np.bool_)
    for norm in norms:
        seen |= ~np.isnan(norm)
    steps, losses = evidence.losses
    alive = max([*evidence.steps[seen], *steps[np.isfinite(losses)]], default=-1)
    return np.logical_or(seen, evidence.steps > alive)


def nonfinite_loss(evidence: Evidence, setup: Setup) -> Finding:
    """A loss or a gradient that is NaN or infinite."""
    symptom = "loss not finite"
    first = evidence.first_nonfinite
    if not len(evidence.losses[1]) and evidence.summary.get("status") != "diverged":
        return unknown(symptom, 0.0, "there is no loss yet")
    if first is None and evidence.summary.get("status") != "diverged":
        return finding(symptom, 0.0, ("ok", 0.0), "every loss and gradient is finite")
    steps, norms = evidence.log10_grad_norm
    before = norms[np.isfinite(norms)][-3:]
    words = str(evidence.summary.get("reason") or f"step {first}: loss or gradient is not finite")
    if len(before):
        words += f"; the last norms before were {', '.join(map(power, before))}"
    thrown = bool((update_ratios(evidence) >= REPLACED).any())
    if len(before) and before.max() <= 1 and first is not None and first > 1 and not thrown:
        words += ", nothing out of the ordinary: look at the data of that step"
    return finding(
        symptom,
        1.0,
        ("alarm", 0.0),
        words,
        () if first is None else (first,),
        against_nonfinite(setup, from_the_start=first is not None and first <= 1),
    )


def overflow(evidence: Evidence, setup: Setup) -> Finding:
    """Gradients so large that float32 cannot hold their square."""
    symptom = "overflow"
    steps, norms = evidence.log10_grad_norm
    seen = [norms, *(history.hidden for history in evidence.bptt.values())]
    largest = [float(np.nanmax(part)) for part in seen if not np.isnan(part).all()]
    if not largest:
        return unknown(symptom, OVERFLOW, "no gradient was seen")
    value = max(largest)
    level = graded(value, OVERFLOW, OVERFLOW)
    words = f"the largest gradient has norm {power(value)}"
    return finding(
        symptom,
        value,
        level,
        words,
        steps[norms >= OVERFLOW],
        against_nonfinite(setup, from_the_start=True),
    )


def underflow(evidence: Evidence, setup: Setup) -> Finding:
    """Gradients that float32 cannot hold: the whole (alarm), or at some time steps (warning)."""
    symptom = "underflow"
    steps, norms = evidence.log10_grad_norm
    known = norms[~np.isnan(norms)]
    if not len(known):
        return unknown(symptom, 0.0, "no gradient was seen")
    under = norms <= UNDERFLOW
    lost = {
        layer: float(np.mean(last <= UNDERFLOW))
        for layer, history in evidence.bptt.items()
        for last in [row[~np.isnan(row)] for row in history.hidden[-1:]]
        if len(last)
    }
    layer = max(lost, key=lambda name: lost[name], default="")
    if known[-1] <= UNDERFLOW:
        value, level = 1.0, "alarm"
        words = (
            f"the whole gradient's norm is {power(float(known[-1]))}, under float32's least normal "
            f"number, at {int(under.sum())} updates"
        )
    else:
        value = lost.get(layer, 0.0)
        level = "warning" if value else "ok"
        words = "no gradient is under float32's least normal number"
        if value:
            words = (
                f"{layer}: the gradient is under float32's least normal number, or 0, at "
                f"{100 * value:.0f} % of the time steps"
            )
    remedies = against_underflow(setup) if level == "alarm" else ()
    where = steps[under] if level == "alarm" else ()
    return finding(symptom, value, (level, 0.0), words, where, remedies)  # type: ignore[arg-type]
