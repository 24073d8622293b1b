"""Sweeps trained as stacks, by processes that share one list of runs."""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from rnngrad.bptt_clip import BPTT_CLIPS
from rnngrad.cells import CELLS
from rnngrad.clipping import CLIPS
from rnngrad.config import experiment
from rnngrad.job import train
from rnngrad.kernels.activations import ACTIVATIONS
from rnngrad.launcher import lock_directory
from rnngrad.outcomes import DONE, FAILED, OUTCOMES, Ledger
from rnngrad.parts import InputError
from rnngrad.regularization import REGULARIZERS
from rnngrad.runs import LOG, Run, find_runs
from rnngrad.signals import Signals
from rnngrad.stack import ADVANCING, _kind
from rnngrad.stacking import Share, _why_alone, grouped, said, work
from rnngrad.sweeps import Job
from rnngrad.tracking import Tracker
from rnngrad.workers import note_lost, read_jobs, write_jobs
from tests.processes import Processes, processes
from tests.sameness import composed, differences, everything, small
from tests.test_command import TINY, Command, command
from tests.test_engines import until
from tests.test_sweeps_killed import descendants

__all__ = ["command", "processes"]

ALONE = Share(0, 1, 16, 2.0**30)
HYDRA: dict[str, Any] = {"job": {}, "overrides": {"task": []}, "runtime": {}}


@pytest.fixture(autouse=True)
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where outcomes go, on one thread and as if nobody cut the power."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setenv(OUTCOMES, str(tmp_path / "outcomes"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "outcomes"
    torch.set_num_threads(before)


def jobs(folder: Path, *changes: dict[str, Any]) -> list[Job]:
    """Small runs that differ in these, in ``folder/NUMBER``."""
    return [
        Job(
            number,
            (f"seed={number}",),
            composed(small({"cell": "rnn"} | own)),
            folder / str(number),
            HYDRA,
        )
        for number, own in enumerate(changes)
    ]


def codes(path: Path) -> dict[str, int | None]:
    """Exit codes by the name of the directory."""
    return {outcome.directory.name: outcome.code for outcome in Ledger(path).outcomes()}


SEEDS = [{"seed": seed} for seed in range(4)]


def test_a_list_of_jobs_is_read_as_it_was_written(tmp_path: Path) -> None:
    other = [{"cell": "lstm", "clip": "value"}, {"cell.num_layers": 1.0}, {"optim.lr": 1e-5}]
    listed = jobs(tmp_path, *SEEDS, *other)
    write_jobs(tmp_path / "jobs.json", listed)
    read = read_jobs(tmp_path / "jobs.json")
    assert read == listed
    for one, same in zip(read, listed, strict=True):
        assert one.texts() == same.texts() and repr(one.values) == repr(same.values)


