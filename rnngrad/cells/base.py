"""What every configurable cell has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from rnngrad.nn import State, unroll
from rnngrad.parts import COUNT, Part, Registry


@dataclass(frozen=True)
class CellPart(Part, ABC):
    """A kind of cell and its size.

    Args:
        hidden_size: ``H``.
        num_layers: Layers stacked on each other.
    """

    hidden_size: Annotated[int, COUNT]
    num_layers: Annotated[int, COUNT]

    @property
    def recomputes(self) -> bool:
        """Whether its layers have ``recompute_segments``, as those of ``rnngrad.nn``."""
        return False

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


class CellModule(torch.nn.Module):
    """What cells that are not torch.nn's share: sizes, ``weight_ih``, and one bias, ``bias_ih``.

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        gates: Blocks of ``H`` rows.
        bias: Whether there is one.
    """

    weight_hh: Tensor
    bias_ih: Tensor | None

    def __init__(
        self, input_size: int, hidden_size: int, *, gates: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.weight_ih = torch.nn.Parameter(torch.empty(gates * hidden_size, input_size))
        self.bias_ih = torch.nn.Parameter(torch.empty(gates * hidden_size)) if bias else None

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"

    def zeros(self, input: Tensor) -> Tensor:
        """An initial state for ``input``."""
        return input.new_zeros(*input.shape[:-1], self.hidden_size)


class Unrolled(torch.nn.Module):
    """Cells stacked on each other, each run over time by ``unroll``."""

    def __init__(self, cells: Any) -> None:
        super().__init__()
        self.cells = torch.nn.ModuleList(cells)

    def forward(
        self, x: Tensor, states: Sequence[State] | None = None, start: int = 0
    ) -> tuple[Tensor, list[State]]:
        """Runs all cells over ``x [T, B, I]``, from ``states`` as an earlier call returned them.

        ``start`` is the number of the first time step.
        """
        given = [None] * len(self.cells) if states is None else states
        last: list[State] = []
        with parametrize.cached():  # a parametrised weight is computed once, not at every step
            for cell, state in zip(self.cells, given, strict=True):
                x, state = unroll(cell, x, state, start)
                last.append(state)
        return x, last


def gate_biases(module: torch.nn.Module, hidden_size: int) -> Iterator[list[Tensor]]:
    """The biases of each layer in ``module`` as ``[gates, H]``: ``bias_ih``, ``bias_hh`` if any."""
    parameters = dict(module.named_parameters())
    for name, bias in parameters.items():
        if name.rpartition(".")[2].startswith("bias_ih"):
            other = parameters.get(name.replace("bias_ih", "bias_hh"))
            both = [bias] if other is None else [bias, other]
            yield [b.view(-1, hidden_size) for b in both]


def set_gate_(biases: list[Tensor], gate: int, value: Tensor | float) -> None:
    """Makes ``value`` the sum of one gate's biases."""
    for bias in biases:
        bias[gate] = 0
    biases[0][gate] = value


@torch.no_grad()
def set_forget_bias_(module: torch.nn.Module, hidden_size: int, value: float | None) -> None:
    """The bias of the second of an LSTM's gates, in every layer; left alone if ``None``."""
    if value is not None:
        for biases in gate_biases(module, hidden_size):
            set_gate_(biases, 1, value)


def chrono(like: Tensor, length: int) -> Tensor:
    """``log U([1, length - 1])`` in the shape of ``like``: memories of up to ``length`` steps."""
    return torch.empty_like(like).uniform_(1, length - 1).log()


CELLS: Registry[CellPart] = Registry("cell", "rnngrad.cells")
