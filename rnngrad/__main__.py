"""The command ``rnngrad``: one run, or a sweep with ``-m``."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from rnngrad.explain import explain
from rnngrad.launcher import InUse, lock_directory, plain, register_run_name
from rnngrad.parts import MISSING, InputError
from rnngrad.runs import SUMMARY, Run, table

DONE, FAILED, BAD_INPUT, DIVERGED, IN_USE = 0, 1, 2, 3, 4
"""Exit codes; a signal's is 128 and its number."""

OUTCOMES = "RNNGRAD_OUTCOMES"
"""Names a file in which each job of a sweep, in whatever process, leaves its exit code."""

log = logging.getLogger("rnngrad")


def main() -> NoReturn:
    """Runs the command line and exits with one of the codes above."""
    sys.exit(run_command())


def run_command() -> int:
    """Hydra's app with its errors in one line each, and an exit code for every way to end."""
    register_run_name()
    try:
        _arguments()
        with tempfile.TemporaryDirectory() as folder:
            ledger = Path(folder, "outcomes")
            ledger.touch()
            # with HYDRA_FULL_ERROR it raises its errors instead of printing six lines and exiting
            with _environment(HYDRA_FULL_ERROR="1", **{OUTCOMES: str(ledger)}):
                version = {} if hydra.__version__ >= "1.4" else {"version_base": "1.3"}
                hydra.main(config_path="pkg://rnngrad.conf", config_name="config", **version)(job)()
            outcomes = [line.split("\t") for line in ledger.read_text().splitlines()]
    except SystemExit as exit:
        if isinstance(exit.code, Exception):
            return _refuse(exit.code, sys.argv[1:])
        return BAD_INPUT if exit.code == 1 else exit.code if isinstance(exit.code, int) else DONE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:  # a job keeps its own: this is Hydra, refusing the command line
        return _refuse(error, sys.argv[1:])
    sweep = outcomes[0][2] if outcomes else ""  # none ran: --cfg, --info
    return _conclude([(int(code), Path(path)) for code, path, _ in outcomes], sweep)


def _arguments() -> None:
    """Checks the shape of the command line, and puts it in the order that Hydra can read."""
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
    # Hydra cannot read the default of `experiment` back
    rest = [argument for argument in sys.argv[1:] if argument not in overrides]
    sys.argv[1:] = [*(o for o in overrides if o != "experiment=null"), *rest]


def job(config: DictConfig) -> float:
    """One run, start to end; called by Hydra with the composed configuration.

    Returns:
        What a sweeper minimises: the last evaluation's loss, ten times chance if it diverged.
    """
    settings = HydraConfig.get()
    directory = Path(settings.runtime.output_dir)
    sweep = settings.sweep.dir if settings.mode == RunMode.MULTIRUN else ""
    code, objective = FAILED, float("inf")
    try:
        code, objective = _run(config, directory)
    except (InputError, InUse) as error:
        code = _refuse(error, [])
    except Exception as error:
        log.error(traceback.format_exc())
        reason = f"failed: {type(error).__name__}: {error}".splitlines()[0]
        _say(f"{reason} (traceback in {directory / 'rnngrad.log'})")
    with open(os.environ[OUTCOMES], "a", encoding="utf-8") as ledger:
        ledger.write(f"{code}\t{directory}\t{sweep}\n")
    if code > 128 and settings.mode == RunMode.MULTIRUN:
        raise SystemExit(code)  # who interrupts a run wants the sweep to end
    return objective


