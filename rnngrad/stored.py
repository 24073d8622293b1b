"""Reading what lies in a run directory, whoever wrote it: sizes first, then data and never code."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from sys import intern
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import yaml

TEXT_LIMIT = 2**20
"""Bytes of a configuration, a summary or a layout: a hundred times what one has."""
DEPTH_LIMIT = 64
"""Levels of nested lists and mappings."""
NODE_LIMIT = 50_000
"""Values, keys, lists and mappings in one YAML file: each takes far more memory than text."""
DIGITS = 400
"""Characters of a number; Python takes time that grows with their square."""


class Unreadable(ValueError):
    """A file that is not what a run writes: one line that names it, and why."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(one_line(f"{path}: {why}"))
        self.path, self.why = path, one_line(why)


def printable(text: str) -> str:
    """Without line breaks and what a terminal would obey, which a stored name may have."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def one_line(text: str) -> str:
    """The same, of a length that can be read."""
    text = printable(text[:1000])
    return text if len(text) <= 500 else text[:497] + "..."


def shown(value: Any) -> str:
    """A stored value, short enough for a line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def flat(tree: Any, levels: int = DEPTH_LIMIT) -> dict[str, Any]:
    """What nested mappings hold, by keys with dots; nothing, if it is no mapping.

    >>> flat({"seed": 0, "clip": {"name": "norm"}, "empty": {}})
    {'seed': 0, 'clip.name': 'norm', 'empty': {}}

    Args:
        tree: The mappings.
        levels: What is nested more deeply stays as it is.
    """
    values: dict[str, Any] = {}
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        # one text for a key, however many runs have it
        inner = flat(value, levels - 1) if levels > 1 else {}
        values |= {intern(f"{key}.{name}"): item for name, item in inner.items()} or {
            f"{key}": value
        }
    return values


def opened(path: Path, limit: int) -> IO[bytes]:
    """The file at ``path``, of at most ``limit`` bytes.

    A link is not followed, as its target need not lie in the run directory, and a pipe is not
    waited for.

    Raises:
        Unreadable: It is no file, or too large.
        OSError: It is not there, or the system will not let us.
    """
    if path.is_symlink() or path.parent.is_symlink() and path.parent.name == ".hydra":
        raise Unreadable(path, "is a symbolic link, or lies in one; these are not followed")

    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    number = os.open(path, os.O_RDONLY | flags)
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable(path, "is a directory or a device")
        if status.st_size > limit:
            raise Unreadable(path, f"has {status.st_size:,} bytes; {limit:,} are allowed")
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def is_odd(path: Path) -> bool:
    """Whether it is neither a file nor a folder: writing there would not be writing there."""
    mode = path.lstat().st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def lines_of(path: Path, limit: int) -> Iterator[str]:
    """A file's lines with their ends; a last one without an end is not there yet.

    Raises:
        Unreadable: It is no file, too large, not UTF-8, or a line is longer than ``TEXT_LIMIT``.
        OSError: It is not there, or the system will not let us.
    """
    with opened(path, limit) as file:
        for number in itertools.count(1):
            line = file.readline(TEXT_LIMIT)
            if not line.endswith(b"\n"):
                if len(line) == TEXT_LIMIT:
                    raise Unreadable(path, f"line {number} is too long")
                return
            try:
                yield line.decode("utf-8" if number > 1 else "utf-8-sig")
            except UnicodeDecodeError:
                raise Unreadable(path, f"line {number} is not UTF-8") from None


def array_of(path: Path, dtype: npt.DTypeLike, limit: int) -> npt.NDArray[Any]:
    """A file's numbers; one that is cut off at the end is not there.

    Raises:
        Unreadable: It is no file, or too large.
        OSError: It is not there, or the system will not let us.
    """
    with opened(path, limit) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            return np.fromfile(file, dtype, count=size // np.dtype(dtype).itemsize)
        except MemoryError:
            raise Unreadable(path, f"has {size:,} bytes, more than there is memory") from None


def bytes_of(path: Path, limit: int) -> bytes:
    """A file's bytes.

    Raises:
        Unreadable: It is no file, or too large.
        OSError: It is not there, or the system will not let us.
    """
    with opened(path, limit) as file:
        data = file.read(limit + 1)
    if len(data) > limit:  # it grows, or the system makes it up as it is read
        raise Unreadable(path, f"has more than the {limit:,} bytes that are allowed")
    return data


def text_of(path: Path) -> str:
    """A file's text, without the mark that some editors put at the beginning.

    Raises:
        Unreadable: It is no file, too large, or not UTF-8.
        OSError: It is not there, or the system will not let us.
    """
    try:
        return bytes_of(path, TEXT_LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(path, f"byte {error.start} is not UTF-8") from None


Pairs = list[tuple[str, Any]]


def unique(pairs: Pairs) -> dict[str, Any]:
    """A mapping of keys and values, as ``json_tree`` has them.

    Raises:
        ValueError: A key is there twice.
    """
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a key is there twice")
    return tree


def json_tree(text: str | bytes, mapping: Callable[[Pairs], Any] = unique) -> Any:
    """What strict JSON says: no key twice, no ``NaN``, no number that would become infinite.

    Args:
        text: The JSON; bytes are UTF-8.
        mapping: Makes of an object's keys and values what stands for it, or raises ValueError.

    Raises:
        ValueError: It is something else.
    """

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:20]} is not a finite number")
        return value

    def integer(text: str) -> int:
        if len(text) > DIGITS:
            raise ValueError("an integer is too long")
        return int(text)

    try:
        return json.loads(
            text if isinstance(text, str) else text.decode(),
            object_pairs_hook=mapping,
            parse_int=integer,
            parse_float=number,
            parse_constant=number,
        )
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not the JSON that is expected here ({error})") from None


