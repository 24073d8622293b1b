"""The command ``rnngrad``: one run, or a sweep with ``-m``."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from rnngrad.composition import nothing_to_run
from rnngrad.explain import explain
from rnngrad.gate import sweeping
from rnngrad.job import attempt, logging_to, say, train
from rnngrad.launcher import (
    InUse,
    plain,
    register_python_text,
    register_run_name,
    stored_texts,
)
from rnngrad.outcomes import (
    BAD_INPUT,
    DIVERGED,
    DONE,
    FAILED,
    IN_USE,
    OUTCOMES,
    Ledger,
    Outcome,
    finished_code,
    forget,
    note,
)
from rnngrad.parts import MISSING, InputError, NothingUsable
from rnngrad.resume import (
    HOW_OFTEN_SAVED,
    refuse_other_overrides,
    stored_config,
)
from rnngrad.runs import LOG, SUMMARY, Run, overview, table
from rnngrad.signals import temporary_folder

log = logging.getLogger("rnngrad")
_NULL = ("experiment=null", "engine=null")


def main() -> NoReturn:
    """Runs the command line and exits with one of the codes of ``rnngrad.outcomes``."""
    sys.exit(run_command())


def run_command() -> int:
    """Hydra's app with its errors in one line each, and an exit code for every way to end."""
    before, logging.raiseExceptions = logging.raiseExceptions, False  # a full disk's tracebacks
    try:
        return _command()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        logging.raiseExceptions = before


def _command() -> int:
    register_run_name()
    register_python_text()
    try:
        if (directory := _resumed()) is not None:
            return resume(directory, sys.argv[1:])
        _arguments()
        with temporary_folder() as folder:
            path = folder / "outcomes"
            forget()
            ledger = Ledger(path)
            # with HYDRA_FULL_ERROR it raises its errors instead of printing six lines and exiting
            raised = _environment(HYDRA_FULL_ERROR="1", **{OUTCOMES: str(path)})
            try:
                with raised, nothing_to_run(), sweeping():
                    version = {} if hydra.__version__ >= "1.4" else {"version_base": "1.3"}
                    app = hydra.main(
                        config_path="pkg://rnngrad.conf", config_name="config", **version
                    )
                    app(job)()
            except (SystemExit, KeyboardInterrupt) as left:
                code = left.code if isinstance(left, SystemExit) else 128 + signal.SIGINT
                if isinstance(code, int) and code > 128:  # interrupted
                    _conclude(ledger.outcomes())
                raise
            return _conclude(ledger.outcomes())
    except SystemExit as exit:
        if isinstance(exit.code, Exception):
            return _refuse(exit.code, sys.argv[1:])
        return BAD_INPUT if exit.code == 1 else exit.code if isinstance(exit.code, int) else DONE
    except Exception as error:  # a job keeps its own: this is Hydra, refusing the command line
        return _refuse(error, sys.argv[1:])


def _resumed() -> Path | None:
    """Takes ``resume=DIR`` off the command line: a path that Hydra need not be able to read."""
    given = [argument for argument in sys.argv[1:] if re.match("[+~]*resume=", argument)]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in given]
    paths = [argument.partition("=")[2] for argument in given]
    if not paths or paths == ["null"]:
        return None
    if len(paths) > 1 or given[0][0] in "+~":
        raise InputError(given[-1], MISSING, "one run goes on at a time: rnngrad resume=DIR")
    if options := [argument for argument in sys.argv[1:] if argument.startswith("-")]:
        raise InputError("resume", paths[0], f"{options[0]} cannot stand beside it")
    if not paths[0]:
        raise InputError("resume", "", "must be the directory of a run")
    return Path(paths[0]).expanduser()


def _arguments() -> None:
    """Checks the shape of the command line, and puts it in the order that Hydra can read."""
    if "--" in sys.argv:
        _usage_error("-- is not needed")
    parser = get_args_parser()
    parser.error = _usage_error  # type: ignore[method-assign]
    arguments, more = parser.parse_known_args()
    if unknown := [argument for argument in more if argument.startswith("-")]:
        _usage_error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.experimental_rerun:
        _usage_error("--experimental-rerun: would run what a stored file says; type the command")
    overrides: list[str] = arguments.overrides + more
    for override in overrides:
        if not re.match(r"[~+]{0,2}[^\W\d]", override):
            raise InputError(repr(override), MISSING, "is not of the form KEY=VALUE")
        if len(override.split("=")[0]) > 255:  # Hydra would look for a file of that name
            raise InputError(f"{override[:60]}...", MISSING, "no such key")
    # argparse, and so Hydra, wants the overrides in one piece: options may stand among them here.
    # Hydra cannot read a default that is null back
    rest = [argument for argument in sys.argv[1:] if argument not in overrides]
    sys.argv[1:] = [*(o for o in overrides if o not in _NULL), *rest]


def job(config: DictConfig) -> float:
    """One run, start to end; called by Hydra with the composed configuration.

    Returns:
        What a sweeper minimises: the last evaluation's loss, ten times chance if it diverged.
    """
    settings = HydraConfig.get()
    directory = Path(settings.runtime.output_dir)
    sweep = settings.sweep.dir if settings.mode == RunMode.MULTIRUN else ""

    def run() -> tuple[int, float]:
        from rnngrad.config import load_plugins

        values = plain(config)
        load_plugins(values, settings.overrides.task)
        return train(values, directory, texts=stored_texts(config))

    code, objective = attempt(run, directory, config.get("plugins") or [])
    note([Outcome(code, directory, sweep)])
    if code > 128 and settings.mode == RunMode.MULTIRUN:
        raise SystemExit(code)  # who interrupts a run wants the sweep to end
    return objective


