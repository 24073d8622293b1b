"""Runs trained as one program: each is, to the last bit, the run that it is alone."""

import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rnngrad import job, stack
from rnngrad.cells import CELLS
from rnngrad.clipping import CLIPS
from rnngrad.optim import OPTIMS
from rnngrad.outcomes import DIVERGED, DONE
from rnngrad.runs import Run
from rnngrad.stack import Stack
from rnngrad.task import TASKS, Batch, Task
from rnngrad.training import Update, Work
from tests.sameness import Asked, composed, differences, everything, small, without_tensorboard
from tests.small import documented, small_task

Ended = dict[Any, tuple[Any, BaseException | None]]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in the processes that train stacks; nobody cuts the power, or looks at pictures."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with without_tensorboard():
        yield
    torch.set_num_threads(before)


def runs(*changes: Mapping[str, Any], **common: Any) -> list[dict[str, Any]]:
    """Configurations of small runs that differ in these."""
    shared = {key.replace("__", "."): value for key, value in common.items()}
    return [composed(small(shared | dict(own))) for own in changes]


def stacked(
    values: Sequence[dict[str, Any]], folder: Path, room: int = 16, asked: Asked | None = None
) -> Ended:
    """What each run, in ``folder/NUMBER``, returned or raised."""
    ended: Ended = {}
    waiting = iter(enumerate(values))

    def take() -> tuple[int, stack.Works] | None:
        for number, own in waiting:
            directory = folder / str(number)
            directory.mkdir(parents=True, exist_ok=True)
            return number, job.works(
                own, directory, asked or Asked(), stacked=True, shares_streams=True
            )  # type: ignore[arg-type]
        return None

    def end(name: Any, result: Any, error: BaseException | None) -> None:
        ended[name] = result, error

    Stack(take, end, room).run()
    return ended


def alone(values: Iterable[dict[str, Any]], folder: Path) -> None:
    """Each run by itself."""
    for number, own in enumerate(values):
        directory = folder / str(number)
        directory.mkdir(parents=True, exist_ok=True)
        job.train(own, directory)


def check(values: Sequence[dict[str, Any]], folder: Path, room: int = 16) -> None:
    """That the runs leave the same stacked and alone."""
    ended = stacked(values, folder / "stacked", room)
    alone(values, folder / "alone")
    for number in range(len(values)):
        assert ended[number][1] is None
        here, there = (
            everything(folder / how / str(number), board=False) for how in ("stacked", "alone")
        )
        assert differences(here, there) == []


DIFFERENT = [{"seed": 0}, {"seed": 0, "optim.lr": 0.05}, {"seed": 1}]


@pytest.mark.parametrize("cell", sorted(CELLS.load()))
def test_of_every_cell_a_run_is_the_same_in_a_stack(cell: str, tmp_path: Path) -> None:
    check(runs(*DIFFERENT, {"seed": 2, "cell.num_layers": 2}, cell=cell), tmp_path)


@pytest.mark.parametrize("clip", sorted(CLIPS.load()))
def test_of_every_clip_rule_a_run_is_the_same_in_a_stack(clip: str, tmp_path: Path) -> None:
    check(runs(*DIFFERENT, {"clip": "none"}, clip=clip, cell="gru"), tmp_path)


@pytest.mark.parametrize("optim", sorted(OPTIMS.load()))
def test_of_every_optimiser_a_run_is_the_same_in_a_stack(optim: str, tmp_path: Path) -> None:
    check(runs(*DIFFERENT, {"optim.schedule": "cosine"}, optim=optim, cell="rnn"), tmp_path)


