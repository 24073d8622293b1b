"""Remedies as they fit behind what was typed.

Hydra gives keys their values after all parts are chosen, whatever the order on the command line: a
key that was typed for one part is refused by the part that takes its place, or outlasts it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import yaml

from rnngrad.diagnosis.findings import Remedy

KEPT: Mapping[str, tuple[str, ...]] = {
    "cell": ("hidden_size", "num_layers"),
    "optim": ("weight_decay", "schedule", "warmup_steps"),
}
"""Keys that stay when another part of the group is chosen, which has them too."""


def fitted(remedy: Remedy, typed: Sequence[str]) -> Remedy:
    """The remedy, with the words of the command that it has to take the place of.

    What an experiment's file sets cannot be left out: it is deleted or set back by further words.

    Args:
        remedy: What to try.
        typed: The overrides of the run's command.
    """
    words = remedy.override.split()
    chosen = {_key(word): _value(word) for word in words if "." not in _key(word)}
    own = {_key(word) for word in words}
    out = [w for w in typed if _leaves(_key(w), chosen)]
    groups = {_key(word).partition(".")[0] for word in out}
    more = [
        _undone(group, key, chosen[group])
        for word in typed
        if _key(word) == "experiment"
        for group, keys in _file("experiment", _value(word)).items()
        if group in chosen and isinstance(keys, Mapping)
        for key in keys
        if _leaves(f"{group}.{key}", chosen) and f"{group}.{key}" not in own
    ]
    instead = [word for word in typed if word in out or _key(word) in groups]
    return Remedy(" ".join([*words, *more]), remedy.words, " ".join(instead))


def _leaves(key: str, chosen: Mapping[str, str]) -> bool:
    """Whether a key belongs to a part that goes."""
    group, _, inner = key.partition(".")
    return bool(inner) and group in chosen and inner not in KEPT.get(group, ())


def _undone(group: str, key: str, name: str) -> str:
    """What rids the new part of a key that an experiment's file sets."""
    part = _file(group, name)
    if key not in part:
        return f"~{group}.{key}"
    value = part[key]
    return f"{group}.{key}={'null' if value is None else str(value).replace(' ', '')}"


def _file(group: str, name: str) -> Mapping[str, Any]:
    """A yaml of the package's menu; nothing of one that a plugin brings.

    The name may be from a stored file: it is no path.
    """
    if not re.fullmatch(r"\w+", name):
        return {}
    path = resources.files("rnngrad.conf") / group / f"{name}.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if isinstance(found, Mapping) else {}


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _value(word: str) -> str:
    return word.partition("=")[2]
