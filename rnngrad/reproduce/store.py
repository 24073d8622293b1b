"""What is kept of an experiment's runs, in a file: rows, and who made them when."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from rnngrad.reproduce.experiment import Experiment, Rows
from rnngrad.stored import Unreadable, json_mapping
from rnngrad.written import replace as write_whole

DIGITS = 6


@dataclass(frozen=True)
class Results:
    """An experiment's rows.

    Args:
        rows: One a run.
        made: Of each time that rows were added: rnngrad, torch, the day, seeds, minutes.
    """

    rows: Rows
    made: tuple[Mapping[str, Any], ...]

    def joined(self, newer: Results, experiment: Experiment) -> Results:
        """With newer rows, which stand in for those of the same seed and settings.

        Rows that were only read again, and not made, change nothing.
        """
        if all(row in self.rows for row in newer.rows):
            return self
        name_of = experiment.name_of
        renewed = {name_of(row) for row in newer.rows}
        kept = [row for row in self.rows if name_of(row) not in renewed]
        made = (*self.made, *newer.made) if kept else newer.made
        return Results(Rows(sorted([*kept, *newer.rows], key=name_of)), made)


def read(path: Path) -> Results:
    """Reads what ``write`` has written; nothing yet, if it is not there.

    Raises:
        Unreadable: It is something else.
    """
    if not path.exists():
        return Results(Rows(), ())
    held = json_mapping(path)
    rows, made = held.get("rows"), held.get("made")
    if not (_are_mappings(rows) and _are_mappings(made)):
        raise Unreadable(path, "has no rows of an experiment")
    return Results(Rows(rows), tuple(made))


def _are_mappings(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def write(path: Path, results: Results) -> None:
    """A line a row, so that a change can be read."""
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in results.rows)
    made = ",\n".join(json.dumps(one, allow_nan=False) for one in results.made)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f'{{"made": [\n{made}\n],\n"rows": [\n{rows}\n]}}\n')


def rounded(value: Any) -> Any:
    """To six digits, which is more than any verdict hangs on; ``None`` for what is not finite."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