def json_mapping(path: Path) -> dict[str, Any]:
    """A file's JSON object, as ``json_tree`` reads it.

    Raises:
        Unreadable: It is something else.
        OSError: It is not there, or the system will not let us.
    """
    try:
        tree = json_tree(text_of(path))
    except Unreadable:
        raise
    except ValueError as error:
        raise Unreadable(path, str(error)) from None
    return _mapping(path, tree)


def yaml_tree(path: Path) -> Any:
    """What a YAML file says, in plain values: no tag, no alias, no key twice.

    Raises:
        Unreadable: It is something else.
        OSError: It is not there, or the system will not let us.
    """
    return _tree(path, text_of(path))


def _tree(path: Path, text: str) -> Any:
    try:
        return _parsed(text)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        why = f"is not the YAML that is expected here ({error.problem}{line})"
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = f"is not the YAML that is expected here ({error})"
    raise Unreadable(path, why)


def _parsed(text: str) -> Any:
    _check_events(text)
    loader = _Plain(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def yaml_mapping(path: Path) -> dict[str, Any]:
    """As ``yaml_tree``, of a mapping whose keys are texts."""
    text = text_of(path)
    tree = _by_block(text)
    return _mapping(path, _tree(path, text) if tree is None else tree)


def _by_block(text: str) -> dict[str, Any] | None:
    """A mapping whose top-level entries can be read one by one; ``None`` if they might not.

    The configurations of a sweep share most of theirs, and those are read once.
    """
    blocks = _BLOCK.findall(text)
    if not blocks or "".join(blocks) != text or len(text) > NODE_LIMIT:
        return None
    tree: dict[str, Any] = {}
    for block in blocks:
        stored = _entry(block)
        if stored is None or not tree.keys().isdisjoint(entry := json.loads(stored)):
            return None
        tree |= entry
    return tree


_BLOCK = re.compile(r"^[a-z_]+:(?: .*)?\n(?:[ -].*\n)*", re.M)
"""A key at the beginning of a line, and the lines under it that cannot be another one's."""


@lru_cache(maxsize=4096)
def _entry(block: str) -> str | None:
    """One entry of a mapping as JSON, of which everybody makes a copy; ``None``: see the whole."""
    try:
        tree = _parsed(block)
        stored = json.dumps(tree)
        alike = isinstance(tree, dict) and len(tree) == 1 and json.loads(stored) == tree
        return stored if alike else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _mapping(path: Path, tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise Unreadable(path, "is not a mapping")
    if not all(isinstance(key, str) for key in tree):
        raise Unreadable(path, "has a key that is not a text")
    if _deeper(tree, DEPTH_LIMIT):
        raise Unreadable(path, "is nested too deeply")
    return tree


def _deeper(tree: Any, levels: int) -> bool:
    """Whether lists and mappings are nested in more ``levels`` than these."""
    level = [tree]
    for _ in range(levels + 1):
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Plain(_SafeLoader):  # type: ignore[misc]
    """A ``SafeLoader`` of null, booleans, numbers, texts, lists and mappings, and nothing else."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is there twice")
        return mapping


_KNOWN = ("null", "bool", "int", "float", "str", "seq", "map")
_Plain.yaml_constructors = {
    tag: make
    for tag, make in _SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _KNOWN
}
_Plain.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag.rpartition(":")[2] in _KNOWN]
    for first, resolvers in _SafeLoader.yaml_implicit_resolvers.items()
}


def _check_events(text: str) -> None:
    """Refuses, before anything is built, what would take more memory or time than its text.

    Raises:
        ValueError: There is such a thing.
        yaml.YAMLError: It is no YAML.
    """
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_SafeLoader)):
        if count > NODE_LIMIT:
            raise ValueError(f"more than {NODE_LIMIT:,} values")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("an alias")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and event.implicit[0] and _is_long(event.value):
            raise ValueError("a number is too long")
        if depth > DEPTH_LIMIT:
            raise ValueError(f"nested in more than {DEPTH_LIMIT} levels")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ValueError(f"the tag {tag}")


def _is_long(scalar: str) -> bool:
    """Whether it would be read as a number of too many digits."""
    numbers = _Plain.yaml_implicit_resolvers.get(scalar[:1], [])
    return len(scalar) > DIGITS and any(regex.match(scalar) for _, regex in numbers)
