"""What a configurable part is: a frozen dataclass in a registry, every field checked.

A task, cell, initialisation, clip rule, penalty or optimiser is a ``Part``. Its fields are the keys
of its yaml, which holds the defaults; the annotations say what is allowed:

>>> class Example(Part):
...     length: Annotated[int, Interval(low=1)]
>>> Example = dataclass(frozen=True)(Example)
>>> Example(length=0)
Traceback (most recent call last):
    ...
rnngrad.parts.InputError: length=0: must be an integer >= 1
"""

from __future__ import annotations

import difflib
import importlib
import math
import pkgutil
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from rnngrad.stored import printable


class InputError(ValueError):
    """Bad input, in one line: the key, the value, and what is allowed."""

    def __init__(self, key: str, value: Any, allowed: str) -> None:
        shown = f"={_shown(value)}" if value is not MISSING else ""
        super().__init__(printable(f"{_cut(key, 100)}{shown}: {allowed}"))
        self.key, self.value, self.allowed = key, value, allowed

    def under(self, group: str) -> InputError:
        """The same error with its key as it is typed on the command line."""
        return InputError(f"{group}.{self.key}", self.value, self.allowed)


class NothingUsable(Exception):
    """Nothing that a run could go on from: one line that says of each checkpoint why not."""

    def __init__(self, said: str) -> None:
        super().__init__(printable(said))  # what a checkpoint has for a key may be anything


MISSING = object()


@dataclass(frozen=True)
class Interval:
    """The numbers from ``low`` to ``high``; an end is left out if it is listed in ``without``."""

    low: float = -math.inf
    high: float = math.inf
    without: tuple[float, ...] = (-math.inf, math.inf)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and value not in self.without

    def __str__(self) -> str:
        ends = []
        if self.low != -math.inf:
            ends.append(f"{'>' if self.low in self.without else '>='} {_plain(self.low)}")
        if self.high != math.inf:
            ends.append(f"{'<' if self.high in self.without else '<='} {_plain(self.high)}")
        return " and ".join(ends) + (", or inf" if math.inf in self else "")

    @property
    def finite(self) -> bool:
        """Whether infinity would lie in the interval, but for being left out."""
        return self.high == math.inf and math.inf in self.without


class Float32(Interval):
    """What is put into a tensor of float32."""

    def __contains__(self, value: float) -> bool:
        return abs(value) <= 2.0**128 - 2.0**104

    def __str__(self) -> str:
        return "that float32 holds"


FLOAT32 = Float32()
COUNT = Interval(low=1, high=10**9)
POSITIVE = Interval(low=0, without=(0, math.inf))


@dataclass(frozen=True)
class Part:
    """A frozen dataclass whose fields are checked, and numbers converted, when it is made."""

    def __post_init__(self) -> None:
        kind: Any = type(self)  # mypy has no hash for it
        hints = _hints(kind)
        for field in fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, _coerce(hints[field.name], value))
            except (ValueError, OverflowError):  # an integer that no float holds
                raise InputError(
                    field.name, value, f"must be {in_words(hints[field.name])}"
                ) from None


@cache
def _hints(part: type) -> dict[str, Any]:
    """What the fields may be; to work it out takes longer than all else about a part."""
    return get_type_hints(part, include_extras=True)


P = TypeVar("P")


