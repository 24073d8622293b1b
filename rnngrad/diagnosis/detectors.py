"""All detectors, and what they say together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from rnngrad.diagnosis import clip_regime, learning, numerics, through_time, units
from rnngrad.diagnosis.evidence import Evidence
from rnngrad.diagnosis.findings import Diagnosis, Finding
from rnngrad.diagnosis.remedies import Setup
from rnngrad.diagnosis.typed import fitted
from rnngrad.diagnosis.verdict import verdict

DETECTORS: Mapping[str, Callable[[Evidence, Setup], Finding]] = {
    "vanishing in time": through_time.vanishing_in_time,
    "exploding in time": through_time.exploding_in_time,
    "both at once": through_time.both_at_once,
    "lower layers barely learn": through_time.lower_layers,
    "weights shrink by decay alone": learning.shrinking_weights,
    "stalled": learning.stalled,
    "at chance": learning.at_chance,
    "jumps": numerics.jumps,
    "weights not finite": numerics.nonfinite_weights,
    "loss not finite": numerics.nonfinite_loss,
    "overflow": numerics.overflow,
    "underflow": numerics.underflow,
    "saturation": units.saturation,
    "dead units": units.dead_units,
    "shut gates": units.shut_gates,
    "clip regime": clip_regime.clip_regime,
    "clipped on the way back": clip_regime.clipped_within,
}
"""What finds each symptom, in the order in which they are told."""


def examine(evidence: Evidence) -> Diagnosis:
    """What all detectors and the verdict make of the evidence.

    What is an alarm in a run that does not learn is a warning in one that does.
    """
    setup = Setup.of(evidence)
    findings = tuple(
        replace(finding, remedies=tuple(fitted(r, evidence.overrides) for r in finding.remedies))
        for finding in (detect(evidence, setup) for detect in DETECTORS.values())
    )
    if evidence.learns:
        findings = tuple(
            replace(finding, level="warning") if finding.alarm else finding for finding in findings
        )
    return verdict(evidence, findings)
