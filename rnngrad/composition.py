"""What files beside our own may tell Hydra: no code to run, nothing to write outside of a run.

``--config-dir`` adds yaml files, which may be somebody else's. Hydra runs what its own part of a
configuration names, callbacks and classes of log handlers, before any of our code has seen it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rnngrad.parts import MISSING, InputError

OWN = {("hydra", "hydra.conf"), ("main", "rnngrad.conf"), ("schema", "")}
"""Where the files come from that we trust: provider and path."""

GUARDED = ("callbacks", "job_logging", "hydra_logging", "job.name", "job.env_set", "job.env_copy")
"""Of Hydra's part, what is taken from the package and the command line alone."""

PLUGINS = ("hydra_plugins.", "hydra._internal.core_plugins.")
"""Where Hydra looks for launchers and sweepers, and nowhere else."""


@contextmanager
def nothing_to_run() -> Iterator[None]:
    """Inside, Hydra composes no configuration in which a file has code for it to run.

    Raises:
        InputError: By whoever composes one.
    """
    compose = ConfigLoaderImpl.load_configuration
    usual: dict[tuple[str, ...], DictConfig] = {}

    def checked(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        config = compose(self, *args, **kwargs)
        sources = {(s.provider, s.path) for s in config.hydra.runtime.config_sources}
        if not sources <= OWN:
            typed = tuple(o for o in config.hydra.overrides.hydra if re.match(_TYPED, o))
            if typed not in usual:
                ours = ConfigLoaderImpl(create_config_search_path("pkg://rnngrad.conf"))
                usual[typed] = compose(ours, "config", [*typed], RunMode.RUN)
            _refuse_code(config, usual[typed])
        return config

    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = compose  # type: ignore[method-assign]


_TYPED = rf"[+~]*hydra[./]({'|'.join(map(re.escape, GUARDED))})\b"


def _refuse_code(config: DictConfig, usual: DictConfig) -> None:
    """Compares what Hydra would run with what it does without files of anybody else."""
    for key in GUARDED:
        if _plain(config, key) != _plain(usual, key):
            raise InputError(f"hydra.{key}", MISSING, "is set by a file, and only taken as typed")
    for key, value in _targets(OmegaConf.to_container(config.hydra, resolve=False), "hydra"):
        plugin = key in ("hydra.launcher", "hydra.sweeper") and str(value).startswith(PLUGINS)
        if not plugin and not key.startswith("hydra.callbacks."):
            raise InputError(f"{key}._target_", value, "names code, which no file may")


def _plain(config: DictConfig, key: str) -> Any:
    node = OmegaConf.select(config.hydra, key)
    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node


def _targets(tree: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every ``_target_`` in a tree, with the key of what it stands in."""
    if isinstance(tree, Mapping):
        for name, item in tree.items():
            if name == "_target_":
                yield key, item
            else:
                yield from _targets(item, f"{key}.{name}")
    elif isinstance(tree, list):
        for item in tree:
            yield from _targets(item, key)
