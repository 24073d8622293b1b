"""What a run was told and how it ended, as Markdown for TensorBoard's text tab."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import yaml


def config_text(settings: Mapping[str, Any]) -> str:
    """The configuration as yaml."""
    return verbatim(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def result_text(summary: Mapping[str, Any]) -> str:
    """summary.json as a table, but for the diagnosis and for what the run has not."""
    rows = [
        (key, _plain(value))
        for key, value in summary.items()
        if key != "diagnosis" and value not in (None, {})
    ]
    return markdown_table(("", ""), rows)


def diagnosis_text(diagnosis: Mapping[str, Any]) -> str:
    """The verdict, then what speaks for it with what to try, and what was found in order.

    Args:
        diagnosis: ``verdict`` and ``findings``, as in summary.json.
    """
    findings: Sequence[Mapping[str, Any]] = diagnosis.get("findings", ())
    lines = [f"## Verdict: {diagnosis['verdict']}", ""]
    for level in ("alarm", "warning"):
        lines += [_finding(finding) for finding in findings if finding["level"] == level]
    for level, said in (("ok", "In order"), ("unknown", "Could not be judged")):
        symptoms = [str(finding["symptom"]) for finding in findings if finding["level"] == level]
        lines += [f"\n{said}: {', '.join(symptoms)}."] if symptoms else []
    return "\n".join(lines)


def verbatim(text: str) -> str:
    """As Markdown shows program text: indented, so that nothing in it can end it."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; what would end a cell is written as its code."""
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "&#124;").replace("\n", " ") for cell in row] for row in lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _finding(finding: Mapping[str, Any]) -> str:
    """One symptom as an item of a list."""
    measured = f"{_plain(finding['value'])} (threshold {_plain(finding['threshold'])})"
    evidence = str(finding["evidence"]).rstrip(".")
    text = f"- **{finding['level']}: {finding['symptom']}**: {measured}. {evidence}."
    steps = finding.get("steps")
    shown = ", ".join(map(str, steps[:8])) if isinstance(steps, Sequence) else str(steps)
    more = ", ..." if isinstance(steps, Sequence) and len(steps) > 8 else ""
    text += f" Steps {shown}{more}." if steps else ""
    for remedy, instead in zip_longest(
        finding.get("remedies") or (), finding.get("in_place_of") or ()
    ):
        text += f"\n    - try `{remedy}`" + (f" in place of `{instead}`" if instead else "")
    return text


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
