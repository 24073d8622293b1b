"""What a report is made of: a figure, a table or a remark, with the words that go with it."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

DPI = 160


@dataclass(frozen=True)
class Table:
    """Rows under a head.

    Args:
        head: Names of the columns, with units.
        rows: As many cells each.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Exhibit:
    """One section of the report.

    Args:
        name: Of its files, without ending.
        title: In a few words.
        text: What it shows and how to read it, with code as ``code`` makes it.
        figure: Saved as PNG and SVG.
        tables: Stand in the page and in the Markdown.
        data: The numbers of the figure, columns of one length: saved as CSV.
    """

    name: str
    title: str
    text: str
    figure: Figure | None = None
    tables: Sequence[Table] = ()
    data: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """Where an exhibit's files are, below the report's folder.

    Args:
        exhibit: What was saved.
        files: Names of files.
        picture: The SVG as a data URI; empty without a figure.
        width: Of the figure, in inches.
    """

    exhibit: Exhibit
    files: Sequence[str]
    picture: str = ""
    width: float = 0.0


def save(exhibit: Exhibit, out: Path) -> Saved:
    """Writes an exhibit's figure as PNG and SVG, and its data as CSV."""
    files, picture, width = [], "", 0.0
    if (figure := exhibit.figure) is not None:
        figure.set_dpi(DPI)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        # not savefig, which goes over the layout again: that takes as long as drawing
        FigureCanvasAgg(figure).print_png(out / f"{exhibit.name}.png")  # type: ignore[no-untyped-call]
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})  # type: ignore[no-untyped-call]
        drawing = buffer.getvalue().encode()
        (out / f"{exhibit.name}.svg").write_bytes(drawing)
        picture = "data:image/svg+xml;base64," + base64.b64encode(drawing).decode()
        files += [f"{exhibit.name}.png", f"{exhibit.name}.svg"]
        width = float(figure.get_size_inches()[0])
    if exhibit.data:
        write_csv(
            out / f"{exhibit.name}.csv",
            list(exhibit.data),
            zip(*exhibit.data.values(), strict=True),
        )
        files.append(f"{exhibit.name}.csv")
    return Saved(exhibit, files, picture, width)


def write_csv(path: Path, head: Sequence[str], rows: Any) -> None:
    """A table as other programs read it: empty where there is no number."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows([cell(value) for value in row] for row in rows)


def cell(value: Any) -> Any:
    """As a CSV has it: floats to their last digit, nothing for NaN and ``None``."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return value


def code(text: str) -> str:
    """As code in a text, whatever backticks it has itself.

    >>> code("cell=lstm"), code("a`b")
    ('`cell=lstm`', '`` a`b ``')
    """
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"


def number(value: float | None, digits: int = 3) -> str:
    """For a table that is read, not computed with.

    >>> number(0.012345), number(1234567.0), number(None), number(float("inf"))
    ('0.0123', '1.23e+06', '-', '∞')
    """
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """A fraction of 1; small ones keep two digits.

    >>> percent(0.25), percent(0.0012), percent(None)
    ('25 %', '0.12 %', '-')
    """
    if value is None or math.isnan(value):
        return "-"
    return f"{100 * value:.0f} %" if value >= 0.1 or value == 0 else f"{100 * value:.2g} %"
