"""TensorBoard's view of one run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import custom_scalars, text

from rnngrad.runs import UPDATE_BYTES, UPDATES, Floats, Run
from rnngrad.stored import Unreadable
from rnngrad.tracking.events import EventFile
from rnngrad.tracking.heatmap import picture, png
from rnngrad.tracking.hparams import session_end, session_start
from rnngrad.tracking.profile import histogram
from rnngrad.tracking.scalars import NoiseScale, of_measures, of_profile, tag
from rnngrad.tracking.text import config_text, diagnosis_text, result_text

LAYOUT = {
    "Training": {
        "loss, and chance": ["Multiline", ["loss/(train|eval|chance)$"]],
        "accuracy": ["Multiline", ["accuracy/(train|eval)$"]],
    },
    "Gradient": {
        "norm before and after clipping, and threshold": [
            "Multiline",
            ["grad_norm/(pre|post)_clip$", "clip/threshold$"],
        ],
        "clip coefficient": ["Multiline", ["clip/coef$"]],
        "log10 |dL/dh_t| at the first and the last time step": [
            "Multiline",
            [r"bptt_hidden_pre_clip/.*_(first|last)_log10$"],
        ],
        "decay of one error going back (decades a step)": [
            "Multiline",
            ["lag/.*_slope_decades_per_step$"],
        ],
        "log10 of update over weight, by layer": ["Multiline", ["update_ratio/"]],
    },
}
"""The same in every run, whatever its layers, as TensorBoard merges all runs' charts."""

GROWTH = 1.5
"""Pictures are drawn anew when the run is so many times as long: TensorBoard keeps ten of a tag."""

SHARE = 0.02
"""Of a run's time, what drawing may take before its end."""

log = logging.getLogger(__name__)


class Board:
    """Writes a run's event file.

    Args:
        directory: Of the run, which already holds its other files.
        chance_loss: The task's.
        settings: The configuration, for the table of runs and as text.
        again: The run goes on, and has an event file already. This is a new one beside it.
    """

    def __init__(
        self,
        directory: Path,
        chance_loss: float,
        settings: Mapping[str, Any] | None = None,
        *,
        again: bool = False,
    ) -> None:
        self._directory = directory
        self._chance_loss = chance_loss
        self._settings = settings
        self._noise = NoiseScale()
        self._writer = EventFile(directory)
        self._clock = (0, time.perf_counter())
        if again:
            self._go_on()
        else:
            self._writer.add_summary(custom_scalars(LAYOUT))
            if settings is not None:
                self._writer.add_summary(session_start(settings))
                self._writer.add_summary(text("config", config_text(settings)), 0)
        self._drawn, self._told = 0, False
        self._drawn_at, self._drawing = self._clock[1], 0.02  # s; until it is known a guess

    def recorded(
        self,
        step: int,
        profiles: Mapping[str, Mapping[str, Floats]],
        clipped: Mapping[str, float],
    ) -> None:
        """Each layer's profiles at a step.

        Args:
            step: Counted from 1.
            profiles: By layer and quantity, of which ``hidden`` is shown.
            clipped: Fraction that ``bptt_clip`` has clipped, by layer.
        """
        scalars = {f"bptt_clip/{layer}": fraction for layer, fraction in clipped.items()}
        for layer, kinds in profiles.items():
            scalars |= of_profile(layer, kinds["hidden"])
        shapes = {layer: histogram(kinds["hidden"]) for layer, kinds in profiles.items()}
        values = [
            Summary.Value(tag=f"bptt_hidden_pre_clip/{layer}_over_t_log10_plus_12", histo=h)
            for layer, h in shapes.items()
        ]
        self._add([*_values(scalars), *values], step)

    def log(self, row: Mapping[str, float]) -> None:
        """One row of metrics.csv."""
        step = int(row["step"])
        scalars = {tag(column): value for column, value in row.items() if column != "step"}
        if "eval_loss" in row:
            scalars["loss/chance"] = self._chance_loss
        last_step, last_time = self._clock
        self._clock = (step, time.perf_counter())
        milliseconds = 1e3 * (self._clock[1] - last_time) / max(1, step - last_step)
        scalars["time/step_ms"] = milliseconds
        self._add(_values(scalars), step)
        rested = self._clock[1] - self._drawn_at > self._drawing / SHARE
        if "eval_loss" in row and step >= GROWTH * self._drawn and rested:
            self._draw(step)
        self._writer.flush()

    def measured(self, step: int, quantities: Mapping[str, Any]) -> None:
        """What was measured at a step, as ``Tracker.measured`` takes it."""
        self._add(_values(of_measures(quantities) | self._noise.add(quantities)), step)

    def flush(self) -> None:
        """Hands everything so far to the system."""
        self._writer.flush()

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

    def _go_on(self) -> None:
        """What the run's beginning left, and a word to a TensorBoard that has seen more of it."""
        step = (self._directory / UPDATES).stat().st_size // UPDATE_BYTES
        try:
            measures = Run(self._directory).measures
        except Unreadable:  # the noise scale is averaged anew
            measures = {}
        for row in range(len(measures.get("step", ()))):
            self._noise.add({name: values[row] for name, values in measures.items()})
        # it forgets what it has read of this step and later ones
        start = SessionLog(status=SessionLog.START)
        self._writer.add(Event(step=step + 1, session_log=start))
        self._clock = (step, time.perf_counter())

    def _draw(self, step: int) -> None:
        """Every field so far, one picture a layer and quantity."""
        if step == self._drawn:
            return
        start = time.perf_counter()
        self._drawn = step
        run = Run(self._directory)
        try:
            pictures = [*recorded_pictures(run), *measured_pictures(run)]
        except Unreadable as error:  # too large by now: the run is worth more than its pictures
            if not self._told:
                log.warning("%s: nothing is drawn in TensorBoard from step %d on", error, step)
            self._told, pictures = True, []
        self._add([image(name, drawn) for name, drawn in pictures], step)
        self._drawn_at = time.perf_counter()
        self._drawing = self._drawn_at - start

    def _add(self, values: list[Summary.Value], step: int) -> None:
        """In one event: each has a price of its own."""
        if values:
            self._writer.add_summary(Summary(value=values), step)