def resume(directory: Path, overrides: list[str]) -> int:
    """Goes on with the run in a directory; the exit code.

    Args:
        directory: Of the run; its configuration is taken from there.
        overrides: What may stand beside: ``trainer.steps``, ``HOW_OFTEN_SAVED``, ``strict``,
            ``plugins``.
    """
    from rnngrad.config import experiment, load_plugins

    values = stored_config(directory)
    directory = directory.absolute()
    given = _given(overrides)
    named = given.pop("plugins", [])
    if values.get("plugins") and not named:
        allowed = "what is stored is not imported; type plugins=[...] again"
        raise InputError("plugins", values["plugins"], allowed)
    load_plugins({"plugins": named}, overrides)
    longer = {"steps": given.pop("trainer.steps")} if "trainer.steps" in given else None
    values["strict"] = given.pop("strict", False)
    experiment(values)
    values["trainer"] |= {k.partition(".")[2]: given.pop(k) for k in HOW_OFTEN_SAVED if k in given}
    refuse_other_overrides(given, values, directory)
    trainer = experiment(values | {"trainer": values["trainer"] | (longer or {})}).trainer
    steps = None if longer is None else trainer.steps

    def run() -> tuple[int, float]:
        return train(values, directory, again=True, steps=steps)

    with logging_to(directory / LOG):
        code, _ = attempt(run, directory, named)
        return _conclude([Outcome(code, directory, "")])


def _given(overrides: list[str]) -> dict[str, Any]:
    """Keys and values of the overrides beside ``resume=``, read as Hydra reads them."""
    given: dict[str, Any] = {}
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.get_key_element()
        if not re.fullmatch(r"\w[\w.]*", key) or override.is_sweep_override() or key in given:
            raise InputError(str(override.input_line), MISSING, "cannot stand beside resume=")
        given[key] = override.value()
    return given


def _refuse(error: Exception, overrides: list[str]) -> int:
    """Says what is wrong in one line; the exit code that goes with it."""
    if isinstance(error, InUse):
        say(str(error))
        return IN_USE
    cause = _system_error(error)
    if isinstance(error, InputError | NothingUsable):
        say(str(error))
    elif cause is not None:
        where = cause.filename or "the current directory"
        say(f"{where}: cannot be used as a run directory ({cause.strerror})")
    else:
        say(explain(error, overrides))
    return BAD_INPUT


def _system_error(error: BaseException | None) -> OSError | None:
    """What the system has refused, if that is why something else was raised."""
    while error is not None and (
        not isinstance(error, OSError) or isinstance(error, HydraException)
    ):
        error = error.__cause__
    return error


def _conclude(outcomes: list[Outcome]) -> int:
    """Says how the runs ended; the exit code of the whole command."""
    if not outcomes:  # none ran: --cfg, --info
        return DONE
    sweep = outcomes[0].sweep
    if not sweep and outcomes[0].code in (BAD_INPUT, IN_USE):
        return outcomes[0].code  # of a run that is as it was, one line is enough
    outcomes = [_by_now(outcome) for outcome in outcomes]
    finished = [Run(path) for _, path, _ in outcomes if (path / SUMMARY).exists()]
    try:
        _tell(finished, sweep)
        if elsewhere := [o.directory.name for o in outcomes if o.code == IN_USE and sweep]:
            more = f" and {len(elsewhere) - 5} more" if len(elsewhere) > 5 else ""
            say(f"going on elsewhere, and not waited for: {', '.join(elsewhere[:5])}{more}")
        if waiting := sum(o.code is None or o.code > 128 for o in outcomes) * bool(sweep):
            say(f"{waiting} of {len(outcomes)} runs are yet to be done: the same command goes on")
    except OSError:  # nobody reads, or the disk is full: the runs are as good as they were
        sys.stdout = open(os.devnull, "w")
    except Exception as error:
        log.error(traceback.format_exc())
        say(f"the runs are whole, but cannot be summed up ({type(error).__name__}: {error})")
    if not sweep:
        return outcomes[0].code or DONE
    return max((_SEVERITY.get(o.code, FAILED) for o in outcomes), key=_RANK.index)


_SEVERITY = {DONE: DONE, DIVERGED: DIVERGED, IN_USE: IN_USE, None: DONE}
_RANK = [DONE, IN_USE, FAILED, DIVERGED]


def _by_now(outcome: Outcome) -> Outcome:
    """What has become of a run that was going on elsewhere."""
    if outcome.code != IN_USE:
        return outcome
    return outcome._replace(code=finished_code(outcome.directory, IN_USE))


def _tell(runs: list[Run], sweep: str) -> None:
    """The runs as a table; what is wrong with a single one; TensorBoard's summary of a sweep."""
    if not runs:
        return
    print(overview(runs) if sweep else table(runs), flush=True)
    if sweep:
        from rnngrad.tracking import summarize

        summarize(sweep, runs)
    else:
        from rnngrad.diagnosis import diagnose_run

        diagnosis = diagnose_run(runs[0])
        if diagnosis.in_trouble:
            print(diagnosis.text(), flush=True)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _usage_error(message: str) -> NoReturn:
    say(f"{message}; see rnngrad --help")
    sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
