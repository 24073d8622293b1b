"""SIGINT, SIGTERM and SIGHUP, in whatever a run is doing, and what becomes of the run."""

import importlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rnngrad.checkpoint import load
from rnngrad.runs import Run, find_runs
from rnngrad.signals import Interrupted, Signals
from tests.processes import PATIENCE, ROOT, SMALL, Processes, differing, processes

__all__ = ["processes"]

RUN = "hydra.run.dir=run"
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(scope="module")
def whole(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert processes.run(folder, *SMALL, RUN) == (0, "")
    return folder / "run"


@pytest.fixture(scope="module")
def killed(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has only saved its beginning: to go on with it is a quick start."""
    folder = tmp_path_factory.mktemp("killed")
    using = ("rnngrad.checkpoint:AsyncCheckpointer.save", 2, signal.SIGKILL)
    assert processes.run(folder, *SMALL, RUN, arrange=signal_in, using=using)[0] == -9
    return folder


@pytest.fixture
def begun(killed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(killed / "run", tmp_path / "run")
    return tmp_path


def strike(place: str, at: int, what: Callable[[], None]) -> None:
    """Has something happen before the ``at``-th call, counted from 1, of ``module:name.name``."""
    module, _, name = place.partition(":")
    holder: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    real, calls = getattr(holder, last), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            what()
        return real(*args, **kwargs)

    setattr(holder, last, call)


def signal_in(place: str, at: int, *numbers: int) -> None:
    """Sends signals to this process; ``seen`` says how many updates were done, ``saved`` of which
    steps checkpoints were begun."""
    from rnngrad.checkpoint import AsyncCheckpointer
    from rnngrad.tracking import Tracker, board

    updates, real, save = 0, Tracker.updated, AsyncCheckpointer.save

    def updated(self: Tracker, *args: float) -> None:
        nonlocal updates
        updates += 1
        real(self, *args)

    def saving(self: AsyncCheckpointer, step: int, *args: Any, **options: Any) -> None:
        with open("saved", "a") as file:
            file.write(f"{step}\n")
        save(self, step, *args, **options)

    def what() -> None:
        seen = updates
        try:
            for number in numbers:
                os.kill(os.getpid(), number)
        finally:  # not before: off the main thread, that would go on meanwhile
            Path("seen").write_text(str(seen))

    board.SHARE = 1e9  # pictures are drawn however much of the time they take
    Tracker.updated = updated  # type: ignore[method-assign, assignment]
    AsyncCheckpointer.save = saving  # type: ignore[method-assign, assignment]
    strike(place, at, what)


TRAINING = {
    "making data": ("rnngrad.tasks.adding:Adding.training_batch", 6),
    "forward": ("rnngrad.training:record", 4),
    "backward": ("torch:Tensor.backward", 6),
    "clipping": ("rnngrad.clipping:Clipper.__call__", 7),
    "the optimiser's step": ("torch.optim:Adam.step", 7),
    "recording": ("rnngrad.tracking:Tracker.recorded", 4),
    "measuring": ("rnngrad.measure:Observation.whole", 2),
    "logging": ("rnngrad.tracking:Tracker.log", 4),
    "evaluating": ("rnngrad.training:evaluate", 3),
    "evaluating at another length": ("rnngrad.training:evaluate", 4),
    "drawing": ("rnngrad.tracking.board:Board._draw", 1),
    "copying the state": ("rnngrad.saving:snapshot", 4),
    "writing a checkpoint": ("rnngrad.checkpoint:_write", 4),
    "removing an older one": ("rnngrad.checkpoint:_purge", 4),
}
"""Where a run can be, and what it calls there for which time."""
BEFORE = {
    "locking": ("rnngrad.job:store_texts", 1),
    "building the training": ("rnngrad.config:Training", 1),
    "opening its files": ("rnngrad.tracking.files:Board", 1),
    "saving the beginning": ("rnngrad.saving:snapshot", 1),
    "the first step": ("rnngrad.training:record", 1),
}
AFTER = {
    "the last evaluation": ("rnngrad.training:evaluate", 6),
    "saving the end": ("rnngrad.saving:snapshot", 7),
    "diagnosing": ("rnngrad.diagnosis:diagnose_run", 1),
    "drawing the whole run": ("rnngrad.tracking.board:Board.close", 1),
}
RESUMING = {
    "verifying a checkpoint": ("rnngrad.checkpoint:load", 1),
    "putting it in place": ("rnngrad.snapshot:restore", 1),
    "removing later ones": ("rnngrad.checkpoint:rewind", 1),
    "cutting the files": ("rnngrad.tracking.files:_cut_back", 1),
    "the first step of those that are left": ("torch:Tensor.backward", 1),
}


def each(phases: dict[str, tuple[str, int]]) -> pytest.MarkDecorator:
    """Every signal in each phase is for those who have time; here each phase has one."""
    cases = [
        pytest.param(phase, number, marks=[] if i % 3 == j else pytest.mark.slow)
        for i, phase in enumerate(phases)
        for j, number in enumerate(NUMBERS)
    ]
    return pytest.mark.parametrize(("phase", "number"), cases)


def check_end(processes: Processes, folder: Path, whole: Path, *line: str) -> None:
    """Gone on with, the run is to the byte the one that nothing happened to."""
    code, said = processes.run(folder, *(line or ["resume=run"]))
    assert code == 0, said
    assert differing(folder / "run", whole) == []


@each(TRAINING)
def test_a_signal_saves_and_leaves_within_a_step(
    phase: str, number: int, processes: Processes, whole: Path, begun: Path
) -> None:
    using = (*TRAINING[phase], number)
    code, said = processes.run(begun, "resume=run", arrange=signal_in, using=using)
    assert code == 128 + number, said
    name = signal.Signals(number).name
    run, step = Run(begun / "run"), load(begun / "run" / "checkpoint").step
    assert said.splitlines() == [
        "rnngrad: run goes on after step 0",
        "",
        f"rnngrad: {name}: saves and leaves after this update; once more leaves at once",
        f"rnngrad: run interrupted after step {step} and saved: rnngrad resume=run goes on",
    ]
    assert (run.summary["status"], run.summary["steps"]) == ("interrupted", step)
    # a signal from the saving thread waits for its turn while the loop takes its tiny steps
    late = 5 if phase == "writing a checkpoint" else 1
    assert 0 <= step - int((begun / "seen").read_text()) <= late
    logged = run.metrics["step"].tolist()
    assert logged[-1] == step and logged == sorted(set(logged))
    saved = (begun / "saved").read_text().split()
    assert saved[-1] == str(step) and len(set(saved)) == len(saved)
    check_end(processes, begun, whole)


@each(BEFORE)
def test_a_signal_before_the_first_update_leaves_at_once_and_breaks_nothing(
    phase: str, number: int, processes: Processes, whole: Path, tmp_path: Path
) -> None:
    using = (*BEFORE[phase], number)
    code, said = processes.run(tmp_path, *SMALL, RUN, arrange=signal_in, using=using)
    assert code == 128 + number
    assert said == "rnngrad: run interrupted before its first update: nothing is lost\n"
    assert (tmp_path / "seen").read_text() == "0"
    check_end(processes, tmp_path, whole, *SMALL, RUN)


@each(AFTER)
def test_a_signal_at_the_end_lets_the_run_be_completed(
    phase: str, number: int, processes: Processes, whole: Path, begun: Path
) -> None:
    """But for the last evaluation, which is long: that is left, and made when the run goes on."""
    using = (*AFTER[phase], number)
    code, _ = processes.run(begun, "resume=run", arrange=signal_in, using=using)
    assert code == 128 + number
    if phase == "the last evaluation":
        assert Run(begun / "run").summary["status"] == "interrupted"
        check_end(processes, begun, whole)
    assert Run(begun / "run").summary["status"] == "completed"
    assert differing(begun / "run", whole) == []


@each(RESUMING)
def test_a_signal_while_a_run_is_being_resumed_takes_nothing_from_it(
    phase: str, number: int, processes: Processes, whole: Path, begun: Path
) -> None:
    stop = (*TRAINING["backward"], signal.SIGTERM)
    assert processes.run(begun, "resume=run", arrange=signal_in, using=stop)[0] == 143
    using = (*RESUMING[phase], number)
    code, said = processes.run(begun, "resume=run", arrange=signal_in, using=using)
    assert code == 128 + number
    last = said.splitlines()[-1]
    assert "interrupted before its first update: nothing is lost" in last or "and saved" in last
    check_end(processes, begun, whole)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("place", ["rnngrad.config:load_plugins", "rnngrad.__main__:table"])
def test_a_signal_while_no_run_is_going_on_leaves_at_once(
    place: str, number: int, processes: Processes, whole: Path, tmp_path: Path
) -> None:
    """Between the command line and the run, and when the run is over."""
    code, said = processes.run(tmp_path, *SMALL, RUN, arrange=signal_in, using=(place, 1, number))
    assert code == (130 if number == signal.SIGINT else -number)  # a shell says 128 + number
    assert said == ""
    check_end(processes, tmp_path, whole, *SMALL, RUN)


IMPORTING = """\
import os, runpy, signal, sys
def hear(event, arguments):
    if event == "import" and arguments[0] == {module!r}:
        os.kill(os.getpid(), signal.SIGTERM)
sys.addaudithook(hear)
runpy.run_module("rnngrad", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["hydra", "torch", "numba"])
def test_a_signal_while_all_is_being_imported_leaves_at_once(
    module: str, processes: Processes, whole: Path, tmp_path: Path
) -> None:
    running = started(tmp_path, *SMALL, RUN, by=("-c", IMPORTING.format(module=module)))
    assert running.wait(timeout=PATIENCE) in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["run"])
    check_end(processes, tmp_path, whole, *SMALL, RUN)


def started(
    folder: Path, *arguments: str, by: tuple[str, ...] = ("-m", "rnngrad"), **options: Any
) -> subprocess.Popen[bytes]:
    """A command line in a process that has imported nothing yet."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= options.pop("env", {})
    line = [sys.executable, *by, *arguments]
    return subprocess.Popen(line, cwd=folder, env=environment, stdout=subprocess.DEVNULL, **options)


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_while_kernels_are_compiled_leaves_when_the_compiler_is_done(
    number: int, processes: Processes, whole: Path, tmp_path: Path
) -> None:
    anew = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    running = started(tmp_path, *SMALL, RUN, env=anew, stderr=subprocess.PIPE)
    assert running.stderr is not None
    said = running.stderr.read(20)  # "rnngrad: compiling the ..."
    time.sleep(0.5)
    running.send_signal(number)
    said += running.communicate(timeout=PATIENCE)[1]
    assert running.returncode == 128 + number
    assert b"interrupted before its first update: nothing is lost" in said
    check_end(processes, tmp_path, whole, *SMALL, RUN)


# A second signal


@pytest.mark.parametrize("phase", ["backward", "evaluating", "copying the state"])
def test_a_second_signal_leaves_at_once(
    phase: str, processes: Processes, whole: Path, begun: Path
) -> None:
    using = (*TRAINING[phase], signal.SIGTERM, signal.SIGINT)
    code, said = processes.run(begun, "resume=run", arrange=signal_in, using=using)
    assert code == 128 + signal.SIGINT
    assert said.endswith("\nrnngrad: SIGINT again: left at once; the last checkpoint is whole\n")
    check_end(processes, begun, whole)


def two_signals_in_a_checkpoint(step: int) -> None:
    """Two signals while a checkpoint's second file is written, which then takes for ever."""
    from rnngrad import checkpoint

    real = checkpoint._write_file

    def write_file(path: Path, data: bytes) -> None:
        real(path, data)
        if f"{step:09}" in path.parent.name:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(2 * PATIENCE)

    checkpoint._write_file = write_file


def test_a_second_signal_while_saving_leaves_at_once_with_the_older_checkpoints_whole(
    processes: Processes, whole: Path, begun: Path
) -> None:
    started = processes.start(begun, "resume=run", arrange=two_signals_in_a_checkpoint, using=(6,))
    assert started.wait() == 128 + signal.SIGINT
    checkpoints = begun / "run" / "checkpoint"
    names = sorted(os.listdir(checkpoints))
    assert names == [f".step-000000006.tmp-{started.pid}", "step-000000003", "step-000000004"]
    assert load(checkpoints).step == 4 and load(checkpoints, 3).skipped == []
    check_end(processes, begun, whole)
    assert not any(name.startswith(".") for name in os.listdir(checkpoints))


# A terminal that goes


def ignore_hangups() -> None:
    """What nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal_in(*TRAINING["backward"], signal.SIGHUP)


def test_a_hangup_is_ignored_under_nohup(processes: Processes, whole: Path, begun: Path) -> None:
    code, said = processes.run(begun, "resume=run", arrange=ignore_hangups)
    assert (code, said) == (0, "rnngrad: run goes on after step 0\n")
    assert differing(begun / "run", whole) == []


def on_a_terminal(name: str) -> None:
    """In a session of its own on a terminal, as from a shell; slow enough for one to watch."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    for file in (1, 2):
        os.dup2(terminal, file)
    strike("torch:Tensor.backward", 6, lambda: Path("there").touch())
    from rnngrad.tracking import Tracker

    real = Tracker.updated

    def updated(self: Tracker, *args: float) -> None:
        real(self, *args)
        time.sleep(0.05)

    Tracker.updated = updated  # type: ignore[method-assign, assignment]


def test_a_terminal_that_goes_away_ends_the_run_saved(
    processes: Processes, whole: Path, begun: Path
) -> None:
    """What is written to it from then on fails."""
    terminal, other = pty.openpty()
    started = processes.start(
        begun, "resume=run", arrange=on_a_terminal, using=(os.ttyname(other),)
    )
    os.close(other)
    deadline = time.monotonic() + PATIENCE
    while not (begun / "there").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.close(terminal)
    assert started.wait() == 128 + signal.SIGHUP
    step = load(begun / "run" / "checkpoint").step
    assert Run(begun / "run").summary["status"] == "interrupted" and 5 <= step < 12
    check_end(processes, begun, whole)


# Sweeps


def test_a_signal_ends_a_sweep_and_the_same_command_ends_it(
    processes: Processes, whole: Path, tmp_path: Path
) -> None:
    line = ["-m", *SMALL, "seed=0,1", "hydra.sweep.dir=sweep"]
    using = (*TRAINING["backward"], signal.SIGTERM)
    code, _ = processes.run(tmp_path, *line, arrange=signal_in, using=using)
    assert code == 128 + signal.SIGTERM
    (path,) = find_runs(tmp_path / "sweep")
    assert Run(path).summary["status"] == "interrupted"
    assert processes.run(tmp_path, *line)[0] == 0
    assert {Run(p).summary["status"] for p in find_runs(tmp_path / "sweep")} == {"completed"}
    assert differing(path, whole) == []


# The handlers themselves


def test_handlers_that_were_there_are_called_and_put_back() -> None:
    told: list[int] = []
    before = {number: signal.getsignal(number) for number in NUMBERS}
    try:
        for number in NUMBERS:
            signal.signal(number, lambda number, frame: told.append(number))
        own = {number: signal.getsignal(number) for number in NUMBERS}
        with Signals() as signals:
            assert not signals()
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals() and signals.number == signal.SIGTERM
        with pytest.raises(Interrupted), Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(1)
        assert told == [signal.SIGTERM, signal.SIGHUP]
        assert {number: signal.getsignal(number) for number in NUMBERS} == own
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_while_handlers_are_being_set_puts_them_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    real = signal.signal

    def then_one_comes(number: int, handler: Any) -> Any:
        result = real(number, handler)
        if number == signal.SIGTERM and handler is not before[signal.SIGTERM]:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(signal, "signal", then_one_comes)
    with pytest.raises(Interrupted), Signals():
        raise AssertionError("never comes here")
    assert {number: signal.getsignal(number) for number in NUMBERS} == before


def in_a_thread() -> None:
    """Has the command line run off the main thread, where no handler can be set."""
    from rnngrad import __main__

    real = __main__.run_command

    def run_command() -> int:
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(real()))
        thread.start()
        thread.join()
        return codes[0]

    __main__.run_command = run_command


