"""Sweeps: jobs composed fast, frozen, resumed, told about."""

import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, open_dict

from rnngrad.launcher import plain, register_run_name, stored_texts
from rnngrad.parts import InputError
from rnngrad.sweeps import Job, compose_jobs

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


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
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
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_job_is_the_same_however_many_are_composed_with_it(lines: list[list[str]]) -> None:
    config, loader = sweep()
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
def test_a_wrong_value_is_refused_in_whichever_job_it_is(line: str, says: str) -> None:
    config, loader = sweep()
    lines = [[f"{line.split('=')[0]}=1"], [line]]
    jobs = compose_jobs(config, loader, lines)
    assert next(jobs).number == 0
    with pytest.raises(InputError, match=says):
        next(jobs)


def test_directories_named_otherwise_are_those_of_hydra(tmp_path: Path) -> None:
    config, loader = sweep(
        f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=${hydra.job.num}_${task.name}_${seed}"
    )
    jobs = compose_jobs(config, loader, [["seed=4"], ["seed=5"]], first=7)
    assert [job.directory.name for job in jobs] == ["7_adding_4", "8_adding_5"]
