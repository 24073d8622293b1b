"""The loop and what it leaves on disk, on the smallest settings."""

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from rnngrad.bptt import record
from rnngrad.bptt_clip import BPTT_CLIPS
from rnngrad.cells import CELLS
from rnngrad.clipping import CLIPS, Clip, ClipAudit, Clipper, Gradient, Outcome
from rnngrad.init import INITS
from rnngrad.model import SequenceModel, build_model, detached
from rnngrad.nn import GRU
from rnngrad.norms import log10_mean, log10_rms
from rnngrad.optim import OPTIMS
from rnngrad.regularization import REGULARIZERS
from rnngrad.report import figure, write
from rnngrad.runs import BPTT, COLUMNS, METRICS, Run, differences, table
from rnngrad.task import TASKS, Batch, Task, training_generator
from rnngrad.tracking import Result, Tracker
from rnngrad.training import Training, evaluate
from tests.small import small_task

SMALL: dict[str, Any] = {
    "seed": 0,
    "steps": 12,
    "batch_size": 4,
    "eval_every": 6,
    "eval_size": 7,
    "log_every": 5,
    "stop_when_solved": False,
}


def small_run(
    path: Path,
    *,
    task: str | Task = "adding",
    cell: str = "rnn",
    clip: str = "norm",
    optim: str = "adam",
    bptt_clip: str = "none",
    layers: int = 1,
    lr: float = 0.01,
    model: SequenceModel | None = None,
    columns: Sequence[str] = (),
    audit: Mapping[str, Clip] | None = None,
    **changes: Any,
) -> tuple[Run, Result, SequenceModel]:
    length = {"length": 6} if task in ("adding", "copy") else {}
    made = small_task(task, **length) if isinstance(task, str) else task
    hidden = 5 if made.reads_out else made.output_size
    part = CELLS.default(cell, hidden_size=hidden, num_layers=layers)
    within = BPTT_CLIPS.default(bptt_clip)
    init = INITS.default("torch")
    model = model or build_model(part, made, init, SMALL["seed"], bptt_clip=within)
    optimizer = OPTIMS.default(optim, lr=lr).build(model.parameters())
    named = list(model.named_parameters())
    watch = None if audit is None else ClipAudit(audit, named)
    with Tracker(path, made.chance_loss, made.time_steps, columns) as tracker:
        result = Training(
            model,
            made,
            optimizer,
            Clipper(CLIPS.default(clip), named),
            tracker,
            audit=watch,
            **(SMALL | changes),
        ).run()
        tracker.finish(result)
    return Run(path), result, model


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_run(tmp_path_factory.mktemp("run"), cell="lstm", layers=2)[0]


PARTS = [
    (registry.group, name)
    for registry in (TASKS, CELLS, CLIPS, BPTT_CLIPS, OPTIMS)
    for name in sorted(registry.load())
]


@pytest.mark.parametrize(("group", "name"), PARTS, ids=["=".join(part) for part in PARTS])
def test_every_part_trains_20_steps_and_is_recorded(group: str, name: str, tmp_path: Path) -> None:
    run, result, _ = small_run(tmp_path, **{group: name}, layers=2, steps=20)
    assert result.status == run.summary["status"] == "completed" and result.steps == 20
    assert math.isfinite(run.summary["eval_loss"]) and list(run.bptt) == ["l0", "l1"]
    for history in run.bptt.values():
        assert history.step.tolist() == [1, 5, 6, 10, 12, 15, 18, 20]
        assert not np.isnan(history.hidden[:, 0]).any()


@pytest.mark.parametrize("cell", sorted(CELLS.load()))
@pytest.mark.parametrize("task", sorted(TASKS.load()))
def test_every_cell_trains_on_every_task(cell: str, task: str, tmp_path: Path) -> None:
    _, result, _ = small_run(tmp_path, task=task, cell=cell, steps=2)
    assert result.status == "completed"


