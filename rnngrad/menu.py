"""docs/menu.md: every part there is, with its keys and its source, from the code itself.

``python -m rnngrad.menu`` prints it; a test compares.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from importlib import resources
from typing import Any, get_type_hints

import yaml

from rnngrad.config import REGISTRIES, Trainer
from rnngrad.init import SCHEMES
from rnngrad.parts import Part, Registry, in_words

TITLES = {
    "task": "Tasks",
    "cell": "Cells",
    "init": "Initialisation",
    "clip": "Clip rules",
    "bptt_clip": "Clipping inside back-propagation",
    "regularizer": "Regularisers",
    "optim": "Optimisers",
    "measure": "Measurements",
}


def menu() -> str:
    """The page, in Markdown."""
    return "\n".join(_lines()).rstrip() + "\n"


def _lines() -> Iterator[str]:
    yield "# The menu"
    yield ""
    yield "Every part that can be named on the command line, its keys with their defaults, and"
    yield "where it comes from. `python -m rnngrad.menu` writes this page from the docstrings and"
    yield "yamls. More on [clip rules](clipping.md) and on"
    yield "[what cell and initialisation do to the gradient](initial_gradients.md)."
    for group, registry in REGISTRIES.items():
        yield ""
        yield f"## {TITLES[group]}: `{group}=`"
        for name in sorted(registry.load()):
            yield from _entry(group, name, registry)
        if group == "init":
            yield from _schemes()
        yield from _presets(group, registry)
    yield ""
    yield "## Set-ups: `experiment=`"
    yield ""
    for name, comment, _ in _yamls("experiment"):
        yield f"- `experiment={name}`: {comment}"
    yield ""
    yield "## Training: `trainer.`"
    yield ""
    yield from _table("trainer", "default", Trainer)


def _entry(group: str, name: str, registry: Registry[Any]) -> Iterator[str]:
    part = registry[name]
    text = _paragraph(part)
    yield ""
    yield f"### `{group}={name}`"
    yield ""
    yield text
    yield ""
    if fields(part):
        yield from _table(group, name, part)
        yield ""
    source = _section(part, "Reference")
    if source:
        yield f"Source: {source}"


def _table(group: str, name: str, part: type[Part]) -> Iterator[str]:
    defaults = _yaml(group, f"{name}.yaml")
    hints = get_type_hints(part, include_extras=True)
    described: dict[str, str] = {}
    for base in reversed(part.__mro__):
        described |= _arguments(base)
    yield "| key | default | may be | what |"
    yield "|---|---|---|---|"
    for field in fields(part):
        shown = yaml.safe_dump(defaults[field.name], default_flow_style=True).split("\n")[0]
        what = described[field.name]
        may_be = in_words(hints[field.name]).replace(
            f" and <= {10**9}", ""
        )  # no limit, in practice
        cells = (f"`{group}.{field.name}`", f"`{shown}`", may_be, what)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _schemes() -> Iterator[str]:
    yield ""
    yield "### Schemes for `init.input`, `init.recurrent` and `init.output`"
    yield ""
    yield "| scheme | what | source |"
    yield "|---|---|---|"
    for name, scheme in SCHEMES.items():
        what, source = _paragraph(scheme.fill), _section(scheme.fill, "Reference")
        yield f"| `{name}` | {what} | {source} |"


def _presets(group: str, registry: Registry[Any]) -> Iterator[str]:
    """The yamls that are not named as a part: cited settings of one."""
    presets = [entry for entry in _yamls(group) if entry[0] not in registry]
    if not presets:
        return
    yield ""
    yield f"### Presets of `{group}=`"
    yield ""
    for name, comment, settings in presets:
        base = _yaml(group, f"{settings['name']}.yaml")
        keys = [f"`{group}.{k}={v}`" for k, v in settings.items() if base[k] != v]
        same = f"`{group}={settings['name']}`"
        yield f"- `{group}={name}`: {comment} {same} {' '.join(keys)}"


def _yamls(group: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, leading comment and settings of every yaml of a group."""
    folder = resources.files("rnngrad.conf") / group
    found = []
    for file in sorted(file.name for file in folder.iterdir() if file.name.endswith(".yaml")):
        lines = (folder / file).read_text(encoding="utf-8").splitlines()
        comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("# "))
        comment = comment.removeprefix("@package _global_ ")
        found.append((file.removesuffix(".yaml"), comment, _yaml(group, file)))
    return found


def _yaml(group: str, file: str) -> dict[str, Any]:
    text = (resources.files("rnngrad.conf") / group / file).read_text(encoding="utf-8")
    settings: dict[str, Any] = yaml.safe_load(text)
    return settings


def _paragraph(thing: Any) -> str:
    """The first paragraph of a docstring, in one line of Markdown."""
    return _inline((inspect.getdoc(thing) or "").split("\n\n")[0])


def _section(thing: Any, title: str) -> str:
    """A section of a docstring, in one line."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)*)", inspect.getdoc(thing) or "", re.M)
    return _inline(found[1]) if found else ""


def _arguments(part: type) -> dict[str, str]:
    """The described fields of one class, without those of its bases."""
    text = inspect.cleandoc(part.__dict__.get("__doc__") or "")
    found = re.search(r"^Args:\n((?:    .*\n?)*)", text, re.M)
    if not found:
        return {}
    described: dict[str, str] = {}
    name = ""
    for line in found[1].splitlines():
        if begins := re.match(r"    (\w+): (.*)", line):
            name, described[begins[1]] = begins[1], begins[2]
        else:
            described[name] += " " + line.strip()
    return {key: _inline(value) for key, value in described.items()}


def _inline(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")


if __name__ == "__main__":
    print(menu(), end="")
