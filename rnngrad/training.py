"""The training loop: one step after the other, every gradient measured before it is used.

The loop asks for its two costly parts, the way forth and back and the optimiser's step, by yielding
them: ``alone`` does them as they come, ``rnngrad.stack`` those of many trainings at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rnngrad.bptt import LayerRecord, record
from rnngrad.clipping import ClipAudit, Clipper, ClipReport
from rnngrad.clipping.norms import total_norm
from rnngrad.measure import Observation, Observer
from rnngrad.model import Passed, SequenceModel, detached, first_rows
from rnngrad.nonfinite import NonFinite, locate_nonfinite
from rnngrad.regularization import NoRegularizer, Regularizer
from rnngrad.replay import extra_states
from rnngrad.saving import Saver
from rnngrad.task import EVALUATION_CHUNK, Batch, Task
from rnngrad.tracking import Result, Tracker
from rnngrad.truncation import truncated_backward

TOLD = 10
"""Updates that were not finite, of which the log says what was not."""

_NOWHERE = "the loss is not finite, while everything on this step's training batch is"
_NO_GRADIENT = ClipReport(math.nan, math.nan, 1.0, clipped=False, finite=False)

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come: what shapes its future, beside the states of its parts.

    Args:
        step: Updates done.
        clipped: Of these, how many the clip rule changed.
        skipped: How many it left out.
        nonfinite: How many had a loss or a gradient that was not finite.
        in_a_row: How many of the last were such.
        loss: Of the last batch.
        best: The least loss of an evaluation.
        solved_at: Updates done at the first evaluation that met the task's rule.
        evaluation: The last one's scores.
        row: Of metrics.csv, where this step's evaluation is still owed.
        reason: Why the run cannot go on.
        state: Of the layers after the last batch, for tasks whose next batch goes on with it.
    """

    step: int = 0
    clipped: int = 0
    skipped: int = 0
    nonfinite: int = 0
    in_a_row: int = 0
    loss: float = math.nan
    best: float = math.inf
    solved_at: int | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    row: dict[str, float] | None = None
    reason: str | None = None
    state: Any = None


@dataclass(eq=False)
class Update:
    """One step on its way: what goes into it, what comes back, what was done with it.

    Args:
        training: Whose step it is.
        step: Its number, from 1.
        inputs: ``[T, B, I]``.
        targets: The task's.
        before: The state that the layers start from; ``None`` for the model's own.
        logs: Whether the step is logged.
        observer: Measures it.
        statistics: What the model has learnt beside its parameters, before the step.
        recorded: Options of ``record``; ``None`` records nothing.
    """

    training: Training
    step: int
    inputs: Tensor
    targets: Tensor
    before: Any
    logs: bool
    observer: Observer | None
    statistics: tuple[list[Tensor], list[tuple[nn.Module, Any]]]
    recorded: Mapping[str, bool] | None
    passed: Passed = field(init=False)
    loss: float = math.nan
    records: Mapping[str, LayerRecord] = field(default_factory=dict)
    penalty: float = math.nan
    report: ClipReport = _NO_GRADIENT
    audited: Mapping[str, ClipReport] = field(default_factory=dict)
    observation: Observation | None = None
    remembered: Mapping[str, Any] = field(default_factory=dict)
    """What the observer did before."""

    def alone(self) -> None:
        """Forward, and backward unless the loss is not finite, of this training's model alone."""
        training = self.training
        self.passed, self.loss, self.records = _backward(
            training.model,
            training.task,
            self.inputs,
            self.targets,
            self.before,
            training.tbptt,
            self.recorded,
        )


