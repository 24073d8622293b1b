"""TensorBoard's view of one run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from rnngrad.runs import Run
from rnngrad.tracking.heatmap import heatmap

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
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer = SummaryWriter(str(directory))
        self._clock = (0, time.perf_counter())
        self._drawn = 0

    def log(self, row: Mapping[str, float], clipped: Mapping[str, float]) -> None:
        """One row of metrics.csv, and what ``bptt_clip`` clipped of each layer."""
        step = int(row["step"])
        for column, value in row.items():
            if column != "step":
                self._writer.add_scalar(tag(column), value, step)
        for layer, fraction in clipped.items():
            self._writer.add_scalar(f"bptt_clip/{layer}", fraction, step)
        last_step, last_time = self._clock
        self._clock = (step, time.perf_counter())
        milliseconds = 1e3 * (self._clock[1] - last_time) / max(1, step - last_step)
        self._writer.add_scalar("time/step(ms)", milliseconds, step)
        if "eval_loss" in row:
            self._draw(step)

    def close(self) -> None:
        """Draws the whole run, and ends the file."""
        self._draw(self._clock[0])
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
                    image = heatmap(history.step, values, title)
                    name = f"bptt_{kind}_pre_clip/{layer}"
                    self._writer.add_image(name, image, step, dataformats="HWC")
        if len(histories) > 1:
            field = np.stack([history.hidden[-1] for history in histories.values()], 1)
            field = field[~np.isnan(field).all(1)]  # a shorter sequence ends before the longest
            names = ", ".join(histories)
            title = f"step {history.step[-1]}: log10 |dL/dh_t| by layer ({names}), {when}"
            image = heatmap(np.arange(len(field)), field, title, across="time step t", up="layer")
            self._writer.add_image("bptt_hidden_pre_clip/layers", image, step, dataformats="HWC")