@pytest.mark.parametrize("task", sorted(documented("task")))
def test_of_every_task_a_run_is_the_same_in_a_stack(task: str, tmp_path: Path) -> None:
    made = small_task(task)
    size = {} if made.reads_out else {"cell.hidden_size": made.output_size}
    changes = {"task": asdict(made) | {"name": task}, "cell": "rnn"} | size
    settings = [
        {k: v for k, v in small(own | changes).items() if k != "task.length"} for own in DIFFERENT
    ]
    check([composed(own) for own in settings], tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"measure": "standard"},
        {"measure": "full", "cell": "lstm"},
        {"cell": "rnn", "regularizer": "omega", "optim": "sgd"},
        {"cell": "rnn", "regularizer": "orthogonality"},
        {"bptt_clip": "graves2013"},
        {"cell": "gru", "bptt_clip": "norm", "bptt_clip.site": "carry"},
        {"trainer.tbptt_k1": 2, "trainer.tbptt_k2": 3},
        {"trainer.recompute_segments": 2},
        {"trainer.clip_audit": ["value", "zclip"], "trainer.eval_lengths": [3]},
        {"task.min_length": 3},
        {"trainer.log_per_decade": 3, "init": "irnn", "cell": "rnn"},
        {"trainer.nonfinite": "pascanu", "cell": "rnn", "optim.lr": 1e30},
    ],
    ids=lambda changes: " ".join(f"{key}={value}" for key, value in changes.items()),
)
def test_whatever_else_is_asked_of_it_a_run_is_the_same_in_a_stack(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    check(runs(changes, changes | {"seed": 1}, {"seed": 2}), tmp_path)


def test_runs_with_other_penalties_are_the_same_in_one_stack(tmp_path: Path) -> None:
    penalties = [{"regularizer": "orthogonality", "regularizer.weight": w} for w in (1e-3, 0.1)]
    check(runs({}, *penalties, {"seed": 1} | penalties[0], cell="gru"), tmp_path)


@pytest.mark.parametrize(
    "optim", [*({"optim": name} for name in sorted(OPTIMS.load())), {"optim.momentum": 0.9}]
)
def test_runs_that_do_not_fit_take_the_places_of_those_that_have_ended(
    optim: dict[str, Any], tmp_path: Path
) -> None:
    """And so one of them makes its first step with others that have a momentum already."""
    lengths = [{"seed": seed, "trainer.steps": steps} for seed, steps in enumerate([3, 9, 4, 2, 6])]
    check(runs(*lengths, cell="rnn", **{"optim": "sgd"} | optim), tmp_path, room=2)


def test_recurrences_of_the_same_shape_are_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    together = stack._there_and_back

    def counted(updates: Sequence[Update], members: Any) -> dict[Work, Exception]:
        sizes.append(len(updates))
        return together(updates, members)

    monkeypatch.setattr(stack, "_there_and_back", counted)
    changes = [{"seed": seed, "optim.lr": 10.0**-seed, "clip": "value"} for seed in range(6)]
    more = [{"cell.hidden_size": 5}, {"clip": "norm"}, {"regularizer": "orthogonality"}]
    stacked(runs(*changes, *more, cell="rnn"), tmp_path)
    assert sizes == [8] * 12


def test_who_diverges_and_who_fails_does_not_touch_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adding = TASKS.load()["adding"]
    batch_of, loss_of = adding.training_batch, adding.loss

    def training_batch(task: Task, seed: int, step: int, size: int) -> Batch:
        if (seed, step) == (98, 5):
            raise ZeroDivisionError
        batch = batch_of(task, seed, step, size)
        return batch._replace(targets=batch.targets / (0 if (seed, step) == (99, 6) else 1))

    def loss(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.isinf().any():
            raise RecursionError
        return loss_of(task, outputs, targets)

    monkeypatch.setattr(adding, "training_batch", training_batch)
    monkeypatch.setattr(adding, "loss", loss)
    common = {"cell": "rnn", "trainer__steps": 8}
    good = runs(*({"seed": n, "optim.lr": 0.01 * (1 + n % 3)} for n in range(13)), **common)
    diverging = {"optim": "sgd", "clip": "none", "optim.lr": 1e38}
    bad = runs(diverging, {"seed": 98}, {"seed": 99}, **common)
    ended = stacked([*bad, *good], tmp_path / "with")
    assert ended[0][0][0] == DIVERGED
    assert isinstance(ended[1][1], ZeroDivisionError)
    assert isinstance(ended[2][1], RecursionError)
    stacked(good, tmp_path / "without")
    for number in range(13):
        assert ended[3 + number][1] is None and ended[3 + number][0][0] == DONE
        one = everything(tmp_path / "with" / str(3 + number), board=False)
        assert differences(one, everything(tmp_path / "without" / str(number), board=False)) == []


def test_an_interrupted_stack_is_saved_and_each_run_goes_on_by_itself(tmp_path: Path) -> None:
    values = runs(*DIFFERENT, cell="lstm")
    ended = stacked(values, tmp_path / "stacked", asked=Asked(40))
    assert {result[0] for result, _ in ended.values()} == {128 + signal.SIGTERM}
    steps = [Run(tmp_path / "stacked" / str(n)).summary["steps"] for n in range(3)]
    assert all(0 < step < 12 for step in steps)
    alone(values, tmp_path / "alone")
    for number in range(3):
        job.train(values[number], tmp_path / "stacked" / str(number))
        here, there = (
            everything(tmp_path / how / str(number), board=False) for how in ("stacked", "alone")
        )
        assert differences(here, there) == []


def test_a_stack_goes_on_where_runs_were_interrupted(tmp_path: Path) -> None:
    values = runs(*DIFFERENT, cell="rnn")
    stacked(values, tmp_path / "stacked", asked=Asked(40))
    stacked(values[:2], tmp_path / "stacked", asked=Asked(30))
    check(values, tmp_path)
