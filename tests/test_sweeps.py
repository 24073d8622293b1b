"""Sweeps: jobs composed fast, frozen, resumed, told about."""

import itertools
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, open_dict

from rnngrad.frozen import freeze
from rnngrad.launcher import plain, register_run_name, stored_texts
from rnngrad.outcomes import OUTCOMES, Ledger, Outcome, note
from rnngrad.parts import InputError
from rnngrad.progress import Progress, in_words
from rnngrad.runs import SUMMARY, Run, find_runs, overview
from rnngrad.sweeps import Job, compose_jobs

from .sweeps import make_run
from .test_command import TINY, Command, command, snapshot

__all__ = ["command"]

VALUES: dict[str, list[str]] = {
    "seed": ["0", "7", "12", "1e1"],
    "optim.lr": ["1e-3", "0.1", "1", "${seed}"],
    "trainer.steps": ["5", "1e1", "${trainer.batch_size}"],
    "trainer.batch_size": ["2", "3"],
    "trainer.tbptt_k2": ["null", "4"],
    "trainer.eval_lengths": ["[]", "[5,6]"],
    "trainer.checkpoint_every": ["30s", "'5 min'", "3", "null"],
    "trainer.stop_when_solved": ["true", "false"],
    "cell": ["rnn", "lstm", "gru"],
    "cell.hidden_size": ["3", "4"],
    "clip": ["none", "norm"],
    "optim": ["sgd", "adam", "{lr: 2.0}"],
    "+optim.lr": ["0.5"],
    "++seed": ["3"],
    "~init": [""],
    "experiment": ["first_look", "null"],
    "strict": ["true", "yes"],
}


@pytest.fixture
def loaded() -> Iterator[None]:
    """What Hydra knows of our configurations."""
    register_run_name()
    with initialize_config_module("rnngrad.conf", version_base="1.3"):
        yield


def sweep(*overrides: str) -> tuple[DictConfig, Any]:
    """The configuration of a sweep as Hydra hands it on, and the loader."""
    app = GlobalHydra.instance().hydra
    assert app is not None
    typed = ["hydra.mode=MULTIRUN", *overrides]
    config = app.compose_config("config", typed, RunMode.MULTIRUN, with_log_configuration=False)
    return config, app.config_loader


def jobs_or_error(config: DictConfig, loader: Any, lines: list[list[str]]) -> list[Any]:
    """The jobs, and the error at which they end."""
    jobs: list[Any] = []
    try:
        for job in compose_jobs(config, loader, lines, 3):
            jobs.append(job)
    except Exception as error:
        jobs.append((type(error), str(error)))
    return jobs


@st.composite
def sweeps(draw: st.DrawFn) -> list[list[str]]:
    """Overrides of jobs that set the same keys, which is what a sweep is."""
    keys = draw(st.lists(st.sampled_from([*VALUES]), min_size=1, max_size=3))
    return [
        [f"{key}={draw(st.sampled_from(VALUES[key]))}".removesuffix("=") for key in keys]
        for _ in range(draw(st.integers(2, 3)))
    ]


@given(sweeps())
@settings(max_examples=4, deadline=None, suppress_health_check=[*HealthCheck])
@pytest.mark.usefixtures("loaded")
def test_a_job_is_the_same_however_many_are_composed_with_it(lines: list[list[str]]) -> None:
    config, loader = sweep()
    freeze(loader)  # it takes less time
    together = jobs_or_error(config, loader, lines)
    alone: list[Any] = []
    for number, line in enumerate(lines):
        got = jobs_or_error(config, loader, [line])[0]
        failed = not isinstance(got, Job)
        alone.append(got if failed else Job(3 + number, *fields(got)))
        if failed:
            break
    assert together == alone
    assert [repr(job.values) for job in together if isinstance(job, Job)] == [
        repr(job.values)
        for job in alone
        if isinstance(job, Job)  # 1 is not 1.0
    ]


def fields(job: Job) -> tuple[Any, ...]:
    return job.overrides, job.values, job.directory, job.hydra


@pytest.mark.usefixtures("loaded")
def test_a_jobs_texts_are_those_that_hydras_own_launcher_leaves(tmp_path: Path) -> None:
    config, loader = sweep(f"hydra.sweep.dir={tmp_path}")
    lines = [["cell=gru", f"seed={seed}", f"optim.lr={lr}"] for seed in (0, 1) for lr in (1, 0.5)]
    for job in pickle.loads(pickle.dumps([*compose_jobs(config, loader, lines)])):  # noqa: S301
        full = loader.load_sweep_config(config, list(job.overrides))
        with open_dict(full):  # as in Hydra's BasicLauncher and run_job
            full.hydra.job.id = full.hydra.job.num = job.number
            full.hydra.runtime.output_dir = str(job.directory)
        HydraConfig.instance().set_config(full)
        with open_dict(full):
            values = plain(full)
            hydra = full.pop("hydra")
        expected = stored_texts(full)
        assert job.texts() == expected and job.values == values and hydra
        assert job.directory.parent == tmp_path and job.directory.name.startswith("adding_gru_norm")


