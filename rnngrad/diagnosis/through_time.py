"""What becomes of an error on its way back through time, and down through the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rnngrad.diagnosis.evidence import Curve, Evidence, Floats
from rnngrad.diagnosis.findings import LEVELS, Finding, Level
from rnngrad.diagnosis.grading import finding, graded, last_finite, power, unknown
from rnngrad.diagnosis.remedies import Setup, against_depth, against_exploding, against_vanishing
from rnngrad.dynamics import Decay, decay

VANISHED = (-3.0, -24 * math.log10(2))
"""Warning: 10^-3, under the noise of an ordinary batch. Alarm: 2^-24, half of the spacing of
float32, so that adding it to a number of size 1 changes nothing."""

GROWTH = (0.004, 0.01)
"""Decades a step: 2.5 times, and 10 times, over 100 steps."""
GROWN = (0.4, 1.0)
"""Decades over the whole sequence: what these two come to over 100 steps."""

STRAIGHT = 0.9
"""R² from which a slope is one."""
POINTS = 20
"""Lags that a line needs."""

STEEPEST = {"tanh": 1.0, "sigmoid": 0.25, "relu": 1.0, "leaky_relu": 1.0, "linear": 1.0, "elu": 1.0}
"""The largest slope of each nonlinearity."""

SLOWER = (10.0, 100.0)
"""Nielsen, "Neural networks and deep learning" (2015), chapter 5: with four or five hidden layers
of sigmoids the first learns 24 to 100 times slower than the last."""


def vanishing_in_time(evidence: Evidence, setup: Setup) -> Finding:
    """What of an error at one step arrives at the far end of the sequence.

    In the layer, and of ``h`` and ``c``, that keeps most: memory is needed in one place only. What
    goes over less than half of the longest sequence keeps nothing that the others would need.
    """
    symptom = "vanishing in time"
    if not evidence.last_curves:
        return unknown(symptom, VANISHED[0], evidence.no_lag)
    longest = max(curve.lag for curve in evidence.last_curves)
    reaching = (curve for curve in evidence.last_curves if 2 * curve.lag >= longest)
    best = max(reaching, key=lambda curve: curve.values[-1])
    value = float(best.values[-1])
    level = graded(value, *VANISHED)
    words = (
        f"{best.layer}: of an error at one step {power(value)} arrives {best.lag} steps "
        f"before{_half_life(decay(best.values))}"
    )
    if level[0] == "alarm":
        words += ", which float32 cannot add to anything of size 1"
    if level[0] != "ok":
        words += _must(evidence, setup, best.layer)
    return finding(
        symptom,
        value,
        level,
        words + _when(best),
        _steps(evidence.curves, all, lambda curve: curve.values[-1] <= level[1]),
        against_vanishing(setup),
    )


def _when(curve: Curve) -> str:
    return f" (step {curve.step})" if curve.step else ""


def _half_life(line: Decay) -> str:
    if not holds(line) or line.slope >= 0:
        return ""
    return f" (half-life {line.half_life:.1f} steps, R² {line.r2:.2f})"


def _must(evidence: Evidence, setup: Setup, layer: str) -> str:
    """Pascanu, Mikolov & Bengio (2013), section 2.1: what is enough for a vanilla RNN to vanish."""
    sigma = last_finite(evidence.measures.get(f"{layer}/sigma_max", np.empty(0)))
    steepest = STEEPEST.get(str(setup.get("cell.nonlinearity")))
    if setup.cell != "rnn" or steepest is None or not sigma * steepest < 1:
        return ""
    return (
        f"; it must, as the largest singular value of its recurrent weight, {sigma:.2g}, is under "
        f"{1 / steepest:g}"
    )


def holds(line: Decay) -> bool:
    """Whether a slope may be spoken of."""
    return line.r2 >= STRAIGHT and line.points >= POINTS


def _steps(
    curves: Sequence[Curve], every: Callable[[Iterable[bool]], bool], shows: Callable[[Curve], bool]
) -> Iterator[int]:
    """The steps at which ``all`` or ``any`` of the curves show it; looks only when asked."""
    by_step: dict[int, list[bool]] = {}
    for curve in curves:
        by_step.setdefault(curve.step, []).append(bool(shows(curve)))
    yield from (step for step, found in sorted(by_step.items()) if every(found))


def exploding_in_time(evidence: Evidence, setup: Setup) -> Finding:
    """By how much an error grows with every step back, in the layer where it grows most."""
    symptom = "exploding in time"
    if (grown := evidence.grown) is not None:
        words = (
            f"{grown.layer}: the state grows by {grown.slope:.2g} decades a step and is not finite "
            f"from t = {grown.t} on"
        )
        level = graded(grown.slope, *GROWTH)
        return finding(symptom, grown.slope, level, words, (), against_exploding(setup))
    if not evidence.last_curves:
        return unknown(symptom, GROWTH[0], evidence.no_lag)
    worst = max(evidence.last_curves, key=lambda curve: growth(curve.values))
    order, value = growth(worst.values)
    name: Level = LEVELS[order]
    line, end = decay(worst.values), float(worst.values[-1])
    words = (
        f"{worst.layer}: an error {'has grown to' if value > 0 else 'is'} {power(end)} of its size "
        f"{worst.lag} steps before"
    )
    if holds(line):
        words += f", {line.slope:+.3f} decades a step (R² {line.r2:.2f})"
    return finding(
        symptom,
        value,
        (name, GROWTH[1] if name == "alarm" else GROWTH[0]),
        words + _when(worst),
        _steps(evidence.curves, any, lambda curve: growth(curve.values)[0] >= order),
        against_exploding(setup),
    )


def growth(values: Floats) -> tuple[int, float]:
    """How serious it is, as an index of ``LEVELS``, and the slope in decades a step.

    As serious as both the slope and what it comes to over the whole sequence. Where the curve is no
    line, growth from the first lag to the last stands for the slope, the last being the median of
    the last tenth; where it has too few points for one, that alone counts.
    """
    end, line = float(values[-1]), decay(values)
    if not math.isfinite(end):
        return LEVELS.index("ok"), 0.0
    total, lags = LEVELS.index(graded(end, *GROWN)[0]), max(1, len(values) - 1)
    if line.points < POINTS:
        return total, end / lags
    slope = line.slope
    if not holds(line):
        end = float(np.median(values[-max(1, len(values) // 10) :]))
        total, slope = LEVELS.index(graded(end, *GROWN)[0]), end / lags
    return min(total, LEVELS.index(graded(slope, *GROWTH)[0])), slope


def both_at_once(evidence: Evidence, setup: Setup) -> Finding:
    """Sequences or steps from which an error explodes beside others from which it vanishes."""
    symptom = "both at once"
    curves = [curve for curve in evidence.last_curves if curve.low is not None]
    if not curves:
        return unknown(symptom, GROWN[0], "no spread was measured")
    widest = max(curves, key=straddle)
    value = straddle(widest)
    level = graded(value, *GROWN)
    low, high = _ends(widest)
    return finding(
        symptom,
        value,
        level,
        f"{widest.layer}: {widest.lag} steps before, an error is {power(low)} of its size in one "
        f"sequence of 20 and {power(high)} in another{_when(widest)}",
        _steps(evidence.curves, any, lambda curve: straddle(curve) >= level[1]),
        (*against_exploding(setup), *against_vanishing(setup)),
    )


def straddle(curve: Curve) -> float:
    """How far the 95th percentile has grown where the 5th has vanished, in decades; else 0."""
    low, high = _ends(curve)
    return max(0.0, high) if low <= VANISHED[0] and math.isfinite(high) else 0.0


def _ends(curve: Curve) -> tuple[float, float]:
    """Both percentiles at the longest lag; NaN if they are not known."""
    if curve.low is None or curve.high is None:
        return math.nan, math.nan
    return float(curve.low[-1]), float(curve.high[-1])


def lower_layers(evidence: Evidence, setup: Setup) -> Finding:
    """How many times faster the top layer changes than the lowest.

    By the ratio of update to weight; before training by that of gradient to weight.
    """
    symptom = "lower layers barely learn"
    updates, weights = evidence.by_layer("update_norm"), evidence.by_layer("norm")
    what = "changes"
    if not any(np.isfinite(norm).any() for norm in updates.values()):
        updates, what = evidence.by_layer("grad_norm"), "has a gradient"
    layers = sorted(updates.keys() & weights.keys())
    stacks = [
        [key for key in layers if key[0] == name] for name in dict.fromkeys(k for k, _ in layers)
    ]
    stacks = [stack for stack in stacks if len(stack) > 1]
    if not stacks:
        return unknown(symptom, SLOWER[0], "there is one layer only")
    several = len({name for name, _ in layers}) > 1
    found = [
        _Slower.of(updates, weights, stack[0], stack[-1], f"{stack[0][0]}l" if several else "l")
        for stack in stacks
    ]
    found = [one for one in found if not math.isnan(one.value)]
    if not found:
        return unknown(symptom, SLOWER[0], "no layer changes at all")
    worst = max(found, key=lambda one: one.value)
    level = graded(worst.value, *SLOWER)
    return finding(
        symptom,
        worst.value,
        level,
        f"{worst.top} {what} {worst.value:.3g} times as fast as {worst.bottom}, by {worst.sizes}",
        evidence.steps[worst.ratio >= level[1]],
        against_depth(setup),
    )


class _Slower(NamedTuple):
    """The top layer of a stack beside the lowest."""

    value: float
    ratio: Floats
    top: str
    bottom: str
    sizes: str

    @classmethod
    def of(
        cls,
        updates: Mapping[tuple[str, int], Floats],
        weights: Mapping[tuple[str, int], Floats],
        lowest: tuple[str, int],
        highest: tuple[str, int],
        name: str,
    ) -> _Slower:
        """By the last third of the measured steps."""
        with np.errstate(divide="ignore", invalid="ignore"):
            bottom, top = (updates[layer] / weights[layer] for layer in (lowest, highest))
            ratio = top / bottom
        known = np.flatnonzero(~np.isnan(ratio))
        known = known[-max(1, len(known) // 3) :]
        if not len(known):
            return cls(math.nan, ratio, "", "", "")
        sizes = [f"{np.median(part[known]):.1e}" for part in (top, bottom)]
        words = f"{sizes[0]} of its weights beside {sizes[1]}"
        value = float(np.median(ratio[known]))
        return cls(value, ratio, f"{name}{highest[1]}", f"{name}{lowest[1]}", words)
