"""Whether clipping is what it is meant to be: neither always nor never."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rnngrad.diagnosis.evidence import Evidence
from rnngrad.diagnosis.findings import Finding, Level, Remedy
from rnngrad.diagnosis.grading import finding, unknown
from rnngrad.diagnosis.remedies import Setup
from rnngrad.diagnosis.thresholds import clip_thresholds

ALWAYS, NEVER = 0.9, 0.001
"""Fractions of the updates."""
RECENT = 100
"""Updates that are looked at for ``ALWAYS``; for ``NEVER`` it is all of them."""
WITHIN = 0.01
"""Of the rows that ``bptt_clip`` looks at: where Kaldi's nnet3 scripts set
``self-repair-clipped-proportion-threshold``."""

FIXED = ("norm", "value", "per_layer_norm", "per_parameter_norm")
"""Rules with a threshold of the user's: the others clip as often as they are told to."""


def clip_regime(evidence: Evidence, setup: Setup) -> Finding:
    """The fraction of updates that are clipped.

    Nearly all: the length of every step is the threshold, which then is part of the learning rate.
    None: the rule does nothing.
    """
    symptom = "clip regime"
    coefs = evidence.updates.get("clip_coef", np.empty(0))
    if setup.get("clip.name") not in FIXED or not len(coefs):
        return unknown(symptom, ALWAYS, "no rule with a threshold is at work")
    clipped = coefs < 1
    recent, value = float(np.mean(clipped[-RECENT:])), float(np.mean(clipped))
    level: tuple[Level, float] = ("ok", ALWAYS)
    words = f"{100 * value:.3g} % of the updates are clipped"
    if recent > ALWAYS and len(coefs) >= RECENT:
        level, value = ("warning", ALWAYS), recent
        words = (
            f"{100 * recent:.0f} % of the last {min(len(coefs), RECENT)} updates are clipped: "
            "every step has the same length, and the threshold sets the learning rate"
        )
    elif value < NEVER and len(coefs) >= RECENT:
        level = ("warning", NEVER)
        words = f"{int(clipped.sum())} of {len(coefs)} updates are clipped: the rule does nothing"
    where = evidence.updates["step"][clipped] if level[0] == "warning" else ()
    return finding(symptom, value, level, words, where, _another_threshold(evidence, setup))


def _another_threshold(evidence: Evidence, setup: Setup) -> Iterator[Remedy]:
    """The norm that a tenth of the updates exceed."""
    if setup.get("clip.name") == "norm":
        for percentile, threshold, _ in clip_thresholds(evidence.log10_grad_norm[1]):
            number = f"{threshold:.2g}"
            word = f"clip.max_norm={number}"
            if setup.get("clip.norm_type", 2.0) != 2:  # the norms seen are of this type
                word += " clip.norm_type=2"
            elif number == f"{setup.get('clip.max_norm', 0.0):.2g}":
                continue
            if percentile == 90:
                yield Remedy(word, "the norm that one update in ten exceeds")


def clipped_within(evidence: Evidence, setup: Setup) -> Finding:
    """The fraction that ``bptt_clip`` clips of what goes back in time."""
    symptom = "clipped on the way back"
    value = evidence.summary.get("bptt_clip_fraction")
    if not isinstance(value, int | float):
        return unknown(symptom, WITHIN, "nothing is clipped on the way back")
    level: Level = "warning" if value > WITHIN else "ok"
    words = f"{100 * value:.2g} % of the errors are clipped on their way back"
    remedies = [Remedy("bptt_clip=none", "no clipping on the way back")]
    return finding(symptom, float(value), (level, WITHIN), words, (), remedies)
