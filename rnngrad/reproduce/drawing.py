"""Figures of experiments, said in numbers; ``rnngrad.report.published`` draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rnngrad.reproduce.experiment import Rows


@dataclass(frozen=True)
class Line:
    """A series.

    Args:
        x: Ascending.
        y: NaN and ``None`` are gaps.
        label: In the legend; lines of the same label share colour and dashes, and stand there once.
        band: Lower and upper ends of an interval around ``y``.
        points: Draws points and not a line.
    """

    x: Any
    y: Any
    label: str
    band: tuple[Any, Any] | None = None
    points: bool = False


def through(pairs: Sequence[Sequence[Any]], label: str, *, points: bool = False) -> Line:
    """A line through pairs ``(x, y)``, as rows keep a curve."""
    x, y = zip(*pairs, strict=True)
    return Line(x, y, label, points=points)


def line_each(rows: Rows, key: str, label: str) -> list[Line]:
    """A line a row, of a curve that is kept as pairs ``(x, y)``."""
    return [through(row[key], label) for row in rows]


@dataclass(frozen=True)
class Field:
    """A surface from above.

    Args:
        x: Of the columns.
        y: Of the rows.
        value: ``[y, x]``.
        label: Of the colours.
    """

    x: Any
    y: Any
    value: Any
    label: str


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        title: Above it.
        x: Label of the axis, with its unit.
        y: Likewise.
        lines: In it.
        behind: A surface behind them.
        levels: Horizontal lines, by their label: chance, a threshold.
        published: Points ``(x, y)`` that a paper or its code's log gives, by their label.
        logarithmic: Which axes are, of ``x``, ``y``, ``xy``.
        limits: Of the ``y`` axis.
        ticks: What stands at 0, 1, 2, ... of the ``x`` axis, in place of numbers.
        x_limits: Of the ``x`` axis.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line] = ()
    behind: Field | None = None
    levels: Mapping[str, float] = field(default_factory=dict)
    published: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    logarithmic: str = ""
    limits: tuple[float | None, float | None] = (None, None)
    ticks: Sequence[str] = ()
    x_limits: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Drawing:
    """Panels side by side, in rows.

    Args:
        panels: From left to right.
        across: In a row at most.
    """

    panels: Sequence[Panel]
    across: int = 3
