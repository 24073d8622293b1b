"""Units and gates that are at an end of their range, where the slope is 0."""

from __future__ import annotations

import math

import numpy as np

from rnngrad.diagnosis.evidence import Evidence
from rnngrad.diagnosis.findings import Finding, Remedy
from rnngrad.diagnosis.grading import finding, graded, last_finite, unknown
from rnngrad.diagnosis.remedies import (
    Setup,
    against_dead_units,
    against_saturation,
    against_vanishing,
)

SATURATED = (0.25, 0.5)
"""Of all units, steps and sequences: where |tanh| > 0.97, its slope is under 0.06."""
SHUT = (0.8, 0.95)
"""Of a gate's values: with Karpathy, Johnson & Fei-Fei, "Visualizing and understanding recurrent
networks" (2015), a gate is at an end under 0.1 and over 0.9."""
DEAD = (0.4, 0.8)
"""Of all units: "as much as 40 % of your network can be dead" (Karpathy, CS231n), which IRNNs that
learn exceed: with inputs that are never negative 56 to 63 % of theirs are."""


def saturation(evidence: Evidence, setup: Setup) -> Finding:
    """The fraction of states at the ends of their nonlinearity, in the worst layer."""
    words = "of all states are within 3 % of their nonlinearity's end"
    remedies = against_saturation(setup)
    return _worst(evidence, "saturation", "saturated", SATURATED, words, remedies)


def dead_units(evidence: Evidence, setup: Setup) -> Finding:
    """The fraction of units that no sequence moves off 0, in the worst layer."""
    words = "of the units are 0 at every step of every sequence"
    return _worst(evidence, "dead units", "dead", DEAD, words, against_dead_units(setup))


def _worst(
    evidence: Evidence,
    symptom: str,
    quantity: str,
    thresholds: tuple[float, float],
    words: str,
    remedies: tuple[Remedy, ...],
) -> Finding:
    """The layer with the largest fraction at the last measured step."""
    last = {layer: last_finite(values) for layer, values in evidence.layers(quantity)}
    last = {layer: value for layer, value in last.items() if not math.isnan(value)}
    if not last:
        return unknown(symptom, thresholds[0], "no unit has such an end")
    layer = max(last, key=lambda name: last[name])
    value = last[layer]
    level = graded(value, *thresholds)
    where = evidence.steps[evidence.measures[f"{layer}/{quantity}"] >= level[1]]
    return finding(symptom, value, level, f"{layer}: {100 * value:.0f} % {words}", where, remedies)


def shut_gates(evidence: Evidence, setup: Setup) -> Finding:
    """The gate that is shut most: an output gate that lets nothing out, a forget gate at 0.

    A forget gate at 1, or a GRU's update gate, is memory and no fault; nor is an input gate at 0
    beside it. A forget gate at 0 gives a warning at most: what it does, vanishing in time tells.
    """
    symptom = "shut gates"
    shut = {
        (layer, gate): last_finite(values)
        for gate in ("o", "f")
        for layer, values in evidence.layers(f"gate_low/{gate}")
        if not np.isnan(values).all()
    }
    if not shut:
        return unknown(symptom, SHUT[0], "there is no such gate")
    layer, gate = max(shut, key=lambda key: shut[key])
    value = shut[layer, gate]
    level = graded(value, *SHUT)
    remedies = against_saturation(setup)
    if gate == "f":
        level = ("warning", SHUT[0]) if level[0] == "alarm" else level
        remedies = against_vanishing(setup)
    name = {"f": "forget", "o": "output"}[gate]
    words = f"{layer}: {100 * value:.0f} % of the {name} gates' values are under 0.1"
    where = evidence.steps[evidence.measures[f"{layer}/gate_low/{gate}"] >= level[1]]
    return finding(symptom, value, level, words, where, remedies)
