"""A run directory: what lies in it, and how to read it."""

from __future__ import annotations

import csv
import itertools
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from rnngrad.stored import (
    Unreadable,
    array_of,
    flat,
    is_odd,
    json_mapping,
    lines_of,
    printable,
    shown,
    yaml_mapping,
)

CONFIG = ".hydra/config.yaml"
LOCK = ".lock"
"""Held by the process that writes to the directory."""
LOG = "rnngrad.log"
"""What was logged, and tracebacks."""
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
UPDATE_BYTES = 12

CHECKPOINTS = "checkpoint"
"""The folder of a run's checkpoints."""
WRITTEN = (METRICS, SUMMARY, BPTT, BPTT_LAYOUT, MEASURES, MEASURES_LAYOUT, UPDATES, CHECKPOINTS)
"""In a run's directory, beside what is hidden, logs and TensorBoard's files."""

FINISHED = ("completed", "diverged")
"""Of a run's statuses, those in which there is nothing left to do."""

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

METRICS_LIMIT = 2**28
"""Bytes of metrics.csv, a million rows and more."""
ARRAY_LIMIT = 2**30
"""Bytes of each file of numbers that ``Run`` reads into memory; raise it for a run of yours that
has recorded more."""

MOST_STEPS = 10**9
"""As ``trainer.steps`` may be."""

ALWAYS = ("hidden", "direct", "hidden_mean")
"""What ``BPTT`` holds of every layer."""
SOMETIMES = ("cell", "clipped")

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
        """The composed configuration, with ``trainer.steps`` as the run was last told."""
        config = read_config(self.path / CONFIG)
        planned = self.summary.get("planned_steps")
        if isinstance(planned, int) and isinstance(config.get("trainer"), dict):
            config["trainer"]["steps"] = planned
        return config

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json as it is now; a run that was killed while ``running`` is ``interrupted``."""
        summary = read_summary(self.path / SUMMARY)
        if summary.get("status") == "running" and _is_abandoned(self.path):
            summary["status"] = "interrupted"
        return summary

    @property
    def metrics(self) -> dict[str, npt.NDArray[Any]]:
        """Columns of metrics.csv: float64 (NaN: empty); steps and yes-or-no columns int64."""
        path = self.path / METRICS
        if not path.exists():
            return {column: np.empty(0, _kind(column)) for column in COLUMNS}
        try:
            return _table(path)
        except (ValueError, csv.Error) as error:
            raise error if isinstance(error, Unreadable) else Unreadable(path, str(error)) from None

    @property
    def bptt(self) -> dict[str, LayerHistory]:
        """Gradient through time by layer: ``l0``, ``l1``, ``l0_reverse``."""
        if not (self.path / BPTT_LAYOUT).exists() or not (self.path / BPTT).exists():
            return {}
        width, layers = _bptt_layout(self.path / BPTT_LAYOUT)
        names = [(layer, kind) for layer, kinds in layers.items() for kind in kinds]
        step, table = _records(self.path / BPTT, width * len(names))
        if len(table) == 0:
            return {}
        fields = {name: table[:, i * width : (i + 1) * width] for i, name in enumerate(names)}
        return {
            layer: LayerHistory(
                step=step,
                hidden=fields[layer, "hidden"],
                direct=fields[layer, "direct"],
                hidden_mean=fields[layer, "hidden_mean"],
                cell=fields.get((layer, "cell")),
                clipped=fields.get((layer, "clipped")),
            )
            for layer in layers
        }

    @property
    def measures(self) -> dict[str, npt.NDArray[Any]]:
        """What ``rnngrad.measure`` has measured: ``step [M]``, numbers ``[M]``, vectors ``[M, n]``.

        Nothing, if nothing has been measured yet.
        """
        if not (self.path / MEASURES_LAYOUT).exists() or not (self.path / MEASURES).exists():
            return {}
        layout = _measures_layout(self.path / MEASURES_LAYOUT)
        width = sum(1 if length is None else length for length in layout.values())
        step, table = _records(self.path / MEASURES, width)
        fields: dict[str, npt.NDArray[Any]] = {"step": step}
        start = 0
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
        there = path.exists()
        values = array_of(path, np.float32, ARRAY_LIMIT) if there else np.empty(0, np.float32)
        with np.errstate(invalid="ignore"):  # a NaN of another kind
            table = values[: len(values) // 3 * 3].reshape(-1, 3).astype(np.float64)
        return {
            "step": np.arange(1, len(table) + 1),
            "loss": table[:, 0],
            "log10_grad_norm": table[:, 1],
            "clip_coef": table[:, 2],
        }


def _kind(column: str) -> type[np.int64] | type[np.float64]:
    return np.int64 if column.endswith(("step", "clipped", "skipped")) else np.float64


def _table(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The columns of metrics.csv.

    Raises:
        ValueError, csv.Error: It is not one.
    """
    rows = csv.reader(lines_of(path, METRICS_LIMIT))
    head = next(rows, [*COLUMNS])
    if missing := [column for column in COLUMNS if column not in head]:
        raise ValueError(f"has no column {missing[0]}")
    if len({*head}) < len(head):
        raise ValueError("has a column twice")
    columns = [array("d") for _ in head]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"line {rows.line_num} has {len(row)} values, the first {len(head)}")
        for column, value in zip(columns, row, strict=True):
            column.append(float(value or "nan"))
    table: dict[str, npt.NDArray[Any]] = {}
    for name, column in zip(head, columns, strict=True):
        values = np.array(column, np.float64)
        table[name] = _counts(values, name) if _kind(name) is np.int64 else values
    _check_steps(table["step"])
    return table


