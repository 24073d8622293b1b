"""One writer a run directory, whose lock outlives no process, and which stays in its directory."""

import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from rnngrad.checkpoint import load
from rnngrad.runs import Run
from rnngrad.tracking import Tracker
from tests.processes import SMALL, Processes, differing, processes

__all__ = ["processes"]

RUN = "hydra.run.dir=run"


@pytest.fixture(scope="module")
def whole(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert processes.run(folder, *SMALL, RUN) == (0, "")
    return folder / "run"


@pytest.fixture(scope="module")
def killed_once(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was killed, in whose lock the process is named."""
    folder = tmp_path_factory.mktemp("killed")
    started = processes.start(folder, *SMALL, RUN, arrange=at_update, using=(7, "kill"))
    assert started.wait() == -signal.SIGKILL
    assert (folder / "run" / ".lock").read_text() == f"{started.pid}\n"
    return folder / "run"


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(killed_once, tmp_path / "run")
    return tmp_path / "run"


def at_update(number: int, what: str, *using: str) -> None:
    """Something happens to the run's directory in an update."""
    real, count = Tracker.updated, 0

    def updated(self: Tracker, *args: float) -> None:
        nonlocal count
        count += 1
        if count == number:
            {"wait": wait, "remove": remove, "move": shutil.move, "kill": kill}[what](*using)
        real(self, *args)

    Tracker.updated = updated  # type: ignore[method-assign, assignment]


def wait(name: str) -> None:
    """Until the file is there; says ``waiting``."""
    Path("waiting").touch()
    there_soon(Path(name))


def remove(name: str) -> None:
    """At one moment, also while there is writing in it."""
    os.rename(name, f"{name}, which was")
    shutil.rmtree(f"{name}, which was", ignore_errors=True)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def contents(directory: Path) -> dict[Path, bytes]:
    """All there is but for checkpoints, at which the process whose they are may be at work."""
    held: dict[Path, bytes] = {}
    for folder, within, names in os.walk(directory):
        # pruned and not passed over later: what is listed there may be gone by the next look
        within[:] = [name for name in within if name != "checkpoint"]
        held |= {path: path.read_bytes() for path in (Path(folder, name) for name in names)}
    return held


def there_soon(path: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.002)


def test_a_second_process_is_refused_and_told_which_is_the_first(
    processes: Processes, whole: Path, tmp_path: Path
) -> None:
    first = processes.start(tmp_path, *SMALL, RUN, arrange=at_update, using=(7, "wait", "go"))
    there_soon(tmp_path / "waiting")
    before = contents(tmp_path / "run")
    refused = f"a run is going on here (process {first.pid}); wait for it, or stop it\n"
    for line in ([*SMALL, RUN], ["resume=run"], [*SMALL, RUN]):  # the first leaves the name there
        started = processes.start(tmp_path, *line, into="second")
        assert started.wait() == 4
        assert started.said.startswith("rnngrad: ") and started.said.endswith(refused)
    assert contents(tmp_path / "run") == before
    (tmp_path / "go").touch()
    assert first.wait() == 0, first.said
    assert differing(tmp_path / "run", whole) == []


@pytest.mark.parametrize("owner", ["dead", "reused", "none", "nonsense"])
def test_the_lock_of_a_dead_process_is_no_obstacle(
    owner: str, processes: Processes, whole: Path, killed: Path
) -> None:
    if owner != "dead":
        text = {"reused": f"{os.getpid()}\n", "none": "", "nonsense": "\0" * 50}[owner]
        (killed / ".lock").write_text(text)
    assert Run(killed).summary["status"] == "interrupted"
    code, said = processes.run(killed.parent, "resume=run")
    assert code == 0 and differing(killed, whole) == [], said


def test_of_ten_started_at_once_one_runs_and_no_other_touches_it(
    processes: Processes, whole: Path, tmp_path: Path
) -> None:
    started = [processes.start(tmp_path, *SMALL, RUN, into=f"said {i}") for i in range(10)]
    ended = [(one.wait(), one.said) for one in started]
    assert Counter(code for code, _ in ended).keys() <= {0, 4}
    ran = [said for code, said in ended if code == 0 and "is already completed" not in said]
    assert ran == [""]
    assert all("a run is going on here" in said for code, said in ended if code == 4)
    assert differing(tmp_path / "run", whole) == []
    assert len([*(tmp_path / "run").glob("events.out.tfevents.*")]) == 1


@pytest.mark.parametrize("name", [".lock", "rnngrad.log", "checkpoint", ".hydra"])
@pytest.mark.parametrize("way", ["the same command", "resume"])
def test_a_link_out_of_the_run_directory_is_refused_and_what_it_points_to_left_alone(
    name: str, way: str, processes: Processes, killed: Path, tmp_path: Path
) -> None:
    (killed / name).rename(tmp_path / "elsewhere")
    (killed / name).symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    assert Run(killed).summary["status"] in ("running", "interrupted")
    line = ["resume=run"] if way == "resume" else [*SMALL, RUN]
    with tempfile.TemporaryDirectory() as folder:
        started = processes.start(tmp_path, *line, into=f"{folder}/said")
        assert started.wait() == 2
        said = started.said
    assert said.count("\n") == 1 and name in said
    assert "is a link" in said or "cannot be read" in said
    assert contents(tmp_path) == before


# A directory that goes away while a run is going on


@pytest.mark.parametrize("what", ["remove", "move"])
def test_a_run_whose_directory_has_gone_says_so_and_makes_none(
    what: str, processes: Processes, whole: Path, tmp_path: Path
) -> None:
    using = (5, what, "run") if what == "remove" else (5, what, "run", "elsewhere")
    code, said = processes.run(tmp_path, *SMALL, RUN, arrange=at_update, using=using)
    assert code == 1 and not (tmp_path / "run").exists()
    assert said.count("\n") == 1 and str(tmp_path / "run" / "metrics.csv") in said
    if what == "move":
        code, said = processes.run(tmp_path, "resume=elsewhere")
        assert code == 0 and differing(tmp_path / "elsewhere", whole) == [], said
    assert processes.run(tmp_path, *SMALL, RUN)[0] == 0
    assert differing(tmp_path / "run", whole) == []


def test_a_run_whose_directory_has_become_another_run_s_leaves_that_alone(
    processes: Processes, whole: Path, tmp_path: Path
) -> None:
    old = processes.start(tmp_path, *SMALL, RUN, arrange=at_update, using=(5, "wait", "go"))
    there_soon(tmp_path / "waiting")
    assert load(tmp_path / "run" / "checkpoint").step >= 3
    remove(str(tmp_path / "run"))
    new = processes.start(
        tmp_path, *SMALL, RUN, arrange=at_update, using=(5, "kill"), into="second"
    )  # the checkpoint of step 3 has waited for the first one
    assert new.wait() == -signal.SIGKILL
    (tmp_path / "go").touch()
    assert old.wait() == 1
    assert "metrics.csv" in old.said and "is not this run's file any more" in old.said
    assert load(tmp_path / "run" / "checkpoint").step < 5
    started = processes.start(tmp_path, "resume=run", into="third")
    assert started.wait() == 0 and differing(tmp_path / "run", whole) == [], started.said
