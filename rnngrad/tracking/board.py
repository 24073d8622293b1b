"""TensorBoard's view of one run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import text

from rnngrad.runs import Run
from rnngrad.tracking.heatmap import picture, png
from rnngrad.tracking.hparams import session_end, session_start
from rnngrad.tracking.text import config_text, diagnosis_text, result_text

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


class Board:
    """Writes a run's event file.

    Args:
        directory: Of the run, which already holds its other files.
        settings: The configuration, for the table of runs and as text.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any] | None = None) -> None:
        self._directory = directory
        self._settings = settings
        self._writer = FileWriter(str(directory))
        if settings is not None:
            self._writer.add_summary(session_start(settings))
            self._writer.add_summary(text("config", config_text(settings)), 0)
        self._clock = (0, time.perf_counter())
        self._drawn = 0

    def log(self, row: Mapping[str, float], clipped: Mapping[str, float]) -> None:
        """One row of metrics.csv, and what ``bptt_clip`` clipped of each layer."""
        step = int(row["step"])
        scalars = {tag(column): value for column, value in row.items() if column != "step"}
        scalars |= {f"bptt_clip/{layer}": fraction for layer, fraction in clipped.items()}
        last_step, last_time = self._clock
        self._clock = (step, time.perf_counter())
        milliseconds = 1e3 * (self._clock[1] - last_time) / max(1, step - last_step)
        scalars["time/step(ms)"] = milliseconds
        self._add([Summary.Value(tag=tag, simple_value=v) for tag, v in scalars.items()], step)
        if "eval_loss" in row:
            self._draw(step)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Draws the whole run, says how it ended, and ends the file.

        Args:
            summary: What summary.json will hold.
        """
        step = self._clock[0]
        self._draw(step)
        self._writer.add_summary(text("result", result_text(summary)), step)
        if summary["diagnosis"] is not None:
            said = diagnosis_text(summary["diagnosis"])
            self._writer.add_summary(text("diagnosis", said), step)
        end = session_end(summary["status"])
        if self._settings is not None and end is not None:
            self._writer.add_summary(end)
        self._writer.close()

    def _draw(self, step: int) -> None:
        """The fields [training step x time step] so far, one image a layer and quantity."""
        if step == self._drawn:
            return
        self._drawn = step
        when = "before clipping"
        histories = Run(self._directory).bptt
        for layer, history in histories.items():
            if history.clipped is not None:
                when = "as clipped at every t"
            for kind, values in (("hidden", history.hidden), ("cell", history.cell)):
                if values is not None and len(values):
                    symbol = "h" if kind == "hidden" else "c"
                    title = f"{layer}: log10 |dL/d{symbol}_t|, RMS over the batch, {when}"
                    drawn = picture(history.step, values, title)
                    self._add([image(f"bptt_{kind}_pre_clip/{layer}", drawn)], step)
        if len(histories) > 1:
            field = np.stack([history.hidden[-1] for history in histories.values()], 1)
            field = field[~np.isnan(field).all(1)]  # a shorter sequence ends before the longest
            names = ", ".join(histories)
            title = f"step {history.step[-1]}: log10 |dL/dh_t| by layer ({names}), {when}"
            drawn = picture(np.arange(len(field)), field, title, across="time step t", up="layer")
            self._add([image("bptt_hidden_pre_clip/layers", drawn)], step)

    def _add(self, values: list[Summary.Value], step: int) -> None:
        """In one event: each has a price of its own."""
        self._writer.add_summary(Summary(value=values), step)


def image(tag: str, drawn: Image.Image) -> Summary.Value:
    """A picture for an event file."""
    width, height = drawn.size
    content = Summary.Image(
        width=width, height=height, colorspace=3, encoded_image_string=png(drawn)
    )
    return Summary.Value(tag=tag, image=content)
