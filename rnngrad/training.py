"""The training loop: one step after the other, every gradient measured before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rnngrad.bptt import LayerRecord, record
from rnngrad.clipping import ClipAudit, Clipper, ClipReport
from rnngrad.measure import Observation, Observer
from rnngrad.model import Passed, SequenceModel, detached, first_rows
from rnngrad.regularization import NoRegularizer, Regularizer
from rnngrad.task import EVALUATION_CHUNK, Task
from rnngrad.tracking import Result, Tracker
from rnngrad.truncation import truncated_backward


def train(
    model: SequenceModel,
    task: Task,
    optimizer: torch.optim.Optimizer,
    clipper: Clipper,
    tracker: Tracker,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    eval_every: int,
    eval_size: int,
    log_every: int,
    stop_when_solved: bool,
    log_per_decade: int | None = None,
    eval_lengths: Sequence[int] = (),
    tbptt: tuple[int, int] | None = None,
    regularizer: Regularizer = NoRegularizer(),  # noqa: B008
    nonlinearity: str | None = None,
    audit: ClipAudit | None = None,
    observer: Observer | None = None,
    learning_rate: Callable[[int], float] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Trains ``model`` on fresh batches of ``task`` and tracks it.

    Args:
        model: Changed in place.
        task: Gives data, loss and the rule for solved.
        optimizer: Of the model's parameters.
        clipper: Called once between backward and the optimiser's step.
        tracker: Is told of every logged step.
        seed: Of the data; step ``s`` trains on a pure function of ``(seed, s)``.
        steps: Updates at most.
        batch_size: ``B``.
        eval_every: Evaluate after every so many updates, and after the last.
        eval_size: Sequences in an evaluation.
        log_every: Log the first step, every so many, every evaluated one and the last.
        log_per_decade: In place of ``log_every``: so many steps a decade of training.
        stop_when_solved: End at the first evaluation that meets the task's rule.
        eval_lengths: Evaluate the task at these lengths as well.
        tbptt: ``(k1, k2)`` of truncated back-propagation; ``None`` for all of it.
        regularizer: Adds its gradient before clipping.
        nonlinearity: Of a vanilla RNN, for the regulariser.
        audit: Is shown every gradient before it is clipped.
        observer: Measures the model at some of the logged steps.
        learning_rate: Of each step, counted from 1; ``None`` leaves the optimiser's.
        should_stop: Asked after every update; true ends the run as interrupted.

    Returns:
        How it ended. A loss or gradient that is not finite ends it before the update.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    elsewhere = {length: task.at_length(length) for length in eval_lengths}
    in_full = regularizer.needs_gradients
    solved_at: int | None = None
    evaluation: dict[str, float] = {}
    clipped = skipped = done = 0
    status, reason, loss_value = "completed", None, math.nan
    state: Any = None
    bar = tqdm(
        total=steps, desc=tracker.directory.name, unit="step", disable=None, dynamic_ncols=True
    )
    for step in range(1, steps + 1):
        batch = task.training_batch(seed, step, batch_size)
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        state = first_rows(state, inputs.shape[1]) if batch.continues else None
        evaluates = step % eval_every == 0 or step == steps
        logs = _on_schedule(step, log_every, log_per_decade) or evaluates
        observes = observer is not None and observer.due(step, logged=logs, evaluated=evaluates)
        if observes and observer.wants_inputs:
            inputs = inputs.detach().requires_grad_()
        if learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)

        for parameter in parameters:
            parameter.grad = None
        before = state
        options = {"full": in_full} | (observer.recording if observes else {})
        passed, loss_value, records = _backward(
            model, task, inputs, targets, state, tbptt, options if logs or in_full else None
        )
        state = detached(passed.state)
        penalty = math.nan
        audited = dict.fromkeys(() if audit is None else audit.counts, _NO_GRADIENT)
        report, observation = _NO_GRADIENT, None
        if math.isfinite(loss_value):
            top = list(records.values())[-1].hidden_grad if in_full else None
            penalty = regularizer.add_(model.rnn, passed.hidden, top, nonlinearity)
            audited = audit() if audit is not None else audited
            if observes and all(p.grad.isfinite().all() for p in parameters if p.grad is not None):
                loss_of = partial(_loss_of, model, task, seed, step, before)
                observation = Observation(observer, records, inputs, loss_of)
            report = clipper()
            if observation is not None:
                observation.clipped()
        tracker.updated(loss_value, report.norm_pre, report.coef)
        if not report.finite:
            status = "diverged"
            found = locate_nonfinite(model, task, inputs, targets, before)
            if not found and math.isfinite(loss_value):
                found = "the gradient of the penalty is not finite, while that of the loss is"
            reason = f"step {step}: " + (found or _NOWHERE)
            accuracy = task.accuracy(passed.outputs, targets).item()
            rate = optimizer.param_groups[0]["lr"]
            tracker.log(_row(step, loss_value, accuracy, report, penalty, rate, audited), {})
            break
        if not report.skipped:
            optimizer.step()
        if observation is not None:
            tracker.measured(step, observation.updated())
        done = step
        clipped += report.clipped
        skipped += report.skipped

        interrupted = should_stop()
        if evaluates and not interrupted:
            evaluation = evaluate(model, task, eval_size)
            for length, there in elsewhere.items():
                scores = evaluate(model, there, eval_size)
                evaluation |= {f"{name}_at_{length}": value for name, value in scores.items()}
            if solved_at is None and task.solved(evaluation["loss"], evaluation["accuracy"]):
                solved_at = step
            if not math.isfinite(evaluation["loss"]):
                status = "diverged"
                found = locate_nonfinite(model, task, inputs, targets, before)
                reason = f"evaluation after step {step}: {found or _NOWHERE}"
        solved = stop_when_solved and solved_at is not None
        ends = interrupted or status == "diverged" or solved or step == steps
        if logs or ends:
            accuracy = task.accuracy(passed.outputs, targets).item()
            rate = optimizer.param_groups[0]["lr"]
            row = _row(step, loss_value, accuracy, report, penalty, rate, audited)
            if evaluates and not interrupted:
                row |= {f"eval_{name}": value for name, value in evaluation.items()}
            tracker.log(row, records if logs else {})
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
        status=status,
        steps=done,
        loss=loss_value,
        eval_loss=evaluation.get("loss"),
        eval_accuracy=evaluation.get("accuracy"),
        solved_at=solved_at,
        clip_fraction=clipped / max(done, 1),
        skip_fraction=skipped / max(done, 1),
        eval_at={
            str(length): {name: evaluation[f"{name}_at_{length}"] for name in ("loss", "accuracy")}
            for length in (elsewhere if evaluation else ())
        },
        clip_audit={
            label: {"clip_fraction": count.fraction, "mean_coef": count.mean_coef}
            for label, count in ({} if audit is None else audit.counts).items()
        },
        reason=reason,
    )


@torch.no_grad()
def evaluate(model: SequenceModel, task: Task, size: int) -> dict[str, float]:
    """Mean ``loss`` and ``accuracy`` over ``size`` sequences, the same ones for every seed."""
    device = next(model.parameters()).device
    totals = {"loss": 0.0, "accuracy": 0.0}
    training, state = model.training, None
    model.eval()
    try:
        for index, start in enumerate(range(0, size, EVALUATION_CHUNK)):
            chunk = min(EVALUATION_CHUNK, size - start)
            batch = task.evaluation_batch(index, chunk)
            inputs, targets = batch.inputs.to(device), batch.targets.to(device)
            passed = model(inputs, first_rows(state, chunk) if batch.continues else None)
            state = passed.state
            totals["loss"] += chunk * task.loss(passed.outputs, targets).item()
            totals["accuracy"] += chunk * task.accuracy(passed.outputs, targets).item()
    finally:
        model.train(training)
    return {name: total / size for name, total in totals.items()}


def locate_nonfinite(
    model: SequenceModel, task: Task, inputs: Tensor, targets: Tensor, state: Any = None
) -> str:
    """What is not finite when this batch is run, and at which time step it first shows.

    Nothing, if everything is finite. Forward, the first step is the earliest; backward, the latest.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name} is not finite"
    with torch.no_grad():
        outputs, hidden, _ = model(inputs, state)
        where = f"hidden state of the last layer ({hidden.shape[-1]} units)"
        if (t := _first_nonfinite(hidden)) is not None:
            return f"{where} is not finite from t = {t} of {len(hidden)} on"
        if not outputs.isfinite().all():
            return "the read-out's output is not finite while every hidden state is"
        if not (loss := task.loss(outputs, targets)).isfinite():
            return f"the loss is {loss.item()} while every output is finite"
    model.zero_grad()
    with record(model) as tape:
        task.loss(model(inputs, state).outputs, targets).backward()
    named = [n for n, p in model.named_parameters() if p.grad is not None]
    bad = [n for n in named if not model.get_parameter(n).grad.isfinite().all()]  # type: ignore[union-attr]
    steps = []
    for name in tape:
        back_in_time = tape[name].hidden_norm.flip(0).unsqueeze(-1)
        if (k := _first_nonfinite(back_in_time)) is not None:
            t = len(back_in_time) - 1 - k
            steps.append(f"going back, ∂L/∂h_t of {name} is not finite from t = {t} on")
    if not bad:
        return ""
    return "; ".join([f"gradient of {', '.join(bad)} is not finite", *steps])


