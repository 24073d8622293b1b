"""Truncated back-propagation through time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnngrad.bptt import LayerRecord, record
from rnngrad.model import Passed, SequenceModel, detached
from rnngrad.norms import norms
from rnngrad.task import Task


class _Way(NamedTuple):
    """One way back: from step ``end`` to ``start``, with the losses from ``own`` on."""

    start: int
    own: int
    end: int


def truncated_backward(
    model: SequenceModel,
    task: Task,
    inputs: Tensor,
    targets: Tensor,
    state: Any,
    *,
    k1: int,
    k2: int,
    recorded: bool,
) -> tuple[Passed, Tensor, dict[str, LayerRecord]]:
    """Adds the truncated gradient of one batch to the parameters' ``.grad``.

    After every ``k1`` steps, and after the last, the losses of those steps go back through ``k2``
    steps and no further. The gradients are summed and the weights stay as they are throughout the
    batch: with ``k2 >= T`` that is all of back-propagation through time. Every step is run forward
    once without a graph, and about ``k2 / k1`` times more to go back; of what going back needs,
    ``k2`` steps are kept at a time.

    Args:
        model: Without statistics over the batch, which would be taken several times.
        task: Gives the loss.
        inputs: ``[T, B, I]``.
        targets: The task's.
        state: What the layers start from; ``None`` for the model's own.
        k1: Steps between two ways back.
        k2: Steps that each goes back, at least ``k1``.
        recorded: Whether to record.

    Returns:
        What the model made of the batch, the loss (if it is not finite, without a backward), and
        records by layer: ``∂L/∂h_t`` summed over the ways back through step ``t``. Where these
        overlap (``k2 > k1``), ``direct_norm`` of a layer under another one is NaN.

    Raises:
        ValueError: ``k1`` is less than 1, or more than ``k2``.

    Reference:
        Sutskever, "Training recurrent neural networks", PhD thesis, University of Toronto 2013.
    """
    if not 1 <= k1 <= k2:
        raise ValueError(f"truncated_backward: 1 <= k1 <= k2, got k1 = {k1} and k2 = {k2}")
    ends = [*range(k1, len(inputs), k1), len(inputs)]
    ways = [_Way(max(0, end - k2), own, end) for own, end in zip([0, *ends], ends, strict=False)]
    states, first, last = _states(model, inputs, state, ways)
    states.requires_grad_()
    outputs = model.readout(states[-1] if model.last_step_only else states)
    loss = task.loss(outputs, targets)
    passed = Passed(outputs.detach(), states.detach(), last)
    if not loss.isfinite():
        return passed, loss.detach(), {}
    loss.backward()
    direct = states.grad  # what arrives at every h_t of the last layer from the loss
    assert direct is not None
    # a way back with nothing to send would be zeros all along
    ways = [way for way in ways if direct[way.own : way.end].any()] or ways[-1:]
    calls: dict[str, list[LayerRecord]] = {}
    for way in ways:  # one after the other: only one graph is kept at a time
        with record(model, full=True) if recorded else nullcontext() as tape:
            part = inputs[way.start : way.end]
            hidden, _ = model.over_time(part, first[way.start], way.start)
            hidden[way.own - way.start :].backward(direct[way.own : way.end])
        for name, layer in (tape or {}).items():
            calls.setdefault(name, []).append(layer)
    records = {name: _summed(found, ways, len(inputs)) for name, found in calls.items()}
    if records:
        top = list(records)[-1]
        records[top] = replace(records[top], direct_norm=norms(direct))
    return passed, loss.detach(), records


@torch.no_grad()
def _states(
    model: SequenceModel, inputs: Tensor, state: Any, ways: Sequence[_Way]
) -> tuple[Tensor, dict[int, Any], Any]:
    """``h_t`` of the last layer, all layers' states before each way back, and the last ones."""
    state = model.first_state(inputs, state)
    marks = sorted({way.start for way in ways})
    hidden, first = [], {}
    for low, high in zip(marks, [*marks[1:], len(inputs)], strict=True):
        first[low] = state
        part, state = model.over_time(inputs[low:high], state, low)
        hidden.append(part)
    return torch.cat(hidden), first, detached(state)


def _summed(calls: Sequence[LayerRecord], ways: Sequence[_Way], steps: int) -> LayerRecord:
    """One layer's records of all ways back as one over the whole sequence."""

    def over_time(name: str) -> Tensor:
        first = getattr(calls[0], name)
        total: Tensor = first.new_zeros(steps, *first.shape[1:])
        for call, way in zip(calls, ways, strict=True):
            total[way.start : way.end] += getattr(call, name)
        return total

    hidden, cell = over_time("hidden_grad"), None
    if calls[0].cell_grad is not None:
        cell = over_time("cell_grad")
    direct_norm = over_time("direct_norm")
    if any(way.own > way.start for way in ways):  # norms of sums are not sums of norms
        direct_norm.fill_(math.nan)
    clipped = None
    if calls[0].clipped is not None:  # of all that was looked at on the ways back through a step
        ways_through = hidden.new_zeros(steps, 1, dtype=torch.float64)
        for way in ways:
            ways_through[way.start : way.end] += 1
        clipped = over_time("clipped") / ways_through.clamp_min(1).cpu()
    return LayerRecord(
        hidden_norm=norms(hidden),
        direct_norm=direct_norm,
        cell_norm=None if cell is None else norms(cell),
        hidden_grad=hidden,
        cell_grad=cell,
        clipped=clipped,
    )