def test_a_step_is_the_step_written_by_hand(tmp_path: Path) -> None:
    _, _, trained = small_run(tmp_path, steps=3)
    task = TASKS.default("adding", length=6)
    model = build_model(CELLS.default("rnn", hidden_size=5), task, INITS.default("torch"), 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in (1, 2, 3):
        x, y = task.batch(4, training_generator(0, step))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x).outputs, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for a, b in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_equal_runs_leave_equal_files_and_another_seed_does_not(tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) + seed)  # the global stream must not matter
        runs.append(small_run(tmp_path / name, seed=seed)[0].path)
    for file in (METRICS, BPTT):
        a, b, c = ((path / file).read_bytes() for path in runs)
        assert a == b != c


def test_building_a_model_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = build_model(
        CELLS.default("lstm"), TASKS.default("adding"), INITS.default("torch"), seed=3
    )
    assert torch.equal(before, torch.get_rng_state())
    assert (model.rnn.bias_ih_l0[128:256] == 1).all() and (model.rnn.bias_hh_l0[128:256] == 0).all()


def test_torchs_initialisation_is_torchs() -> None:
    part = CELLS.default("lstm", hidden_size=5, forget_bias=None)
    ours = build_model(part, TASKS.default("adding"), INITS.default("torch"), seed=3)
    torch.manual_seed(3)
    theirs = torch.nn.LSTM(2, 5)
    for a, b in zip(ours.rnn.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rows_are_the_first_each_logged_each_evaluated_and_the_last(finished: Run) -> None:
    metrics = finished.metrics
    assert list(metrics) == list(COLUMNS)
    assert metrics["step"].tolist() == [1, 5, 6, 10, 12]
    evaluated = ~np.isnan(metrics["eval_loss"])
    assert metrics["step"][evaluated].tolist() == [6, 12]
    assert np.isfinite(metrics["loss"]).all()
    np.testing.assert_allclose(
        metrics["clip_coef"], metrics["grad_norm_post"] / metrics["grad_norm_pre"]
    )
    assert (metrics["grad_norm_post"] <= 1 + 1e-6).all()
    assert ((metrics["clip_coef"] < 1) == metrics["clipped"]).all()


def test_the_summary_says_how_it_ended(finished: Run) -> None:
    summary, metrics = finished.summary, finished.metrics
    assert summary["status"] == "completed" and summary["steps"] == 12
    assert summary["loss"] == metrics["loss"][-1]
    assert summary["eval_loss"] == metrics["eval_loss"][-1]
    assert summary["chance_loss"] == 1 / 6 and summary["solved_at"] is None
    assert summary["verdict"] is None and 0 <= summary["clip_fraction"] <= 1


def test_recorded_arrays_are_those_of_a_record_block(tmp_path: Path) -> None:
    run, _, _ = small_run(tmp_path, cell="lstm", layers=2, steps=1)
    task = TASKS.default("adding", length=6)
    part = CELLS.default("lstm", hidden_size=5, num_layers=2)
    model = build_model(part, task, INITS.default("torch"), 0)
    x, y = task.batch(4, training_generator(0, 1))
    with record(model) as tape:
        task.loss(model(x).outputs, y).backward()
    assert list(run.bptt) == ["l0", "l1"]
    for layer, history in run.bptt.items():
        kept = tape[f"rnn.{layer}"]
        assert history.step.tolist() == [1] and history.hidden.shape == (1, 6)
        assert kept.cell_norm is not None and history.cell is not None
        for ours, expected in (
            (history.hidden, log10_rms(kept.hidden_norm)),
            (history.direct, log10_rms(kept.direct_norm)),
            (history.hidden_mean, log10_mean(kept.hidden_norm)),
            (history.cell, log10_rms(kept.cell_norm)),
        ):
            np.testing.assert_array_equal(ours[0], expected.numpy())
    top = run.bptt["l1"].direct[0]
    assert np.isneginf(top[:-1]).all() and np.isfinite(top[-1])


def test_the_copy_task_records_the_whole_sequence(tmp_path: Path) -> None:
    run, _, _ = small_run(tmp_path, task="copy", steps=1)
    assert run.bptt["l0"].hidden.shape == (1, 6 + 20)


def test_a_run_can_be_read_while_it_goes_on_and_after_a_crash_in_a_line(
    tmp_path: Path, finished: Run
) -> None:
    for name in (METRICS, BPTT, "bptt.json", "summary.json"):
        (tmp_path / name).write_bytes((finished.path / name).read_bytes())
    for name in (METRICS, BPTT):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-5])
    run = Run(tmp_path)
    assert run.metrics["step"].tolist() == [1, 5, 6, 10]
    assert run.bptt["l0"].step.tolist() == [1, 5, 6, 10]
    for name in (METRICS, BPTT, "bptt.json"):
        (tmp_path / name).unlink()
    assert run.metrics["step"].tolist() == [] and run.bptt == {}


