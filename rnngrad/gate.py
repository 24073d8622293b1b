"""What a command has to pass: no job starts before every job of it is sound."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.plugins.sweeper import Sweeper
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from rnngrad.dry_run import DryRun
from rnngrad.frozen import freeze
from rnngrad.job import say
from rnngrad.launcher import (
    InUse,
    check_directory,
    check_hydra,
    check_values,
    directory_of,
    overrides_of,
    plain,
    short,
)
from rnngrad.outcomes import DONE, FINISHED_CODES, IN_USE, Outcome, note
from rnngrad.parts import MISSING, InputError, unknown_key
from rnngrad.progress import Progress
from rnngrad.runs import FINISHED
from rnngrad.sweeps import DIRECTORY, Job, compose_jobs

if TYPE_CHECKING:
    from rnngrad.stacking import Share

MOST_JOBS = 100_000
"""In a sweep; every one is checked before the first starts."""
OF_A_SWEEP = re.compile(r"[+~]*(engine=|hydra[/.](launcher|sweeper)\b)")
"""Overrides that choose what runs a sweep."""

_sweep = ExitStack()
"""What holds as long as a sweep goes on."""


@contextmanager
def sweeping() -> Iterator[None]:
    """Around a command: a sweep launches what has passed the gate, and says how far it is."""
    try:
        yield
    finally:
        _sweep.close()


class Gate(Callback):
    """Checks values and directories of all jobs before Hydra makes the first directory.

    Hydra turns a callback's exceptions into warnings and goes on, but lets ``SystemExit`` through:
    that is how every error leaves, as its argument.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with _leaving():
            values = plain(config)
            check_hydra(config)
            check_values(values, overrides_of(config, "task"))
            for typed in overrides_of(config, "task") + overrides_of(config, "hydra"):
                if OF_A_SWEEP.match(typed):  # by a file it may be set for whoever adds -m
                    say(f"{typed}: has no effect on a single run; to sweep add -m")
            directory = directory_of(config, "hydra.run.dir")
            status = check_directory(directory, values, "hydra.run.dir")
            if values.get("dry_run"):
                dry = DryRun()
                dry.add(Job(0, (), values, directory, {}), status)
                _tell(dry)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with _leaving():
            how = _check_launcher(config.hydra.launcher)
            loader = GlobalHydra.instance().config_loader()
            assert isinstance(loader, ConfigLoaderImpl)
            freeze(loader)
            jobs = grid(config)
            if not jobs and config.get("dry_run"):
                raise InputError("dry_run", True, "nobody knows what this sweeper will choose")
            share = None if how is None else how.share
            standing, dry = _standing(compose_jobs(config, loader, jobs), share)
            if dry is not None:
                _tell(dry)
            if standing:
                self._begin(config, jobs, standing)
            trials = OmegaConf.select(config, "hydra.sweeper.n_trials")
            bar = not config.hydra.launcher._target_.endswith("BasicLauncher")
            _sweep.enter_context(Progress(len(standing) or trials, bar=bar))

    def _begin(
        self, config: DictConfig, jobs: Sequence[Sequence[str]], standing: Mapping[Path, str]
    ) -> None:
        """Says what there is to do, and hands just that on to the launcher."""
        codes = FINISHED_CODES | {"running": IN_USE}
        sweep = str(config.hydra.sweep.dir)
        note(Outcome(codes.get(status), path, sweep) for path, status in standing.items())
        counts = Counter("to run" if s not in codes else s for s in standing.values())
        finished = sum(counts[status] for status in FINISHED)
        line = f"sweep: {len(standing)} runs, {finished} finished, {counts['to run']} to run"
        say(line + f", {counts['running']} going on elsewhere" * bool(counts["running"]))
        sweep_dir = OmegaConf.to_container(config.hydra.sweep, resolve=False)
        if not re.search(r"hydra[.:]job", str(sweep_dir)):  # a job is what its number says
            jobs = [
                job
                for job, status in zip(jobs, standing.values(), strict=True)
                if status not in codes
            ]
        _sweep.enter_context(_launching(jobs, config.hydra.sweeper.max_batch_size))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        # Hydra keeps them to the end of the sweep: a quarter of a megabyte a job
        job_return.cfg = job_return.hydra_cfg = None