def _check_steps(steps: npt.NDArray[np.int64]) -> None:
    """What is drawn over steps, or interpolated, counts on their order.

    Raises:
        ValueError: They do not increase, or are more than a run can have.
    """
    if (np.diff(steps) <= 0).any():
        raise ValueError("its steps do not increase")
    if len(steps) and steps[-1] > MOST_STEPS:
        raise ValueError(f"step is {steps[-1]}, more than the {MOST_STEPS:,} there can be")


def _counts(values: Floats, name: str) -> npt.NDArray[np.int64]:
    """As integers.

    Raises:
        ValueError: One is none.
    """
    wrong = ~((values >= 0) & (values < 2**53) & (np.floor(values) == values))
    if wrong.any():
        raise ValueError(f"{name} is {values[wrong][0]}, not an integer >= 0")
    return values.astype(np.int64)


def _records(path: Path, width: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """Steps ``[S]`` and values ``[S, width]`` of appended records."""
    size = 1 + width
    if size * 8 > ARRAY_LIMIT:
        raise Unreadable(path, f"is said to have records of {size} numbers, too many")
    values = array_of(path, np.float64, ARRAY_LIMIT)
    table = values[: len(values) // size * size].reshape(-1, size)
    try:
        steps = _counts(table[:, 0], "step")
        _check_steps(steps)
    except ValueError as error:
        raise Unreadable(path, str(error)) from None
    return steps, table[:, 1:]


def _bptt_layout(path: Path) -> tuple[int, dict[str, list[str]]]:
    """``T``, and the quantities of each layer."""
    layout = json_mapping(path)
    width, layers = layout.get("T"), layout.get("layers")
    if type(width) is not int or width < 1:
        raise Unreadable(path, f"T is {shown(width)}, not an integer >= 1")
    if not isinstance(layers, dict):
        raise Unreadable(path, "has no layers")
    for layer, kinds in layers.items():
        if not isinstance(kinds, list) or not {*ALWAYS} <= {*map(str, kinds)}:
            raise Unreadable(path, f"{layer} lacks one of {', '.join(ALWAYS)}")
        if not {*map(str, kinds)} <= {*ALWAYS, *SOMETIMES} or len({*map(str, kinds)}) < len(kinds):
            raise Unreadable(path, f"{layer} has something else than a run records, or it twice")
    return width, layers


def _measures_layout(path: Path) -> dict[str, int | None]:
    """Each quantity's length."""
    layout = json_mapping(path)
    for name, length in layout.items():
        if name == "step" or (length is not None and (type(length) is not int or length < 0)):
            raise Unreadable(
                path, f"{name} is {shown(length)}; a length is an integer >= 0, or null"
            )
    return layout


def read_config(path: Path) -> dict[str, Any]:
    """The configuration that a run has stored, in plain values, as data and not to be trusted.

    Raises:
        Unreadable: It is not a mapping in YAML of at most ``TEXT_LIMIT`` bytes, or what every
            reader counts on is of another type.
        OSError: It is not there, or the system will not let us.
    """
    config = yaml_mapping(path)
    for key, value in flat(config, levels=2).items():
        group, _, inner = key.rpartition(".")
        if group and inner == "name" and not isinstance(value, str):
            raise Unreadable(path, f"{key} is {shown(value)}, not a text")
        if key in NUMBERS and value is not None and not _is_number(value):
            raise Unreadable(path, f"{key} is {shown(value)}, not a number")
    return config


NUMBERS = ("seed", "trainer.steps", "trainer.batch_size")
"""Keys of every configuration that are computed with when runs are read."""


def read_summary(path: Path) -> dict[str, Any]:
    """The summary that a run has stored; what it lacks of the usual keys is ``None``.

    Raises:
        Unreadable: It is not a mapping in JSON of at most ``TEXT_LIMIT`` bytes, or a value is not
            of the type that a run writes.
        OSError: It is not there, or the system will not let us.
    """
    summary = json_mapping(path)
    if wrong := wrong_in_summary(summary):
        raise Unreadable(path, wrong)
    return dict.fromkeys(itertools.chain(*SUMMARY_KEYS.values())) | summary


def wrong_in_summary(summary: Mapping[str, Any]) -> str:
    """Which value of a summary is not of the type that a run writes; nothing if all are."""
    for kind, keys in SUMMARY_KEYS.items():
        for key in keys:
            if summary.get(key) is not None and not _SUMMARY_KINDS[kind](summary[key]):
                return f"{key} is {shown(summary[key])}, not {kind}"
    return ""


SUMMARY_KEYS = {
    "a text": ("status", "verdict", "reason", "rnngrad", "torch"),
    "a number": (
        *("loss", "eval_loss", "eval_accuracy", "chance_loss"),
        *("clip_fraction", "skip_fraction", "bptt_clip_fraction"),
    ),
    "an integer >= 0": ("steps", "solved_at"),
    "a table of numbers": ("eval_at", "clip_audit"),
    "a diagnosis": ("diagnosis",),
}
"""Of summary.json."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(row, dict) and all(item is None or _is_number(item) for item in row.values())
        for row in value.values()
    )


def _is_diagnosis(value: Any) -> bool:
    """``Diagnosis.as_dict()``, as far as it is read."""
    if not isinstance(value, dict) or not isinstance(value.get("verdict"), str):
        return False
    findings = value.get("findings", [])
    return _is_list_of(str, value.get("because", [])) and (
        _is_list_of(dict, findings)
        and all(
            all(isinstance(found.get(key, ""), str) for key in ("symptom", "level", "evidence"))
            and all(
                found.get(key) is None or _is_number(found[key]) for key in ("value", "threshold")
            )
            and _is_list_of(int, found.get("steps", []))
            and all(_is_list_of(str, found.get(key, [])) for key in ("remedies", "in_place_of"))
            for found in findings
        )
    )


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


_SUMMARY_KINDS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "a number": _is_number,
    "an integer >= 0": _is_count,
    "a table of numbers": _is_table,
    "a diagnosis": _is_diagnosis,
}


def refuse_odd_files(directory: Path) -> None:
    """Refuses a run directory in which a run would write elsewhere, or wait for a reader.

    Raises:
        Unreadable: A file that a run writes is a link there, a pipe or a device.
        OSError: The system will not let us look.
    """
    for folder in (directory, directory / Path(CONFIG).parent):
        for path in folder.iterdir() if folder.is_dir() else ():
            if is_odd(path) and (folder != directory or _is_written(path.name)):
                raise Unreadable(path, "is a link, a pipe or a device, and would be written to")


def _is_written(name: str) -> bool:
    """Whether a run writes a file, or has a folder, of that name in its directory."""
    return name in WRITTEN or name.startswith((".", "events.out.tfevents.")) or ".log" in name


def _is_abandoned(path: Path) -> bool:
    """Whether a run's lock lies there and nobody holds it."""
    if (path / LOCK).is_symlink() or not (path / LOCK).is_file():
        return False  # a run of a loop of one's own
    try:
        with FileLock(path / LOCK, blocking=False):
            return True
    except (Timeout, OSError):
        return False


def find_runs(path: str | Path) -> Iterator[Path]:
    """The run directories in ``path``, itself included, in order of name.

    Links to folders are not followed, and folders that cannot be read are passed over.
    """
    path = Path(path)
    if (path / SUMMARY).is_file():
        yield path
        return
    found, folders = [], [os.fspath(path)]
    while folders:  # not recursive: folders may be nested more deeply than Python's calls
        folder = folders.pop()
        inside, is_run = [], False
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        inside.append(entry)
                    elif entry.name == SUMMARY and entry.is_file():
                        is_run = True
        except (OSError, ValueError):
            continue
        if is_run:
            found.append(Path(folder))
        folders += [entry.path for entry in inside if not is_run or entry.name not in _OWN_FOLDERS]
    yield from sorted(found)


_OWN_FOLDERS = (CHECKPOINTS, os.path.dirname(CONFIG))
"""Of a run: no other run is looked for there."""


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
    seen: dict[tuple[str, Any], str] = {}
    several: set[tuple[str, Any]] = set()
    for mine in configurations:
        for key, value in mine.items():
            place = key, _part_of(key, mine)
            if place not in several and seen.setdefault(place, repr(value)) != repr(value):
                several.add(place)
    return [
        {key: value for key, value in mine.items() if (key, _part_of(key, mine)) in several}
        for mine in configurations
    ]


def _part_of(key: str, settings: dict[str, Any]) -> Any:
    """The name of the part that a key belongs to."""
    named = _naming(key)
    return None if named is None else settings.get(named)


@lru_cache(maxsize=1024)
def _naming(key: str) -> str | None:
    """The key that has the name of the part that a key belongs to."""
    group, _, inner = key.partition(".")
    return None if inner == "name" else f"{group}.name"


def settings(run: Run) -> dict[str, Any]:
    """A run's configuration, one level deep; nothing if there is none."""
    try:
        return flat(run.config, levels=2)
    except OSError:
        return {}


def typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


MOST_ROWS, WRONG_ROWS, BEST_ROWS = 40, 20, 10
"""Of a table of runs; of more runs those that have failed or diverged, and the best."""
SAMPLE = 200
"""Runs among which it is looked for what tells the best from the others."""


def overview(runs: Sequence[Run]) -> str:
    """How the runs of a sweep ended, and which is the best.

    A line a run for up to 40; of more runs their numbers by status, up to 20 that have failed or
    diverged, and the 10 with the least evaluation loss.
    """
    # of a hundred thousand summaries there is no room for more
    ends = [(run, s["status"], s["eval_loss"]) for run in runs for s in [run.summary]]
    done = [(run, loss) for run, status, loss in ends if status == "completed"]
    ranked = sorted(((r, loss) for r, loss in done if loss is not None), key=lambda item: item[1])
    sample = [*runs][:: max(1, len(runs) // SAMPLE)]
    shown = [*runs]
    lines = []
    if len(runs) > MOST_ROWS:
        wrong = [run for run, status, _ in ends if status in ("failed", "diverged")]
        counts = Counter(sorted(str(status) for _, status, _ in ends))
        shown = [*wrong[:WRONG_ROWS], *(run for run, _ in ranked[:BEST_ROWS])]
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        lines.append(f"{len(runs)} runs: {printable(said)}")
        if len(wrong) > WRONG_ROWS:
            lines.append(
                f"the first {WRONG_ROWS} that failed or diverged, and the {BEST_ROWS} best:"
            )
    if shown:
        lines.append(table(shown))
    if ranked:
        best, loss = ranked[0]
        (different,) = differences([best, *sample])[:1]
        name = printable(" ".join([best.path.name, different]).strip())
        lines.append(f"best: {name}, eval loss {_number(loss)}")
    return "\n".join(lines)


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
            with np.errstate(over="ignore"):
                first, last = (f"{10.0**exponent:.1e}" for exponent in (profile[0], profile[-1]))
        clipped = "-" if s["clip_fraction"] is None else f"{100 * s['clip_fraction']:.0f} %"
        numbers = (_number(s[key]) for key in ("loss", "eval_loss", "chance_loss"))
        solved = "never" if s["solved_at"] is None else str(s["solved_at"])
        ending = (run.path.name, s["status"] or "-", s["verdict"] or "-", str(s["steps"]))
        row = (*ending, *numbers, solved, clipped, first, last, different)
        rows.append(tuple(map(printable, row)))
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