def test_off_the_main_thread_a_run_is_as_any_other(
    processes: Processes, whole: Path, begun: Path
) -> None:
    assert processes.run(begun, "resume=run", arrange=in_a_thread)[0] == 0
    assert differing(begun / "run", whole) == []


# What a part of a user's own raises


INTERRUPTING = """\
from dataclasses import dataclass
from rnngrad.clipping import CLIPS, Clip, Outcome

calls = 0

@CLIPS.register("interrupting")
@dataclass(frozen=True)
class Interrupting(Clip):
    error: str

    def clip_(self, gradient, state):
        global calls
        calls += 1
        if calls == 8:
            raise {"KeyboardInterrupt": KeyboardInterrupt, "MemoryError": MemoryError}[self.error]
        return Outcome(clipped=False)
"""


@pytest.mark.parametrize(("error", "expected"), [("KeyboardInterrupt", 130), ("MemoryError", 1)])
def test_what_a_plugin_raises_is_named_and_leaves_the_checkpoints_whole(
    error: str, expected: int, processes: Processes, tmp_path: Path
) -> None:
    (tmp_path / "interrupting.py").write_text(INTERRUPTING)
    options: dict[str, Any] = {"arrange": look_here}
    watching = [
        "plugins=[interrupting]",
        f"trainer.clip_audit=[{{name:interrupting,error:{error}}}]",
    ]
    code, said = processes.run(tmp_path, *watching, *SMALL, RUN, **options)
    assert code == expected and "Traceback" not in said
    where = f"{error}; at {tmp_path / 'interrupting.py'}, line 15, in clip_"
    assert where in said
    loaded = load(tmp_path / "run" / "checkpoint")
    assert (loaded.step, loaded.skipped) == (6, [])
    code, said = processes.run(tmp_path, "resume=run", "plugins=[interrupting]", **options)
    assert code == 0, said


def look_here() -> None:
    """Finds modules in the current directory, as python -m does."""
    sys.path.insert(0, os.getcwd())
