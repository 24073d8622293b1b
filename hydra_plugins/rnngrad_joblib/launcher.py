"""Hydra's joblib launcher, with an end: whoever interrupts the sweep has every run saved."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Joblib(Launcher):
    """Trains each run in one of several processes, which share the cores.

    Args:
        keys: Those of ``hydra/launcher=joblib``.
    """

    def __init__(self, **keys: Any) -> None:
        self._keys = keys

    @staticmethod
    def check(*, n_jobs: int, **others: Any) -> None:
        """Refuses what joblib would, but only once a directory is made.

        Raises:
            InputError: There are to be no processes.
        """
        from rnngrad.parts import InputError

        if n_jobs == 0:
            allowed = "must be a number of processes, or -1 for one a core, -2 for one less, ..."
            raise InputError("hydra.launcher.n_jobs", n_jobs, allowed)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        # here: Hydra imports this file for every command
        from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
        from joblib.externals.loky.process_executor import BrokenProcessPool

        from rnngrad.children import Children

        # one line a run, and what is left of processes that were ended, which is cleaned up
        logging.getLogger("hydra_plugins.hydra_joblib_launcher").setLevel(logging.WARNING)
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        launcher = JoblibLauncher(**self._keys)
        with Children() as children:
            launcher.setup(
                hydra_context=self._context,
                task_function=children.trains(self._task),
                config=self._config,
            )
            try:
                returned: Sequence[JobReturn] = launcher.launch(job_overrides, initial_job_idx)
                return returned
            except BrokenProcessPool:
                return self._lost(job_overrides, initial_job_idx)

    def _lost(self, overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """What is left when a process has died: its run, and those that were yet to come."""
        from rnngrad.job import objective_of, say
        from rnngrad.sweeps import compose_jobs
        from rnngrad.workers import note_lost

        jobs = [*compose_jobs(self._config, self._context.config_loader, overrides, first)]
        sweep = str(self._config.hydra.sweep.dir)
        say("a process was killed, perhaps for its memory: lower hydra.launcher.n_jobs")
        note_lost(jobs, sweep)
        return [
            JobReturn(status=JobStatus.COMPLETED, _return_value=objective_of(job.directory))
            for job in jobs
        ]
