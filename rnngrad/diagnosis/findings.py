"""What a diagnosis consists of: findings with evidence, and what they add up to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

Level = Literal["ok", "warning", "alarm", "unknown"]
Verdict = Literal[
    "healthy", "vanishing", "exploding", "both", "numerical", "saturated", "inconclusive"
]

LEVELS: tuple[Level, ...] = ("unknown", "ok", "warning", "alarm")
"""From the least to the most serious."""

SICK: tuple[Verdict, ...] = ("vanishing", "exploding", "both", "numerical", "saturated")
"""The verdicts that say what is wrong."""

CONSEQUENCES = ("at chance", "stalled")
"""Symptoms that say that something is wrong, and not what."""


class Remedy(NamedTuple):
    """Something to try.

    Args:
        override: As it is typed behind the run's own command; a group's name takes the place of
            the one that was there.
        words: The same for who writes a loop in torch.
        instead: Words of the run's command that it takes the place of; empty if all may stay.
    """

    override: str
    words: str
    instead: str = ""

    @property
    def typed(self) -> str:
        """What to type, and in place of what."""
        return f"{self.override} in place of {self.instead}" if self.instead else self.override


@dataclass(frozen=True)
class Finding:
    """What one detector says.

    Args:
        symptom: What was looked for.
        level: ``unknown`` where nothing was there to look at.
        value: The number that decides; NaN where it is unknown.
        threshold: What it is compared with: that of the level, or of the next one.
        evidence: One sentence with the numbers.
        steps: Training steps that show it, the last ones if there are many.
        remedies: What to try, the best supported first.
    """

    symptom: str
    level: Level
    value: float = math.nan
    threshold: float = math.nan
    evidence: str = ""
    steps: tuple[int, ...] = ()
    remedies: tuple[Remedy, ...] = ()

    @property
    def bad(self) -> bool:
        """Whether it is a warning or an alarm."""
        return self.level in ("warning", "alarm")

    @property
    def alarm(self) -> bool:
        """Whether it is an alarm."""
        return self.level == "alarm"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as summary.json keeps them; what is not finite is ``None``."""
        plain = asdict(self) | {
            "remedies": [remedy.override for remedy in self.remedies],
            "in_place_of": [remedy.instead for remedy in self.remedies],
        }
        plain["steps"] = list(self.steps)
        for key in ("value", "threshold"):
            plain[key] = plain[key] if math.isfinite(plain[key]) else None
        return plain


@dataclass(frozen=True)
class Diagnosis:
    """A verdict and what it rests on.

    Args:
        verdict: See ``rnngrad.diagnosis.verdict``.
        findings: One of every detector, in their order.
        because: The symptoms that decided, the most important first.
    """

    verdict: Verdict
    findings: tuple[Finding, ...]
    because: tuple[str, ...] = ()

    def __getitem__(self, symptom: str) -> Finding:
        """The finding of a symptom."""
        for finding in self.findings:
            if finding.symptom == symptom:
                return finding
        raise KeyError(f"{symptom!r}; there are {', '.join(f.symptom for f in self.findings)}")

    @property
    def in_trouble(self) -> bool:
        """Whether something is wrong that can be named."""
        return self.verdict in SICK

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        """What to try, the best supported first, of the findings that decided.

        Of several values for one key the first.
        """
        deciding = [symptom for symptom in self.because if symptom not in CONSEQUENCES]
        found: dict[str, Remedy] = {}
        for symptom in deciding or self.because:
            for remedy in self[symptom].remedies:
                key, _, value = remedy.override.partition("=")
                found.setdefault(key if _is_number(value) else remedy.override, remedy)
        return tuple(found.values())

    def text(self) -> str:
        """The verdict, its evidence and what to try first, in a few lines."""
        lines = [f"diagnosis: {self.verdict}"]
        lines += [f"  {self[symptom].evidence}" for symptom in self.because]
        for number, remedy in enumerate(self.remedies[:3]):
            start = "try first" if number == 0 else "then     "
            lines.append(f"  {start}: {remedy.typed}  ({remedy.words})")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as summary.json keeps them."""
        return {
            "verdict": self.verdict,
            "because": list(self.because),
            "findings": [finding.as_dict() for finding in self.findings],
        }


def once(remedies: Iterable[Remedy]) -> Iterator[Remedy]:
    """Each remedy the first time it comes."""
    seen: set[str] = set()
    for remedy in remedies:
        if remedy.override not in seen:
            seen.add(remedy.override)
            yield remedy


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
