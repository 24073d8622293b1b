"""Quick instances of every task, also of those that do not exist yet."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from rnngrad.parts import InputError
from rnngrad.task import TASKS, Task

TEXT = Path(__file__).parent.parent / "README.md"


def documented(group: str) -> set[str]:
    """The parts of a group that docs/menu.md has; a part that is being written is not in it yet."""
    menu = (TEXT.parent / "docs" / "menu.md").read_text(encoding="utf-8")
    return set(re.findall(rf"^### `{group}=(\w+)`$", menu, re.M))


def small_task(name: str, **changes: Any) -> Task:
    """A task's defaults but for ``changes``, of length 12 if it can be; a text is the README."""
    names = {field.name for field in fields(TASKS.load()[name])}  # type: ignore[arg-type]
    small = {"length": 12, "path": str(TEXT), "valid_fraction": 0.5}
    wanted = {key: value for key, value in small.items() if key in names} | changes
    try:
        return TASKS.default(name, **wanted)
    except InputError as error:
        if error.key != "task.length" or "length" in changes:
            raise
        return TASKS.default(name, **{k: v for k, v in wanted.items() if k != "length"})
