"""How every figure of the project looks."""

from __future__ import annotations

from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's colours, which the colour-blind can tell apart."""

DASHES = ("-", "--", "-.", ":")
"""Tell lines apart where colours run out, or are printed in grey."""

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
"""For ``matplotlib.rc_context``."""
