"""Processes that share the runs of a sweep: a core each, and one list of jobs in a file.

One of them is told to stop by the end of its standard input, which also comes when the process that
has started it is no more.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, replace
from pathlib import Path
from sys import intern

from rnngrad.job import say
from rnngrad.outcomes import FAILED, OUTCOMES, Ledger, Outcome, finished_code, note
from rnngrad.signals import Signals, before_leaving, temporary_folder
from rnngrad.stacking import Share, work
from rnngrad.sweeps import Job

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
"""Of the environment of a process that is one of several, a core each."""

_PROGRAM = (  # not -m, with which the current folder would come before everything else
    "import sys; del sys.path[0]; from rnngrad.workers import main; main(sys.argv[1:])"
)


def write_jobs(path: Path, jobs: Sequence[Job]) -> None:
    """The list, as other processes can read it.

    What jobs have in common is written once: of a hundred thousand, every process has them all.
    """
    parts = {id(part): part for job in jobs for part in (job.hydra, *job.values.values())}
    number = {identity: index for index, identity in enumerate(parts)}
    rows = [
        [
            job.number,
            job.overrides,
            {key: number[id(part)] for key, part in job.values.items()},
            str(job.directory),
            number[id(job.hydra)],
        ]
        for job in jobs
    ]
    text = json.dumps({"parts": [*parts.values()], "jobs": rows})
    path.write_text(text, encoding="utf-8")


def read_jobs(path: Path) -> list[Job]:
    """What ``write_jobs`` has written."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    parts = stored["parts"]
    return [
        Job(
            number,
            tuple(map(intern, overrides)),
            {key: parts[index] for key, index in values.items()},
            Path(directory),
            parts[hydra],
        )
        for number, overrides, values, directory, hydra in stored["jobs"]
    ]


def run_processes(
    jobs: Sequence[Job],
    shares: Sequence[Share],
    sweep: str,
    plugins: Sequence[str],
    signals: Signals,
) -> None:
    """Trains the jobs in processes of one thread; their outcomes are in the ledger then.

    Args:
        jobs: To be trained, each in a directory of its own.
        shares: Of each process.
        sweep: The directory of the sweep.
        plugins: Modules with parts of the user's own.
        signals: Says when all are to save their runs and leave.
    """
    with ExitStack() as opened:
        listed = opened.enter_context(temporary_folder()) / "jobs.json"
        write_jobs(listed, jobs)
        with _ignored_usr2():
            processes = _started(listed, shares, sweep, plugins)
        for process in processes:
            opened.enter_context(before_leaving(process.kill))
        while any(process.poll() is None for process in processes) and not signals():
            time.sleep(0.05)
        for process in processes:
            assert process.stdin is not None
            with process.stdin as told, suppress(OSError):  # it may have ended
                told.write(str(signals.number or 0).encode())
        for process in processes:
            process.wait()
        codes = [process.returncode for process in processes]
        if any(codes) and not signals():
            say(f"processes of the sweep have died (exit codes {', '.join(map(str, codes))})")


def _started(
    listed: Path, shares: Sequence[Share], sweep: str, plugins: Sequence[str]
) -> list[subprocess.Popen[bytes]]:
    path = os.pathsep.join(filter(None, sys.path))
    common = [str(listed), sweep, ",".join(plugins)]
    return [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *common, *map(str, astuple(share))],
            env=os.environ | ONE_THREAD | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C comes to this process, which passes it on
        )
        for share in shares
    ]


@contextmanager
def _ignored_usr2() -> Iterator[None]:
    """Who is started inside ignores SIGUSR2, which a cluster sends to all: it is told by us."""
    if not hasattr(signal, "SIGUSR2"):
        yield
        return
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, before)


def note_lost(jobs: Sequence[Job], sweep: str) -> None:
    """Notes how the jobs stand that have no outcome after all who trained them have ended."""
    ledger = Ledger(Path(os.environ[OUTCOMES]))
    lost = [job.directory for job in jobs if not ledger.is_done(job.directory)]
    # one may be finished: the ledger may have had no room
    outcomes = [Outcome(finished_code(path, FAILED), path, sweep) for path in lost]
    note(outcomes)
    if count := sum(outcome.code == FAILED for outcome in outcomes):
        say(
            f"nobody is left to train {count} of {len(jobs)} runs: see what was said above; the "
            "same command goes on with them"
        )


def run_task(folder: str, sweep: str, plugins: Sequence[str], share: Share) -> None:
    """One task of a cluster: as many processes as it was given cores.

    When its time is nearly up, which SIGUSR2 says, it saves its runs and leaves.

    Args:
        folder: Has the list of jobs, and gets the outcomes.
        sweep: The directory of the sweep.
        plugins: Modules with parts of the user's own.
        share: Of the task.
    """
    os.environ[OUTCOMES] = str(Path(folder, "outcomes"))
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    shares = [
        replace(share, index=share.index * cores + core, of=share.of * cores)
        for core in range(cores)
    ]
    with Signals() as signals:
        # Slurm's nodes have that signal, unlike Windows
        before = signal.signal(signal.SIGUSR2, lambda *_: signals.stop(signal.SIGTERM))
        try:
            run_processes(read_jobs(Path(folder, "jobs.json")), shares, sweep, plugins, signals)
        finally:
            signal.signal(signal.SIGUSR2, before)


def main(arguments: Sequence[str]) -> None:
    """One process; its arguments are those that ``run_processes`` gives."""
    import torch

    from rnngrad.config import load_plugins

    listed, sweep, plugins, index, of, most, memory = arguments
    named = [name for name in plugins.split(",") if name]
    _raise_limit_of_files()
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.INFO)  # of what runs log to files of their own
    logging.raiseExceptions = False  # a full disk's tracebacks
    with Signals() as signals:
        threading.Thread(target=_watch, args=[signals], daemon=True).start()
        load_plugins({"plugins": named}, ["plugins="])
        share = Share(int(index), int(of), int(most), float(memory))
        work(read_jobs(Path(listed)), share, sweep, named, signals)


def _raise_limit_of_files() -> None:
    """To what the system allows: a run has eight files open, and a stack may have many runs."""
    with suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _watch(signals: Signals) -> None:
    """Until standard input ends, and then has everything saved and left."""
    number = os.read(0, 9)  # not through sys.stdin, whose lock a thread at its end would hold
    signals.stop(int(number) if number.isdigit() else signal.SIGTERM)