def test_a_run_killed_before_its_first_record_was_written_has_none_yet(
    tmp_path: Path, finished: Run
) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(finished.summary))
    (tmp_path / "bptt.json").write_bytes((finished.path / "bptt.json").read_bytes())
    assert Run(tmp_path).bptt == {}
    (tmp_path / BPTT).touch()
    assert Run(tmp_path).bptt == {}
    write([Run(tmp_path)], tmp_path / "report")


def test_shorter_sequences_end_in_nan_and_longer_ones_are_refused(tmp_path: Path) -> None:
    layer = torch.nn.ModuleDict({"rnn": GRU(2, 3)})
    row = {"step": 0, "loss": 1.0}
    with Tracker(tmp_path, 1 / 6, 4) as tracker:
        for step, length in ((1, 4), (2, 3), (3, 6)):
            with record(layer) as tape:
                layer["rnn"](torch.randn(length, 2, 2))[0].sum().backward()
            if length < 6:
                tracker.recorded(step, tape)
                tracker.log(row | {"step": step})
            else:
                with pytest.raises(ValueError, match="over 6 time steps, but the run has"):
                    tracker.recorded(step, tape)
    history = Run(tmp_path).bptt["l0"]
    assert history.step.tolist() == [1, 2]
    assert np.isnan(history.hidden).tolist() == [[False] * 4, [False] * 3 + [True]]


def test_stopping_when_solved_ends_at_that_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(TASKS.default("adding")), "solved", lambda *_: True)
    run, result, _ = small_run(tmp_path / "stop", stop_when_solved=True)
    assert result.steps == result.solved_at == 6 and run.metrics["step"].tolist() == [1, 5, 6]
    _, result, _ = small_run(tmp_path / "go on")
    assert result.steps == 12 and result.solved_at == 6


def test_a_relapse_does_not_clear_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([True, False])
    monkeypatch.setattr(type(TASKS.default("adding")), "solved", lambda *_: next(answers))
    _, result, _ = small_run(tmp_path)
    assert result.solved_at == 6


def test_being_told_to_stop_ends_after_the_step(tmp_path: Path) -> None:
    calls: list[int] = []

    def in_the_third() -> bool:
        calls.append(1)
        return len(calls) >= 8  # asked three times an update

    run, result, _ = small_run(tmp_path, should_stop=in_the_third)
    assert result.status == run.summary["status"] == "interrupted"
    assert result.steps == 3 and run.metrics["step"].tolist() == [1, 3]


def test_a_failing_run_says_so_on_disk(tmp_path: Path) -> None:
    def fail() -> bool:
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        small_run(tmp_path, should_stop=fail)
    assert Run(tmp_path).summary["status"] == "failed"
    assert "no more" in Run(tmp_path).summary["reason"]


# --- streams, truncation, penalties, audits, other lengths


@dataclass(frozen=True)
class Stream(Task):
    """Windows of one stream, whose state goes on but at every third batch."""

    input_size: ClassVar[int] = 2
    output_size: ClassVar[int] = 1
    last_step_only: ClassVar[bool] = False

    time_steps: ClassVar[int] = 4  # type: ignore[misc]
    chance_loss: ClassVar[float] = 1.0  # type: ignore[misc]

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs = torch.rand(4, batch_size, 2, generator=generator)
        return inputs, inputs.sum(-1, keepdim=True)

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        return super().training_batch(seed, step, batch_size)._replace(continues=step % 3 != 1)

    def evaluation_batch(self, index: int, batch_size: int) -> Batch:
        return super().evaluation_batch(index, batch_size)._replace(continues=index > 0)

    def at_length(self, length: int) -> "Stream":
        return self

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(outputs, targets)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).abs() < 0.1).float().mean()

    def solved(self, loss: float, accuracy: float) -> bool:
        return False

    def memoryless(self, targets: Tensor) -> Tensor:
        return torch.ones_like(targets)


