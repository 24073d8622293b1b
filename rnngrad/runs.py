"""A run directory: what lies in it, and how to read it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rnngrad.stored import json_mapping, yaml_mapping

CONFIG = ".hydra/config.yaml"
METRICS = "metrics.csv"
SUMMARY = "summary.json"
BPTT = "bptt.f64"
"""Appended records of float64 in this machine's byte order, one a logged step: the step, then per
layer ``T`` values of each quantity. A record cut off at the end of the file is not there."""
BPTT_LAYOUT = "bptt.json"
"""``T`` and the layers' quantities, in the order of a record."""
MEASURES = "measures.f64"
"""As ``BPTT``, one record a measured step: the step, then each quantity's values."""
MEASURES_LAYOUT = "measures.json"
"""How long each quantity's vector is, ``null`` of a number; in the order of a record."""
UPDATES = "updates.f32"
"""Three float32 an update: loss, ``log10`` of the gradient's norm before clipping, and the clip
coefficient."""

COLUMNS = (
    "step",
    "loss",
    "accuracy",
    "eval_loss",
    "eval_accuracy",
    "grad_norm_pre",
    "grad_norm_post",
    "clip_coef",
    "clipped",
    "clip_threshold",
    "skipped",
    "lr",
    "penalty",
)
"""Of every metrics.csv; after them stand, where a run has them, ``eval_loss_at_<length>`` and
``eval_accuracy_at_<length>``, ``audit_<rule>_clipped`` and ``audit_<rule>_coef``."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerHistory:
    """One layer's gradient through time, at every logged step.

    Args:
        step: Logged steps ``[S]``.
        hidden: ``log10`` of the root mean square over the batch of ``‖∂L/∂h_t‖₂ [S, T]``.
        direct: The same of what arrives from outside the layer's own recurrence.
        hidden_mean: ``log10`` of the batch mean of ``‖∂L/∂h_t‖₂``.
        cell: As ``hidden``, of ``‖∂L/∂c_t‖₂``; ``None`` without cell state.
        clipped: With ``bptt_clip``, the fraction clipped at each step ``[S, T]``, the batch's mean:
            all norms are then of the error as it was clipped on its way. ``None`` without.
    """

    step: npt.NDArray[np.int64]
    hidden: Floats
    direct: Floats
    hidden_mean: Floats
    cell: Floats | None
    clipped: Floats | None = None


class Run:
    """Reads a run directory, also while the run is going on.

    All norms are of the gradient before a clip rule (``clip``) sees it; ``-inf`` stands where a
    norm is exactly 0.

    Args:
        path: The directory.

    Raises:
        FileNotFoundError: There is no run; runs inside the directory are listed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / SUMMARY).is_file():
            inside = sorted(str(run.relative_to(self.path)) for run in find_runs(self.path))
            listed = f"; runs inside it: {', '.join(inside)}" if inside else ""
            raise FileNotFoundError(f"{self.path}: not a run directory (no {SUMMARY}){listed}")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The composed configuration."""
        return read_config(self.path / CONFIG)

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json as it is now."""
        return read_summary(self.path / SUMMARY)

    @property
    def metrics(self) -> dict[str, npt.NDArray[Any]]:
        """Columns of metrics.csv: float64 (NaN: empty); steps and yes-or-no columns int64."""
        path = self.path / METRICS
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # a line cut off by a crash is not there
        reader = csv.DictReader(lines)
        rows = list(reader)
        return {
            column: np.array([float(row[column] or "nan") for row in rows]).astype(
                np.int64 if column.endswith(("step", "clipped", "skipped")) else np.float64
            )
            for column in reader.fieldnames or COLUMNS
        }

    @property
    def bptt(self) -> dict[str, LayerHistory]:
        """Gradient through time by layer: ``l0``, ``l1``, ``l0_reverse``."""
        layout_path = self.path / BPTT_LAYOUT
        if not layout_path.exists() or not (self.path / BPTT).exists():
            return {}
        layout = json.loads(layout_path.read_text(encoding="utf-8"))
        width = layout["T"]
        names = [(layer, kind) for layer, kinds in layout["layers"].items() for kind in kinds]
        values = np.fromfile(self.path / BPTT, dtype=np.float64)
        size = 1 + width * len(names)
        table = values[: len(values) // size * size].reshape(-1, size)
        if len(table) == 0:
            return {}
        fields = {
            name: table[:, 1 + i * width : 1 + (i + 1) * width] for i, name in enumerate(names)
        }
        return {
            layer: LayerHistory(
                step=table[:, 0].astype(np.int64),
                hidden=fields[layer, "hidden"],
                direct=fields[layer, "direct"],
                hidden_mean=fields[layer, "hidden_mean"],
                cell=fields.get((layer, "cell")),
                clipped=fields.get((layer, "clipped")),
            )
            for layer in layout["layers"]
        }

    @property
    def measures(self) -> dict[str, npt.NDArray[Any]]:
        """What ``rnngrad.measure`` has measured: ``step [M]``, numbers ``[M]``, vectors ``[M, n]``.

        Nothing, if nothing has been measured yet.
        """
        layout_path = self.path / MEASURES_LAYOUT
        if not layout_path.exists() or not (self.path / MEASURES).exists():
            return {}
        layout: dict[str, int | None] = json.loads(layout_path.read_text(encoding="utf-8"))
        values = np.fromfile(self.path / MEASURES, dtype=np.float64)
        size = 1 + sum(1 if length is None else length for length in layout.values())
        table = values[: len(values) // size * size].reshape(-1, size)
        fields: dict[str, npt.NDArray[Any]] = {"step": table[:, 0].astype(np.int64)}
        start = 1
        for name, length in layout.items():
            end = start + (1 if length is None else length)
            fields[name] = table[:, start] if length is None else table[:, start:end]
            start = end
        return fields if len(table) else {}

    @property
    def updates(self) -> dict[str, npt.NDArray[Any]]:
        """Every update, not only the logged ones: columns ``[N]``.

        ``step`` from 1, ``loss``, ``log10_grad_norm`` before clipping, ``clip_coef``.
        """
        path = self.path / UPDATES
        values = np.fromfile(path, dtype=np.float32) if path.exists() else np.empty(0, np.float32)
        table = values[: len(values) // 3 * 3].reshape(-1, 3).astype(np.float64)
        return {
            "step": np.arange(1, len(table) + 1),
            "loss": table[:, 0],
            "log10_grad_norm": table[:, 1],
            "clip_coef": table[:, 2],
        }


def read_config(path: Path) -> dict[str, Any]:
    """The configuration that a run has stored, in plain values, as data and not to be trusted.

    Raises:
        Unreadable: It is not a mapping in YAML of at most ``TEXT_LIMIT`` bytes.
        OSError: It is not there, or the system will not let us.
    """
    return yaml_mapping(path)


def read_summary(path: Path) -> dict[str, Any]:
    """The summary that a run has stored.

    Raises:
        Unreadable: It is not a mapping in JSON of at most ``TEXT_LIMIT`` bytes.
        OSError: It is not there, or the system will not let us.
    """
    return json_mapping(path)


def find_runs(path: str | Path) -> Iterator[Path]:
    """The run directories in ``path``, itself included, in order of name."""
    path = Path(path)
    if (path / SUMMARY).is_file():
        yield path
    else:
        for summary in sorted(path.glob(f"**/{SUMMARY}")):
            yield summary.parent


def differences(runs: Sequence[Run]) -> list[str]:
    """What tells each run from the others and is not in its name, as it would be typed.

    Keys of a part count among the runs that have this part.
    """
    named = ("seed", "task.name", "cell.name", "clip.name")  # in the run's name
    return [
        " ".join(
            f"{key.removesuffix('.name')}={typed(value)}"
            for key, value in mine.items()
            if key not in named
        )
        for mine in differing([settings(run) for run in runs])
    ]


def differing(configurations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each of several ``settings``, the keys in which they differ, with their values.

    Keys of a part count among the runs that have this part.
    """
    seen: dict[tuple[str, Any], set[str]] = {}
    for mine in configurations:
        for key, value in mine.items():
            seen.setdefault((key, _part_of(key, mine)), set()).add(repr(value))
    return [
        {k: value for k, value in mine.items() if len(seen[k, _part_of(k, mine)]) > 1}
        for mine in configurations
    ]


def _part_of(key: str, settings: dict[str, Any]) -> Any:
    """The name of the part that a key belongs to."""
    group, _, inner = key.partition(".")
    return None if inner == "name" else settings.get(f"{group}.name")


def settings(run: Run) -> dict[str, Any]:
    """A run's configuration, one level deep; nothing if there is none."""
    try:
        config = run.config
    except OSError:
        return {}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else None
        flat |= {key: value} if inner is None else inner
    return flat


def typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def table(runs: Iterable[Run]) -> str:
    """One line a run: how it ended, and how much of the gradient reaches the first time step.

    ``|dL/dh_1|`` and ``|dL/dh_T|`` are the root mean square over the batch of ``‖∂L/∂h_t‖`` in the
    last layer at the last logged step, at the first and at the last time step. Where runs differ in
    more than their names tell, a column says in what.
    """
    head = ("run", "status", "verdict", "steps", "loss", "eval loss", "chance", "solved at")
    rows: list[tuple[str, ...]] = [(*head, "clipped", "|dL/dh_1|", "|dL/dh_T|", "settings")]
    runs = list(runs)
    for run, different in zip(runs, differences(runs), strict=True):
        s = run.summary
        first, last = "-", "-"
        bptt = run.bptt
        if forward := [layer for layer in bptt if not layer.endswith("_reverse")]:
            profile = bptt[forward[-1]].hidden[-1]
            there = ~np.isnan(profile)  # a shorter sequence has NaN beyond its end
            profile = profile[there] if there.any() else profile
            first, last = (f"{10.0**exponent:.1e}" for exponent in (profile[0], profile[-1]))
        clipped = "-" if s["clip_fraction"] is None else f"{100 * s['clip_fraction']:.0f} %"
        numbers = (_number(s[key]) for key in ("loss", "eval_loss", "chance_loss"))
        solved = "never" if s["solved_at"] is None else str(s["solved_at"])
        ending = (run.path.name, s["status"], s.get("verdict") or "-", str(s["steps"]))
        rows.append((*ending, *numbers, solved, clipped, first, last, different))
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[3:11], widths[3:11], strict=True)]
        end = [cell.ljust(width) for cell, width in zip(row[11:], widths[11:], strict=True)]
        lines.append("  ".join(left + right + end))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