def _backward(
    model: SequenceModel,
    task: Task,
    inputs: Tensor,
    targets: Tensor,
    state: Any,
    tbptt: tuple[int, int] | None,
    recorded: Mapping[str, bool] | None,
) -> tuple[Passed, float, Mapping[str, LayerRecord]]:
    """Forward, and backward unless the loss is not finite: what came of it, loss and records.

    ``recorded`` holds the options of ``record``; ``None`` records nothing.
    """
    if tbptt is not None and tbptt[1] < len(inputs):
        k1, k2 = tbptt
        passed, loss, records = truncated_backward(
            model, task, inputs, targets, state, k1=k1, k2=k2, recorded=recorded is not None
        )
        return passed, loss.item(), records
    recording = nullcontext() if recorded is None else record(model, **recorded)
    try:
        with recording as tape:
            passed = model(inputs, state)
            loss = task.loss(passed.outputs, targets)
            value = loss.item()
            if not math.isfinite(value):
                raise _NonFiniteLoss
            loss.backward()
    except _NonFiniteLoss:
        tape = None
    records = {} if tape is None else dict(tape)
    return Passed(passed.outputs.detach(), passed.hidden.detach(), passed.state), value, records


def _loss_of(
    model: SequenceModel, task: Task, seed: int, step: int, state: Any, size: int
) -> Tensor:
    """The loss, with its graph, of a batch of another size at the same step."""
    parameter = next(model.parameters())
    batch = task.training_batch(seed, step, size)
    before = first_rows(state, size) if batch.continues and state is not None else None
    outputs = model(batch.inputs.to(parameter.device), before).outputs
    return task.loss(outputs, batch.targets.to(parameter.device))


