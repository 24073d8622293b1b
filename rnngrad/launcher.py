"""What stands between Hydra and a run: no job starts before every job of the command is sound."""

from __future__ import annotations

import itertools
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from rnngrad.parts import MISSING, InputError
from rnngrad.runs import CONFIG, LOCK, LOG, read_config, refuse_odd_files
from rnngrad.stored import Unreadable, opened
from rnngrad.written import naming, replace, without_links

MOST_JOBS = 100_000
"""In a sweep; every one is checked before the first starts."""


class InUse(Exception):
    """The run directory is being written to by another process."""


class Gate(Callback):
    """Checks values and directories of all jobs before Hydra makes the first directory.

    Hydra turns a callback's exceptions into warnings and goes on, but lets ``SystemExit`` through:
    that is how every error leaves, as its argument.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            check_job(config, "hydra.run.dir")
        except Exception as error:
            raise SystemExit(error) from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            seen: dict[Path, int] = {}
            for number, job in enumerate(sweep_jobs(config, kwargs["config_name"])):
                directory = check_job(job, "hydra.sweep.dir", "hydra.sweep.subdir")
                if directory in seen:
                    raise InputError(
                        "hydra.sweep.subdir",
                        directory,
                        f"is the directory of job {seen[directory]} and of job {number}; "
                        "every job needs its own",
                    )
                seen[directory] = number
        except Exception as error:
            raise SystemExit(error) from error

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        # Hydra keeps them to the end of the sweep: a quarter of a megabyte a job
        job_return.cfg = job_return.hydra_cfg = None


def sweep_jobs(config: DictConfig, config_name: str) -> Iterator[DictConfig]:
    """The composed configuration of every job that a grid sweep will launch, in its order.

    Other sweepers choose their values as they go: their jobs are checked as they start.
    """
    if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
        return
    overrides = overrides_of(config, "task")
    given = {override.split("=")[0] for override in overrides}
    params = config.hydra.sweeper.params or {}
    overrides += [f"{key}={value}" for key, value in params.items() if key not in given]
    loader = GlobalHydra.instance().config_loader()  # it knows what a glob can match
    choices = [
        [f"{o.get_key_element()}={value}" for value in _swept(o)]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    ]
    if not all(choices):
        raise InputError("-m", MISSING, "the sweep is empty: one of its keys has no value")
    if math.prod(map(len, choices)) > MOST_JOBS:
        raise InputError("-m", MISSING, f"the sweep has more than {MOST_JOBS:,} runs")
    for number, job in enumerate(itertools.product(*choices)):
        composed = compose(
            config_name,
            [*overrides_of(config, "hydra"), *job, "hydra.mode=RUN"],
            return_hydra_config=True,
        )
        with open_dict(composed):
            composed.hydra.job.num = number
            composed.hydra.job.id = str(number)
            composed.hydra.overrides.task = list(job)
        yield composed


def _swept(override: Override) -> Iterator[str]:
    """The values of one key of a sweep."""
    value = override.value()
    if isinstance(value, RangeSweep):
        start, stop = value.start or 0, value.stop or 0
        if not abs(stop - start) <= MOST_JOBS * abs(value.step):
            raise InputError(str(override.input_line), MISSING, f"is over {MOST_JOBS:,} values")
    return override.sweep_string_iterator()


def check_job(config: DictConfig, *directory_keys: str) -> Path:
    """Checks one job's values and that its directory is free for it; returns the directory.

    Raises:
        InputError: A value is not allowed, or the directory belongs to something else.
        InUse: The same run is going on there.
    """
    from rnngrad.config import experiment, load_plugins  # torch: only once Hydra has found no fault

    values = plain(config)
    _check_hydra(config)
    overrides = overrides_of(config, "task")
    for override in overrides:
        key, _, value = override.partition("=")
        if isinstance(values.get(key), dict) and value.startswith("["):  # Hydra would merge them
            raise InputError(key, value, f"one name is needed; to sweep, -m {key}=A,B")
    load_plugins(values, overrides)
    experiment(values)
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)  # ${hydra:...} in the directory's name
    try:
        directory = Path(*(str(OmegaConf.select(config, key)) for key in directory_keys))
        OmegaConf.to_container(config.hydra.job.env_set, resolve=True)  # as Hydra will, too late
    finally:
        HydraConfig.instance().cfg = before
    key = directory_keys[-1]
    try:
        refuse_odd_files(directory)
    except Unreadable as error:
        raise InputError(key, directory, str(error)) from None
    refuse_foreign(directory, values, key)
    return directory.absolute()


def _check_hydra(config: DictConfig) -> None:
    """Checks what Hydra would only find out once the directory is made, or would write elsewhere.

    Raises:
        InputError: There is such a thing.
    """
    if config.hydra.output_subdir is not None:  # Hydra empties the files there, then writes them
        raise InputError("hydra.output_subdir", config.hydra.output_subdir, "must stay null")
    if not re.fullmatch(r"\w[\w.-]{,99}", str(config.hydra.job.name)):
        allowed = "names the log: letters, digits, underscores, dots and hyphens, 100 at most"
        raise InputError("hydra.job.name", config.hydra.job.name, allowed)
    logging = config.hydra.job_logging
    if logging is not None:
        wanted = OmegaConf.select(logging, "root.handlers") or []
        there = OmegaConf.select(logging, "handlers") or {}
        if OmegaConf.select(logging, "version") != 1 or not {*wanted} <= {*there}:
            raise InputError("hydra.job_logging", MISSING, "is not whole; leave it as it is")


def refuse_foreign(directory: Path, values: Mapping[str, Any], key: str) -> None:
    """Lets a run have a directory that is new, empty, or already its own and not in use."""
    if not directory.exists():
        return
    stored = directory / CONFIG
    early = {".hydra", LOCK, LOG}  # all that is there before a run's configuration is
    if not directory.is_dir() or (
        not stored.exists() and {path.name for path in directory.iterdir()} - early
    ):
        raise InputError(key, directory, "exists and is not a run; name a new or empty directory")
    refuse_other_run(directory, values, key)
    if (directory / LOCK).exists():
        with lock_directory(directory):
            pass


def refuse_other_run(directory: Path, values: Mapping[str, Any], key: str) -> None:
    """Lets a run have a directory in which no other one has stored its configuration.

    What was found before the run's lock was held may not be so any more: to be asked again then.
    """
    stored = directory / CONFIG
    if not stored.exists():
        return
    try:
        there = _flat(read_config(stored))
    except (OSError, ValueError):
        raise InputError(key, directory, f"its {CONFIG} cannot be read") from None
    here = _flat(values)
    for name in sorted((there.keys() | here.keys()) - {"resume", "strict"}):
        if there.get(name) != here.get(name):
            longer = f", or go on: rnngrad resume=DIR {name}=N" if name == "trainer.steps" else ""
            raise InputError(
                key,
                directory,
                f"holds another run ({name} is {there.get(name)} there and "
                f"{here.get(name)} here); name another directory{longer}",
            )


def stored_texts(config: DictConfig) -> dict[str, str]:
    """What a run keeps of how it was started, by file; its configuration comes last."""
    hydra: Any = HydraConfig.instance().cfg
    parts = {"overrides": hydra.hydra.overrides.task, "hydra": hydra, "config": config}
    return {
        # a configuration is read back as it stands, with nothing in it to be worked out
        f".hydra/{name}.yaml": OmegaConf.to_yaml(part, resolve=name == "config")
        for name, part in parts.items()
    }


def store_texts(directory: Path, texts: Mapping[str, str]) -> None:
    """Keeps how a run was started, unless it has been started before.

    Only who holds the run's lock may. A run whose configuration is there at all has it whole.
    """
    if (directory / CONFIG).exists():
        return
    for name, text in texts.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        replace(path, text, lasting=True)


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """The right to write to a run directory, inside ``with``.

    The system takes it back from a process that dies, so that what the file says of one that has
    died, or whose number is somebody else's by now, does not matter.

    Raises:
        InUse: Another process holds it.
        OSError: The file that stands for it cannot be written.
    """
    path = directory / LOCK
    owner = _owner(path)
    lock = FileLock(path)
    with naming(path):
        try:
            lock.acquire(timeout=0.3, poll_interval=0.05)  # who only looks holds it for a moment
        except Timeout:
            by = f" (process {owner})" if owner.isdigit() else ""
            raise InUse(
                f"{directory}: a run is going on here{by}; wait for it, or stop it"
            ) from None
    try:
        with naming(path), open(path, "wb", opener=without_links) as file:
            file.write(f"{os.getpid()}\n".encode())
        yield
    finally:
        lock.release()


def _owner(path: Path) -> str:
    """The number of the process that has last held a lock, as the file says."""
    try:
        with opened(path, 20) as file:
            return file.read(20).decode(errors="replace").strip()
    except (OSError, ValueError):
        return ""


def overrides_of(config: DictConfig, kind: str) -> list[str]:
    """The command line's overrides of the ``task`` or of ``hydra``, as they were typed."""
    overrides = OmegaConf.to_container(config.hydra.overrides[kind], resolve=False)
    assert isinstance(overrides, list)
    return [str(override) for override in overrides]


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration without Hydra's own part, resolved, as plain values."""
    values = OmegaConf.to_container(
        OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]), resolve=True
    )
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def register_run_name() -> None:
    """Makes ``${rnngrad.run_name:}`` mean the name of the run that the configuration describes."""

    def run_name(*, _root_: DictConfig) -> str:
        from rnngrad.config import experiment

        return experiment(plain(_root_)).run_name

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OmegaConf 2.4 is about to rename the function
        OmegaConf.register_new_resolver("rnngrad.run_name", run_name, replace=True)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
