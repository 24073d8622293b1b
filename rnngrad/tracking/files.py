"""What a run leaves on disk: metrics, recorded gradients, measured quantities, summary."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from rnngrad import __version__
from rnngrad.bptt import LayerRecord
from rnngrad.model import layer_key
from rnngrad.norms import log10_mean, log10_rms
from rnngrad.parts import NothingUsable
from rnngrad.runs import (
    BPTT,
    BPTT_LAYOUT,
    COLUMNS,
    MEASURES,
    MEASURES_LAYOUT,
    METRICS,
    SUMMARY,
    UPDATES,
    Floats,
)
from rnngrad.tracking.board import Board
from rnngrad.tracking.events import event_files
from rnngrad.written import Appended, replace

_DATA = (METRICS, BPTT, MEASURES, UPDATES)
"""What is appended to, and cut back when a run goes on from a checkpoint."""


@dataclass(frozen=True)
class Result:
    """How a run ended; the names and meanings are those of summary.json.

    Args:
        status: ``completed``, ``diverged`` or ``interrupted``; ``running`` until then.
        steps: Updates done.
        loss: Of the last batch, before its update.
        eval_loss: Of the last evaluation, if there was one.
        eval_accuracy: Likewise.
        solved_at: Updates done at the first evaluation that met the task's rule.
        clip_fraction: Of all updates.
        skip_fraction: Of all updates, those that a clip rule has left out.
        nonfinite: Updates whose loss or gradient was not finite: left out, or replaced.
        eval_at: ``loss`` and ``accuracy`` of the last evaluation at other lengths, by length.
        clip_audit: How often and how hard each audited rule would have clipped, by rule.
        planned_steps: Updates at most, as the run was last told.
        reason: What went wrong, and where.
    """

    status: str
    steps: int
    loss: float
    eval_loss: float | None
    eval_accuracy: float | None
    solved_at: int | None
    clip_fraction: float
    skip_fraction: float = 0.0
    nonfinite: int = 0
    eval_at: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    clip_audit: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    planned_steps: int | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As summary.json has it: null for numbers that are not finite."""
        return {key: _finite(value) for key, value in asdict(self).items()}


