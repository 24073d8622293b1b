"""Tidy CSV: a row a run, a row a run and logged step, a row a run and measured step."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rnngrad.report.exhibit import cell, write_csv
from rnngrad.report.groups import Digest, Group
from rnngrad.runs import COLUMNS, METRICS, typed

ALWAYS = ("seed", "task.name", "cell.name", "clip.name")
"""Settings of every runs.csv; after them come those in which the runs differ."""


def write_runs(path: Path, groups: Sequence[Group]) -> None:
    """A row a run: its set-up, how it ended, and where its gradient stands at the end."""
    found = dict.fromkeys([*ALWAYS, *(key for group in groups for key in group.differs)])
    keys = [key for key in found if key != "run" and key != "variant"]

    def rows() -> Iterator[dict[str, Any]]:  # made twice rather than kept
        for group in groups:
            name = group.name
            for digest in group.digests:
                settings = {key: _typed(digest.settings, key) for key in keys}
                yield {"run": digest.label, "setup": name} | settings | _run_row(digest)

    head = list(dict.fromkeys(column for row in rows() for column in row))
    write_csv(path, head, ([row.get(column) for column in head] for row in rows()))


def _typed(settings: dict[str, Any], key: str) -> Any:
    """Numbers as they are; what is neither a number nor text as it would be typed."""
    value = settings.get(key)
    return value if value is None or isinstance(value, int | float | str) else typed(value)


def _run_row(digest: Digest) -> dict[str, Any]:
    summary = digest.summary
    row: dict[str, Any] = {}
    for key, value in summary.items():
        if not isinstance(value, dict | list):
            row[key] = value
    for length, scores in (summary.get("eval_at") or {}).items():
        row |= {f"eval_{name}_at_{length}": value for name, value in scores.items()}
    for rule, count in (summary.get("clip_audit") or {}).items():
        row |= {f"audit_{rule}_{name}": value for name, value in count.items()}
    for finding in (summary.get("diagnosis") or {}).get("findings") or ():
        row[f"finding_{finding.get('symptom')}"] = finding.get("level")
    there = digest.last[~np.isnan(digest.last)]
    row["log10_hidden_grad_first_t"] = there[0] if len(there) else None
    row["log10_hidden_grad_last_t"] = there[-1] if len(there) else None
    if digest.decay is not None:
        row["lag_slope"], row["lag_r2"] = digest.decay.slope, digest.decay.r2
        row["lag_half_life"] = digest.decay.half_life
    row["lag_horizon"] = digest.horizon
    return row


def write_steps(path: Path, digests: Sequence[Digest]) -> None:
    """A row a run and logged step: metrics.csv of all runs, digit by digit as it stands there."""
    with path.open("w", encoding="utf-8", newline="") as file:
        heads = [next(_lines(digest), list(COLUMNS)) for digest in digests]
        columns = list(dict.fromkeys(column for head in heads for column in head))
        file.write(_joined(["run", "seed", *columns]))
        for digest, head in zip(digests, heads, strict=True):
            prefix = _joined([digest.label, digest.seed])[:-1]
            place = {column: i for i, column in enumerate(head)}
            order = [place.get(column) for column in columns]
            lines = _lines(digest)
            next(lines, None)
            for cells in lines:
                if order != list(range(len(cells))):
                    cells = ["" if i is None else cells[i] for i in order]
                file.write(f"{prefix},{','.join(cells)}\n")


def _lines(digest: Digest) -> Iterator[list[str]]:
    """The cells of metrics.csv line by line; numbers need no quotes. A cut-off line is left out."""
    path = digest.run.path / METRICS
    if path.exists():
        text = path.read_text(encoding="utf-8")
        for line in text[: text.rfind("\n") + 1].splitlines():
            yield line.split(",")


def _joined(cells: Sequence[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow([cell(value) for value in cells])
    return buffer.getvalue()


def write_measures(path: Path, digests: Sequence[Digest]) -> bool:
    """A row a run and measured step, with every measured number; says whether there was any."""
    names: dict[str, None] = {}
    for digest in digests:
        names |= dict.fromkeys(n for n, v in digest.run.measures.items() if v.ndim == 1)
    names.pop("step", None)
    if not names:
        return False

    def rows() -> Iterator[list[Any]]:
        for digest in digests:
            measures = digest.run.measures
            columns = [measures.get(name) for name in names]
            for i, step in enumerate(measures.get("step", ())):
                yield [digest.label, digest.seed, step,
                       *(None if c is None or c.ndim > 1 else c[i] for c in columns)]  # fmt: skip

    write_csv(path, ["run", "seed", "step", *names], rows())
    return True
