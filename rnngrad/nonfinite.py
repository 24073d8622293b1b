"""Losses and gradients that are not finite: where it begins, and what becomes of the update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rnngrad.bptt import record
from rnngrad.model import SequenceModel
from rnngrad.regularization import recurrent_weights
from rnngrad.replay import undisturbed
from rnngrad.task import Task

POLICIES = ("stop", "skip", "pascanu")


@dataclass(frozen=True)
class NonFinite:
    """What becomes of an update whose loss or gradient is not finite.

    Guards look at one side only: however small a loss or a gradient becomes, the update is made.

    Args:
        policy: ``stop`` ends the run before the update. ``skip`` leaves the update out. ``pascanu``
            shrinks the recurrent weights in its place: their gradient is ``0.02 W_hh`` and all
            others are 0, also where the norm is over ``1e10``.
        patience: So many such updates in a row are let pass, and the next ends the run; ``None``
            lets all pass.

    Reference:
        The code of Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural
        networks", ICML 2013 (``trainingRNNs/RNN.py``); the paper does not mention it.
    """

    policy: str = "stop"
    patience: int | None = None

    @property
    def bound(self) -> float:
        """A gradient of a larger norm counts as one that is not finite."""
        return 1e10 if self.policy == "pascanu" else math.inf

    def lets_pass(self, before: int) -> bool:
        """Whether an update that is not finite is no end, after so many others in a row."""
        return self.policy != "stop" and (self.patience is None or before < self.patience)

    @torch.no_grad()
    def replace_gradient_(self, model: SequenceModel) -> bool:
        """Puts another gradient in the place of the one there is; whether there is to be a step."""
        if self.policy != "pascanu":
            return False
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for _, weight in recurrent_weights(model.rnn):
            weight.grad = 0.02 * weight.detach()
        return True


def locate_nonfinite(
    model: SequenceModel, task: Task, inputs: Tensor, targets: Tensor, state: Any = None
) -> str:
    """What is not finite when this batch is run, and at which time step it first shows.

    Nothing, if everything is finite. Forward, the first step is the earliest; backward, the latest.
    Statistics and random streams are afterwards as they were.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name} is not finite"
    if (t := _first_nonfinite(inputs)) is not None:
        return f"the input is not finite at t = {t} of {len(inputs)}"
    with undisturbed(model):
        return _forward(model, task, inputs, targets, state) or _backward(
            model, task, inputs, targets, state
        )


@torch.no_grad()
def _forward(model: SequenceModel, task: Task, inputs: Tensor, targets: Tensor, state: Any) -> str:
    outputs, hidden, _ = model(inputs, state)
    where = f"hidden state of the last layer ({hidden.shape[-1]} units)"
    if (t := _first_nonfinite(hidden)) is not None:
        return f"{where} is not finite from t = {t} of {len(hidden)} on"
    if not outputs.isfinite().all():
        return "the read-out's output is not finite while every hidden state is"
    if not (loss := task.loss(outputs, targets)).isfinite():
        return f"the loss is {loss.item()} while every output is finite"
    return ""


def _backward(model: SequenceModel, task: Task, inputs: Tensor, targets: Tensor, state: Any) -> str:
    model.zero_grad()
    with record(model) as tape:
        task.loss(model(inputs, state).outputs, targets).backward()
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    if not bad:
        return ""
    steps = []
    for name in tape:
        back_in_time = tape[name].hidden_norm.flip(0).unsqueeze(-1)
        if (k := _first_nonfinite(back_in_time)) is not None:
            t = len(back_in_time) - 1 - k
            steps.append(f"going back, ∂L/∂h_t of {name} is not finite from t = {t} on")
    return "; ".join([f"gradient of {', '.join(bad)} is not finite", *steps])


def _first_nonfinite(values: Tensor) -> int | None:
    """The first index of ``values [T, ...]`` that holds a value that is not finite."""
    bad = (~values.isfinite()).flatten(1).any(1).nonzero()
    return int(bad[0]) if len(bad) else None