class Tracker:
    """Writes one run's files, from the beginning or from where a checkpoint was taken.

    Args:
        directory: Of the run.
        chance_loss: The task's.
        time_steps: ``T`` of the longest sequence: shorter ones are recorded with NaN at the end.
        columns: Of metrics.csv, beside those that every run has.
        settings: The configuration, nested plain values, for TensorBoard: its text, and a line of
            the table of runs, which runs that differ in ``seed`` alone share. ``None``: neither.
        position: What ``position`` returned: the files go on from there, and what was written later
            is cut off. ``None``: the files of an earlier attempt are removed.

    Its ``with`` block opens and closes the files; a run that was not finished by then has failed.

    Raises:
        NothingUsable: A file does not reach as far as ``position``, or is another one.
    """

    def __init__(
        self,
        directory: str | Path,
        chance_loss: float,
        time_steps: int,
        columns: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        position: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self._time_steps = time_steps
        self._summary: dict[str, Any] = {
            "status": "running",
            "steps": 0,
            "loss": None,
            "eval_loss": None,
            "eval_accuracy": None,
            "chance_loss": chance_loss,
            "solved_at": None,
            "clip_fraction": None,
            "skip_fraction": None,
            "nonfinite": 0,
            "bptt_clip_fraction": None,
            "eval_at": {},
            "clip_audit": {},
            "verdict": None,
            "diagnosis": None,
            "planned_steps": None,
            "reason": None,
            "rnngrad": __version__,
            "torch": torch.__version__,
        }
        self._columns = [*COLUMNS, *columns]
        self._settings = settings
        self._position = position
        self._has_news = position is None  # else the earlier attempt's summary stays for now
        self._files: list[Appended] = []
        self._closing: list[Callable[[], None]] = []
        if position is None:
            position = {"layouts": {}, "clipped": [0.0, 0]}
        else:
            self._check(position)
        layouts = {name: json.loads(text) for name, text in position["layouts"].items()}
        self._layout: dict[str, Any] | None = layouts.get(BPTT_LAYOUT)
        self._measured: dict[str, int | None] | None = layouts.get(MEASURES_LAYOUT)
        self._clipped_sum, self._clipped_count = position["clipped"]
        """Of the fractions that ``bptt_clip`` has clipped, by logged step and layer."""

    def __enter__(self) -> Tracker:
        """Opens the files."""
        try:
            self._open()
        except BaseException as error:
            self._close(error)
            raise
        return self

    def _open(self) -> None:
        again = self._position is not None
        if self._position is None:
            self._clear()
        else:
            _cut_back(self.directory, self._position)
        self._write_summary()
        for name in _DATA:
            self._files.append(Appended(self.directory / name))
            self._closing.append(self._files[-1].close)
        self._metrics, self._bptt, self._measures, self._updates = self._files
        if not again:
            self._write_row(dict(zip(self._columns, self._columns, strict=True)))
        chance = self._summary["chance_loss"]
        self._board = Board(self.directory, chance, self._settings, again=again)
        self._closing.append(lambda: self._board.close(self._summary))

    def updated(self, loss: float, grad_norm_pre: float, clip_coef: float) -> None:
        """One update, logged or not."""
        exponent = math.log10(grad_norm_pre) if grad_norm_pre else -math.inf
        self._updates.write(struct.pack("<3f", _float32(loss), exponent, _float32(clip_coef)))

    def measured(self, step: int, quantities: Mapping[str, float | Floats]) -> None:
        """What was measured at a step, by name: numbers, and vectors that keep their length."""
        values = {name: np.atleast_1d(value) for name, value in quantities.items()}
        layout = {name: np.size(q) if np.ndim(q) else None for name, q in quantities.items()}
        if self._measured is None:
            self._measured = layout
            replace(self.directory / MEASURES_LAYOUT, json.dumps(layout))
        if layout != self._measured:
            raise ValueError(f"step {step}: measured {layout}, but the run has {self._measured}")
        self._measures.write(np.concatenate([[float(step)], *values.values()]).tobytes())
        self._measures.flush()
        self._board.measured(step, quantities)

    def recorded(self, step: int, records: Mapping[str, LayerRecord]) -> None:
        """The gradient through time at a step, if it was recorded."""
        profiles = {layer_key(name): profile(layer) for name, layer in records.items()}
        if not profiles:
            return
        self._append(profiles, step)
        clipped = {
            key: float(np.nanmean(kinds["clipped"]))
            for key, kinds in profiles.items()
            if "clipped" in kinds
        }
        self._clipped_sum += math.fsum(clipped.values())
        self._clipped_count += len(clipped)
        self._board.recorded(step, profiles, clipped)

    def log(self, row: Mapping[str, float]) -> None:
        """One row of metrics.csv."""
        self._write_row(row)
        self._metrics.flush()
        self._updates.flush()
        self._board.log(row)

    def finish(self, result: Result) -> None:
        """How the run ended, or how far it has come if it is ``running``."""
        self._has_news = True
        self._summary |= asdict(result)
        if self._clipped_count:
            self._summary["bptt_clip_fraction"] = self._clipped_sum / self._clipped_count
        self._write_summary()

    def position(self) -> dict[str, Any]:
        """Where the files end, as plain values: a ``Tracker`` can go on from there."""
        for file in self._files:
            file.flush()
        self._board.flush()
        layouts = {BPTT_LAYOUT: self._layout, MEASURES_LAYOUT: self._measured}
        paths = [*(file.path for file in self._files), *event_files(self.directory)]
        return {
            "files": {path.name: path.stat().st_size for path in paths},
            # as text: the order of keys matters, and a checkpoint does not keep it
            "layouts": {
                name: json.dumps(layout) for name, layout in layouts.items() if layout is not None
            },
            "clipped": [self._clipped_sum, self._clipped_count],
        }

    def sync(self) -> None:
        """Makes what has been written so far outlive a power cut; from any thread."""
        for file in self._files:
            file.sync()

    def diagnosed(self, diagnosis: Mapping[str, Any]) -> None:
        """What is wrong with the run, in plain values: ``Diagnosis.as_dict()``."""
        self._summary |= {"verdict": diagnosis["verdict"], "diagnosis": diagnosis}
        self._write_summary()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        failure = self._close(error)
        if failure is not None and error is None:
            raise failure

    def _close(self, error: BaseException | None) -> Exception | None:
        """Closes all files, whatever becomes of the others; what went wrong first in doing so.

        The summary comes last: a run is completed only when everything else is there.
        """
        failure = None
        self._ends_in(error)
        steps: list[Callable[[], None]] = [*self._closing, partial(self._write_summary, ended=True)]
        for step in steps:
            try:
                step()
            except Exception as told:  # an error on its way matters more; the disk may be full
                failure = failure or told
                self._ends_in(error or told)
        return failure

    def _ends_in(self, error: BaseException | None) -> None:
        """What an error, or having been left too early, means for the run."""
        if isinstance(error, KeyboardInterrupt):
            self._summary["status"] = "interrupted"
        elif error is not None or self._summary["status"] == "running":
            self._summary |= {"status": "failed", "reason": repr(error)}

    def _write_row(self, row: Mapping[str, Any]) -> None:
        line = io.StringIO()
        csv.DictWriter(line, self._columns, lineterminator="\n").writerow(row)
        self._metrics.write(line.getvalue().encode())

    def _append(self, profiles: dict[str, dict[str, Floats]], step: int) -> None:
        rows = [values for kinds in profiles.values() for values in kinds.values()]
        layers = {layer: list(kinds) for layer, kinds in profiles.items()}
        if self._layout is None:
            self._layout = {"T": self._time_steps, "layers": layers}
            replace(self.directory / BPTT_LAYOUT, json.dumps(self._layout))
        width = self._layout["T"]
        if layers != self._layout["layers"] or any(len(row) > width for row in rows):
            raise ValueError(
                f"step {step}: recorded {layers} over {max(map(len, rows))} time steps, but the "
                f"run has {self._layout['layers']} over {width}"
            )
        # shorter sequences end in NaN, so that every record has the same length
        padded = np.full((len(rows), width), np.nan)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        self._bptt.write(np.float64(step).tobytes() + padded.tobytes())
        self._bptt.flush()

    def _check(self, position: Mapping[str, Any]) -> None:
        """That the files are there, are this run's, and reach as far."""
        if not _is_position(position):
            raise NothingUsable(f"{self.directory}: the checkpoint does not say where files end")
        for name in _DATA:
            path, size = self.directory / name, position["files"].get(name)
            if path.is_symlink() or not path.is_file():
                raise NothingUsable(f"{path}: is missing, or not a file")
            there = path.stat().st_size
            if size is None or there < size:
                raise NothingUsable(f"{path}: has {there} of the {size} bytes that it had")
        header = ",".join(self._columns) + "\n"
        with (self.directory / METRICS).open(
            encoding="utf-8", errors="replace", newline=""
        ) as file:
            if file.readline(len(header) + 1) != header:
                raise NothingUsable(f"{file.name}: its columns are not this run's")

    def _clear(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        mine = (*_DATA, BPTT_LAYOUT, MEASURES_LAYOUT)
        for path in (*(self.directory / name for name in mine), *event_files(self.directory)):
            path.unlink(missing_ok=True)

    def _write_summary(self, *, ended: bool = False) -> None:
        if not self._has_news:
            return
        if self._files and not self._files[0].is_in_place():
            path = self._files[0].path
            raise OSError(errno.ESTALE, "is not this run's file any more", str(path))
        summary = self._summary
        if summary["status"] == "completed" and not ended:
            summary = summary | {"status": "running"}
        text = json.dumps(_finite(summary), indent=2, allow_nan=False)
        replace(self.directory / SUMMARY, text + "\n")


def profile(layer: LayerRecord) -> dict[str, Floats]:
    """One record as what is kept of it, ``[T]`` each: ``log10`` over the batch; fractions."""
    norms = {"hidden": layer.hidden_norm, "direct": layer.direct_norm}
    if layer.cell_norm is not None:
        norms["cell"] = layer.cell_norm
    kinds = dict(zip(norms, log10_rms(torch.stack([*norms.values()])).numpy(), strict=True))
    kinds["hidden_mean"] = log10_mean(layer.hidden_norm).numpy()
    if layer.clipped is not None:
        kinds["clipped"] = layer.clipped.mean(1).numpy()
    return kinds


def _is_position(position: Any) -> bool:
    """Whether it is what ``Tracker.position`` returned, and then was stored."""
    if not isinstance(position, Mapping) or set(position) != {"files", "layouts", "clipped"}:
        return False
    files, layouts, clipped = position["files"], position["layouts"], position["clipped"]
    try:
        return (
            all(type(size) is int and size >= 0 for size in files.values())
            and all(isinstance(json.loads(text), dict) for text in layouts.values())
            and [type(number) for number in clipped] == [float, int]
            and (0 <= clipped[0] <= clipped[1] or math.isnan(clipped[0]))  # of fractions
            and 0 <= clipped[1] < 2**53
        )
    except (AttributeError, TypeError, ValueError, RecursionError):
        return False


def _cut_back(directory: Path, position: Mapping[str, Any]) -> None:
    """Has every file end where it did."""
    sizes, layouts = position["files"], position["layouts"]
    for name in _DATA:
        os.truncate(directory / name, sizes[name])
    for path in event_files(directory):  # a view of the others: a lost one is no loss
        if path.name not in sizes or path.is_symlink():
            path.unlink()
        elif sizes[path.name] < path.stat().st_size:
            os.truncate(path, sizes[path.name])
    for name in (BPTT_LAYOUT, MEASURES_LAYOUT):
        if name in layouts:  # the system may have lost it since
            replace(directory / name, layouts[name])
        else:
            (directory / name).unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """With null, which JSON knows, for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _float32(value: float) -> float:
    """What ``struct`` can pack: beyond float32's range it raises instead of rounding."""
    return math.copysign(math.inf, value) if abs(value) > 3.4e38 else value
