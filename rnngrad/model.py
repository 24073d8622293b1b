"""Recurrent layers and a linear read-out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rnngrad.cells import CellPart
from rnngrad.init import Init
from rnngrad.task import Task


class SequenceModel(nn.Module):
    """``x [T, B, I]`` -> layers over time -> read-out ``[T, B, O]``, or ``[B, O]`` at the end.

    Args:
        rnn: Layers called as torch.nn's.
        readout: ``H -> O``.
        last_step_only: Read out after the last step alone.
    """

    def __init__(self, rnn: nn.Module, readout: nn.Linear, last_step_only: bool) -> None:
        super().__init__()
        self.rnn = rnn
        self.readout = readout
        self.last_step_only = last_step_only

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, state = self.rnn(inputs)
        # the state, not hidden[-1]: going back, that would be T steps of zeros and one that is not
        outputs: Tensor = self.readout(_top(state) if self.last_step_only else hidden)
        return outputs


def _top(state: Any) -> Tensor:
    """The last ``h [B, H]`` of the topmost layer: of torch.nn's states, or of a list of cells'."""
    if isinstance(state, list):  # a cell's h, or (h, c), for each layer
        state = state[-1]
        h: Tensor = state[0] if isinstance(state, tuple) else state
        return h
    h_n: Tensor = state[0] if isinstance(state, tuple) else state
    return h_n[-1]


def build_model(
    cell: CellPart, task: Task, init: Init, seed: int, recompute_segments: int = 1
) -> SequenceModel:
    """The model of a run, its weights a function of ``seed`` alone."""
    # torch's initialisers draw from the global generator: lend it, and give it back as it was
    with torch.random.fork_rng(devices=[]):
        rnn = cell.layers(task.input_size)
        readout = nn.Linear(cell.hidden_size, task.output_size)
        model = SequenceModel(rnn, readout, task.last_step_only)
        torch.manual_seed(seed)
        init(model)
        cell.adjust_(model.rnn)
    if recompute_segments > 1:
        model.rnn.recompute_segments = recompute_segments  # type: ignore[assignment]
    return model


def layer_key(name: str) -> str:
    """A layer's name in a tape of ``SequenceModel`` as its key in a run: ``l0``, ``l0_reverse``.

    >>> layer_key("rnn.l1_reverse"), layer_key("rnn.cells.1.l0")
    ('l1_reverse', 'l1')
    """
    path = name.split(".")
    return f"l{path[-2]}" if "cells" in path else path[-1]
