"""What a run leaves on disk: metrics, recorded gradients, measured quantities, summary."""

from __future__ import annotations

import csv
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch

from rnngrad import __version__
from rnngrad.bptt import LayerRecord
from rnngrad.model import layer_key
from rnngrad.norms import log10_mean, log10_rms
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


@dataclass(frozen=True)
class Result:
    """How a run ended; the names and meanings are those of summary.json.

    Args:
        status: ``completed``, ``diverged`` or ``interrupted``.
        steps: Updates done.
        loss: Of the last batch, before its update.
        eval_loss: Of the last evaluation, if there was one.
        eval_accuracy: Likewise.
        solved_at: Updates done at the first evaluation that met the task's rule.
        clip_fraction: Of all updates.
        skip_fraction: Of all updates, those that a clip rule has left out.
        eval_at: ``loss`` and ``accuracy`` of the last evaluation at other lengths, by length.
        clip_audit: How often and how hard each audited rule would have clipped, by rule.
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
    eval_at: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    clip_audit: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    reason: str | None = None


class Tracker:
    """Writes one run's files.

    Args:
        directory: Of the run; files of an earlier attempt are replaced.
        chance_loss: The task's.
        time_steps: ``T`` of the longest sequence: shorter ones are recorded with NaN at the end.
        columns: Of metrics.csv, beside those that every run has.
        settings: The configuration, nested plain values, for TensorBoard: its text, and a line of
            the table of runs, which runs that differ in ``seed`` alone share. ``None``: neither.

    Leaving its ``with`` block closes the files; a run that was not finished by then has failed.
    """

    def __init__(
        self,
        directory: str | Path,
        chance_loss: float,
        time_steps: int,
        columns: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
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
            "bptt_clip_fraction": None,
            "eval_at": {},
            "clip_audit": {},
            "verdict": None,
            "diagnosis": None,
            "reason": None,
            "rnngrad": __version__,
            "torch": torch.__version__,
        }
        self._clear()
        self._write_summary()
        self._metrics: IO[str] = (self.directory / METRICS).open("w", encoding="utf-8", newline="")
        self._csv = csv.DictWriter(self._metrics, [*COLUMNS, *columns], lineterminator="\n")
        self._csv.writeheader()
        self._bptt = (self.directory / BPTT).open("wb")
        self._layout: dict[str, Any] | None = None
        self._measures = (self.directory / MEASURES).open("wb")
        self._measured: dict[str, int | None] | None = None
        self._updates = (self.directory / UPDATES).open("wb")
        self._board = Board(self.directory, chance_loss, settings)
        self._within: list[float] = []

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
            _replace(self.directory / MEASURES_LAYOUT, json.dumps(layout))
        if layout != self._measured:
            raise ValueError(f"step {step}: measured {layout}, but the run has {self._measured}")
        self._measures.write(np.concatenate([[float(step)], *values.values()]).tobytes())
        self._measures.flush()
        self._board.measured(step, quantities)

    def log(self, row: Mapping[str, float], records: Mapping[str, LayerRecord]) -> None:
        """One row of metrics.csv, and the recorded gradients if there are any."""
        step = int(row["step"])
        self._csv.writerow(row)
        self._metrics.flush()
        self._updates.flush()
        profiles = {layer_key(name): profile(layer) for name, layer in records.items()}
        if profiles:
            self._append(profiles, step)
        clipped = {
            key: float(np.nanmean(kinds["clipped"]))
            for key, kinds in profiles.items()
            if "clipped" in kinds
        }
        self._within += clipped.values()
        self._board.log(row, profiles, clipped)

    def finish(self, result: Result) -> None:
        """How the run ended."""
        self._summary |= asdict(result)
        if self._within:
            self._summary["bptt_clip_fraction"] = float(np.mean(self._within))
        self._write_summary()

    def diagnosed(self, diagnosis: Mapping[str, Any]) -> None:
        """What is wrong with the run, in plain values: ``Diagnosis.as_dict()``."""
        self._summary |= {"verdict": diagnosis["verdict"], "diagnosis": diagnosis}
        self._write_summary()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._summary["status"] == "running":
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self._summary |= {"status": status, "reason": repr(error)}
        for file in (self._metrics, self._bptt, self._measures, self._updates):
            file.close()
        self._write_summary()
        self._board.close(self._summary)

    def _append(self, profiles: dict[str, dict[str, Floats]], step: int) -> None:
        rows = [values for kinds in profiles.values() for values in kinds.values()]
        layers = {layer: list(kinds) for layer, kinds in profiles.items()}
        if self._layout is None:
            self._layout = {"T": self._time_steps, "layers": layers}
            _replace(self.directory / BPTT_LAYOUT, json.dumps(self._layout))
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

    def _clear(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        mine = (METRICS, BPTT_LAYOUT, BPTT, MEASURES_LAYOUT, MEASURES, UPDATES)
        for pattern in (*mine, "events.out.tfevents.*"):
            for path in self.directory.glob(pattern):
                path.unlink()

    def _write_summary(self) -> None:
        text = json.dumps(_finite(self._summary), indent=2, allow_nan=False)
        _replace(self.directory / SUMMARY, text + "\n")


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


def _replace(path: Path, text: str) -> None:
    """Writes ``path`` whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
