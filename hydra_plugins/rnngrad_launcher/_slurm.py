"""Stacks on a cluster: an array of tasks, through submitit, that share one list of runs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rnngrad.job import say
from rnngrad.outcomes import Ledger, Outcome, note
from rnngrad.signals import Signals
from rnngrad.stacking import Share
from rnngrad.sweeps import Job
from rnngrad.workers import run_task, write_jobs

POLL, ASK = 1.0, 5.0
"""Seconds from one look at the outcomes to the next, and from one question to the cluster."""


def run_array(
    jobs: Sequence[Job],
    shares: Sequence[Share],
    sweep: str,
    plugins: Sequence[str],
    signals: Signals,
    *,
    cluster: str,
    settings: Mapping[str, Any],
) -> None:
    """Has the jobs trained by an array of tasks; as ``workers.run_processes``.

    Args:
        jobs: To be trained, in directories that all nodes see.
        shares: Of each task.
        sweep: The directory of the sweep; ``.slurm`` in it keeps the list, logs and outcomes.
        plugins: Modules with parts of the user's own.
        signals: Says when the array is to be cancelled, which saves its runs.
        cluster: ``slurm``, or ``local`` for processes on this machine, all at once.
        settings: As submitit names them.
    """
    import submitit

    folder = Path(sweep, ".slurm", f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}").absolute()
    folder.mkdir(parents=True)
    write_jobs(folder / "jobs.json", jobs)
    executor = submitit.AutoExecutor(folder=folder / "log", cluster=cluster)
    executor.update_parameters(**settings)
    count = len(shares)
    tasks = executor.map_array(
        run_task, [str(folder)] * count, [str(sweep)] * count, [[*plugins]] * count, shares
    )
    array = _Array(tasks, cluster)
    say(f"submitted {count} tasks as {array.name}; their logs are in {folder / 'log'}")
    relay, cancelled = _Relay(folder / "outcomes"), False
    while array.is_there():
        relay()
        if signals() and not cancelled:
            cancelled = True
            array.cancel()
        time.sleep(POLL)
    relay()


class _Array:
    """The tasks, asked of the cluster itself.

    submitit would ask ``sacct``, and wait for ever for a task that has died where there is none.
    """

    def __init__(self, tasks: Sequence[Any], cluster: str) -> None:
        self._tasks, self._cluster = tasks, cluster
        self.name = str(tasks[0].job_id).partition("_")[0]
        self._asked = time.monotonic()

    def is_there(self) -> bool:
        """Whether a task is waiting, running or just ending."""
        if self._cluster == "local":
            return not all(task.done() for task in self._tasks)
        if time.monotonic() - self._asked < ASK:
            return True
        self._asked = time.monotonic()
        asked = subprocess.run(
            ["squeue", "-h", "-r", "-j", self.name, "-o", "%i"], capture_output=True, text=True
        )
        if asked.returncode:
            return "Invalid job id" not in asked.stderr  # else the controller is busy
        return bool(asked.stdout.strip())

    def cancel(self) -> None:
        """Has every task save its runs and leave."""
        if self._cluster == "local":
            for task in self._tasks:
                task.cancel(check=False)
        else:
            subprocess.run(["scancel", self.name], check=False)


class _Relay:
    """Notes in this process's ledger what the tasks have noted in theirs."""

    def __init__(self, path: Path) -> None:
        self._ledger, self._seen = Ledger(path), set[Outcome]()

    def __call__(self) -> None:
        new = [outcome for outcome in self._ledger.outcomes() if outcome not in self._seen]
        self._seen.update(new)
        if new:
            note(new)
