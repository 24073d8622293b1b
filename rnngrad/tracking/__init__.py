"""What a run leaves on disk: metrics, recorded gradients, summary, and TensorBoard's view of them.

Every file is appended or replaced whole, so that a run killed at any moment can be read.
"""

from __future__ import annotations

import csv
import json
import math
import os
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter

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
    Run,
)

TAGS = {
    "loss": "loss/train",
    "accuracy": "accuracy/train",
    "eval_loss": "loss/eval",
    "eval_accuracy": "accuracy/eval",
    "grad_norm_pre": "grad_norm/pre_clip",
    "grad_norm_post": "grad_norm/post_clip",
    "clip_coef": "clip/coef",
    "clipped": "clip/clipped",
    "clip_threshold": "clip/threshold",
    "skipped": "clip/skipped",
    "lr": "optim/lr",
    "penalty": "loss/penalty",
}


def tag(column: str) -> str:
    """TensorBoard's tag of a column of metrics.csv.

    >>> tag("grad_norm_pre"), tag("eval_loss_at_200"), tag("audit_agc_coef")
    ('grad_norm/pre_clip', 'loss/eval_at_200', 'clip_audit_coef/agc')
    """
    if column.startswith("audit_"):
        label, _, quantity = column.removeprefix("audit_").rpartition("_")
        return f"clip_audit_{quantity}/{label}"
    kind, _, length = column.partition("_at_")
    return f"{TAGS[kind]}_at_{length}" if length else TAGS[column]


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

    Leaving its ``with`` block closes the files; a run that was not finished by then has failed.
    """

    def __init__(
        self,
        directory: str | Path,
        chance_loss: float,
        time_steps: int,
        columns: Sequence[str] = (),
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
        self._measured: dict[str, int] | None = None
        self._updates = (self.directory / UPDATES).open("wb")
        self._board = SummaryWriter(str(self.directory))
        self._clock = (0, time.perf_counter())
        self._drawn = 0
        self._within: list[float] = []

    def updated(self, loss: float, grad_norm_pre: float, clip_coef: float) -> None:
        """One update, logged or not."""
        exponent = math.log10(grad_norm_pre) if grad_norm_pre else -math.inf
        self._updates.write(struct.pack("<3f", _float32(loss), exponent, clip_coef))

    def measured(self, step: int, quantities: Mapping[str, float | Floats]) -> None:
        """What was measured at a step, by name: numbers, and vectors that keep their length."""
        values = {name: np.atleast_1d(value) for name, value in quantities.items()}
        layout = {name: len(value) for name, value in values.items()}
        if self._measured is None:
            self._measured = layout
            _replace(self.directory / MEASURES_LAYOUT, json.dumps(layout))
        if layout != self._measured:
            raise ValueError(f"step {step}: measured {layout}, but the run has {self._measured}")
        self._measures.write(np.concatenate([[float(step)], *values.values()]).tobytes())
        self._measures.flush()

    def log(self, row: Mapping[str, float], records: Mapping[str, LayerRecord]) -> None:
        """One row of metrics.csv, and the recorded gradients if there are any."""
        step = int(row["step"])
        self._csv.writerow(row)
        self._metrics.flush()
        self._updates.flush()
        for column, value in row.items():
            if column != "step":
                self._board.add_scalar(tag(column), value, step)
        last_step, last_time = self._clock
        self._clock = (step, time.perf_counter())
        milliseconds = 1e3 * (self._clock[1] - last_time) / max(1, step - last_step)
        self._board.add_scalar("time/step(ms)", milliseconds, step)
        if records:
            profiles = {layer_key(name): profile(layer) for name, layer in records.items()}
            self._append(profiles, step)
            for key, kinds in profiles.items():
                if "clipped" in kinds:
                    fraction = float(np.nanmean(kinds["clipped"]))
                    self._board.add_scalar(f"bptt_clip/{key}", fraction, step)
                    self._within.append(fraction)
        if "eval_loss" in row:
            self._draw(step)

    def finish(self, result: Result) -> None:
        """How the run ended."""
        self._summary |= asdict(result)
        if self._within:
            self._summary["bptt_clip_fraction"] = float(np.mean(self._within))

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
        self._draw(self._clock[0])
        self._metrics.close()
        self._bptt.close()
        self._measures.close()
        self._updates.close()
        self._board.close()
        self._write_summary()

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
        padded = [np.pad(row, (0, width - len(row)), constant_values=np.nan) for row in rows]
        self._bptt.write(np.concatenate([[float(step)], *padded]).tobytes())
        self._bptt.flush()

    def _draw(self, step: int) -> None:
        """The fields [training step x time step] so far, one image a layer and quantity."""
        if step == self._drawn:
            return
        self._drawn = step
        when = "before clipping"
        histories = Run(self.directory).bptt
        for layer, history in histories.items():
            if history.clipped is not None:
                when = "as clipped at every t"
            for kind, values in (("hidden", history.hidden), ("cell", history.cell)):
                if values is not None and len(values):
                    symbol = "h" if kind == "hidden" else "c"
                    title = f"{layer}: log10 |dL/d{symbol}_t|, RMS over the batch, {when}"
                    image = heatmap(history.step, values, title)
                    tag = f"bptt_{kind}_pre_clip/{layer}"
                    self._board.add_image(tag, image, step, dataformats="HWC")
        if len(histories) > 1:
            field = np.stack([history.hidden[-1] for history in histories.values()], 1)
            field = field[~np.isnan(field).all(1)]  # a shorter sequence ends before the longest
            names = ", ".join(histories)
            title = f"step {history.step[-1]}: log10 |dL/dh_t| by layer ({names}), {when}"
            image = heatmap(np.arange(len(field)), field, title, across="time step t", up="layer")
            self._board.add_image("bptt_hidden_pre_clip/layers", image, step, dataformats="HWC")

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
    kinds = {
        "hidden": log10_rms(layer.hidden_norm).numpy(),
        "direct": log10_rms(layer.direct_norm).numpy(),
        "hidden_mean": log10_mean(layer.hidden_norm).numpy(),
    }
    if layer.cell_norm is not None:
        kinds["cell"] = log10_rms(layer.cell_norm).numpy()
    if layer.clipped is not None:
        kinds["clipped"] = layer.clipped.mean(1).numpy()
    return kinds


def heatmap(
    step: np.ndarray[Any, Any],
    values: Floats,
    title: str,
    *,
    across: str = "training step",
    up: str = "time step t",
    low: float = -12.0,
    high: float = 2.0,
) -> np.ndarray[Any, Any]:
    """A field ``[S, T]`` as a picture with axes and a colour bar, for TensorBoard.

    The colour range is fixed, so that runs can be compared; what lies under it has its darkest
    colour, an exact 0 (``-inf``) is black, and NaN and ``+inf`` are red. Grey is beyond the end of
    a sequence that is shorter than others.

    Args:
        step: Training steps ``[S]``, from left to right.
        values: ``log10`` of a norm ``[S, T]``; ``t`` from bottom to top.
        title: What it shows.
        across: What goes from left to right.
        up: What goes from bottom to top.
        low: Value of the darkest colour.
        high: Value of the brightest.

    Returns:
        ``[height, width, 3]``, uint8.
    """
    left, top, wide, tall = 60, 46, 640, 300
    columns = np.linspace(0, len(step) - 1, wide).round().astype(int)
    rows = (np.arange(tall)[::-1] * values.shape[1]) // tall
    canvas = np.full((top + tall + 46, left + wide + 80, 3), 255, dtype=np.uint8)
    field = _colours(values[columns][:, rows].T, low, high)
    field[_beyond(values)[columns][:, rows].T] = 230
    canvas[top : top + tall, left : left + wide] = field
    bar = np.linspace(high, low, tall)[:, None].repeat(14, 1)
    canvas[top : top + tall, left + wide + 16 : left + wide + 30] = _colours(bar, low, high)
    picture = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    draw.text((left + wide // 2, 8), title, fill="black", font=font, anchor="ma")
    for tick in range(5):
        x, index = left + tick * wide // 4, columns[min(tick * wide // 4, wide - 1)]
        draw.line([(x, top + tall), (x, top + tall + 4)], fill="black")
        draw.text((x, top + tall + 6), str(step[index]), fill="black", font=font, anchor="ma")
    count = values.shape[1]
    heights = [tick / 4 for tick in range(5)]
    if count <= 5:  # few enough to name each
        heights = [(t + 0.5) / count for t in range(count)]
    for share in heights:
        y, t = top + tall - round(share * tall), rows[::-1][min(round(share * tall), tall - 1)]
        draw.line([(left - 4, y), (left, y)], fill="black")
        draw.text((left - 8, y), str(t), fill="black", font=font, anchor="rm")
    for value in np.arange(math.ceil(low / 2) * 2, high + 1e-9, 2):
        y = top + round((high - value) / (high - low) * (tall - 1))
        draw.text((left + wide + 36, y), f"{value:.0f}", fill="black", font=font, anchor="lm")
    draw.text((left + wide // 2, top + tall + 26), across, fill="black", font=font, anchor="ma")
    draw.text((8, top - 26), up, fill="black", font=font)
    return np.asarray(picture)


_RAMP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
"""Five colours of viridis: even in brightness, and readable by the colour-blind."""


def _colours(values: Floats, low: float, high: float) -> np.ndarray[Any, Any]:
    position = np.clip((values - low) / (high - low), 0, 1) * (len(_RAMP) - 1)
    position = np.nan_to_num(position)
    channels = [np.interp(position, np.arange(len(_RAMP)), _RAMP[:, c]) for c in range(3)]
    pixels = np.stack(channels, -1).astype(np.uint8)
    pixels[np.isneginf(values)] = 0
    pixels[np.isnan(values) | np.isposinf(values)] = (220, 20, 20)
    return pixels


def _beyond(values: Floats) -> np.ndarray[Any, Any]:
    """Where a record ``[S, T]`` is NaN to its end, though not all of it."""
    to_the_end = np.logical_and.accumulate(np.isnan(values)[:, ::-1], axis=1)[:, ::-1]
    return to_the_end & ~to_the_end[:, :1]


def _finite(value: Any) -> Any:
    """With null, which JSON knows, for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _float32(value: float) -> float:
    """What ``struct`` can pack: beyond float32's range it raises instead of rounding."""
    return math.copysign(math.inf, value) if abs(value) > 3.4e38 else value


def _replace(path: Path, text: str) -> None:
    """Writes ``path`` whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
