"""Where the runs of a sweep run, and who chooses them; what needs an extra has a mark."""

import importlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.errors import MissingConfigException

from rnngrad.children import Child, Children, _left
from rnngrad.explain import explain
from rnngrad.launcher import register_run_name
from rnngrad.parts import InputError
from rnngrad.runs import LOCK, Run, find_runs

from .test_command import TINY, whole

ROOT = Path(__file__).parent.parent
ENGINES = sorted((ROOT / "conf" / "engine").glob("*.yaml"))


@pytest.mark.parametrize(
    ("missing", "words", "said"),
    [
        ("find 'hydra/launcher/joblib'", "engine=joblib", "engine=joblib: needs pip install"),
        ("load 'hydra/sweeper/optuna'", "hydra/sweeper=study", "hydra/sweeper=study: needs pip"),
        ("find 'hydra/sweeper/optuna'", "experiment=x seed=1", "experiment=x: needs pip install"),
        ("find 'hydra/launcher/ray'", "hydra/launcher=ray", "hydra/launcher=ray: must be one of"),
    ],
)
def test_what_is_not_installed_is_one_line_that_says_how_to(
    missing: str, words: str, said: str
) -> None:
    error = MissingConfigException(f"In 'config': Could not {missing}\n\nAvailable options", "x")
    line = explain(error, words.split())
    assert line.startswith(said) and "\n" not in line


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_an_engine_says_what_it_is_and_names_a_launcher_of_ours(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n# A sweep's runs ")
    launcher = path.stem
    assert yaml.safe_load(text)["defaults"] == [{"override /hydra/launcher": launcher}]
    if launcher in ("stacked", "slurm"):
        register_run_name()
        with initialize_config_module("rnngrad.conf", version_base="1.3"):
            composed = compose("config", [f"engine={launcher}"], return_hydra_config=True)
        target = composed.hydra.launcher._target_
    else:
        target = yaml.safe_load(text)["hydra"]["launcher"]["_target_"]
    module, _, name = target.rpartition(".")
    assert module.startswith("hydra_plugins.rnngrad_")
    assert hasattr(importlib.import_module(module), name)


def test_no_processes_of_joblib_s_are_refused_in_one_line() -> None:
    from hydra_plugins.rnngrad_joblib.launcher import Joblib

    Joblib.check(n_jobs=-1, verbose=0)
    with pytest.raises(InputError, match="^hydra.launcher.n_jobs=0: must be a number of processes"):
        Joblib.check(n_jobs=0)


# --- processes of somebody else's


def test_whoever_was_interrupted_does_not_begin_another_run(tmp_path: Path) -> None:
    def interrupted(argument: int) -> int:
        raise SystemExit(143)

    ran: list[int] = []
    try:
        with pytest.raises(SystemExit):
            Child(interrupted, tmp_path, os.getpid())(0)
        with pytest.raises(SystemExit) as left:
            Child(ran.append, tmp_path, os.getpid())(0)
    finally:
        _left.clear()
    assert left.value.code == 143 and not ran and not [*tmp_path.iterdir()]


FAMILY = """
import os, sys, time
from rnngrad.children import Children
from rnngrad.signals import Signals

def trains(path):
    with Signals() as signals:
        signals()
        open(path, "w").close()
        while not signals():
            time.sleep(0.01)
        time.sleep(0.2)
        os.rename(path, path + ".saved")
    raise SystemExit(128 + signals.number)

with Children() as children:
    child = children.trains(trains)
    for number in range(2):
        if os.fork() == 0:
            try:
                child(str(number))
            finally:
                os._exit(0)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("everybody", [False, True], ids=["one", "all"])
def test_a_signal_to_a_command_is_one_to_all_that_train_for_it(
    number: signal.Signals, code: int, everybody: bool, tmp_path: Path
) -> None:
    """Whether the terminal sends it to all of the group, as Ctrl-C, or it comes to one alone."""
    if everybody and number == signal.SIGKILL:
        pytest.skip("nobody is left to hear of it")
    told = tmp_path / "told"
    with open(told, "wb") as file:
        family = subprocess.Popen(
            [sys.executable, "-c", FAMILY],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=file,
            start_new_session=True,
        )
    until(lambda: {"0", "1"} <= {path.name for path in tmp_path.iterdir()})
    (os.killpg if everybody else os.kill)(family.pid, number)
    assert family.wait(30) == code, told.read_text()
    saved = {"0.saved", "1.saved"}
    if number == signal.SIGKILL:
        until(lambda: saved <= {path.name for path in tmp_path.iterdir()})
    assert saved <= {path.name for path in tmp_path.iterdir()}, told.read_text()


def test_a_signal_that_comes_while_something_is_printed_is_told_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def print_in_print(*_: object) -> None:
        raise RuntimeError("reentrant call")

    with Children():
        monkeypatch.setattr(sys, "stderr", Mock(write=print_in_print))
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
    assert left.value.code == 143
    assert "SIGTERM: every run saves and leaves" in capfd.readouterr().err


def until(true: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- with the extras: make test-engines


Sweep = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Sweep]:
    """Starts a sweep that ends with the test, in a group of its own; ``said`` has what it says."""
    started = []

    def start(*words: str) -> "subprocess.Popen[bytes]":
        with open(tmp_path / "said", "ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "rnngrad", "-m", *TINY, "cell=rnn", "measure=none", *words],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def finished(folder: Path) -> int:
    summaries = [path / "summary.json" for path in find_runs(folder)]
    return sum('"completed"' in path.read_text() for path in summaries)


@pytest.mark.engines
def test_joblib_interrupted_saves_all_and_one_that_dies_is_told(
    sweep: Sweep, tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ["engine=joblib", "hydra.launcher.n_jobs=2", "seed=range(4)", "trainer.steps=1000000"]

    def under_way() -> bool:
        runs = [path for path in find_runs(tmp_path) if (path / "updates.f32").exists()]
        return sum(len(Run(path).updates["step"]) > 5 for path in runs) >= 2

    started = sweep(*words)
    until(under_way)
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(300) == 130
    statuses = [Run(path).summary["status"] for path in find_runs(tmp_path)]
    assert statuses == ["interrupted", "interrupted"]
    said = (tmp_path / "said").read_text()
    assert said.count("and saved") == 2 and "Traceback" not in said and "HYDRA" not in said

    started = sweep(*words)
    until(lambda: (tmp_path / "said").read_text().count("goes on after") == 2)
    os.kill(int(next(find_runs(tmp_path)).joinpath(LOCK).read_text()), signal.SIGKILL)
    assert started.wait(300) == 1
    assert "the same command goes on" in (tmp_path / "said").read_text()


@pytest.mark.engines
def test_a_study_that_is_killed_goes_on_with_the_trials_that_were_under_way(
    sweep: Sweep, tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = [
        *("hydra/sweeper=study", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2"),
        *("hydra.sweep.dir=study", "optim.lr=tag(log,interval(1e-4,1e-1))", "trainer.steps=2000"),
    ]
    started = sweep(*words)
    until(lambda: finished(tmp_path) >= 3)
    started.kill()
    assert started.wait() == -9
    before = len((tmp_path / "said").read_text())
    assert sweep(*words).wait(600) == 0, (tmp_path / "said").read_text()
    totals = re.findall(r"of (\d+) runs done", (tmp_path / "said").read_text()[before:])
    assert all(int(total) <= 4 for total in totals)  # of two at once both or none is done
    runs = [*find_runs(tmp_path / "study")]
    assert len(runs) == 6 and all(map(whole, runs))
    with sqlite3.connect(tmp_path / "study" / "study.db") as study:
        states = [state for (state,) in study.execute("select state from trials")]
    assert states.count("COMPLETE") == 6 and "RUNNING" not in states
    again = sweep(*words)
    assert again.wait(600) == 0 and len([*find_runs(tmp_path / "study")]) == 6
    best = yaml.safe_load((tmp_path / "study" / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(Run(path).summary["eval_loss"] for path in runs)