@pytest.mark.usefixtures("loaded")
def test_jobs_that_differ_in_values_alone_are_composed_by_hydra_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, loader = sweep()
    composed = []
    compose = loader.load_sweep_config

    def counted(*arguments: Any) -> DictConfig:
        composed.append(arguments)
        result: DictConfig = compose(*arguments)
        return result

    monkeypatch.setattr(loader, "load_sweep_config", counted)
    grid = itertools.product(["rnn", "gru"], range(20), ["1e-3", "1e-2"])
    lines = [[f"cell={cell}", f"seed={seed}", f"optim.lr={lr}"] for cell, seed, lr in grid]
    jobs = [*compose_jobs(config, loader, lines)]
    assert len(composed) == 2 and len({job.directory for job in jobs}) == 80


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("seed=-1", "seed=-1: must be an integer >= 0"),
        ("seed=text", "seed=text: must be an integer >= 0"),
        ("optim.lr=true", "optim.lr=true: must be"),
        ("trainer.steps=[1]", r"trainer.steps=\[1\]: must be"),
    ],
)
@pytest.mark.usefixtures("loaded")
def test_a_wrong_value_is_refused_in_whichever_job_it_is(line: str, says: str) -> None:
    config, loader = sweep()
    lines = [[f"{line.split('=')[0]}=1"], [line]]
    jobs = compose_jobs(config, loader, lines)
    assert next(jobs).number == 0
    with pytest.raises(InputError, match=says):
        next(jobs)


@pytest.mark.usefixtures("loaded")
def test_directories_named_otherwise_are_those_of_hydra(tmp_path: Path) -> None:
    config, loader = sweep(
        f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=${hydra.job.num}_${task.name}_${seed}"
    )
    jobs = compose_jobs(config, loader, [["seed=4"], ["seed=5"]], first=7)
    assert [job.directory.name for job in jobs] == ["7_adding_4", "8_adding_5"]


# What a sweep finds when it begins


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    return ["-m", *TINY, f"hydra.sweep.dir={tmp_path / 'sweep'}"]


def statuses(path: Path) -> list[str]:
    return [Run(run).summary["status"] for run in find_runs(path)]


def test_a_larger_sweep_runs_what_is_missing_and_tells_of_all(
    command: Command, line: list[str], tmp_path: Path
) -> None:
    diverging = ["cell=rnn", "clip=none", "optim=sgd", "trainer.eval_every=100"]
    sweep = [*line, *diverging, "optim.lr=1e38,0.01"]
    code, said = command(*sweep, "seed=0")
    assert code == 3 and "sweep: 2 runs, 0 finished, 2 to run" in said and "best: " in said
    before = snapshot(tmp_path / "sweep")
    code, said = command(*sweep, "seed=0,1", "hydra.sweeper.max_batch_size=1")
    assert code == 3 and "sweep: 4 runs, 2 finished, 2 to run" in said
    assert said.count("#0 :") == 1 and said.count("#1 :") == 1 and "#2 :" not in said
    after = snapshot(tmp_path / "sweep")
    assert all(after[path] == before[path] for path in before if "_s0-" in path)
    assert sorted(statuses(tmp_path)) == ["completed", "completed", "diverged", "diverged"]
    assert all(path.name in said for path in find_runs(tmp_path / "sweep"))


def test_a_diverged_run_typed_again_says_so_and_stays(command: Command, tmp_path: Path) -> None:
    typed = [*TINY, "cell=rnn", "clip=none", "optim=sgd", "optim.lr=1e38", "trainer.eval_every=100"]
    assert command(*typed)[0] == 3
    before = snapshot(tmp_path)
    code, said = command(*typed)
    assert code == 3 and "has already diverged" in said
    after = snapshot(tmp_path)
    changed = {Path(path).name for path in after if after[path] != before.get(path)}
    assert changed <= {".lock", "rnngrad.log"}


