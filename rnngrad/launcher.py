"""What stands between a composed configuration and a run: is it sound, and its directory free?"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rnngrad.parts import MISSING, InputError
from rnngrad.runs import (
    CONFIG,
    FINISHED,
    LOCK,
    LOG,
    SUMMARY,
    read_config,
    read_summary,
    refuse_odd_files,
)
from rnngrad.stored import Unreadable, flat, opened
from rnngrad.written import naming, replace, without_links

if TYPE_CHECKING:
    from rnngrad.config import Experiment


NOT_OF_THE_RUN = {"resume", "strict", "dry_run"}
"""Keys in which two commands for the same run may differ."""


class InUse(Exception):
    """The run directory is being written to by another process."""


def check_values(values: Mapping[str, Any], overrides: Iterable[str]) -> Experiment:
    """A run's parts, checked; the modules that ``plugins`` names are imported.

    Raises:
        InputError: A value is not allowed.
    """
    from rnngrad.config import experiment, load_plugins  # torch: only once Hydra has found no fault

    for override in overrides:
        key, _, value = override.partition("=")
        if isinstance(values.get(key), dict) and value.startswith("["):  # Hydra would merge them
            raise InputError(key, value, f"one name is needed; to sweep, -m {key}=A,B")
    load_plugins(values, overrides)
    return experiment(values)


def directory_of(config: DictConfig, *keys: str) -> Path:
    """The directory of a composed job, absolute.

    Args:
        config: With Hydra's own part.
        keys: Which together name it, as ``hydra.run.dir``.
    """
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)  # ${hydra:...} in the directory's name
    try:
        directory = Path(*(str(OmegaConf.select(config, key)) for key in keys))
        OmegaConf.to_container(config.hydra.job.env_set, resolve=True)  # as Hydra will, too late
    finally:
        HydraConfig.instance().cfg = before
    return directory.absolute()


def check_directory(directory: Path, values: Mapping[str, Any], key: str) -> str:
    """Checks that a directory is free for a run; says how far the run is there.

    Returns:
        Its status; ``new`` if it has not been started.

    Raises:
        InputError: It belongs to something else.
        InUse: The same run is going on there.
    """
    directory = short(directory)
    try:
        refuse_odd_files(directory)
    except Unreadable as error:
        raise InputError(key, directory, str(error)) from None
    refuse_foreign(directory, values, key)
    status = _status(directory)
    if status not in FINISHED and (directory / LOCK).exists():
        _refuse_if_locked(directory)
    return status


def _refuse_if_locked(directory: Path) -> None:
    """Looks whether somebody holds a directory's lock, and changes no file."""
    path = directory / LOCK
    if sys.platform == "win32":  # no such look there
        with lock_directory(directory):
            return
    import fcntl

    with naming(path), opened(path, sys.maxsize) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until it is closed
        except BlockingIOError:
            raise _in_use(directory, _owner(path)) from None


def _status(directory: Path) -> str:
    try:
        status = read_summary(directory / SUMMARY)["status"]
    except FileNotFoundError:
        return "new"
    except (OSError, ValueError):
        return "interrupted"  # in the middle of something
    return "interrupted" if status in (None, "running") else str(status)


def check_hydra(config: DictConfig) -> None:
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
    """Lets a run have a directory that is new, empty, or already its own."""
    if not directory.exists():
        return
    stored = directory / CONFIG
    early = {".hydra", LOCK, LOG}  # all that is there before a run's configuration is
    if not directory.is_dir() or (
        not stored.exists() and {path.name for path in directory.iterdir()} - early
    ):
        raise InputError(key, directory, "exists and is not a run; name a new or empty directory")
    refuse_other_run(directory, values, key)


def refuse_other_run(directory: Path, values: Mapping[str, Any], key: str) -> None:
    """Lets a run have a directory in which no other one has stored its configuration.

    What was found before the run's lock was held may not be so any more: to be asked again then.
    """
    stored = directory / CONFIG
    if not stored.exists():
        return
    same = dict.fromkeys(NOT_OF_THE_RUN)
    try:
        there = read_config(stored) | same
    except (OSError, ValueError):
        raise InputError(key, directory, f"its {CONFIG} cannot be read") from None
    here = {**values} | same
    if there == here:
        return
    there, here = flat(there), flat(here)
    for name in sorted(there.keys() | here.keys()):
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
def lock_directory(directory: Path, wait: float = 0.3) -> Iterator[None]:
    """The right to write to a run directory, inside ``with``.

    The system takes it back from a process that dies, so that what the file says of one that has
    died, or whose number is somebody else's by now, does not matter.

    Args:
        directory: Of the run.
        wait: Seconds for who holds it to let go.

    Raises:
        InUse: Another process holds it.
        OSError: The file that stands for it cannot be written.
    """
    path = directory / LOCK
    owner = _owner(path)
    lock = FileLock(path)
    with naming(path):
        try:
            lock.acquire(timeout=wait, poll_interval=0.05)  # who only looks holds it for a moment
        except Timeout:
            raise _in_use(directory, owner) from None
    try:
        with naming(path), open(path, "wb", opener=without_links) as file:
            file.write(f"{os.getpid()}\n".encode())
        yield
    finally:
        lock.release()


def _in_use(directory: Path, owner: str) -> InUse:
    by = f" (process {owner})" if owner.isdigit() else ""
    return InUse(f"{directory}: a run is going on here{by}; wait for it, or stop it")


def _owner(path: Path) -> str:
    """The number of the process that has last held a lock, as the file says."""
    try:
        with opened(path, 20) as file:
            return file.read(20).decode(errors="replace").strip()
    except (OSError, ValueError):
        return ""


def short(directory: Path) -> Path:
    """The directory as a person in this one would name it."""
    return directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory


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


def register_python_text() -> None:
    """Makes ``${rnngrad.python_text:}`` the path of a text that Python brings along.

    What ``help()`` says of the language, some 750,000 characters; each version has its own.
    """
    path = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    OmegaConf.register_new_resolver("rnngrad.python_text", lambda: str(path), replace=True)
