"""What a command has to pass: no job starts before every job of it is sound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from rnngrad.launcher import (
    check_directory,
    check_hydra,
    check_values,
    directory_of,
    overrides_of,
    plain,
)
from rnngrad.parts import MISSING, InputError
from rnngrad.sweeps import DIRECTORY, compose_jobs

MOST_JOBS = 100_000
"""In a sweep; every one is checked before the first starts."""


class Gate(Callback):
    """Checks values and directories of all jobs before Hydra makes the first directory.

    Hydra turns a callback's exceptions into warnings and goes on, but lets ``SystemExit`` through:
    that is how every error leaves, as its argument.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            values = plain(config)
            check_hydra(config)
            check_values(values, overrides_of(config, "task"))
            check_directory(directory_of(config, "hydra.run.dir"), values, "hydra.run.dir")
        except Exception as error:
            raise SystemExit(error) from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            seen: dict[Path, int] = {}
            loader = GlobalHydra.instance().config_loader()
            for job in compose_jobs(config, loader, grid(config)):
                check_directory(job.directory, job.values, DIRECTORY[-1])
                if job.directory in seen:
                    raise InputError(
                        DIRECTORY[-1],
                        job.directory,
                        f"is the directory of job {seen[job.directory]} and of job {job.number}; "
                        "every job needs its own",
                    )
                seen[job.directory] = job.number
        except Exception as error:
            raise SystemExit(error) from error

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        # Hydra keeps them to the end of the sweep: a quarter of a megabyte a job
        job_return.cfg = job_return.hydra_cfg = None


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
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return jobs


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
