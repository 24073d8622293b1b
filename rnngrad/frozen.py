"""Configuration files as they were when a command first read them."""

from __future__ import annotations

import copy
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.config_source import ConfigResult, ConfigSource


def freeze(loader: ConfigLoaderImpl) -> None:
    """From here on the loader reads each file once, and so do those it is pickled to.

    What is edited while a sweep goes on would otherwise be another configuration for its later
    jobs than the one that was checked.
    """
    if not isinstance(loader.repository, Frozen):
        loader.repository = Frozen(loader.repository, {})  # type: ignore[assignment]


class Frozen(IConfigRepository):
    """Remembers what another repository has answered.

    Args:
        files: The repository that reads them.
        answers: By sources and question; copies share them.
    """

    def __init__(self, files: IConfigRepository, answers: dict[Any, Any]) -> None:
        self._files, self._answers = files, answers

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        # a composition copies the repository, as it may be given other sources
        return Frozen(copy.deepcopy(self._files, memo), self._answers)

    def _once(self, question: str, path: str, *more: Any) -> Any:
        sources = tuple((source.provider, source.path) for source in self._files.get_sources())
        key = (sources, question, path, *more)
        if key not in self._answers:
            self._answers[key] = getattr(self._files, question)(path, *more)
        return self._answers[key]

    def load_config(self, config_path: str) -> ConfigResult | None:
        # Hydra changes what it composes
        result: ConfigResult | None = copy.deepcopy(self._once("load_config", config_path))
        return result

    def group_exists(self, config_path: str) -> bool:
        return bool(self._once("group_exists", config_path))

    def config_exists(self, config_path: str) -> bool:
        return bool(self._once("config_exists", config_path))

    def get_group_options(self, group_name: str, results_filter: Any = None) -> list[str]:
        return list(self._once("get_group_options", group_name, results_filter))

    def get_schema_source(self) -> ConfigSource:
        return self._files.get_schema_source()

    def get_sources(self) -> list[ConfigSource]:
        return self._files.get_sources()

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        self._files.initialize_sources(config_search_path)
