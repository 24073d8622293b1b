"""What the findings add up to.

A run that learns is healthy, whatever its gradient does: the findings stay, and say what to watch.
Of one that does not, or of a model before training, the verdict is the first of these that holds:

1. ``numerical``: a number overflowed, underflowed or was none, and no growth led there.
2. ``both``: an error explodes from some places and vanishes from others.
3. ``exploding``: an error grows on its way back, or steps are out of proportion.
4. ``saturated``: units are where their slope is 0.
5. ``vanishing``: an error is lost on its way back through time or down through the layers.
6. ``inconclusive``, or before training ``healthy`` if a curve says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from rnngrad.diagnosis.evidence import Evidence
from rnngrad.diagnosis.findings import CONSEQUENCES, Diagnosis, Finding, Verdict


def verdict(evidence: Evidence, findings: tuple[Finding, ...]) -> Diagnosis:
    """The diagnosis that the findings of all detectors make."""
    by_symptom = {finding.symptom: finding for finding in findings}
    outcome = evidence.outcome
    if evidence.learns:
        return Diagnosis("healthy", findings)
    for name, because in (
        ("numerical", _numerical(by_symptom)),
        ("both", _alarms(by_symptom, "both at once")),
        ("exploding", _exploding(by_symptom)),
        ("saturated", _alarms(by_symptom, "saturation", "dead units", "shut gates")),
        ("vanishing", _vanishing(by_symptom)),
    ):
        if because:
            if outcome == "stuck":
                because += _bad(by_symptom, *CONSEQUENCES)
            if outcome == "diverged":
                because += _bad(by_symptom, "loss not finite")
            return Diagnosis(name, findings, tuple(dict.fromkeys(because)))  # type: ignore[arg-type]
    return _undecided(evidence, findings, by_symptom)


def _undecided(
    evidence: Evidence, findings: tuple[Finding, ...], by_symptom: Mapping[str, Finding]
) -> Diagnosis:
    """Nothing is wrong that a detector knows."""
    name: Verdict = "inconclusive"
    known = by_symptom["vanishing in time"].level != "unknown"
    if not evidence.summary and evidence.outcome == "unknown" and known:
        name = "healthy"
    because = () if name == "healthy" else _bad(by_symptom, *CONSEQUENCES)
    return Diagnosis(name, findings, because)


def _numerical(found: Mapping[str, Finding]) -> tuple[str, ...]:
    grows = _exploding(found)
    lost = _alarms(found, "saturation", "dead units")
    if not grows:
        broken = _alarms(found, "weights not finite", "loss not finite", "overflow")
        if broken:
            return broken
    return () if lost or grows else _alarms(found, "underflow")


def _exploding(found: Mapping[str, Finding]) -> tuple[str, ...]:
    return _alarms(found, "exploding in time", "jumps")


def _vanishing(found: Mapping[str, Finding]) -> tuple[str, ...]:
    because = _alarms(
        found, "weights shrink by decay alone", "vanishing in time", "lower layers barely learn"
    )
    if not because and found["stalled"].bad and found["at chance"].bad:
        because = _bad(found, "vanishing in time")
    return because


def _alarms(found: Mapping[str, Finding], *symptoms: str) -> tuple[str, ...]:
    return tuple(symptom for symptom in symptoms if found[symptom].alarm)


def _bad(found: Mapping[str, Finding], *symptoms: str) -> tuple[str, ...]:
    return tuple(symptom for symptom in symptoms if found[symptom].bad)