def test_runs_that_differ_in_what_can_be_stacked_are_one_group(tmp_path: Path) -> None:
    penalties = [{"regularizer": "orthogonality", "regularizer.weight": w} for w in (0.1, 0.2)]
    same = [{}, {"seed": 3}, {"optim": "sgd"}, {"clip": "value"}, {"init": "irnn"}, *penalties]
    other = [
        {"cell.hidden_size": 5},
        {"task.length": 7},
        {"cell": "gru"},
        {"trainer.batch_size": 2},
    ]
    groups = grouped(jobs(tmp_path, *same, *other))
    assert [len(group.jobs) for group in groups] == [7, 1, 1, 1, 1]
    assert [*said(groups)] == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"cell": "ln_lstm"}, "cell=ln_lstm is run step by step by autograd"),
        ({"trainer.tbptt_k2": 3}, "trainer.tbptt_k2 is set"),
        ({"trainer.recompute_segments": 2}, "trainer.recompute_segments is set"),
        ({"regularizer": "omega"}, "regularizer=omega looks at every step's gradient"),
        ({"plugins": ["os"]}, "plugins may draw from the random streams of the whole process"),
    ],
)
def test_of_what_is_not_stacked_it_is_said_why(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    groups = grouped(jobs(tmp_path, {}, changes, changes | {"seed": 1}))
    assert [*said(groups)] == [f"2 of the runs are not stacked: {why}"]
    assert [ALONE.room(group) for group in groups] == [1, 1]


SETTINGS = [
    *({"cell": name} for name in CELLS.load()),
    *({"cell": "rnn", "cell.nonlinearity": name} for name in ACTIVATIONS),
    *({"cell": "rnn", "regularizer": name} for name in REGULARIZERS.load()),
    *({"clip": name} for name in CLIPS.load()),
    *({"bptt_clip": name} for name in BPTT_CLIPS.load()),
    {"cell": "lstm", "cell.forget_gate": False, "cell.forget_bias": None},
    *({"trainer.tbptt_k2": steps} for steps in (3, 5, 6)),
    {"trainer.recompute_segments": 2},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_what_settings_say_can_be_stacked_is_what_a_stack_can_take(changes: dict[str, Any]) -> None:
    values = composed(small(changes))
    spec = experiment(values)
    training = spec.training(Mock())
    assert bool(_why_alone(spec, values)) == (_kind(training) is None)


def test_a_process_takes_on_what_fits_and_leaves_something_to_the_others(tmp_path: Path) -> None:
    (group,) = grouped(jobs(tmp_path, *SEEDS, *({"seed": 9 + n} for n in range(8))))
    assert Share(0, 1, 16, 2.0**30).room(group) == 12
    assert Share(0, 1, 5, 2.0**30).room(group) == 5
    assert Share(0, 1, 16, 3.5 * group.bytes).room(group) == 3
    assert Share(1, 4, 16, 2.0**30).room(group) == 3
    assert Share(1, 4, 16, 1).room(group) == 1
    orders = [[job.number for job in Share(i, 3, 1, 1).first(group.jobs)] for i in range(3)]
    assert [order[0] for order in orders] == [0, 1, 2]
    assert all(sorted(order) == [*range(12)] for order in orders)


def test_a_process_trains_each_run_as_it_is_alone_and_keeps_its_log(
    tmp_path: Path, ledger: Path
) -> None:
    changes = [*SEEDS, {"optim.lr": 1e38, "optim": "sgd", "clip": "none"}, {"cell": "ln_rnn"}]
    listed = jobs(tmp_path / "stacked", *changes)
    with Signals() as signals:
        work(listed, ALONE, str(tmp_path), [], signals)
    assert codes(ledger) == {"0": 0, "1": 0, "2": 0, "3": 0, "4": 3, "5": 0}
    for own in jobs(tmp_path / "alone", *changes):
        own.directory.mkdir(parents=True)
        train(dict(own.values), own.directory, texts=own.texts())
        name = own.directory.name
        here, there = (everything(tmp_path / how / name) for how in ("stacked", "alone"))
        assert differences(here, there) == []
        texts = [tmp_path / how / name / ".hydra" / "config.yaml" for how in ("stacked", "alone")]
        assert texts[0].read_text() == texts[1].read_text()
    logs = {path.parent.name: path.read_text() for path in tmp_path.glob(f"stacked/*/{LOG}")}
    assert [*logs] == ["4"] and "diverged" in logs["4"]


def test_a_run_that_fails_has_its_traceback_in_its_own_log(
    tmp_path: Path, ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnngrad.training.evaluate", lambda *_, **__: 1 / 0)
    listed = jobs(tmp_path, {}, {"trainer.eval_every": 100, "trainer.steps": 1})
    with Signals() as signals:
        work(listed, ALONE, str(tmp_path), [], signals)
    assert codes(ledger) == {"0": FAILED, "1": FAILED}
    for job in listed:
        text = (job.directory / LOG).read_text()
        assert text.count("Traceback") == 1 and "ZeroDivisionError" in text
        assert Run(job.directory).summary["status"] == "failed"


def test_a_run_that_draws_from_the_global_streams_is_trained_as_it_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = CLIPS.load()["norm"].clip_

    def noisy(rule: Any, gradient: Any, state: Any) -> Any:
        for grad in gradient.grads:
            grad.mul_(torch.rand(()))
        return clip(rule, gradient, state)

    monkeypatch.setattr(CLIPS["norm"], "clip_", noisy)
    changes = {"plugins": ["os"], "trainer.checkpoint_every": 3, "clip": "norm"}
    (stacked,) = jobs(tmp_path / "stacked", changes)
    (alone,) = jobs(tmp_path / "alone", changes)
    with Signals() as signals:
        work([stacked], ALONE, str(tmp_path), ["os"], signals)
    alone.directory.mkdir(parents=True)
    train(dict(alone.values), alone.directory, texts=alone.texts())
    assert differences(everything(stacked.directory), everything(alone.directory)) == []


def test_a_directory_that_cannot_be_made_is_one_runs_failure(tmp_path: Path, ledger: Path) -> None:
    listed = jobs(tmp_path, *SEEDS[:2])
    (tmp_path / "0").touch()
    with Signals() as signals:
        work(listed, ALONE, str(tmp_path), [], signals)
    assert codes(ledger) == {"0": FAILED, "1": DONE}


def test_a_run_that_somebody_else_has_is_waited_for_and_then_taken(
    tmp_path: Path, ledger: Path
) -> None:
    listed = jobs(tmp_path, *SEEDS[:2])
    listed[0].directory.mkdir()
    held = threading.Event()

    def hold() -> None:
        with lock_directory(listed[0].directory):
            held.set()
            while not codes(ledger):  # until the other run is done
                time.sleep(0.01)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with Signals() as signals:
        work(listed, ALONE, str(tmp_path), [], signals)
    holder.join()
    assert [*codes(ledger).items()] == [("1", DONE), ("0", DONE)]


def test_two_processes_share_a_list_and_none_is_trained_twice(tmp_path: Path, ledger: Path) -> None:
    listed = jobs(tmp_path, *SEEDS)
    pid, code = os.fork(), 1
    try:
        with Signals() as signals:
            work(listed, Share(0 if pid else 1, 2, 1, 2.0**30), str(tmp_path), [], signals)
        code = 0
    finally:
        if not pid:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert codes(ledger) == dict.fromkeys("0123", DONE)
    # who goes on with a run begins another file
    assert [len(list(job.directory.glob("*tfevents*"))) for job in listed] == [1] * 4


def deadly(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Has the run of a seed end whoever trains it."""
    updated = Tracker.updated

    def end(tracker: Tracker, *arguments: float) -> None:
        job: Any = ADVANCING.get()
        if job.values["seed"] == seed:
            os.kill(os.getpid(), signal.SIGKILL)
        updated(tracker, *arguments)

    monkeypatch.setattr(Tracker, "updated", end)


def trained_by(count: int, listed: list[Job], folder: Path) -> list[int]:
    """How so many processes have ended that share a list."""
    pids = []
    for index in range(count):
        pids.append(os.fork())
        if not pids[-1]:
            code = 1
            try:
                with Signals() as signals:
                    work(listed, Share(index, count, 16, 2.0**30), str(folder), [], signals)
                code = 0
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def test_a_run_that_ends_its_process_is_tried_by_one_more_and_left_to_the_next_sweep(
    tmp_path: Path, ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = jobs(tmp_path, *({"seed": seed} for seed in range(8)))
    deadly(monkeypatch, 3)
    assert sorted(trained_by(4, listed, tmp_path)) == [-9, -9, 0, 0]
    assert codes(ledger) == {str(n): FAILED if n == 3 else DONE for n in range(8)}
    assert "2 processes have died" in (listed[3].directory / LOG).read_text()
    monkeypatch.undo()
    monkeypatch.setenv(OUTCOMES, str(tmp_path / "next"))
    assert trained_by(1, listed, tmp_path) == [0]
    assert codes(tmp_path / "next") == {str(n): DONE for n in range(8)}


def test_what_a_killed_process_has_begun_is_gone_on_with_by_the_others(
    tmp_path: Path, ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = jobs(tmp_path, *SEEDS)
    with monkeypatch.context() as patch:
        deadly(patch, 2)
        assert trained_by(1, listed, tmp_path) == [-9]
    assert codes(ledger) == {} and len(list(find_runs(tmp_path))) == 4
    assert trained_by(1, listed, tmp_path) == [0]
    assert codes(ledger) == dict.fromkeys("0123", DONE)


def test_once_stopped_a_process_begins_no_run(tmp_path: Path, ledger: Path) -> None:
    with Signals() as signals:
        signals.stop(signal.SIGTERM)
        work(jobs(tmp_path, *SEEDS), ALONE, str(tmp_path), [], signals)
    assert codes(ledger) == {} and not list(find_runs(tmp_path))


def test_what_nobody_is_left_to_train_has_failed(
    tmp_path: Path, ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = jobs(tmp_path, *SEEDS[:2])
    with Signals() as signals:
        work(listed[:1], ALONE, str(tmp_path), [], signals)
    note_lost(listed, str(tmp_path))
    assert codes(ledger) == {"0": DONE, "1": FAILED}
    assert "nobody is left to train 1 of 2 runs" in capsys.readouterr().err


def test_a_sweep_as_stacks_leaves_what_hydras_own_launcher_leaves(
    command: Command, tmp_path: Path
) -> None:
    sweep = ["-m", *TINY, "cell=rnn,ln_rnn", "seed=0,1"]
    code, told = command(*sweep, "hydra/launcher=stacked", "hydra.sweep.dir=stacked")
    assert code == 0, told
    assert "2 of the runs are not stacked: cell=ln_rnn is run step by step by autograd" in told
    assert "4 of 4 runs done" in told and "best: " in told
    assert command(*sweep, "hydra.sweep.dir=basic")[0] == 0
    names = sorted(path.name for path in find_runs(tmp_path / "basic"))
    assert names == sorted(path.name for path in find_runs(tmp_path / "stacked"))
    for name in names:
        here, there = (everything(tmp_path / how / name) for how in ("stacked", "basic"))
        environment = json.dumps({"threads": 1})[1:-1].replace('"', "'")
        assert environment in here["state.json"].decode()
        assert here["metrics.csv"] == there["metrics.csv"]
        for text in ("config", "overrides"):
            one, other = (
                tmp_path / how / name / f".hydra/{text}.yaml" for how in ("stacked", "basic")
            )
            assert one.read_text() == other.read_text()


def test_a_sweep_of_stacks_that_is_interrupted_goes_on(
    processes: Processes, tmp_path: Path
) -> None:
    sweep = [
        *("-m", *TINY, "cell=rnn", "seed=0,1,2", "trainer.steps=3000", "hydra/launcher=stacked"),
        *("trainer.checkpoint_every=100", "trainer.eval_every=3000"),
    ]
    started = processes.start(tmp_path, *sweep)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("runs/*/checkpoint/step-*00"))) < 3:
        assert time.monotonic() < deadline, started.said
        time.sleep(0.01)
    started.kill(signal.SIGTERM)
    assert started.wait() == 143, started.said
    runs = [Run(path) for path in find_runs(tmp_path / "runs")]
    assert {run.summary["status"] for run in runs} == {"interrupted"}
    assert processes.run(tmp_path, *sweep)[0] == 0
    assert [Run(path).summary["steps"] for path in find_runs(tmp_path / "runs")] == [3000] * 3


def keep_temporary_files_in(folder: str) -> None:
    os.makedirs(folder)
    tempfile.tempdir = folder


def test_a_second_signal_leaves_no_process_and_no_file_behind(
    processes: Processes, tmp_path: Path
) -> None:
    sweep = ("-m", *TINY, "cell=rnn", "seed=0,1", "trainer.steps=1000000", "engine=stacked")
    temporary = tmp_path / "temporary"
    started = processes.start(
        tmp_path, *sweep, arrange=keep_temporary_files_in, using=(str(temporary),)
    )
    until(lambda: any(tmp_path.glob("runs/*/updates.f32")))
    workers = {*descendants(started.pid)} - {started.pid}
    assert workers and any(temporary.iterdir())
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # as if it took long to save
    started.kill(signal.SIGINT)
    until(lambda: "once more leaves at once" in started.said)
    started.kill(signal.SIGINT)
    assert started.wait() == 130, started.said
    until(lambda: not any(is_alive(pid) for pid in workers), 10)
    assert not any(temporary.iterdir())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("hydra.launcher.processes=0", "hydra.launcher.processes=0: must be an integer >= 1"),
        ("hydra.launcher.max_stack=many", "hydra.launcher.max_stack=many: must be an integer >= 1"),
    ],
)
def test_a_setting_that_is_none_is_refused_in_one_line(
    typed: str, said: str, command: Command, tmp_path: Path
) -> None:
    code, told = command("-m", *TINY, "seed=0,1", "hydra/launcher=stacked", typed)
    assert code == 2 and said in told
    assert not (tmp_path / "runs").exists()


def test_without_submitit_it_is_said_how_to_get_it(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, told = command("-m", *TINY, "seed=0,1", "engine=slurm")
    assert code == 2 and "needs submitit: pip install 'rnngrad[slurm]'" in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("cluster", "lsf", "cluster=lsf: must be one of slurm, local"),
        ("additional", 3, "additional=3: must be a mapping"),
        ("additional", {"account": "a\nb"}, "additional.account=a.*b: must be printable"),
        ("partition", "a\nb", "partition=a.*b: must be printable"),
    ],
)
def test_a_setting_of_the_cluster_is_checked(
    key: str, value: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra_plugins.rnngrad_launcher._launch import on_slurm

    monkeypatch.setitem(sys.modules, "submitit", Mock())
    settings: dict[str, Any] = {
        **{"tasks": 2, "cpus_per_task": 1, "timeout_min": 5, "partition": None},
        **{"cluster": "local", "additional": {}, "max_stack": 2, "memory_mib": 1},
    }
    with pytest.raises(InputError, match=f"^hydra.launcher.{said}"):
        on_slurm(**settings | {key: value})