def test_numbered_directories_keep_their_numbers(
    command: Command, line: list[str], tmp_path: Path
) -> None:
    numbered = [*line, "hydra.sweep.subdir=${hydra.job.num}"]
    assert command(*numbered, "seed=0,1")[0] == 0
    code, said = command(*numbered, "seed=0,1,2")
    assert code == 0 and "sweep: 3 runs, 2 finished, 1 to run" in said
    assert [path.name for path in find_runs(tmp_path / "sweep")] == ["0", "1", "2"]
    assert [Run(path).config["seed"] for path in find_runs(tmp_path / "sweep")] == [0, 1, 2]


def test_a_run_that_goes_on_elsewhere_is_left_there_and_the_others_run(
    command: Command, line: list[str], tmp_path: Path
) -> None:
    assert command(*line, "seed=0,1")[0] == 0
    first = next(find_runs(tmp_path / "sweep"))
    summary = json.loads((first / SUMMARY).read_text())
    (first / SUMMARY).write_text(json.dumps(summary | {"status": "running"}))
    with FileLock(first / ".lock"):
        code, said = command(*line, "seed=0,1,2")
        assert code == 4 and "3 runs, 1 finished, 1 to run, 1 going on elsewhere" in said
        assert f"going on elsewhere, and not waited for: {first.name}" in said
    assert sorted(statuses(tmp_path)) == ["completed", "completed", "interrupted"]
    assert command(*line, "seed=0,1,2")[0] == 0
    assert statuses(tmp_path) == ["completed"] * 3


def test_a_file_edited_while_a_sweep_runs_changes_no_job_of_it(
    command: Command, line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own" / "clip" / "mine.yaml"
    file.parent.mkdir(parents=True)
    (tmp_path / "editing.py").write_text(
        f"from pathlib import Path\npath = Path({str(file)!r})\n"
        "from rnngrad.clipping import CLIPS\nfrom rnngrad.clipping.norm import NormClip\n"
        "class Editing(NormClip):\n"
        "    def clip_(self, gradient, state):\n"
        "        path.unlink(missing_ok=True)\n"
        "        return super().clip_(gradient, state)\n"
        "CLIPS.register('editing')(Editing)\n"
    )
    file.write_text("name: editing\nmax_norm: 1.5\nnorm_type: 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["--config-dir", "own", "plugins=[editing]", "clip=mine"]
    code, said = command(*line, "seed=0,1", *own)
    assert code == 0, said
    assert not file.exists() and statuses(tmp_path) == ["completed"] * 2


@pytest.mark.usefixtures("loaded")
def test_frozen_files_travel_to_other_processes(tmp_path: Path) -> None:
    file = tmp_path / "clip" / "mine.yaml"
    file.parent.mkdir()
    file.write_text("name: norm\nmax_norm: 1.5\nnorm_type: 2\n")
    config, loader = sweep(f"hydra.searchpath=[file://{tmp_path}]")
    before = loader.repository
    try:
        freeze(loader)
        (job,) = compose_jobs(config, loader, [["clip=mine"]])
        file.write_text("name: norm\nmax_norm: 3.0\nnorm_type: 2\n")
        there = pickle.loads(pickle.dumps(loader))  # noqa: S301
        (again,) = compose_jobs(config, there, [["clip=mine"]])
        assert job.values["clip"]["max_norm"] == again.values["clip"]["max_norm"] == 1.5
    finally:
        loader.repository = before


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=0,1,2"]])
def test_a_dry_run_tells_of_the_runs_and_writes_nothing(
    sweep: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnngrad.dry_run.SECONDS", 0.1)
    count = 3 if sweep else 1
    code, said = command(*sweep, *TINY, "dry_run=true")
    assert code == 0 and f"{count} to begin" in said and "ms an update" in said
    assert not any(tmp_path.iterdir())
    assert command(*TINY, "seed=0")[0] == 0
    before = snapshot(tmp_path)
    code, said = command(*sweep, *TINY, "dry_run=true")
    assert code == 0 and "1 completed, to stay as they are" in said and snapshot(tmp_path) == before
    (summary,) = tmp_path.glob(f"runs/*/{SUMMARY}")
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "running"}))
    (summary.parent / ".lock").write_text("99999\n")
    before, times = snapshot(tmp_path), written(tmp_path)
    code, said = command(*sweep, *TINY, "dry_run=true")
    assert code == 0 and "1 to go on" in said
    assert snapshot(tmp_path) == before and written(tmp_path) == times


