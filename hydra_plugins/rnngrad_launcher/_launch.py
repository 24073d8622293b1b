"""What the launchers do once they have something to launch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from hydra_plugins.rnngrad_launcher._slurm import run_array
from rnngrad.job import objective_of, say
from rnngrad.parts import COUNT, InputError
from rnngrad.signals import Signals
from rnngrad.stacking import Share, grouped, said
from rnngrad.sweeps import Job, compose_jobs
from rnngrad.workers import note_lost, run_processes

Run = Callable[[Sequence[Job], Sequence[Share], str, Sequence[str], Signals], None]
"""Has the jobs trained by processes of these shares; see ``workers.run_processes``."""


@dataclass(frozen=True)
class How:
    """How many processes there are at most, of how many cores, what each takes on, and who runs
    them.
    """

    processes: int
    max_stack: int
    memory_mib: float
    run: Run
    cores: int = 1

    def shares(self, jobs: int) -> list[Share]:
        """Of the processes, no more than jobs."""
        count = min(self.processes, max(1, jobs))
        memory = self.memory_mib * 2**20
        return [Share(index, count, self.max_stack, memory) for index in range(count)]

    def share(self, jobs: int) -> Share:
        """Of a core, of which a process of a cluster's may have several."""
        share = self.shares(jobs)[0]
        return replace(share, of=min(share.of * self.cores, max(1, jobs)))


def here(*, processes: int | None, max_stack: int, memory_mib: float) -> How:
    """Processes on this machine; parameters are ``StackedLauncher``'s."""
    count = cores() if processes is None else processes
    _check(processes=count, max_stack=max_stack, memory_mib=memory_mib)
    return How(count, max_stack, memory_mib, run_processes)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(**settings: object) -> None:
    """That settings of a launcher are numbers that they can be."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value not in COUNT:
            raise InputError(f"hydra.launcher.{name}", value, f"must be an integer {COUNT}")


def on_slurm(
    *,
    tasks: int,
    cpus_per_task: int,
    timeout_min: int,
    partition: str | None,
    cluster: str,
    additional: Mapping[str, Any],
    max_stack: int,
    memory_mib: float,
) -> How:
    """Tasks of an array; parameters are ``SlurmLauncher``'s."""
    _check(
        tasks=tasks,
        cpus_per_task=cpus_per_task,
        timeout_min=timeout_min,
        max_stack=max_stack,
        memory_mib=memory_mib,
    )
    if cluster not in ("slurm", "local"):
        raise InputError("hydra.launcher.cluster", cluster, "must be one of slurm, local")
    try:
        import submitit  # noqa: F401
    except ImportError:
        allowed = "needs submitit: pip install 'rnngrad[slurm]'"
        raise InputError("engine", "slurm", allowed) from None
    if cluster == "slurm" and shutil.which("sbatch") is None:
        allowed = (
            "needs sbatch of Slurm's on the PATH; hydra.launcher.cluster=local tries it without"
        )
        raise InputError("engine", "slurm", allowed)
    if not isinstance(additional, Mapping):
        allowed = "must be a mapping {OPTION: VALUE}"
        raise InputError("hydra.launcher.additional", additional, allowed)
    options = {f"additional.{name}": value for name, value in additional.items()}
    for name, value in {"partition": partition, **options}.items():
        if not f"{name}{value}".isprintable():  # a new line would be one of the batch script
            raise InputError(f"hydra.launcher.{name}", value, "must be printable, in one line")
    settings = {"name": "rnngrad", "timeout_min": timeout_min, "cpus_per_task": cpus_per_task}
    if cluster == "slurm":
        settings |= {
            # from Slurm 22.05 on a step does not get what its job was given
            "slurm_srun_args": [f"--cpus-per-task={cpus_per_task}"],
            "slurm_additional_parameters": dict(additional),
            "slurm_partition": partition,
        }
    run = partial(run_array, cluster=cluster, settings=settings)
    return How(tasks, max_stack, memory_mib, run, cpus_per_task)


def launch(
    config: DictConfig,
    loader: ConfigLoader,
    overrides: Sequence[Sequence[str]],
    first: int,
    how: How,
) -> list[JobReturn]:
    """Has all jobs trained, and returns what a sweeper wants of each.

    Raises:
        SystemExit: A signal has ended it; what was training is saved.
    """
    jobs = list(compose_jobs(config, loader, overrides, first))
    sweep = str(config.hydra.sweep.dir)
    Path(sweep).mkdir(parents=True, exist_ok=True)
    for line in said(grouped(jobs)):
        say(line)
    plugins = list(jobs[0].values.get("plugins") or []) if jobs else []
    with Signals() as signals:
        how.run(jobs, how.shares(len(jobs)), sweep, plugins, signals)
    if signals.number is None:
        note_lost(jobs, sweep)
    else:
        raise SystemExit(128 + signals.number)
    return [
        JobReturn(
            overrides=list(job.overrides),
            working_dir=os.getcwd(),
            task_name=config.hydra.job.name,
            status=JobStatus.COMPLETED,  # a run that failed has said so, and the sweep goes on
            _return_value=objective_of(job.directory),
        )
        for job in jobs
    ]