@pytest.mark.parametrize("cell", sorted(CELLS.load()))
def test_the_state_of_a_stream_goes_on_and_its_gradient_does_not(cell: str, tmp_path: Path) -> None:
    run, _, trained = small_run(tmp_path, task=Stream(), cell=cell, steps=5, log_every=1)
    part = CELLS.default(cell, hidden_size=5)
    model = build_model(part, Stream(), INITS.default("torch"), 0)
    optimizer = OPTIMS.default("adam", lr=0.01).build(model.parameters())
    clipper = Clipper(CLIPS.default("norm"), model.named_parameters())
    state, losses = None, []
    for step in range(1, 6):
        batch = Stream().training_batch(0, step, 4)
        outputs, _, state = model(batch.inputs, state if step % 3 != 1 else None)
        loss = Stream().loss(outputs, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        clipper()
        optimizer.step()
        state = detached(state)
        losses.append(loss.item())
    np.testing.assert_allclose(run.metrics["loss"], losses, rtol=1e-5)
    for a, b in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_evaluation_of_a_stream_carries_its_state_also_to_a_smaller_rest() -> None:
    task = Stream()
    model = build_model(CELLS.default("gru", hidden_size=5), task, INITS.default("torch"), 0)
    state, losses = None, []
    with torch.no_grad():
        for index, rows in enumerate((100, 100, 30)):
            batch = task.evaluation_batch(index, rows)
            given: Any = None if state is None else state[:, :rows]
            outputs, _, state = model(batch.inputs, given)
            losses.append(rows * task.loss(outputs, batch.targets).item())
    assert evaluate(model, task, 230)["loss"] == pytest.approx(sum(losses) / 230)


def test_evaluation_at_other_lengths_is_that_of_the_task_at_those(tmp_path: Path) -> None:
    columns = [f"eval_{score}_at_{length}" for length in (4, 9) for score in ("loss", "accuracy")]
    run, result, model = small_run(tmp_path, eval_lengths=[4, 9], columns=columns)
    task = TASKS.default("adding", length=6)
    for length in (4, 9):
        expected = evaluate(model, task.at_length(length), SMALL["eval_size"])
        assert result.eval_at[str(length)] == run.summary["eval_at"][str(length)] == expected
        assert run.metrics[f"eval_loss_at_{length}"][-1] == expected["loss"]
        assert np.isnan(run.metrics[f"eval_accuracy_at_{length}"][0])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"loss/eval_at_4", "accuracy/eval_at_9"} <= set(events.Tags()["scalars"])


def test_an_audit_changes_nothing_and_counts_what_each_rule_would_have_done(
    tmp_path: Path,
) -> None:
    rules = {name: CLIPS.default(name) for group, name in PARTS if group == "clip"}
    columns = [f"audit_{name}_{what}" for name in rules for what in ("clipped", "coef")]
    audited, result, _ = small_run(
        tmp_path / "a", clip="none", audit=rules, columns=columns, log_every=1
    )
    plain, _, _ = small_run(tmp_path / "b", clip="none", log_every=1)
    np.testing.assert_array_equal(audited.metrics["loss"], plain.metrics["loss"])
    assert (audited.path / BPTT).read_bytes() == (plain.path / BPTT).read_bytes()
    assert set(result.clip_audit) == set(rules) == set(audited.summary["clip_audit"])
    pre = plain.metrics["grad_norm_pre"]
    coefficients = audited.metrics["audit_norm_coef"]
    np.testing.assert_allclose(coefficients, np.minimum(1, 1 / pre), rtol=1e-6)
    fired = audited.metrics["audit_norm_clipped"]
    assert fired.tolist() == (pre > 1).astype(int).tolist()
    assert result.clip_audit["norm"]["clip_fraction"] == pytest.approx(fired.mean())
    assert not audited.metrics["audit_none_clipped"].any()


