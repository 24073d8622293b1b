"""Clipping of rows, a row being one vector of one sequence at one step, on its way back in time."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rnngrad.norms import norms_on_device

Site = Literal["preact", "state", "carry"]


class RowClip(NamedTuple):
    """What is clipped, and how: all that a kernel needs to know of it.

    NaN stays NaN. By value an infinite entry becomes ``±c``. By norm a row with a NaN or an
    infinity has no direction to keep, and stays as it is: an overflow is not hidden as a row of
    zeros.

    Args:
        site: Where: ``preact`` clips ``∂L/∂`` the pre-activations, a row a gate; ``state``
            ``∂L/∂h_t``, then ``∂L/∂c_t``; ``carry`` what goes on to the step before alone, of ``h``
            and of ``c``.
        kind: ``value`` clamps every entry, ``norm`` scales the row.
        threshold: The largest magnitude of an entry, or norm of a row.
    """

    site: Site
    kind: Literal["value", "norm"]
    threshold: float

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Clipped ``rows [..., H]``, and how many of its ``count`` were clipped of each ``[...]``.

        The rows stay as they are; what comes is in their dtype.
        """
        if rows.device.type == "mps":  # has no float64
            clipped, counts = self(rows.cpu())
            return clipped.to(rows.device), counts.to(rows.device)
        if self.kind == "value":
            limit = self.limit(rows.dtype)
            return rows.clamp(-limit, limit), (rows.abs() > limit).sum(-1)
        norm = norms_on_device(rows)
        over = (norm > self.threshold) & (norm < math.inf)
        # in float64 and first the norm: the quotient of two small or large numbers is neither
        scaled = rows.double() / torch.where(over, norm, 1).unsqueeze(-1) * self.threshold
        return torch.where(over.unsqueeze(-1), scaled.to(rows.dtype), rows), over.long()

    def limit(self, dtype: torch.dtype) -> float:
        """The largest magnitude of an entry as a number of ``dtype``, infinity included."""
        return _rounded(self.threshold, dtype)

    def count(self, size: int) -> int:
        """How many things there are to clip in a row of ``size`` entries."""
        return size if self.kind == "value" else 1


@lru_cache(maxsize=64)
def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))
