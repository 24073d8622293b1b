"""Recurrent layers and a linear read-out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rnngrad.bptt_clip import BPTTClip, install
from rnngrad.cells import CellPart
from rnngrad.cells.base import Unrolled
from rnngrad.init import Init
from rnngrad.task import Task


class Passed(NamedTuple):
    """What a model makes of a batch.

    Args:
        outputs: ``[T, B, O]``, or ``[B, O]`` at the end.
        hidden: The last layer's states ``h_t [T, B, H]``.
        state: After the last step, of every layer.
    """

    outputs: Tensor
    hidden: Tensor
    state: Any


class SequenceModel(nn.Module):
    """``x [T, B, I]`` -> layers over time -> read-out.

    Args:
        rnn: Layers called as torch.nn's.
        readout: ``H -> O``.
        last_step_only: Read out after the last step alone.
        initial_hidden: Value of every unit of ``h_0``; that of ``c_0`` is 0.
    """

    def __init__(
        self,
        rnn: nn.Module,
        readout: nn.Module,
        last_step_only: bool,
        initial_hidden: float = 0.0,
    ) -> None:
        super().__init__()
        self.rnn = rnn
        self.readout = readout
        self.last_step_only = last_step_only
        self.initial_hidden = initial_hidden

    def forward(self, inputs: Tensor, state: Any = None) -> Passed:
        """Runs the batch from ``state``, by default the first one."""
        hidden, state = self.over_time(inputs, self.first_state(inputs, state))
        # the state, not hidden[-1]: going back, that would be T steps of zeros and one that is not
        return Passed(self.readout(_top(state) if self.last_step_only else hidden), hidden, state)

    def over_time(self, inputs: Tensor, state: Any, start: int = 0) -> tuple[Tensor, Any]:
        """The layers alone, over a part of a sequence that begins at step ``start``."""
        if start and isinstance(self.rnn, Unrolled):
            hidden, last = self.rnn(inputs, state, start)
        else:  # the equations of torch.nn's layers are the same at every step
            hidden, last = self.rnn(inputs, state)
        return hidden, last

    @torch.no_grad()
    def first_state(self, inputs: Tensor, state: Any = None) -> Any:
        """``state``, or if there is none what the layers start from."""
        if state is not None or not self.initial_hidden:
            return state
        training = self.rnn.training
        self.rnn.eval()  # nothing is to be learnt from a step that is not one
        _, state = self.rnn(inputs[:1])  # in the form of the layers' own
        self.rnn.train(training)

        def filled(part: Any) -> Any:
            if isinstance(part, list):
                return [filled(layer) for layer in part]
            if isinstance(part, tuple):
                return (filled(part[0]), torch.zeros_like(part[1]))
            return torch.full_like(part, self.initial_hidden)

        return filled(state)


def detached(state: Any) -> Any:
    """The same state with nothing behind it to go back to."""
    if isinstance(state, list | tuple):
        return type(state)(detached(part) for part in state)
    return state.detach()


def first_rows(state: Any, count: int) -> Any:
    """The state of the first ``count`` sequences of a batch.

    Raises:
        ValueError: There are fewer.
    """
    if isinstance(state, list | tuple):
        return type(state)(first_rows(part, count) for part in state)
    if state.shape[-2] < count:
        raise ValueError(f"a batch of {count} cannot go on where one of {state.shape[-2]} ended")
    return state[..., :count, :]


def _top(state: Any) -> Tensor:
    """The last ``h [B, H]`` of the topmost layer: of torch.nn's states, or of a list of cells'."""
    if isinstance(state, list):  # a cell's h, or (h, c), for each layer
        state = state[-1]
        h: Tensor = state[0] if isinstance(state, tuple) else state
        return h
    h_n: Tensor = state[0] if isinstance(state, tuple) else state
    return h_n[-1]


def build_model(
    cell: CellPart,
    task: Task,
    init: Init,
    seed: int,
    recompute_segments: int = 1,
    bptt_clip: BPTTClip | None = None,
) -> SequenceModel:
    """The model of a run, its weights a function of ``seed`` alone."""
    # torch's initialisers draw from the global generator: lend it, and give it back as it was
    with torch.random.fork_rng(devices=[]):
        rnn = cell.layers(task.input_size)
        readout: nn.Module = nn.Identity()
        if task.reads_out:
            readout = nn.Linear(cell.hidden_size, task.output_size)
        model = SequenceModel(rnn, readout, task.last_step_only, task.initial_hidden)
        torch.manual_seed(seed)
        init(model)
        cell.adjust_(model.rnn)
    if recompute_segments > 1:
        model.rnn.recompute_segments = recompute_segments  # type: ignore[assignment]
    if bptt_clip is not None:
        install(model.rnn, bptt_clip)
    return model


def layer_key(name: str) -> str:
    """A layer's name in a tape of ``SequenceModel`` as its key in a run: ``l0``, ``l0_reverse``.

    >>> layer_key("rnn.l1_reverse"), layer_key("rnn.cells.1.l0")
    ('l1_reverse', 'l1')
    """
    path = name.split(".")
    return f"l{path[-2]}" if "cells" in path else path[-1]