def _on_schedule(step: int, every: int, per_decade: int | None) -> bool:
    """Whether a step is logged: the first, and then evenly or evenly in its logarithm."""
    if step == 1:
        return True
    if per_decade is None:
        return step % every == 0
    return math.floor(per_decade * math.log10(step)) > math.floor(per_decade * math.log10(step - 1))


class _NonFiniteLoss(Exception):
    """Leaves a ``record`` block without a backward."""


_NOWHERE = "the loss is not finite, while everything on this step's training batch is"
_NO_GRADIENT = ClipReport(math.nan, math.nan, 1.0, clipped=False, finite=False)


def _row(
    step: int,
    loss: float,
    accuracy: float,
    report: ClipReport,
    penalty: float,
    rate: float,
    audited: Mapping[str, ClipReport],
) -> dict[str, float]:
    row = {
        "step": step,
        "loss": loss,
        "accuracy": accuracy,
        "grad_norm_pre": report.norm_pre,
        "grad_norm_post": report.norm_post,
        "clip_coef": report.coef,
        "clipped": int(report.clipped),
        "skipped": int(report.skipped),
        "lr": rate,
    }
    for column, value in (("clip_threshold", report.threshold), ("penalty", penalty)):
        if math.isfinite(value):  # else the run has none
            row[column] = value
    for label, other in audited.items():
        row |= {
            f"audit_{label}_clipped": int(other.clipped),
            f"audit_{label}_coef": other.coef,
        }
    return row


def _first_nonfinite(values: Tensor) -> int | None:
    """The first index of ``values [T, ...]`` that holds a value that is not finite."""
    bad = (~values.isfinite()).flatten(1).any(1).nonzero()
    return int(bad[0]) if len(bad) else None
