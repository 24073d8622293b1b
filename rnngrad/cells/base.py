"""What every configurable cell has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from rnngrad.nn import unroll
from rnngrad.parts import COUNT, Part, Registry


@dataclass(frozen=True)
class CellPart(Part, ABC):
    """A kind of cell and its size.

    Args:
        hidden_size: ``H``.
        num_layers: Layers stacked on each other.

    Attributes:
        recomputes: Whether its layers have ``recompute_segments``, as those of ``rnngrad.nn``.
    """

    recomputes: ClassVar[bool] = False

    hidden_size: Annotated[int, COUNT]
    num_layers: Annotated[int, COUNT]

    @abstractmethod
    def cell(self, input_size: int) -> torch.nn.Module:
        """One layer's step, called as torch.nn's cells are."""

    def layers(self, input_size: int) -> torch.nn.Module:
        """All layers over time, called as torch.nn's: ``x [T, B, I] -> ([T, B, H], state)``."""
        sizes = [input_size] + [self.hidden_size] * (self.num_layers - 1)
        return Unrolled(self.cell(size) for size in sizes)

    def adjust_(self, module: torch.nn.Module) -> None:
        """Gives freshly initialised weights, of a cell or of layers, what this part asks for."""
        return


class Unrolled(torch.nn.Module):
    """Cells stacked on each other, each run over time by ``unroll``."""

    def __init__(self, cells: Any) -> None:
        super().__init__()
        self.cells = torch.nn.ModuleList(cells)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        states = []
        for cell in self.cells:
            x, state = unroll(cell, x)
            states.append(state)
        return x, states


CELLS: Registry[CellPart] = Registry("cell", "rnngrad.cells")
