"""The training loop: one step after the other, every gradient measured before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from tqdm import tqdm

from rnngrad.bptt import Tape, record
from rnngrad.clipping import Clip, ClipReport
from rnngrad.model import SequenceModel
from rnngrad.task import Task, evaluation_generator, training_generator
from rnngrad.tracking import Result, Tracker

EVALUATION_CHUNK = 100  # sequences a forward pass: bounds memory, and keeps the numbers the same


def train(
    model: SequenceModel,
    task: Task,
    optimizer: torch.optim.Optimizer,
    clip: Clip,
    tracker: Tracker,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    eval_every: int,
    eval_size: int,
    log_every: int,
    stop_when_solved: bool,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Trains ``model`` on fresh batches of ``task`` and tracks it.

    Args:
        model: Changed in place.
        task: Gives data, loss and the rule for solved.
        optimizer: Of the model's parameters.
        clip: Called once between backward and the optimiser's step.
        tracker: Is told of every logged step.
        seed: Of the data; step ``s`` trains on a pure function of ``(seed, s)``.
        steps: Updates at most.
        batch_size: ``B``.
        eval_every: Evaluate after every so many updates, and after the last.
        eval_size: Sequences in an evaluation.
        log_every: Log the first step, every so many, every evaluated one and the last.
        stop_when_solved: End at the first evaluation that meets the task's rule.
        should_stop: Asked after every update; true ends the run as interrupted.

    Returns:
        How it ended. A loss or gradient that is not finite ends it before the update.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    solved_at: int | None = None
    evaluation: dict[str, float] = {}
    clipped = done = 0
    status, reason, loss_value = "completed", None, math.nan
    bar = tqdm(
        total=steps, desc=tracker.directory.name, unit="step", disable=None, dynamic_ncols=True
    )
    for step in range(1, steps + 1):
        inputs, targets = (
            tensor.to(device) for tensor in task.batch(batch_size, training_generator(seed, step))
        )
        evaluates = step % eval_every == 0 or step == steps
        logs = step == 1 or step % log_every == 0 or evaluates

        for parameter in parameters:
            parameter.grad = None
        outputs, loss_value, tape = _backward(model, task, inputs, targets, recorded=logs)
        report = clip(parameters) if math.isfinite(loss_value) else _NO_GRADIENT
        if not report.finite:
            status = "diverged"
            reason = f"step {step}: " + locate_nonfinite(model, task, inputs, targets)
            row = _row(step, loss_value, task.accuracy(outputs, targets).item(), report)
            tracker.log(row, None)
            break
        optimizer.step()
        done = step
        clipped += report.clipped

        interrupted = should_stop()
        if evaluates and not interrupted:
            evaluation = evaluate(model, task, eval_size)
            if solved_at is None and task.solved(evaluation["loss"], evaluation["accuracy"]):
                solved_at = step
            if not math.isfinite(evaluation["loss"]):
                status = "diverged"
                reason = f"evaluation after step {step}: " + locate_nonfinite(
                    model, task, inputs, targets
                )
        solved = stop_when_solved and solved_at is not None
        ends = interrupted or status == "diverged" or solved or step == steps
        if logs or ends:
            accuracy = task.accuracy(outputs, targets).item()
            row = _row(step, loss_value, accuracy, report)
            if evaluates and not interrupted:
                row |= {f"eval_{name}": value for name, value in evaluation.items()}
            tracker.log(row, tape)
            bar.set_postfix(
                loss=f"{loss_value:.4g}", accuracy=f"{accuracy:.3f}", grad=f"{report.norm_pre:.3g}"
            )
        bar.update()
        if interrupted:
            status = "interrupted"
        if ends:
            break
    bar.close()
    return Result(
        status,
        done,
        loss_value,
        evaluation.get("loss"),
        evaluation.get("accuracy"),
        solved_at,
        clipped / max(done, 1),
        reason,
    )


@torch.no_grad()
def evaluate(model: SequenceModel, task: Task, size: int) -> dict[str, float]:
    """Mean ``loss`` and ``accuracy`` over ``size`` sequences, the same ones for every seed."""
    device = next(model.parameters()).device
    totals = {"loss": 0.0, "accuracy": 0.0}
    for index, start in enumerate(range(0, size, EVALUATION_CHUNK)):
        chunk = min(EVALUATION_CHUNK, size - start)
        inputs, targets = (
            tensor.to(device) for tensor in task.batch(chunk, evaluation_generator(index))
        )
        outputs = model(inputs)
        totals["loss"] += chunk * task.loss(outputs, targets).item()
        totals["accuracy"] += chunk * task.accuracy(outputs, targets).item()
    return {name: total / size for name, total in totals.items()}


def locate_nonfinite(model: SequenceModel, task: Task, inputs: Tensor, targets: Tensor) -> str:
    """What is not finite when this batch is run, and at which time step it first shows.

    Forward, the first step is the earliest; backward, the latest.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name} is not finite"
    with torch.no_grad():
        hidden, _ = model.rnn(inputs)
        where = f"hidden state of the last layer ({hidden.shape[-1]} units)"
        if (t := _first_nonfinite(hidden)) is not None:
            return f"{where} is not finite from t = {t} of {len(hidden)} on"
        outputs = model(inputs)
        if not outputs.isfinite().all():
            return "the read-out's output is not finite while every hidden state is"
        if not (loss := task.loss(outputs, targets)).isfinite():
            return f"the loss is {loss.item()} while every output is finite"
    model.zero_grad()
    with record(model) as tape:
        task.loss(model(inputs), targets).backward()
    named = [n for n, p in model.named_parameters() if p.grad is not None]
    bad = [n for n in named if not model.get_parameter(n).grad.isfinite().all()]  # type: ignore[union-attr]
    steps = []
    for name in tape:
        back_in_time = tape[name].hidden_norm.flip(0).unsqueeze(-1)
        if (k := _first_nonfinite(back_in_time)) is not None:
            t = len(back_in_time) - 1 - k
            steps.append(f"going back, ∂L/∂h_t of {name} is not finite from t = {t} on")
    if not bad:
        return "the loss is not finite, while everything on this step's training batch is"
    return "; ".join([f"gradient of {', '.join(bad)} is not finite", *steps])


def _backward(
    model: SequenceModel, task: Task, inputs: Tensor, targets: Tensor, *, recorded: bool
) -> tuple[Tensor, float, Tape | None]:
    """Forward, and backward unless the loss is not finite: outputs, loss and record."""
    recording = record(model) if recorded else nullcontext()
    try:
        with recording as tape:
            outputs = model(inputs)
            loss = task.loss(outputs, targets)
            value = loss.item()
            if not math.isfinite(value):
                raise _NonFiniteLoss
            loss.backward()
    except _NonFiniteLoss:
        tape = None
    return outputs.detach(), value, tape


class _NonFiniteLoss(Exception):
    """Leaves a ``record`` block without a backward."""


_NO_GRADIENT = ClipReport(math.nan, math.nan, 1.0, clipped=False, finite=False)


def _row(step: int, loss: float, accuracy: float, report: ClipReport) -> dict[str, float]:
    return {
        "step": step,
        "loss": loss,
        "accuracy": accuracy,
        "grad_norm_pre": report.norm_pre,
        "grad_norm_post": report.norm_post,
        "clip_coef": report.coef,
        "clipped": int(report.clipped),
    }


def _first_nonfinite(values: Tensor) -> int | None:
    """The first index of ``values [T, ...]`` that holds a value that is not finite."""
    bad = (~values.isfinite()).flatten(1).any(1).nonzero()
    return int(bad[0]) if len(bad) else None