class Registry(dict[str, type[P]], Generic[P]):
    """The parts of one kind by name.

    Args:
        group: The config group, as in ``task=copy``.
        package: Where the built-in parts live: each module in it registers its own.
    """

    def __init__(self, group: str, package: str) -> None:
        super().__init__()
        self.group = group
        self._package = package
        self._loaded = False

    def register(self, name: str) -> Callable[[type[P]], type[P]]:
        """Class decorator: makes the part available as ``<group>=<name>``."""

        def add(part: type[P]) -> type[P]:
            self[name] = part
            return part

        return add

    def load(self) -> Registry[P]:
        """Imports the package's modules, so that every built-in part is registered."""
        if not self._loaded:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
                importlib.import_module(f"{self._package}.{module.name}")
            self._loaded = True
        return self

    def default(self, name: str, **changes: Any) -> P:
        """The part with the defaults of its yaml, but for ``changes``.

        >>> from rnngrad.task import TASKS
        >>> TASKS.default("adding", length=20)
        Adding(length=20, min_length=None, form='sum')
        """
        yaml_file = resources.files("rnngrad.conf") / self.group / f"{name}.yaml"
        defaults = yaml.safe_load(yaml_file.read_text(encoding="utf-8"))
        return self.build(defaults | changes)

    def build(self, settings: Any) -> P:
        """The part that ``settings`` names, from its ``name`` and exactly its fields.

        Raises:
            InputError: No such part, a key missing or unknown, or a value that is not allowed.
        """
        names = ", ".join(sorted(self.load()))
        if not isinstance(settings, Mapping) or "name" not in settings:
            raise InputError(self.group, MISSING, f"is missing; give one of {names}")
        name = settings["name"]
        if not isinstance(name, str) or name not in self:
            raise InputError(f"{self.group}.name", name, f"must be one of {names}")
        return build(self[name], {k: v for k, v in settings.items() if k != "name"}, self.group)


def build(part: type[P], settings: Mapping[str, Any], group: str) -> P:
    """``part(**settings)``, its errors in terms of the command line's keys."""
    known = [field.name for field in fields(part)]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            typed = f"{group}.{as_key(key)}"
            allowed = unknown_key(typed, [f"{group}.{name}" for name in known])
            raise InputError(typed, settings[key], allowed)
    for key in known:
        if key not in settings:
            raise InputError(f"{group}.{key}", MISSING, "is missing")
    try:
        return part(**settings)
    except InputError as error:
        raise error.under(group) from None


def as_key(key: Any) -> str:
    """A key of a mapping, which need not be a text, as one that can be shown."""
    return key if isinstance(key, str) else _shown(key)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What to say of a key that does not exist, with the nearest that does."""
    known, key = list(known), key[:100]
    near = difflib.get_close_matches(key, known, 1)
    known = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    if near:
        return f"no such key; did you mean {near[0]}?"
    return f"no such key; there are {', '.join(known)}" if known else "no such key"


def _coerce(hint: Any, value: Any) -> Any:
    """``value`` as what ``hint`` asks for; ValueError or OverflowError if it is not that."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _coerce(args[0], value)
        if value is not None and not all(value in allowed for allowed in args[1:]):
            raise ValueError
        return value
    if origin in (Union, types.UnionType):
        for choice in args:
            try:
                return _coerce(choice, value)
            except ValueError:
                continue
        raise ValueError
    if origin is Literal:
        if value not in args:
            raise ValueError
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError
        if args[1:] == (...,):
            return tuple(_coerce(args[0], v) for v in value)
        if len(value) != len(args):
            raise ValueError
        return tuple(_coerce(item, v) for item, v in zip(args, value, strict=True))
    if isinstance(value, bool) != (hint is bool):
        raise ValueError  # true is not the number 1
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e4 steps
    if hint is float and isinstance(value, int):
        return float(value)
    if value is None and hint is type(None):
        return value
    if not isinstance(value, hint):
        raise ValueError
    return value


def in_words(hint: Any) -> str:
    """What ``hint`` admits, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind = in_words(args[0])
        if args[0] is float and any(interval.finite for interval in args[1:]):
            kind = "a finite number"
        return " ".join([kind, *map(str, args[1:])]).strip()
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(choice) for choice in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple and args[1:] == (...,):
        return f"a list [A,B,...] of which each is {in_words(args[0])}"
    if origin is tuple:
        return f"[{', '.join(in_words(item) for item in args)}]"
    words: dict[Any, str] = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a text",
        dict: "a mapping {KEY: VALUE}",
    }
    return words.get(hint, "null")


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)


def _shown(value: Any) -> str:
    """As it is typed; a text that looks like a number with its quotes."""
    if isinstance(value, str) and re.fullmatch(r"[-+.\deE]*", value):
        return _cut(repr(value), 60)
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    try:
        return _cut(str(value), 60)
    except (ValueError, RecursionError):  # Python does not write a very long integer
        return f"({type(value).__name__})"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