def _check_launcher(settings: DictConfig) -> Any:
    """Has a launcher of ours check its settings: when it is to launch, a directory is made.

    Returns:
        What it makes of them, if it trains stacks.
    """
    kind: Any = get_class(settings._target_)
    check = getattr(kind, "check", None)
    given = {str(key): value for key, value in settings.items() if key != "_target_"}
    if check is not None:
        known = getattr(kind, "SETTINGS", given.keys())  # somebody else's are checked by Hydra
        for key in given.keys() - known:
            typed = [f"hydra.launcher.{name}" for name in known]
            raise InputError(
                f"hydra.launcher.{key}", given[key], unknown_key(f"hydra.launcher.{key}", typed)
            )
        return check(**given)
    return None


@contextmanager
def _leaving() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise SystemExit(error) from error


def _tell(dry: DryRun) -> NoReturn:
    print(dry.text(), flush=True)
    raise SystemExit(DONE)


def _standing(
    jobs: Iterable[Job], share: Callable[[int], Share] | None
) -> tuple[dict[Path, str], DryRun | None]:
    """How far each job is in its directory, and what a dry run has to tell.

    Args:
        jobs: Of the sweep.
        share: As of ``DryRun``.
    """
    standing: dict[Path, str] = {}
    numbers: dict[Path, int] = {}
    dry = None
    for job in jobs:
        if job.directory in numbers:
            raise InputError(
                DIRECTORY[-1],
                short(job.directory),
                f"is the directory of job {numbers[job.directory]} and of job {job.number}; "
                "every job needs its own",
            )
        numbers[job.directory] = job.number
        try:
            status = check_directory(job.directory, job.values, DIRECTORY[-1])
        except InUse:  # it is left to whom it belongs
            status = "running"
        standing[job.directory] = status
        if job.values.get("dry_run"):
            dry = dry or DryRun(share)
            dry.add(job, status)
    return standing, dry


@contextmanager
def _launching(jobs: Sequence[Sequence[str]], size: int | None) -> Iterator[None]:
    """Inside, a grid sweep launches these jobs, and composes none to see whether it can be."""
    sweeper = _grid_sweeper()
    before = sweeper.split_arguments, sweeper.validate_batch_is_legal
    given = [*sweeper.split_overrides_to_chunks([[*job] for job in jobs], size)] if jobs else []
    sweeper.split_arguments = staticmethod(lambda *_: given)
    sweeper.validate_batch_is_legal = lambda *_: None
    try:
        yield
    finally:
        sweeper.split_arguments = staticmethod(before[0])
        sweeper.validate_batch_is_legal = before[1]


def _grid_sweeper() -> Any:
    """Hydra's ``BasicSweeper``, of which an import would give another copy."""
    (sweeper,) = (c for c in Plugins.instance().discover(Sweeper) if c.__name__ == "BasicSweeper")
    return sweeper


def grid(config: DictConfig) -> Sequence[Sequence[str]]:
    """The overrides of every job that a grid sweep will launch, in its order.

    Other sweepers choose their values as they go: their jobs are checked as they start.
    """
    if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
        return []
    params = config.hydra.sweeper.params or {}
    overrides = [f"{key}={value}" for key, value in params.items()]
    overrides += overrides_of(config, "task")
    loader = GlobalHydra.instance().config_loader()  # it knows what a glob can match
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    counts = [_count(override) for override in parsed]
    if not all(counts):
        raise InputError("-m", MISSING, "the sweep is empty: one of its keys has no value")
    if math.prod(counts) > MOST_JOBS:
        raise InputError("-m", MISSING, f"the sweep has more than {MOST_JOBS:,} runs")
    (jobs,) = _grid_sweeper().split_arguments(parsed, None)
    return list(jobs)


def _count(override: Override) -> int:
    """How many values a key of a sweep has."""
    value = override.value()
    if isinstance(value, RangeSweep):
        start, stop = value.start or 0, value.stop or 0
        if not abs(stop - start) <= MOST_JOBS * abs(value.step):
            raise InputError(str(override.input_line), MISSING, f"is over {MOST_JOBS:,} values")
    if not override.is_sweep_override():
        return 1
    return sum(1 for _ in override.sweep_string_iterator())
