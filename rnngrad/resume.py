"""What a run goes on from: the checkpoints in its own directory, if they are this run's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnngrad.parts import InputError, NothingUsable
from rnngrad.runs import (
    CHECKPOINTS,
    CONFIG,
    MOST_STEPS,
    find_runs,
    read_config,
    refuse_odd_files,
)
from rnngrad.stored import flat

if TYPE_CHECKING:
    from rnngrad.checkpoint import Loaded

HOW_OFTEN_SAVED = ("trainer.checkpoint_every", "trainer.checkpoint_keep")
"""Keys that change no bit of a run: what is saved when, and what stays."""


def stored_config(directory: Path) -> dict[str, Any]:
    """The configuration of the run in a directory.

    Raises:
        InputError: There is no run; those inside it are listed.
    """
    if not directory.is_dir():
        raise InputError("resume", directory, "no such directory")
    if not (directory / CONFIG).is_file():
        inside = [str(path) for path in find_runs(directory)]
        listed = f"; runs inside it: {', '.join(inside)}" if inside else ""
        raise InputError("resume", directory, f"is not a run (it has no {CONFIG}){listed}")
    try:
        refuse_odd_files(directory)
        return read_config(directory / CONFIG)
    except (OSError, ValueError) as error:
        raise InputError("resume", directory, str(error)) from None


def has_checkpoints(directory: Path) -> bool:
    """Whether there is anything at all that a run could go on from, usable or not."""
    folder = directory / CHECKPOINTS
    return folder.is_dir() and any(path.name.startswith("step-") for path in folder.iterdir())


def planned_steps(directory: Path, summary: Mapping[str, Any], configured: int) -> int:
    """Updates at most, as the run was last told; it says so wherever it says how far it is.

    Args:
        directory: Of the run.
        summary: Its own, empty if it cannot be read.
        configured: What its configuration says, which is what it was told first.
    """
    from rnngrad.checkpoint import load

    planned: Any = summary.get("planned_steps")
    if not _can_be_planned(planned):
        try:
            planned = _steps(load(directory / CHECKPOINTS))
        except NothingUsable:
            return configured
    return max(configured, planned) if _can_be_planned(planned) else configured


def _can_be_planned(steps: Any) -> bool:
    return type(steps) is int and steps <= MOST_STEPS


def checkpoint_of(
    directory: Path,
    settings: Mapping[str, Any],
    device: str,
    *,
    strict: bool = False,
    say: Callable[[str], None],
) -> Loaded:
    """The newest checkpoint that verifies and that a run with these settings comes by.

    Args:
        directory: Of the run.
        settings: What defines the run.
        device: That the run is to go on on.
        strict: An environment in which the bits may come out otherwise is an error.
        say: Is told in one line of each checkpoint that was passed over, and of each difference.

    Raises:
        NothingUsable: There is none.
        InputError: With ``strict``, the first difference.
    """
    from rnngrad.checkpoint import load

    here = plain_settings(settings)
    loaded = load(directory / CHECKPOINTS)
    skipped = loaded.skipped
    _check_settings(loaded, here)
    while _is_shorter_end(loaded, here["trainer"]):
        loaded = load(directory / CHECKPOINTS, before=loaded.step)
        skipped = skipped + loaded.skipped
        _check_settings(loaded, here)
    for reason in skipped:
        say(f"checkpoint passed over: {reason}")
    _check_environment(loaded, device, strict, say)
    return loaded


def _steps(loaded: Loaded) -> Any:
    """Updates at most, as they were when a checkpoint was saved."""
    return flat(loaded.values.get("settings")).get("trainer.steps")


def _is_shorter_end(loaded: Loaded, trainer: Mapping[str, Any]) -> bool:
    """Whether its last step owes to having been the last what is not in a longer run."""
    planned = _steps(loaded)
    evaluated = isinstance(planned, int) and planned % trainer["eval_every"] == 0
    return loaded.step == planned != trainer["steps"] and not evaluated


def _check_settings(loaded: Loaded, settings: Mapping[str, Any]) -> None:
    """Refuses a checkpoint of another run.

    Raises:
        NothingUsable: The first key in which they differ.
    """
    there, here = flat(loaded.values.get("settings")), flat(settings)
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key) and key not in ("trainer.steps", *HOW_OFTEN_SAVED):
            raise NothingUsable(
                f"{loaded.path}: is of another run ({key} is {_shown(there.get(key))} there and "
                f"{_shown(here.get(key))} here)"
            )


def _check_environment(
    loaded: Loaded, device: str, strict: bool, say: Callable[[str], None]
) -> None:
    """Says, or refuses, where the bits may come out otherwise; as ``checkpoint_of``."""
    from rnngrad.snapshot import environment

    stored = loaded.values.get("environment")
    if not isinstance(stored, Mapping):
        raise NothingUsable(f"{loaded.path}: does not say where it was made")
    now = environment(device)
    if stored.get("device") != now["device"]:
        made_on = _shown(stored.get("device"))
        raise NothingUsable(f"{loaded.path}: was made on {made_on}, and this is {now['device']}")
    for key, value in now.items():
        if stored.get(key) != value:
            differs = f"{key} is {_shown(stored.get(key))} in the checkpoint and {value} here"
            if strict:
                raise InputError("strict", True, differs)
            say(f"{differs}: what follows may differ in its last bits (strict=true refuses this)")


def more_steps(wanted: int, planned: int, learning_rate: Callable[[int, int], float]) -> None:
    """Refuses a number of updates that would have made another run of those already made.

    Args:
        wanted: Updates at most, as asked for.
        planned: As they were when the run was last started.
        learning_rate: Of a step, in a run of so many.

    Raises:
        InputError: Fewer than planned, or the learning rates so far depend on how many there are.
    """
    if wanted < planned:
        allowed = f"can only be raised, and this run was planned for {planned}"
        raise InputError("trainer.steps", wanted, allowed)
    if learning_rate(planned, planned) != learning_rate(planned, wanted):
        raise InputError(
            "trainer.steps",
            wanted,
            f"cannot be raised: optim.schedule has its end at step {planned}, so that the updates "
            "already made would have been others; start a new run",
        )


def refuse_other_overrides(
    overrides: Mapping[str, Any], config: Mapping[str, Any], directory: Path
) -> None:
    """A run goes on as it is: what is typed beside ``resume=`` may only repeat what it is.

    Args:
        overrides: Values by key, as they were typed.
        config: The run's.
        directory: Of the run.

    Raises:
        InputError: The first key that has another value, or that the run does not have.
    """
    own = flat(config)
    for key, value in overrides.items():
        name = f"{key}.name" if f"{key}.name" in own else key
        if name not in own:
            raise InputError(key, value, f"no such key in the run in {directory}")
        if own[name] != value:
            raise InputError(
                key,
                value,
                f"a run goes on as it is, and in {directory} it is {_shown(own[name])}; only "
                f"trainer.steps can be raised, {' and '.join(HOW_OFTEN_SAVED)} changed",
            )


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back, with lists for tuples, and not how often to save."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    for key in HOW_OFTEN_SAVED:
        group, _, name = key.partition(".")
        plain.get(group, {}).pop(name, None)
    return plain


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
