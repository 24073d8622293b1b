"""Errors in one line: of Hydra and OmegaConf the key, the value, and what is allowed; of a plugin
the place.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from rnngrad.launcher import plain
from rnngrad.parts import unknown_key

EXTRAS = {"hydra/launcher=joblib": "joblib", "hydra/sweeper=optuna": "optuna"}
"""What packages beside ours bring, and the extra of ours that installs them."""


def explain(error: Exception, overrides: list[str]) -> str:
    """What is wrong with ``overrides``, for errors that take up to ten lines to say it."""
    text = str(error).split("Config search path")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    if found := re.search(r"Could not (?:find|load) '(hydra/\w+)/(\w+)'", first):
        if extra := EXTRAS.get("=".join(found.groups())):
            asked = [o for o in overrides if o.startswith(("engine=", "hydra/", "experiment="))]
            return f"{asked[0] if asked else extra}: needs pip install 'rnngrad[{extra}]'"
    if found := re.search(r"Could not find '([^']+)/([^']*)'", first):
        group, name = found.groups()
        options = text.partition("Available options in")[2].partition(":")[2].split()
        options = options or [o for o in _options(group) if o]
        allowed = (
            f"must be one of {', '.join(options)}" if options else "there is nothing to choose"
        )
        return f"{group}={name}: {allowed}"
    if found := re.search(r"Could not (?:override|append|delete)[^']*'([^']+)'", first):
        key = found.group(1).split("=")[0].lstrip("+~")
        keys = _keys(overrides)
        why = first if key in keys else unknown_key(key, keys)
        return f"{_given(key, overrides)}: {why}"
    if first.startswith("Ambiguous value for argument"):
        given = first.split("'")[1]
        return f"{given}: several values; to sweep over them add -m, for a list write [A,B]"
    if found := re.search(r"Multiple values for (\S+)\.", first):
        group = found.group(1)
        return f"{group}: is given twice; write {group}=NAME once, without +"
    if first.startswith("Config group override must be"):
        given = next((o for o in overrides if re.match(r"[\w/]+=(null\b|[-.\d])", o)), "")
        group = given.split("=")[0]
        return f"{given}: must be one of {', '.join(_options(group))}" if group else first
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read as KEY=VALUE; the value may need quotes"
    if first.startswith("Error merging override") and error.__cause__ is not None:
        first = str(error.__cause__).splitlines()[0]
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{_given(error.full_key, overrides)}: {first}"
    named = [o for o in overrides if o in text or o.split("=")[0].lstrip("+~") in text]
    blamed = named or [o for o in overrides if not o.startswith("-")]
    return f"{blamed[0]}: {first}" if len(blamed) == 1 or named else first


def blame(error: BaseException, plugins: Iterable[str]) -> str:
    """What was raised, and where in a plugin that was: file, line and function.

    Args:
        error: Whoever raised it; what counts is the last of a plugin's functions on its way.
        plugins: Modules; those beside them in a package count as well.
    """
    packages = {name.partition(".")[0] for name in plugins}
    said = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        if str(frame.f_globals.get("__name__")).partition(".")[0] in packages:
            code = frame.f_code
            return f"{said}; at {code.co_filename}, line {line}, in {code.co_name}"
    return said


def _given(key: str, overrides: list[str]) -> str:
    """The override of ``key`` as it was typed."""
    return next((o for o in overrides if o.lstrip("+~").split("=")[0] == key), key)


def _options(group: str) -> list[str]:
    """The names that a group can be given."""
    with hydra.initialize_config_module("rnngrad.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        return list(loader.get_group_options(group))


def _keys(overrides: list[str]) -> list[str]:
    """The groups and keys there are, with the parts that ``overrides`` choose."""
    with hydra.initialize_config_module("rnngrad.conf", version_base="1.3"):
        groups = set(plain(hydra.compose("config")))
        chosen = [o for o in overrides if re.fullmatch(r"\w+=\w+", o) and o.split("=")[0] in groups]
        try:
            keys = plain(hydra.compose("config", chosen))
        except (HydraException, OmegaConfBaseException):
            keys = plain(hydra.compose("config"))
    inner = [
        f"{group}.{key}" for group, node in keys.items() if isinstance(node, dict) for key in node
    ]
    return [*keys, "experiment", "engine", *(key for key in inner if not key.endswith(".name"))]