def _run(config: DictConfig, directory: Path) -> tuple[int, float]:
    """Exit code and objective of a run whose configuration and directory were checked."""
    from rnngrad.clipping import ClipAudit, Clipper
    from rnngrad.config import experiment, load_plugins
    from rnngrad.diagnosis import diagnose_run
    from rnngrad.model import build_model
    from rnngrad.tracking import Tracker
    from rnngrad.training import Training

    values = plain(config)
    load_plugins(values, HydraConfig.get().overrides.task)
    spec = experiment(values)
    chance = spec.task.chance_loss
    with lock_directory(directory):
        done = _summary(directory)
        if done.get("status") == "completed":
            _say(f"{_short(directory)} is already completed; remove it to train again")
            return DONE, done["eval_loss"]
        general, trainer = spec.general, spec.trainer
        model = build_model(
            spec.cell,
            spec.task,
            spec.init,
            general.seed,
            trainer.recompute_segments,
            spec.bptt_clip,
        ).to(general.device)
        named = list(model.named_parameters())
        tracker = Tracker(directory, chance, spec.task.time_steps, spec.columns, values)
        with tracker, _noticing_signals() as received:
            result = Training(
                model,
                spec.task,
                spec.optim.build(model.parameters()),
                Clipper(spec.clip, named),
                tracker,
                seed=general.seed,
                steps=trainer.steps,
                batch_size=trainer.batch_size,
                eval_every=trainer.eval_every,
                eval_size=trainer.eval_size,
                log_every=trainer.log_every,
                log_per_decade=trainer.log_per_decade,
                stop_when_solved=trainer.stop_when_solved,
                eval_lengths=trainer.eval_lengths,
                tbptt=trainer.tbptt,
                regularizer=spec.regularizer,
                nonlinearity=spec.nonlinearity,
                audit=ClipAudit(spec.audited, named) if spec.audited else None,
                observer=spec.observer(model),
                learning_rate=lambda step: spec.optim.learning_rate(step, trainer.steps),
                should_stop=lambda: bool(received),
            ).run()
            tracker.finish(result)
            tracker.diagnosed(diagnose_run(Run(directory)).as_dict())
    if result.reason:
        _say(f"{_short(directory)} {result.status}: {result.reason}")
    if result.status == "interrupted":
        _say(
            f"{_short(directory)} interrupted after step {result.steps}; everything logged is kept"
        )
        return 128 + received[0], 10 * chance
    if result.status == "diverged":
        return DIVERGED, 10 * chance
    return DONE, 10 * chance if result.eval_loss is None else result.eval_loss


def _summary(directory: Path) -> dict[str, Any]:
    """What an earlier attempt left, if it can be read."""
    try:
        return Run(directory).summary
    except (OSError, ValueError):
        return {}


def _refuse(error: Exception, overrides: list[str]) -> int:
    """Says what is wrong in one line; the exit code that goes with it."""
    if isinstance(error, InUse):
        _say(str(error))
        return IN_USE
    if isinstance(error, InputError):
        _say(str(error))
    elif isinstance(error, OSError) and not isinstance(error, HydraException):
        where = error.filename or "the current directory"
        _say(f"{where}: cannot be used as a run directory ({error.strerror})")
    else:
        _say(explain(error, overrides))
    return BAD_INPUT


def _conclude(outcomes: list[tuple[int, Path]], sweep: str) -> int:
    """Says how the runs ended; the exit code of the whole command."""
    finished = [Run(path) for _, path in outcomes if (path / SUMMARY).exists()]
    try:
        _tell(finished, sweep)
    except OSError:  # nobody reads, or the disk is full: the runs are as good as they were
        sys.stdout = open(os.devnull, "w")
    except Exception as error:
        log.error(traceback.format_exc())
        _say(f"the runs are whole, but cannot be summed up ({type(error).__name__}: {error})")
    codes = [code for code, _ in outcomes]
    if len(codes) == 1:
        return codes[0]
    return max((c if c in (DONE, DIVERGED) else FAILED for c in codes), default=DONE)


def _tell(runs: list[Run], sweep: str) -> None:
    """The runs as a table; what is wrong with a single one; TensorBoard's summary of a sweep."""
    if not runs:
        return
    print(table(runs), flush=True)
    if sweep:
        from rnngrad.tracking import summarize

        summarize(sweep, runs)
    else:
        from rnngrad.diagnosis import diagnose_run

        diagnosis = diagnose_run(runs[0])
        if diagnosis.in_trouble:
            print(diagnosis.text(), flush=True)


@contextmanager
def _noticing_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are put into the list, once; a second one acts as it did before."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def notice(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    for number in before:
        signal.signal(number, notice)
    try:
        yield received
    finally:
        restore()


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
    _say(f"{message}; see rnngrad --help")
    sys.exit(BAD_INPUT)


def _say(line: str) -> None:
    print(f"rnngrad: {line if len(line) < 500 else line[:500] + '...'}", file=sys.stderr)


def _short(directory: Path) -> Path:
    """The directory as a person in this one would name it."""
    return directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory


if __name__ == "__main__":
    main()