class Step:
    """An optimiser's step, with the gradients as they are.

    Args:
        optimizer: Whose.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def alone(self) -> None:
        """Makes it."""
        self.optimizer.step()


Work = Update | Step
"""What a training asks for: done when it is resumed."""

Ended = TypeVar("Ended")


def alone(works: Generator[Work, None, Ended]) -> Ended:
    """Does the work as it is asked for; what the generator returns at its end."""
    while True:
        try:
            work = next(works)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        try:
            work.alone()
        except BaseException as error:  # so that it ends where it was
            works.throw(error)


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
        nonfinite: What becomes of an update whose loss or gradient is not finite.
        saver: Saves the training on its way, at its end, and when it is interrupted.
        should_stop: Asked around every update and within evaluations; true ends the run as
            interrupted. Until it is asked for the first time, nothing has been changed.

    Attributes:
        progress: Where the run is; ``rnngrad.snapshot`` can put it there.
        draw: Gives the batch of a task, seed, step and size, as ``Task.training_batch`` does.
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
        nonfinite: NonFinite = NonFinite(),  # noqa: B008
        saver: Saver | None = None,
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
        self.learning_rate, self.nonfinite = learning_rate, nonfinite
        self.saver, self.should_stop = saver, should_stop
        self.parameters = list(model.parameters())
        self.progress = Progress()
        self.draw: Callable[[Task, int, int, int], Batch] = draw
        self._status = "running"
        self._learns_beside = bool([*model.buffers()] or extra_states(model))

    def run(self) -> Result:
        """Trains to the end, from where ``progress`` is.

        Returns:
            How it ended.
        """
        return alone(self.works())

    def works(self, *, bar: bool = True) -> Generator[Work, None, Result]:
        """As ``run``, but the ways forth and back and the optimiser's steps are left to the caller.

        Args:
            bar: Whether to show how far it is, if that goes to a terminal.
        """
        progress, update = self.progress, None
        shown = tqdm(
            total=self.steps,
            initial=progress.step,
            desc=self.tracker.directory.name,
            unit="step",
            disable=None if bar else True,
            dynamic_ncols=True,
        )
        with shown, nullcontext() if self.saver is None else self.saver:
            self.tracker.finish(self.result())
            if self.saver is not None:
                self.saver.begin(self)
            if progress.row is not None:  # the run was stopped in this step's evaluation
                self._conclude()
            while self._goes_on():
                update = self._begin(progress.step + 1)
                yield update
                self._returned(update)
                self.should_stop()  # from here on, who wants the run to stop waits for the update
                if not self._is_usable(update):
                    self._stop_at(update)
                    break
                if not update.report.skipped:
                    yield Step(self.optimizer)
                self._applied(update)
                if (row := progress.row) is not None:
                    grad, accuracy = update.report.norm_pre, row["accuracy"]
                    shown.set_postfix(
                        loss=f"{update.loss:.4g}", accuracy=f"{accuracy:.3f}", grad=f"{grad:.3g}"
                    )
                self._conclude()
                shown.update()
                if self._goes_on() and self.should_stop():  # in the middle of saving, say
                    self._status = "interrupted"
            if self.saver is not None:
                self.saver.end(self)
                ended = self._status == "running" and progress.reason is None
                if ended and self.saver.failure is not None:
                    raise self.saver.failure  # what is not saved is not completed
            if self._status == "interrupted":
                # for who looks at the run as it is; one that goes on cuts it off again
                row = progress.row
                if update is not None and not update.logs:
                    row = self._row(update)
                if row is not None:
                    self.tracker.log(row)
        if self._status == "running":
            self._status = "completed" if progress.reason is None else "diverged"
        return self.result()

    def _goes_on(self) -> bool:
        progress = self.progress
        solved = self.stop_when_solved and progress.solved_at is not None
        ended = progress.reason is not None or solved or progress.step >= self.steps
        return not ended and self._status == "running"

    def _evaluates(self, step: int) -> bool:
        return step % self.eval_every == 0 or step == self.steps

    def _begin(self, step: int) -> Update:
        """What goes into a step."""
        device, progress = self.parameters[0].device, self.progress
        batch = self.draw(self.task, self.seed, step, self.batch_size)
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        goes_on = batch.continues and progress.state is not None  # none, if no update was made yet
        before = first_rows(progress.state, inputs.shape[1]) if goes_on else None
        evaluates = self._evaluates(step)
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
        statistics: tuple[list[Tensor], list[tuple[nn.Module, Any]]] = [], []
        if self._learns_beside:
            statistics = [b.clone() for b in self.model.buffers()], extra_states(self.model)
        return Update(self, step, inputs, targets, before, logs, observer, statistics, recorded)

    def _returned(self, update: Update) -> None:
        """Up to the gradient, clipped if it is finite."""
        if math.isfinite(update.loss):
            self._clip(update)
        else:
            update.audited = self._unaudited()

    def _clip(self, update: Update) -> None:
        """What happens to a gradient before it is used, and what is seen of it."""
        if update.observer is not None and all(
            parameter.grad.isfinite().all()
            for parameter in self.parameters
            if parameter.grad is not None
        ):
            loss_of = partial(_loss_of, update)
            update.remembered = update.observer.state_dict()
            update.observation = Observation(
                update.observer, update.records, update.inputs, loss_of
            )
        top = None
        if self.regularizer.needs_gradients:
            top = list(update.records.values())[-1].hidden_grad
        update.penalty = self.regularizer.add_(
            self.model.rnn, update.passed.hidden, top, self.nonlinearity
        )
        if self.nonfinite.bound < math.inf:
            norm = total_norm([p.grad for p in self.parameters if p.grad is not None])
            if not norm <= self.nonfinite.bound:  # no rule is to remember it
                update.report = replace(_NO_GRADIENT, norm_pre=norm, finite=math.isfinite(norm))
                update.audited = self._unaudited()
                return
        if self.audit is not None:
            update.audited = self.audit()
        if update.observation is not None:
            update.observation.whole()
        update.report = self.clipper()
        if update.observation is not None:
            update.observation.clipped()

    def _unaudited(self) -> dict[str, ClipReport]:
        """What the audit says of a gradient that it is not shown."""
        return {} if self.audit is None else dict.fromkeys(self.audit.counts, _NO_GRADIENT)

    def _is_usable(self, update: Update) -> bool:
        """Whether a step can be made; what is not finite is put aside, if that is no end."""
        report, progress = update.report, self.progress
        if report.finite and report.norm_pre <= self.nonfinite.bound:
            progress.in_a_row = 0
            return True
        self._forget(update)
        if not self.nonfinite.lets_pass(progress.in_a_row):
            return False
        progress.in_a_row += 1
        progress.nonfinite += 1
        if progress.nonfinite <= TOLD:
            log.warning(
                "step %d: %s; goes on (%s)",
                update.step,
                self._locate(update),
                self.nonfinite.policy,
            )
        update.passed = update.passed._replace(state=update.before)
        update.records, update.observation = {}, None
        steps = self.nonfinite.replace_gradient_(self.model)
        post = total_norm([p.grad for p in self.parameters if p.grad is not None]) if steps else 0.0
        update.report = replace(report, norm_post=post, skipped=not steps)
        return True

    @torch.no_grad()
    def _forget(self, update: Update) -> None:
        """Puts what has learnt from an update where it was before: statistics, as batch norm's."""
        buffers, extra = update.statistics
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        for part, state in extra:
            part.set_extra_state(state)
        if update.observation is not None and update.observer is not None:
            update.observer.load_state_dict(update.remembered)

    def _applied(self, update: Update) -> None:
        """What is kept of an update, after the optimiser's step if there was one."""
        report, progress = update.report, self.progress
        self.tracker.updated(update.loss, report.norm_pre, report.coef)
        if update.observation is not None:
            self.tracker.measured(update.step, update.observation.updated())
        progress.step, progress.loss = update.step, update.loss
        progress.state = update.passed.state
        progress.clipped += report.clipped
        progress.skipped += report.skipped and report.finite
        if update.logs:
            self.tracker.recorded(update.step, update.records)
            progress.row = self._row(update)
        # what was only there to be measured would stay in memory while the next step runs
        update.observation = None
        if update.records:
            update.records = {n: layer.norms_only() for n, layer in update.records.items()}

    def _conclude(self) -> None:
        """The evaluation that is owed, the row of metrics that waits for it, a checkpoint."""
        progress, best = self.progress, False
        if self.should_stop():
            self._status = "interrupted"
            return
        if self._evaluates(progress.step) and progress.row is not None:
            try:
                scores = self._evaluate()
            except Stopped:
                self._status = "interrupted"
                return
            best = scores["loss"] < progress.best
            self._judge(scores)
            progress.row |= {f"eval_{name}": score for name, score in scores.items()}
        if progress.row is not None:
            self.tracker.log(progress.row)
            progress.row = None
        if self.saver is not None and progress.reason is None:
            # what a step owes to being the last is not to be in a run that is made longer
            last_but_one = progress.step == self.steps - 1 and self.steps % self.eval_every != 0
            self.saver.after_update(self, best=best, now=last_but_one)

    def _evaluate(self) -> dict[str, float]:
        """Scores at all lengths."""
        scores = evaluate(self.model, self.task, self.eval_size, self.should_stop)
        for length, there in self.elsewhere.items():
            at_length = evaluate(self.model, there, self.eval_size, self.should_stop)
            scores |= {f"{name}_at_{length}": value for name, value in at_length.items()}
        return scores

    def _judge(self, scores: dict[str, float]) -> None:
        """What an evaluation means for the run."""
        progress = self.progress
        progress.evaluation, loss = scores, scores["loss"]
        if progress.solved_at is None and self.task.solved(loss, scores["accuracy"]):
            progress.solved_at = progress.step
        if loss < progress.best:
            progress.best = loss
        if not math.isfinite(loss):
            found = self._locate_in_evaluation()
            if self.nonfinite.policy == "stop":
                progress.reason = f"evaluation after step {progress.step}: {found}"
            else:
                log.warning("evaluation after step %d: %s; goes on", progress.step, found)

    def _stop_at(self, update: Update) -> None:
        """Ends the run at an update that cannot be made; the state before it is saved."""
        if self.saver is not None:
            self.saver.end(self)
        progress = self.progress
        before, progress.loss = progress.in_a_row, update.loss
        progress.nonfinite += 1
        progress.reason = f"step {update.step}: {self._locate(update)}"
        if before:
            progress.reason += f" (and the {before} updates before were not finite either)"
        update.records = {}
        self.tracker.updated(update.loss, update.report.norm_pre, update.report.coef)
        self.tracker.log(self._row(update))

    def _locate(self, update: Update) -> str:
        found = locate_nonfinite(
            self.model, self.task, update.inputs, update.targets, update.before
        )
        if not found and update.report.finite:
            return f"the gradient's norm is {update.report.norm_pre:.3g}"
        if not found and math.isfinite(update.loss):
            return "the gradient of the penalty is not finite, while that of the loss is"
        return found or _NOWHERE

    def _locate_in_evaluation(self) -> str:
        batch = self.task.evaluation_batch(0, min(EVALUATION_CHUNK, self.eval_size))
        device = self.parameters[0].device
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        return locate_nonfinite(self.model, self.task, inputs, targets) or _NOWHERE

    def _row(self, update: Update) -> dict[str, float]:
        """What metrics.csv has of an update, but for its evaluation."""
        report = update.report
        accuracy = self.task.accuracy(update.passed.outputs, update.targets).item()
        row = {
            "step": update.step,
            "loss": update.loss,
            "accuracy": accuracy,
            "grad_norm_pre": report.norm_pre,
            "grad_norm_post": report.norm_post,
            "clip_coef": report.coef,
            "clipped": int(report.clipped),
            "skipped": int(report.skipped),
            "lr": self.optimizer.param_groups[0]["lr"],
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

    def result(self) -> Result:
        """How far the run has come, and how it ended if it has."""
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
            nonfinite=progress.nonfinite,
            eval_at={
                str(length): {name: scores[f"{name}_at_{length}"] for name in ("loss", "accuracy")}
                for length in (self.elsewhere if scores else ())
            },
            clip_audit={
                label: {"clip_fraction": count.fraction, "mean_coef": count.mean_coef}
                for label, count in ({} if self.audit is None else self.audit.counts).items()
            },
            planned_steps=self.steps,
            reason=progress.reason,
        )