def recorded_pictures(run: Run) -> Iterator[tuple[str, Image.Image]]:
    """The gradient through time over training, and over layers as it is now, by tag."""
    when = "before clipping"
    histories = run.bptt
    for layer, history in histories.items():
        if history.clipped is not None:
            when = "as clipped at every t"
        for kind, values in (("hidden", history.hidden), ("cell", history.cell)):
            if values is not None:
                symbol = "h" if kind == "hidden" else "c"
                title = f"{layer}: log10 |dL/d{symbol}_t|, RMS over the batch, {when}"
                yield f"bptt_{kind}_pre_clip/{layer}", picture(history.step, values, title)
    if len(histories) > 1:
        field = np.stack([history.hidden[-1] for history in histories.values()], 1)
        field = field[~np.isnan(field).all(1)]  # a shorter sequence ends before the longest
        title = f"step {history.step[-1]}: log10 |dL/dh_t| by layer, {when}"
        t = np.arange(len(field))
        drawn = picture(t, field, title, across="time step t", up="layer", rows=[*histories])
        yield "bptt_hidden_pre_clip/layers", drawn


def measured_pictures(run: Run) -> Iterator[tuple[str, Image.Image]]:
    """What was measured as vectors over time, by tag."""
    measures = run.measures
    kinds = {
        "lag": "log10 of an error k steps back beside itself, median",
        "weight_norm": "log10 |G_t|, what step t adds to dL/dW_hh",
        "attribution": "T x share of step t in |dL/dW_hh| (even: 1)",
    }
    names = {"weight_norm": "norm", "attribution": "share"}
    for name, values in measures.items():
        layer, _, kind = name.rpartition("/")
        if kind not in kinds or values.ndim != 2:
            continue
        title = f"{layer}: {kinds[kind]}"
        options: dict[str, Any] = {}
        if kind == "lag":
            options = {"up": "lag k"}
        if kind == "attribution":
            values = values * (~np.isnan(values)).sum(1, keepdims=True)
            options = {"low": -5.0, "high": 5.0, "diverging": True}
        tag = f"lag/{layer}" if kind == "lag" else f"weight_contribution/{layer}_{names[kind]}"
        yield tag, picture(measures["step"], values, title, **options)
    if "input_norm" in measures:
        title = "log10 |dL/dx_t|, RMS over the batch: which input matters"
        yield "bptt_input_pre_clip/x", picture(measures["step"], measures["input_norm"], title)


def image(tag: str, drawn: Image.Image) -> Summary.Value:
    """A picture for an event file."""
    width, height = drawn.size
    content = Summary.Image(
        width=width, height=height, colorspace=3, encoded_image_string=png(drawn)
    )
    return Summary.Value(tag=tag, image=content)


def _values(scalars: Mapping[str, float]) -> list[Summary.Value]:
    return [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
