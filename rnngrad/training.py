"""The training loop: one step after the other, every gradient measured before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
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

_NOWHERE = "the loss is not finite, while everything on this step's training batch is"
_NO_GRADIENT = ClipReport(math.nan, math.nan, 1.0, clipped=False, finite=False)


@dataclass
class Progress:
    """How far a run has come: what shapes its future, beside the states of its parts.

    Args:
        step: Updates done.
        clipped: Of these, how many the clip rule changed.
        skipped: How many it left out.
        loss: Of the last batch.
        solved_at: Updates done at the first evaluation that met the task's rule.
        evaluation: The last one's scores.
        state: Of the layers after the last batch, for tasks whose next batch goes on with it.
    """

    step: int = 0
    clipped: int = 0
    skipped: int = 0
    loss: float = math.nan
    solved_at: int | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    state: Any = None


@dataclass
class _Update:
    """One step on its way: what went into it, what came back, what was done with it."""

    step: int
    inputs: Tensor
    targets: Tensor
    before: Any
    logs: bool
    evaluates: bool
    observer: Observer | None
    passed: Passed
    loss: float
    records: Mapping[str, LayerRecord]
    penalty: float = math.nan
    report: ClipReport = _NO_GRADIENT
    audited: Mapping[str, ClipReport] = field(default_factory=dict)
    observation: Observation | None = None


class Training:
    """Trains a model on fresh batches of a task and tracks it.

    Args:
        model: Changed in place.
        task: Gives data, loss and the rule for solved.
        optimizer: Of the model's parameters.
        clipper: Called once between backward and the optimiser's step.
        tracker: Is told of every update, and all about the logged ones.
        seed: Of the data; step ``s`` trains on a pure function of ``(seed, s)``.
        steps: Updates at most.
        batch_size: ``B``.
        eval_every: Evaluate after every so many updates, and after the last.
        eval_size: Sequences in an evaluation.
        log_every: Log the first step, every so many, every evaluated one and the last.
        stop_when_solved: End at the first evaluation that meets the task's rule.
        log_per_decade: In place of ``log_every``: so many steps a decade of training.
        eval_lengths: Evaluate the task at these lengths as well.
        tbptt: ``(k1, k2)`` of truncated back-propagation; ``None`` for all of it.
        regularizer: Adds its gradient before clipping.
        nonlinearity: Of a vanilla RNN, for the regulariser.
        audit: Is shown every gradient before it is clipped.
        observer: Measures the model at some of the logged steps.
        learning_rate: Of each step, counted from 1; ``None`` leaves the optimiser's.
        should_stop: Asked after every update; true ends the run as interrupted.
    """

    def __init__(
        self,
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
    ) -> None:
        self.model, self.task, self.optimizer = model, task, optimizer
        self.clipper, self.tracker = clipper, tracker
        self.seed, self.steps, self.batch_size = seed, steps, batch_size
        self.eval_every, self.eval_size = eval_every, eval_size
        self.log_every, self.log_per_decade = log_every, log_per_decade
        self.stop_when_solved = stop_when_solved
        self.elsewhere = {length: task.at_length(length) for length in eval_lengths}
        self.tbptt, self.regularizer, self.nonlinearity = tbptt, regularizer, nonlinearity
        self.audit, self.observer = audit, observer
        self.learning_rate, self.should_stop = learning_rate, should_stop
        self.parameters = list(model.parameters())
        self.progress = Progress()
        self._status = "completed"
        self._reason: str | None = None

    def run(self) -> Result:
        """Trains to the end.

        Returns:
            How it ended. A loss or gradient that is not finite ends it before the update.
        """
        bar = tqdm(
            total=self.steps,
            desc=self.tracker.directory.name,
            unit="step",
            disable=None,
            dynamic_ncols=True,
        )
        with bar:
            for step in range(self.progress.step + 1, self.steps + 1):
                update = self._forth_and_back(step)
                if not update.report.finite:
                    self._stop_at(update)
                    break
                self._apply(update)
                ends = self._conclude(update)
                if update.logs or ends:
                    accuracy = self._log(update)
                    bar.set_postfix(
                        loss=f"{update.loss:.4g}",
                        accuracy=f"{accuracy:.3f}",
                        grad=f"{update.report.norm_pre:.3g}",
                    )
                bar.update()
                if ends:
                    break
        return self._result()

    def _forth_and_back(self, step: int) -> _Update:
        """Up to the gradient, clipped if it is finite."""
        device, progress = self.parameters[0].device, self.progress
        batch = self.task.training_batch(self.seed, step, self.batch_size)
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        before = first_rows(progress.state, inputs.shape[1]) if batch.continues else None
        evaluates = step % self.eval_every == 0 or step == self.steps
        logs = _on_schedule(step, self.log_every, self.log_per_decade) or evaluates
        observer = self.observer
        if observer is not None and not observer.due(step, logged=logs, evaluated=evaluates):
            observer = None
        if observer is not None and observer.wants_inputs:
            inputs = inputs.detach().requires_grad_()
        if self.learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
        for parameter in self.parameters:
            parameter.grad = None

        in_full = self.regularizer.needs_gradients
        options = {"full": in_full} | ({} if observer is None else observer.recording)
        recorded = options if logs or in_full else None
        passed, loss, records = _backward(
            self.model, self.task, inputs, targets, before, self.tbptt, recorded
        )
        progress.loss, progress.state = loss, passed.state
        update = _Update(
            step, inputs, targets, before, logs, evaluates, observer, passed, loss, records
        )
        if math.isfinite(loss):
            self._clip(update)
        elif self.audit is not None:
            update.audited = dict.fromkeys(self.audit.counts, _NO_GRADIENT)
        self.tracker.updated(loss, update.report.norm_pre, update.report.coef)
        return update

    def _clip(self, update: _Update) -> None:
        """What happens to a gradient before it is used, and what is seen of it."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if update.observer is not None and all(grad.isfinite().all() for grad in grads):
            loss_of = partial(_loss_of, self.model, self.task, self.seed, update.step)
            update.observation = Observation(
                update.observer, update.records, update.inputs, loss_of
            )
        top = None
        if self.regularizer.needs_gradients:
            top = list(update.records.values())[-1].hidden_grad
        update.penalty = self.regularizer.add_(
            self.model.rnn, update.passed.hidden, top, self.nonlinearity
        )
        if self.audit is not None:
            update.audited = self.audit()
        if update.observation is not None:
            update.observation.whole()
        update.report = self.clipper()
        if update.observation is not None:
            update.observation.clipped()

    def _apply(self, update: _Update) -> None:
        """The optimiser's step."""
        if not update.report.skipped:
            self.optimizer.step()
        if update.observation is not None:
            self.tracker.measured(update.step, update.observation.updated())
        # what was only there to be measured would stay in memory while the next step runs
        update.observation = None
        update.records = {name: layer.norms_only() for name, layer in update.records.items()}
        self.progress.step = update.step
        self.progress.clipped += update.report.clipped
        self.progress.skipped += update.report.skipped

    def _conclude(self, update: _Update) -> bool:
        """Evaluates if it is time to; whether the run ends here."""
        progress = self.progress
        if self.should_stop():
            self._status = "interrupted"
            update.evaluates = False
        if update.evaluates:
            progress.evaluation = scores = self._evaluate()
            if progress.solved_at is None and self.task.solved(scores["loss"], scores["accuracy"]):
                progress.solved_at = update.step
            if not math.isfinite(scores["loss"]):
                self._status = "diverged"
                self._reason = f"evaluation after step {update.step}: {self._locate(update)}"
        solved = self.stop_when_solved and progress.solved_at is not None
        return self._status != "completed" or solved or update.step == self.steps

    def _evaluate(self) -> dict[str, float]:
        scores = evaluate(self.model, self.task, self.eval_size)
        for length, there in self.elsewhere.items():
            at_length = evaluate(self.model, there, self.eval_size)
            scores |= {f"{name}_at_{length}": value for name, value in at_length.items()}
        return scores

    def _stop_at(self, update: _Update) -> None:
        """Ends the run at an update that cannot be made."""
        self._status = "diverged"
        found = self._locate(update, "")
        if not found and math.isfinite(update.loss):
            found = "the gradient of the penalty is not finite, while that of the loss is"
        self._reason = f"step {update.step}: {found or _NOWHERE}"
        update.evaluates, update.records = False, {}
        self._log(update)

    def _locate(self, update: _Update, otherwise: str = _NOWHERE) -> str:
        batch = (update.inputs, update.targets, update.before)
        return locate_nonfinite(self.model, self.task, *batch) or otherwise

    def _log(self, update: _Update) -> float:
        """Leaves a row of metrics and what was recorded; the batch's accuracy."""
        accuracy = self.task.accuracy(update.passed.outputs, update.targets).item()
        row = _row(update, accuracy, self.optimizer.param_groups[0]["lr"])
        if update.evaluates:
            row |= {f"eval_{name}": score for name, score in self.progress.evaluation.items()}
        self.tracker.log(row, update.records if update.logs else {})
        return accuracy

    def _result(self) -> Result:
        progress = self.progress
        scores, done = progress.evaluation, max(progress.step, 1)
        return Result(
            status=self._status,
            steps=progress.step,
            loss=progress.loss,
            eval_loss=scores.get("loss"),
            eval_accuracy=scores.get("accuracy"),
            solved_at=progress.solved_at,
            clip_fraction=progress.clipped / done,
            skip_fraction=progress.skipped / done,
            eval_at={
                str(length): {name: scores[f"{name}_at_{length}"] for name in ("loss", "accuracy")}
                for length in (self.elsewhere if scores else ())
            },
            clip_audit={
                label: {"clip_fraction": count.fraction, "mean_coef": count.mean_coef}
                for label, count in ({} if self.audit is None else self.audit.counts).items()
            },
            reason=self._reason,
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
    # the state's graph would keep what was recorded
    return Passed(*map(detached, passed)), value, records


def _loss_of(model: SequenceModel, task: Task, seed: int, step: int, size: int) -> Tensor | None:
    """The loss, with its graph, of a batch of another size at the same step.

    ``None`` where batches go on from each other: one of another size would be read elsewhere.
    """
    device = next(model.parameters()).device
    batch = task.training_batch(seed, step, size)
    if batch.continues:
        return None
    return task.loss(model(batch.inputs.to(device)).outputs, batch.targets.to(device))


def _on_schedule(step: int, every: int, per_decade: int | None) -> bool:
    """Whether a step is logged: the first, and then evenly or evenly in its logarithm."""
    if step == 1:
        return True
    if per_decade is None:
        return step % every == 0
    return math.floor(per_decade * math.log10(step)) > math.floor(per_decade * math.log10(step - 1))


class _NonFiniteLoss(Exception):
    """Leaves a ``record`` block without a backward."""


def _row(update: _Update, accuracy: float, rate: float) -> dict[str, float]:
    """What metrics.csv has of an update, but for its evaluation."""
    report = update.report
    row = {
        "step": update.step,
        "loss": update.loss,
        "accuracy": accuracy,
        "grad_norm_pre": report.norm_pre,
        "grad_norm_post": report.norm_post,
        "clip_coef": report.coef,
        "clipped": int(report.clipped),
        "skipped": int(report.skipped),
        "lr": rate,
    }
    for column, value in (("clip_threshold", report.threshold), ("penalty", update.penalty)):
        if math.isfinite(value):  # else the run has none
            row[column] = value
    for label, other in update.audited.items():
        row |= {
            f"audit_{label}_clipped": int(other.clipped),
            f"audit_{label}_coef": other.coef,
        }
    return row


def _first_nonfinite(values: Tensor) -> int | None:
    """The first index of ``values [T, ...]`` that holds a value that is not finite."""
    bad = (~values.isfinite()).flatten(1).any(1).nonzero()
    return int(bad[0]) if len(bad) else None
