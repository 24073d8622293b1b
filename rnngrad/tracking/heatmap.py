"""A field as a picture with axes, without matplotlib, which would take eight times as long."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rnngrad.runs import Floats


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