def test_the_audit_of_a_run_that_diverges_can_be_read(tmp_path: Path) -> None:
    rules = {"norm": CLIPS.default("norm")}
    columns = ["audit_norm_clipped", "audit_norm_coef"]
    run, result, _ = small_run(
        tmp_path, optim="sgd", lr=1e30, clip="none", audit=rules, columns=columns, log_every=1
    )
    assert result.status == "diverged"
    assert set(run.metrics["audit_norm_clipped"].tolist()) <= {0, 1}
    assert run.metrics["audit_norm_coef"][-1] == 1


def test_truncating_nothing_is_bitwise_all_of_back_propagation(tmp_path: Path) -> None:
    full, cut, longer, some = (
        small_run(tmp_path / str(k2), cell="lstm", tbptt=k2)[0].path
        for k2 in (None, (2, 6), (4, 1000), (2, 3))
    )
    for file in (METRICS, BPTT):
        assert (full / file).read_bytes() == (cut / file).read_bytes()
        assert (full / file).read_bytes() == (longer / file).read_bytes()
        assert (full / file).read_bytes() != (some / file).read_bytes()
    history = Run(some).bptt["l0"]
    assert np.isneginf(history.hidden[:, :3]).all() and np.isfinite(history.hidden[:, 3:]).all()


def test_a_penalty_joins_the_gradient_before_it_is_clipped(tmp_path: Path) -> None:
    omega = REGULARIZERS.default("omega", weight=100.0)
    run, _, _ = small_run(tmp_path / "a", regularizer=omega, nonlinearity="tanh", log_every=1)
    plain, _, _ = small_run(tmp_path / "b", log_every=1)
    assert (run.metrics["penalty"] > 1).all() and np.isnan(plain.metrics["penalty"]).all()
    assert run.metrics["loss"][0] == plain.metrics["loss"][0]
    assert run.metrics["grad_norm_pre"][0] > 5 * plain.metrics["grad_norm_pre"][0]
    assert (run.metrics["grad_norm_post"] <= 1 + 1e-6).all()


@pytest.mark.parametrize("tbptt", [None, (2, 3)])
def test_with_bptt_clip_the_norms_are_of_the_clipped_error_and_say_so(
    tbptt: tuple[int, int] | None, tmp_path: Path
) -> None:
    within = BPTT_CLIPS.default("norm", site="state", max_norm=1e-3)
    part = CELLS.default("lstm", hidden_size=5)
    made = TASKS.default("copy", length=1)
    model = build_model(part, made, INITS.default("torch"), 0, bptt_clip=within)
    run, _, _ = small_run(tmp_path / "a", task=made, model=model, tbptt=tbptt)
    history = run.bptt["l0"]
    assert history.clipped is not None and history.clipped.shape == history.hidden.shape
    assert (history.clipped >= 0).all() and 0 < history.clipped.mean() <= 1
    fraction = run.summary["bptt_clip_fraction"]
    assert fraction == pytest.approx(history.clipped.mean())
    assert "as clipped at every t" in figure([run]).get_suptitle()
    if tbptt is None:
        assert (history.hidden <= -3 + 1e-6).all()
    plain, _, _ = small_run(tmp_path / "b", task=made, cell="lstm", tbptt=tbptt)
    assert "before clipping" in figure([plain]).get_suptitle()
    assert plain.summary["bptt_clip_fraction"] is None
    assert plain.bptt["l0"].clipped is None and (plain.bptt["l0"].hidden > -3).any()
    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    assert "bptt_clip/l0" in events.Tags()["scalars"]


def test_a_penalty_that_is_not_finite_is_named(tmp_path: Path) -> None:
    part = REGULARIZERS.default("orthogonality", weight=1e300)
    _, result, _ = small_run(tmp_path, regularizer=part)
    assert result.status == "diverged" and result.steps == 0
    assert result.reason is not None and "gradient of the penalty is not finite" in result.reason


def test_a_stream_cannot_go_on_with_more_rows_than_it_had(tmp_path: Path) -> None:
    class Growing(Stream):
        def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
            return super().training_batch(seed, step, step if step < 3 else 1)

    with pytest.raises(ValueError, match="a batch of 2 cannot go on where one of 1 ended"):
        small_run(tmp_path, task=Growing(), cell="indrnn")


