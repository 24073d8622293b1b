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

LEFT, TOP, WIDE, TALL, RIGHT, BOTTOM = 76, 64, 464, 250, 100, 66
"""Pixels. TensorBoard shows a picture of 640 in a card 320 wide by leaving out every second pixel:
the text is twice as large as it is to be read."""
LINE = 26
"""Of text."""

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
    absent: bool = False,
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
        absent: NaN means that there is nothing, and is grey.

    Returns:
        A picture with a palette, a third as large as one in full colour.
    """
    names = max((int(_font().getlength(name)) for name in rows), default=0)
    left, tall = max(LEFT, 24 + names), max(TALL, min(LINE * len(rows), 100 * LINE))
    columns = np.linspace(0, len(step) - 1, WIDE).round().astype(int)
    lines = (np.arange(tall)[::-1] * values.shape[1]) // tall
    if values.size < WIDE * tall:  # coloured before it is made larger, else after it is smaller
        field = _indices(values, low, high, absent)[columns].T[lines]
    else:
        field = _indices(values[columns][:, lines[::-1]], low, high, absent)[:, ::-1].T
    bar = _indices(np.linspace(high, low, tall)[:, None], low, high)

    text = Image.new("L", (left + WIDE + RIGHT, TOP + tall + BOTTOM), 255)
    draw = ImageDraw.Draw(text)
    draw.font = _font()
    draw.text((text.width // 2, 8), title, fill=0, anchor="ma")
    draw.text((8, TOP - 30), up, fill=0)
    draw.text((left + WIDE // 2, TOP + tall + 36), across, fill=0, anchor="ma")
    numbers = [str(step[columns[min(k * WIDE // 4, WIDE - 1)]]) for k in range(5)]
    _draw_ticks(draw, left, tall, numbers, _row_ticks(values.shape[1], rows, tall))
    for value in _ticks(low, high):
        y = TOP + round((high - value) / (high - low) * (tall - 1))
        draw.text((left + WIDE + 48, y), f"{value:g}", fill=0, anchor="lm")

    canvas = GREYS + (np.asarray(text).astype(np.uint16) * (255 - GREYS) // 255).astype(np.uint8)
    canvas[TOP : TOP + tall, left : left + WIDE] = field
    canvas[TOP : TOP + tall, left + WIDE + 20 : left + WIDE + 40] = bar
    drawn = Image.fromarray(canvas).convert("P")
    drawn.putpalette(_palette(diverging))
    return drawn


def _draw_ticks(
    draw: ImageDraw.ImageDraw,
    left: int,
    tall: int,
    columns: Sequence[str],
    rows: Sequence[tuple[int, str]],
) -> None:
    """What stands under the field, evenly spaced, and to its left, by pixels from the top."""
    for k, name in enumerate(columns):
        x = left + k * WIDE // (len(columns) - 1)
        draw.line([(x, TOP + tall), (x, TOP + tall + 6)], fill=0, width=2)
        draw.text((x, TOP + tall + 9), name, fill=0, anchor="ma")
    for y, name in rows:
        draw.line([(left - 6, TOP + y), (left, TOP + y)], fill=0, width=2)
        draw.text((left - 12, TOP + y), name, fill=0, anchor="rm")


def _indices(
    values: Floats, low: float, high: float, absent: bool = False
) -> npt.NDArray[np.uint8]:
    """Each value's place in the palette."""
    with np.errstate(invalid="ignore"):
        position = np.clip((values - low) / (high - low), 0, 1) * (LEVELS - 1)
    places: npt.NDArray[np.uint8] = np.nan_to_num(position).round().astype(np.uint8)
    places[np.isneginf(values)] = ZERO
    places[np.isnan(values) | np.isposinf(values)] = NOT_FINITE
    places[np.isnan(values) if absent else _beyond(values)] = BEYOND
    return places


def _beyond(values: Floats) -> npt.NDArray[Any]:
    """Where a record ``[S, T]`` is NaN to its end, though not all of it."""
    to_the_end = np.logical_and.accumulate(np.isnan(values)[:, ::-1], axis=1)[:, ::-1]
    return to_the_end & ~to_the_end[:, :1]


def _row_ticks(count: int, names: Sequence[str], tall: int) -> list[tuple[int, str]]:
    """Pixels from the top, and what stands there."""
    if names or count <= 5:  # few enough to name each, or as many as there is room for
        names = names or [str(t) for t in range(count)]
        every = math.ceil(0.9 * LINE * count / tall)
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
    return ImageFont.load_default(20)


@cache
def _palette(diverging: bool) -> list[int]:
    ramp = np.array(DIVERGING if diverging else SEQUENTIAL)
    at = np.linspace(0, len(ramp) - 1, LEVELS)
    levels = np.stack([np.interp(at, np.arange(len(ramp)), ramp[:, c]) for c in range(3)], -1)
    special = [(0, 0, 0), (220, 20, 20), (230, 230, 230)]  # ZERO, NOT_FINITE, BEYOND
    greys = np.linspace(0, 255, 256 - GREYS)[:, None].repeat(3, 1)
    colours = np.concatenate([levels, special, greys])
    return [int(value) for value in colours.round().astype(int).flatten()]
