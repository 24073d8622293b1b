"""A sweep is a list of jobs: composed fast, and from files as they were when it began.

To compose a configuration takes Hydra tens of milliseconds, as it merges a dozen files. Jobs that
choose the same parts and differ in plain values differ in those values alone, so that one of them
is composed and the others are copies of it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import AnyNode, DictConfig, OmegaConf, open_dict

from rnngrad.launcher import check_hydra, check_values, directory_of, overrides_of, plain

DIRECTORY = ("hydra.sweep.dir", "hydra.sweep.subdir")
"""Keys that together name the directory of a job."""
USUAL = "${rnngrad.run_name:}"
"""What the second one is, unless somebody has typed another."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        number: From 0, in the order of the sweep.
        overrides: As typed.
        values: The configuration in plain values, which jobs share: not to be changed.
        directory: Of the run, absolute.
        hydra: Hydra's own part, in plain values and not resolved, of a job like this one.
    """

    number: int
    overrides: tuple[str, ...]
    values: Mapping[str, Any]
    directory: Path
    hydra: Mapping[str, Any] = field(repr=False, compare=False)

    def texts(self) -> dict[str, str]:
        """What the run keeps of how it was started: ``launcher.stored_texts`` of this job."""
        hydra = copy.deepcopy(dict(self.hydra))
        hydra["overrides"]["task"] = overrides = [*self.overrides]
        hydra["runtime"]["output_dir"] = str(self.directory)
        hydra["job"] |= {"num": self.number, "id": str(self.number)}
        if isinstance(hydra["job"].get("override_dirname"), str):
            parsed = OverridesParser.create().parse_overrides(overrides)
            how = hydra["job"]["config"]["override_dirname"]
            hydra["job"]["override_dirname"] = get_overrides_dirname(parsed, **how)
        parts = {"overrides": overrides, "hydra": {"hydra": hydra}, "config": self.values}
        return {f".hydra/{name}.yaml": OmegaConf.to_yaml(part) for name, part in parts.items()}


def compose_jobs(
    config: DictConfig,
    loader: ConfigLoader,
    overrides: Sequence[Sequence[str]],
    first: int = 0,
) -> Iterator[Job]:
    """The jobs of a sweep, each checked but for its directory.

    Args:
        config: Of the sweep, as a sweeper and a launcher have it.
        loader: Hydra's, ``hydra_context.config_loader``.
        overrides: Of each job.
        first: The first one's number.

    Raises:
        InputError: A value is not allowed.
        HydraException: There is no such key or part.
    """
    composer = _Composer(config, loader)
    for number, mine in enumerate(overrides, first):
        yield composer.job(number, tuple(mine))


@dataclass(frozen=True)
class _Like:
    """A job and what others like it have in common with it."""

    job: Job
    sweep_dir: str
    """In which all have their directories, named after what they are."""


class _Composer:
    """Composes jobs, one of a kind by Hydra.

    Args:
        config: Of the sweep.
        loader: Hydra's.
    """

    def __init__(self, config: DictConfig, loader: ConfigLoader) -> None:
        self._config, self._loader = config, loader
        self._parser = OverridesParser.create(config_loader=loader)
        self._parsed: dict[str, Override] = {}
        self._groups: dict[str, bool] = {}
        self._like: dict[tuple[str, ...], _Like | None] = {}
        """By what is not a plain value, and where each of those stands."""

    def job(self, number: int, overrides: tuple[str, ...]) -> Job:
        """One job, checked."""
        parsed = [self._parse(override) for override in overrides]
        changes = {o.key_or_group: o.value() for o in parsed if self._is_plain(o)}
        kind = tuple(
            o.key_or_group if o.key_or_group in changes else line
            for o, line in zip(parsed, overrides, strict=True)
        )
        like = self._like.get(kind)
        if like is None:
            job, config = self._compose(number, overrides)
            if kind not in self._like:
                clear = not self._overlap(parsed)
                self._like[kind] = self._common(job, config, changes) if clear else None
            return job
        values: Any = like.job.values
        for key, value in changes.items():
            values = with_value(values, key.split("."), value)
        name = check_values(values, overrides).run_name
        directory = Path(like.sweep_dir, name).absolute()
        return Job(number, overrides, values, directory, like.job.hydra)

    def _parse(self, override: str) -> Override:
        if override not in self._parsed:
            self._parsed[override] = self._parser.parse_override(override)
        return self._parsed[override]

    def _is_plain(self, override: Override) -> bool:
        """Whether it puts one value in the place of another, and does nothing else."""
        key, value = override.key_or_group, override.value()
        if isinstance(value, str) and ("${" in value or value == "???"):
            return False
        return (
            override.type is OverrideType.CHANGE
            and override.package is None
            and re.fullmatch(r"(?!hydra\b)\w+(\.\w+)*", key) is not None
            and isinstance(value, int | float | str | None)
            and not self._is_group(key)
        )

    def _is_group(self, key: str) -> bool:
        if key not in self._groups:
            typed = overrides_of(self._config, "hydra")
            name = self._config.hydra.job.config_name
            options = self._loader.get_group_options(key, config_name=name, overrides=typed)
            self._groups[key] = bool(options)
        return self._groups[key]

    def _overlap(self, parsed: Sequence[Override]) -> bool:
        """Whether one override may change what another one has set."""
        keys = sorted(f"{o.key_or_group}." for o in parsed if not self._is_group(o.key_or_group))
        odd = [f"{o.key_or_group}." for o in parsed if not isinstance(o.value(), str)]
        return any(two.startswith(one) for one, two in zip(keys, keys[1:], strict=False)) or any(
            key.startswith(group) for group in odd for key in keys if self._is_group(group[:-1])
        )

    def _compose(self, number: int, overrides: tuple[str, ...]) -> tuple[Job, DictConfig]:
        """By Hydra, as its own launchers do."""
        config = self._loader.load_sweep_config(self._config, [*overrides])
        with open_dict(config):
            config.hydra.job.num, config.hydra.job.id = number, str(number)
        values = plain(config)
        check_hydra(config)
        check_values(values, overrides_of(config, "task"))
        directory = directory_of(config, *DIRECTORY).absolute()
        hydra: Any = OmegaConf.to_container(config.hydra, resolve=False, enum_to_str=True)
        return Job(number, overrides, values, directory, hydra), config

    def _common(self, job: Job, config: DictConfig, changes: Mapping[str, Any]) -> _Like | None:
        """What jobs have in common that differ in plain values; nothing if that is not clear."""
        settings = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        if "${" in repr(OmegaConf.to_container(settings, resolve=False)):
            return None  # a value may depend on another
        for key, value in changes.items():
            *parents, name = key.split(".")
            node: Any = settings
            for parent in parents:
                node = node._get_node(parent) if isinstance(node, DictConfig) else None
            leaf = node._get_node(name) if isinstance(node, DictConfig) else None
            if type(leaf) is not AnyNode or repr(leaf._value()) != repr(value):
                return None  # of a type of its own, or another override has the last word
        own = job.hydra["job"]["name"], job.hydra["job"]["env_set"], job.hydra["sweep"]["dir"]
        if job.hydra["sweep"]["subdir"] != USUAL or "${" in repr(own):
            return None
        return _Like(job, job.hydra["sweep"]["dir"])


def with_value(tree: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of ``tree`` with another value; what is not on the way to it is shared."""
    if not path:
        return value
    key, *rest = path
    return {**tree, key: with_value(tree[key], rest, value)}


def changes(tree: Any, other: Any, path: Sequence[str] = ()) -> Iterator[tuple[Sequence[str], Any]]:
    """Which values, and where, make ``other`` of ``tree`` by ``with_value``."""
    if isinstance(tree, Mapping) and isinstance(other, Mapping) and [*tree] == [*other]:
        for key in tree:
            if tree[key] is not other[key]:
                yield from changes(tree[key], other[key], (*path, key))
    elif repr(tree) != repr(other):  # 1 is not 1.0
        yield path, other