def test_the_learning_rate_of_every_step_is_the_schedules(tmp_path: Path) -> None:
    optim = OPTIMS.default("adam", lr=0.1, schedule="cosine", warmup_steps=3)
    run, _, _ = small_run(
        tmp_path, learning_rate=lambda step: optim.learning_rate(step, 12), log_every=1
    )
    expected = [optim.learning_rate(step, 12) for step in range(1, 13)]
    assert run.metrics["lr"].tolist() == expected


@dataclass(frozen=True)
class EverySecond(Clip):
    """Skips every second step."""

    def initial_state(self) -> dict[str, Any]:
        return {"steps": 0}

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        state["steps"] += 1
        return Outcome(clipped=state["steps"] % 2 == 0, skip=state["steps"] % 2 == 0)


def test_a_skipped_step_leaves_weights_and_optimiser_as_they_were(tmp_path: Path) -> None:
    made = small_task("adding")
    model = build_model(CELLS.default("rnn", hidden_size=5), made, INITS.default("torch"), 0)
    optimizer = OPTIMS.default("adam", lr=0.01).build(model.parameters())
    clipper = Clipper(EverySecond(), model.named_parameters())
    with Tracker(tmp_path, made.chance_loss, made.time_steps) as tracker:
        result = Training(
            model, made, optimizer, clipper, tracker, **(SMALL | {"steps": 4, "log_every": 1})
        ).run()
        tracker.finish(result)
    run = Run(tmp_path)
    assert run.metrics["skipped"].tolist() == [0, 1, 0, 1] == run.metrics["clipped"].tolist()
    assert run.metrics["grad_norm_post"][[1, 3]].tolist() == [0, 0]
    assert result.skip_fraction == run.summary["skip_fraction"] == 0.5
    assert {state["step"].item() for state in optimizer.state.values()} == {2}


def test_sequences_of_random_length_are_recorded_to_their_own_end(tmp_path: Path) -> None:
    task = TASKS.default("copy", length=6, min_length=2)
    run, _, _ = small_run(tmp_path, task=task, steps=20, log_every=1)
    hidden = run.bptt["l0"].hidden
    assert hidden.shape == (20, task.time_steps) == (20, 26)
    ends = (~np.isnan(hidden)).sum(1)
    assert set(ends.tolist()) == {22, 23, 24, 25, 26}
    for row, end in zip(hidden, ends, strict=True):
        assert not np.isnan(row[:end]).any()
    assert table([run]).splitlines()[-1].count("nan") == 0


def test_finding_the_first_states_form_teaches_batch_normalisation_nothing() -> None:
    task = small_task("cliff")
    part = CELLS.default("bn_rnn", hidden_size=1)
    model = build_model(part, task, INITS.default("torch"), 0)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.first_state(task.training_batch(0, 1, 3).inputs)
    assert before and model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_tasks_first_state_is_where_every_kind_of_layer_starts(tmp_path: Path) -> None:
    task = small_task("cliff")
    for cell in (name for group, name in PARTS if group == "cell"):
        part = CELLS.default(cell, hidden_size=1, num_layers=2)
        model = build_model(part, task, INITS.default("torch"), 0)
        inputs, _, _ = task.training_batch(0, 1, 3)
        state = model.first_state(inputs)
        layers = state if isinstance(state, list) else [state]
        for layer in layers:
            h, *c = layer if isinstance(layer, tuple) else (layer,)
            assert (h == task.initial_hidden).all() and not any(part.any() for part in c)
        assert torch.equal(model(inputs).hidden, model(inputs, state).hidden)


# --- what is not finite stops before the update


def poisoned(poison: Any) -> SequenceModel:
    task = TASKS.default("adding", length=6)
    model = build_model(CELLS.default("rnn", hidden_size=5), task, INITS.default("torch"), 0)
    with torch.no_grad():
        poison(model)
    return model