def draw(task: Task, seed: int, step: int, size: int) -> Batch:
    """What a step trains on."""
    return task.training_batch(seed, step, size)


class Stopped(Exception):
    """An evaluation was told to stop before its end."""


@torch.no_grad()
def evaluate(
    model: SequenceModel,
    task: Task,
    size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Mean ``loss`` and ``accuracy`` over ``size`` sequences, the same ones for every seed.

    Raises:
        Stopped: It was to stop, which is asked before every ``EVALUATION_CHUNK`` of them.
    """
    device = next(model.parameters()).device
    totals = {"loss": 0.0, "accuracy": 0.0}
    training, state = model.training, None
    model.eval()
    try:
        for index, start in enumerate(range(0, size, EVALUATION_CHUNK)):
            if should_stop():
                raise Stopped
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


def _loss_of(update: Update, size: int) -> Tensor | None:
    """The loss, with its graph, of a batch at the same step: of the update's own, if of its size.

    ``None`` where batches go on from each other: one of another size would be read elsewhere.
    """
    training = update.training
    model, task = training.model, training.task
    if size == update.inputs.shape[1]:
        return task.loss(model(update.inputs.detach(), update.before).outputs, update.targets)
    batch = task.training_batch(training.seed, update.step, size)
    if batch.continues:
        return None
    device = update.inputs.device
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
