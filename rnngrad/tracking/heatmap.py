"""A field as a picture with axes, without matplotlib, which would take eight times as long."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from rnngrad.runs import Floats

LOW, HIGH = -12.0, 2.0
"""``log10`` of the norms of the darkest and the brightest colour, in every run."""

LEVELS = 200
"""Colours of a field; the rest of a palette of 256 are the special ones and the greys of text."""
ZERO, NOT_FINITE, BEYOND = LEVELS, LEVELS + 1, LEVELS + 2
GREYS = LEVELS + 3

SEQUENTIAL = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Five colours of viridis: even in brightness, and readable by the colour-blind."""
DIVERGING = ((0, 76, 133), (120, 180, 218), (247, 247, 247), (240, 160, 90), (178, 72, 0))
"""Okabe and Ito's blue and vermilion, light where they meet."""


def heatmap(step: npt.NDArray[Any], values: Floats, title: str, **options: Any) -> npt.NDArray[Any]:
    """``picture`` as an array ``[height, width, 3]``, uint8, as ``SummaryWriter.add_image`` has it.

    Takes the same arguments.
    """
    return np.asarray(picture(step, values, title, **options).convert("RGB"))


def png(image: Image.Image) -> bytes:
    """The picture as a file; packed for speed, as it is drawn while training waits."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=2)
    return file.getvalue()


def picture(
    step: npt.NDArray[Any],
    values: Floats,
    title: str,
    *,
    across: str = "training step",
    up: str = "time step t",
    low: float = LOW,
    high: float = HIGH,
    diverging: bool = False,
    rows: Sequence[str] = (),
) -> Image.Image:
    """A field ``[S, T]`` with axes and a colour bar.

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
        diverging: From blue over white to orange, for values with a sign.
        rows: A name for each of ``T``, instead of its number.

    Returns:
        A picture with a palette, a third as large as one in full colour.
    """
    font = _font()
    left = 60 if not rows else 24 + max(int(font.getlength(name)) for name in rows)
    top, wide, tall = 46, 640, max(300, min(14 * len(rows), 1400))
    size = (left + wide + 80, top + tall + 46)
    across_index = np.linspace(0, len(step) - 1, wide).round().astype(int)
    up_index = (np.arange(tall)[::-1] * values.shape[1]) // tall
    if values.size < wide * tall:
        field = _indices(values, low, high)[across_index].T[up_index]
    else:
        field = _indices(values[across_index][:, up_index[::-1]], low, high)[:, ::-1].T
    bar = _indices(np.linspace(high, low, tall)[:, None], low, high).repeat(14, 1)

    text = Image.new("L", size, 255)
    draw = ImageDraw.Draw(text)
    draw.text((left + wide // 2, 8), title, fill=0, font=font, anchor="ma")
    draw.text((8, top - 26), up, fill=0, font=font)
    draw.text((left + wide // 2, top + tall + 26), across, fill=0, font=font, anchor="ma")
    for tick in range(5):
        x, index = left + tick * wide // 4, across_index[min(tick * wide // 4, wide - 1)]
        draw.line([(x, top + tall), (x, top + tall + 4)], fill=0)
        draw.text((x, top + tall + 6), str(step[index]), fill=0, font=font, anchor="ma")
    for y, name in _row_ticks(values.shape[1], rows, tall):
        draw.line([(left - 4, top + y), (left, top + y)], fill=0)
        draw.text((left - 8, top + y), name, fill=0, font=font, anchor="rm")
    for value in _ticks(low, high):
        y = top + round((high - value) / (high - low) * (tall - 1))
        draw.text((left + wide + 36, y), f"{value:g}", fill=0, font=font, anchor="lm")

    canvas = GREYS + (np.asarray(text).astype(np.uint16) * (255 - GREYS) // 255).astype(np.uint8)
    canvas[top : top + tall, left : left + wide] = field
    canvas[top : top + tall, left + wide + 16 : left + wide + 30] = bar
    drawn = Image.fromarray(canvas).convert("P")
    drawn.putpalette(_palette(diverging))
    return drawn


def _indices(values: Floats, low: float, high: float) -> npt.NDArray[np.uint8]:
    """Each value's place in the palette."""
    with np.errstate(invalid="ignore"):
        position = np.clip((values - low) / (high - low), 0, 1) * (LEVELS - 1)
    places: npt.NDArray[np.uint8] = np.nan_to_num(position).round().astype(np.uint8)
    places[np.isneginf(values)] = ZERO
    places[np.isnan(values) | np.isposinf(values)] = NOT_FINITE
    places[_beyond(values)] = BEYOND
    return places


def _beyond(values: Floats) -> npt.NDArray[Any]:
    """Where a record ``[S, T]`` is NaN to its end, though not all of it."""
    to_the_end = np.logical_and.accumulate(np.isnan(values)[:, ::-1], axis=1)[:, ::-1]
    return to_the_end & ~to_the_end[:, :1]


def _row_ticks(count: int, names: Sequence[str], tall: int) -> list[tuple[int, str]]:
    """Pixels from the top, and what stands there."""
    if names or count <= 5:  # few enough to name each, or as many as there is room for
        names = names or [str(t) for t in range(count)]
        every = math.ceil(13 * count / tall)
        return [(tall - round((t + 0.5) / count * tall), names[t]) for t in range(0, count, every)]
    last = count - 1
    return [(tall - round(k / 4 * tall), str(min(k * count // 4, last))) for k in range(5)]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, eight at most, from ``low`` to ``high``."""
    rough = (high - low) / 7
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


@cache
def _font() -> Any:
    return ImageFont.load_default(13)


@cache
def _palette(diverging: bool) -> list[int]:
    ramp = np.array(DIVERGING if diverging else SEQUENTIAL)
    at = np.linspace(0, len(ramp) - 1, LEVELS)
    levels = np.stack([np.interp(at, np.arange(len(ramp)), ramp[:, c]) for c in range(3)], -1)
    special = [(0, 0, 0), (220, 20, 20), (230, 230, 230)]  # ZERO, NOT_FINITE, BEYOND
    greys = np.linspace(0, 255, 256 - GREYS)[:, None].repeat(3, 1)
    colours = np.concatenate([levels, special, greys])
    return [int(value) for value in colours.round().astype(int).flatten()]