class Exploding(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * math.inf


class ExplodingReadout(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Exploding.apply(x))


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        (lambda m: m.rnn.weight_hh_l0.fill_(math.nan), "parameter rnn.weight_hh_l0 is not finite"),
        (lambda m: m.readout.bias.fill_(math.inf), "parameter readout.bias is not finite"),
        (lambda m: m.readout.bias.fill_(1e25), "loss is inf while every output is finite"),
        (
            lambda m: setattr(m, "readout", exploding(m.readout)),
            "gradient of rnn.weight_ih_l0, .* is not finite; going back, .* from t = 5 on",
        ),
    ],
    ids=["weight", "bias", "loss", "gradient"],
)
def test_what_is_not_finite_is_named_and_nothing_is_updated(
    poison: Any, reason: str, tmp_path: Path
) -> None:
    model = poisoned(poison)
    before = [p.clone() for p in model.parameters()]
    run, result, _ = small_run(tmp_path, model=model)
    assert result.status == run.summary["status"] == "diverged" and result.steps == 0
    assert result.reason is not None and result.reason.startswith("step 1: ")
    assert re.search(reason, result.reason), result.reason
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())
    assert run.metrics["step"].tolist() == [1]
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)


def exploding(readout: torch.nn.Linear) -> torch.nn.Linear:
    other = ExplodingReadout(readout.in_features, readout.out_features)
    other.load_state_dict(readout.state_dict())
    return other


def test_a_hidden_state_that_overflows_is_located_in_time(tmp_path: Path) -> None:
    task = TASKS.default("adding", length=6)
    part = CELLS.default("rnn", hidden_size=5, nonlinearity="relu")
    model = build_model(part, task, INITS.default("torch"), 0)
    with torch.no_grad():
        model.rnn.weight_hh_l0.fill_(1e15)
        model.rnn.bias_ih_l0.fill_(1.0)
    _, result, _ = small_run(tmp_path, model=model)
    assert result.reason is not None
    assert "hidden state of the last layer (5 units) is not finite from t = 3 of 6" in result.reason


def test_an_update_that_breaks_the_weights_is_seen_by_the_evaluation(tmp_path: Path) -> None:
    run, result, _ = small_run(tmp_path, steps=1, lr=1e38, optim="sgd", clip="none")
    assert result.status == "diverged" and run.summary["eval_loss"] is None
    assert result.reason is not None and result.reason.startswith("evaluation after step 1: ")


# --- reports


def test_the_table_has_a_line_a_run_also_for_one_that_has_logged_nothing(
    finished: Run, tmp_path: Path
) -> None:
    with Tracker(tmp_path, 1 / 6, 6):
        lines = table([finished, Run(tmp_path)]).splitlines()
    assert len(lines) == 4 and "running" in lines[3] and "completed" in lines[2]
    assert len(set(map(len, lines))) == 1


def configured(path: Path, **settings: Any) -> Run:
    small_run(path, steps=1)
    (path / ".hydra").mkdir()
    config = {"seed": 0, "cell": {"name": "rnn", "nonlinearity": "tanh"}, "optim": {"name": "sgd"}}
    (path / ".hydra" / "config.yaml").write_text(json.dumps(config | settings))
    return Run(path)


def test_runs_are_told_apart_by_what_their_names_do_not_say(tmp_path: Path) -> None:
    runs = [
        configured(tmp_path / "a"),
        configured(tmp_path / "b", seed=1),
        configured(tmp_path / "c", optim={"name": "adam"}),
        configured(tmp_path / "d", cell={"name": "rnn", "nonlinearity": "relu"}),
        configured(tmp_path / "e", cell={"name": "lstm", "forget_bias": None}),
    ]
    tanh = "cell.nonlinearity=tanh optim=sgd"
    assert differences(runs) == [
        tanh,
        tanh,
        "cell.nonlinearity=tanh optim=adam",
        "cell.nonlinearity=relu optim=sgd",
        "optim=sgd",
    ]
    assert differences(runs[:2]) == ["", ""] and "settings" not in table(runs[:2])
    lines = table(runs).splitlines()
    assert "optim=adam" in lines[4] and len(set(map(len, lines))) == 1


def test_a_sweep_directory_lists_its_runs(finished: Run) -> None:
    with pytest.raises(FileNotFoundError, match=f"runs inside it: .*{finished.path.name}"):
        Run(finished.path.parent)


def test_metrics_are_plain_csv(finished: Run) -> None:
    with (finished.path / METRICS).open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(COLUMNS) and all(len(row) == len(COLUMNS) for row in rows)
    assert rows[1][3] == "", "evaluations are empty elsewhere"