def test_a_dry_run_counts_the_steps_that_are_left_and_times_stacks(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[int, int | None]] = []

    def second(together: list[Any], budget: float, threads: int | None = None) -> float:
        timed.append((len(together), threads))
        return 1.0

    typed = ["-m", *TINY, "cell=rnn", "seed=0,1", "optim.lr=0.1,0.2"]
    assert command(*TINY, "cell=rnn", "seed=0", "optim.lr=0.1")[0] == 0
    (path,) = tmp_path.glob(f"runs/*/{SUMMARY}")
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"status": "interrupted", "steps": 1}))
    with monkeypatch.context() as patch:
        patch.setattr("rnngrad.dry_run.seconds_per_update", second)
        code, said = command(*typed, "dry_run=true")
        assert code == 0 and "about 11 s for 4 runs one after the other" in said
        code, said = command(*typed, "dry_run=true", "engine=stacked", "hydra.launcher.processes=2")
        assert code == 0 and "about 6 s for 4 runs as stacks in 2 processes" in said
        assert timed == [(1, None), (2, 1)]
    monkeypatch.setattr("rnngrad.dry_run.SECONDS", 0.1)
    code, said = command(*typed, "dry_run=true", "engine=stacked", "hydra.launcher.processes=2")
    assert code == 0 and "4 runs as stacks" in said and "ms an update, timed" in said


def written(folder: Path) -> dict[Path, int]:
    """When each file and folder was last changed."""
    return {path: path.lstat().st_ctime_ns for path in folder.rglob("*")}


def test_an_engine_without_a_sweep_is_told_to_have_no_effect(command: Command) -> None:
    code, said = command(*TINY, "engine=stacked", "hydra.launcher.processes=1")
    for typed in ("engine=stacked", "hydra.launcher.processes=1"):
        assert code == 0 and f"{typed}: has no effect on a single run; to sweep add -m\n" in said
    code, said = command(*TINY, "engine=null", "hydra.sweep.dir=elsewhere")
    assert code == 0 and "has no effect" not in said


# How it ends


def test_of_many_runs_the_table_shows_what_went_wrong_and_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnngrad.runs.MOST_ROWS", 8)
    monkeypatch.setattr("rnngrad.runs.BEST_ROWS", 3)
    runs = [
        make_run(
            tmp_path / f"adding_gru_norm_s{i}",
            "gru",
            seed=i,
            lr=1e-3 * (1 + i % 4),
            steps=20,
            measures=False,
            diverges=i in (3, 7),
        )
        for i in range(10)
    ]
    lines = overview(runs).splitlines()
    assert lines[0] == "10 runs: 8 completed, 2 diverged" and len(lines) == 1 + 2 + 2 + 3 + 1
    least = min(run.summary["eval_loss"] or 9.0 for run in runs)
    assert lines[-1].startswith("best: adding_gru_norm_s") and f"{least:.4g}" in lines[-1]
    assert "optim.lr=0.003" in lines[-1]
    assert len(overview(runs[:5]).splitlines()) == 2 + 5 + 1


def test_a_line_says_how_far_a_sweep_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OUTCOMES, str(tmp_path / "ledger"))
    paths = [tmp_path / str(i) for i in range(9)]
    note(Outcome(0 if i < 2 else None, path, "runs") for i, path in enumerate(paths))
    progress = Progress(9, bar=False)
    ledger = Ledger(tmp_path / "ledger")
    note([Outcome(code, paths[2 + i], "runs") for i, code in enumerate((0, 3, 1))])
    make_run(paths[5], steps=20, measures=False)
    summary = json.loads((paths[5] / SUMMARY).read_text())
    (paths[5] / SUMMARY).write_text(json.dumps(summary | {"status": "running"}))
    outcomes = ledger.outcomes()
    assert [o.code for o in outcomes] == [0, 0, 0, 3, 1, None, None, None, None]
    said = progress.line(outcomes)
    assert said.startswith("sweep: 5 of 9 runs done, 1 running, 1 diverged, 1 failed, about ")
    assert ledger.outcomes() == outcomes


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (90, "90 s"), (600, "10 min"), (1e4, "3 h"), (1e6, "12 days")],
)
def test_a_time_is_said_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_a_sweep_killed_at_any_moment_and_typed_again_is_whole(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "rnngrad", "-m", "seed=range(0,6)", *TINY, "trainer.steps=30"]
    line.append("measure=none")
    killed = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while len(statuses(tmp_path)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        killed.kill()
        killed.communicate()
    done = [path for path in find_runs(tmp_path) if Run(path).summary["status"] == "completed"]
    before = {path: snapshot(path) for path in done}
    again = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"sweep: 6 runs, {len(done)} finished, {6 - len(done)} to run" in again.stderr
    assert done and {path: snapshot(path) for path in done} == before
    assert statuses(tmp_path) == ["completed"] * 6
    for path in find_runs(tmp_path):
        assert Run(path).metrics["step"][-1] == 30
        assert len(Run(path).updates["step"]) == 30
