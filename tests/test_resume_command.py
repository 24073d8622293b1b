"""``resume=DIR`` and the same command again: what goes on, what is refused and left as it was."""

import logging
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from rnngrad.__main__ import run_command
from rnngrad.checkpoint import load, save
from rnngrad.runs import Run
from rnngrad.training import Training
from tests import test_command
from tests.processes import Processes, processes
from tests.sameness import Asked, differences, everything

__all__ = ["processes"]

typed = test_command.command
Typed = Callable[..., tuple[int, str]]

LINE = [
    *("task.length=6", "cell.hidden_size=4", "cell=rnn", "optim.lr=1e-2"),
    *("trainer.steps=9", "trainer.batch_size=3", "trainer.eval_size=5", "trainer.eval_every=4"),
    *("trainer.log_every=2", "trainer.checkpoint_every=2", "hydra.run.dir=run"),
]


@contextmanager
def stopped(step: int = 5) -> Iterator[None]:
    """Inside, runs are stopped after an update, as by SIGTERM."""
    asked, apply = Asked(), Training._applied

    def applied(training: Training, update: Any) -> None:
        apply(training, update)
        asked.often = -1 if training.progress.step >= step else math.inf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rnngrad.job.Signals", lambda: asked)
        patch.setattr(Training, "_applied", applied)
        yield


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run``, which was interrupted, and ``whole``, which was not."""
    folder, handlers = tmp_path_factory.mktemp("templates"), logging.root.handlers[:]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["rnngrad", *LINE])
        with stopped():
            assert run_command() == 143
        patch.setattr(sys, "argv", ["rnngrad", *LINE[:-1], "hydra.run.dir=whole"])
        assert run_command() == 0
    for handler in logging.root.handlers[:]:
        handler.close()
    logging.root.handlers[:] = handlers
    return folder


@pytest.fixture
def run(templates: Path, tmp_path: Path) -> Path:
    """An interrupted run of one's own."""
    return Path(shutil.copytree(templates / "run", tmp_path / "run"))


def there(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder with its time, but for locks, which whoever wants to write takes."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.glob("**/*"))
        if path.name != ".lock"
    }


def refused(typed: Typed, folder: Path, *arguments: str, code: int = 2) -> str:
    """What is said by a command that must change nothing; one line."""
    before = there(folder)
    found, said = typed(*arguments)
    assert (found, said.count("\n")) == (code, 1), said
    assert said.startswith("rnngrad: ") and "Traceback" not in said
    assert there(folder) == before
    return said


def rewritten(
    run: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object], before: int = 10**9
) -> None:
    """Changes what the newest checkpoint holds, sizes and hashes too."""
    loaded = load(run / "checkpoint", before=before)
    change(loaded.tensors, loaded.values)
    save(run / "checkpoint", loaded.step, loaded.tensors, loaded.values, keep=0)


def broken(run: Path, step: int) -> str:
    """Damages a checkpoint; its name."""
    path = run / "checkpoint" / f"step-{step:09}" / "tensors.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path.parent.name


# --- it goes on


def test_it_goes_on_in_its_own_directory_and_leaves_its_configuration_alone(
    typed: Typed, run: Path, templates: Path, tmp_path: Path
) -> None:
    hydra = there(run / ".hydra")
    code, said = typed(f"resume={run}")
    assert code == 0 and "\nrnngrad: run goes on after step 5\n" in said and "completed" in said
    assert differences(everything(templates / "whole"), everything(run)) == []
    assert there(run / ".hydra") == hydra
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    log = (run / "rnngrad.log").read_text()
    assert "run goes on after step 5" in log and "Traceback" not in log


def test_the_same_command_again_does_the_same(typed: Typed, run: Path, templates: Path) -> None:
    code, said = typed(*LINE)
    assert code == 0 and "run goes on after step 5" in said
    assert differences(everything(templates / "whole"), everything(run)) == []
    assert "run goes on after step 5" in (run / "rnngrad.log").read_text()


def test_what_may_stand_beside_it_is_what_the_run_is_already(
    typed: Typed, run: Path, templates: Path
) -> None:
    same = ["cell=rnn", "optim.lr=0.01", "trainer.steps=9", "seed=0", "optim.betas=[0.9,0.999]"]
    assert typed(*same[:2], f"resume={run}", *same[2:], "strict=true", "plugins=[]")[0] == 0
    assert differences(everything(templates / "whole"), everything(run)) == []


def test_what_was_typed_in_terms_of_another_key_goes_on_as_what_it_was(
    typed: Typed, tmp_path: Path
) -> None:
    line = [*LINE, "cell.hidden_size=${task.length}"]
    with stopped():
        assert typed(*line)[0] == 143
    assert typed("resume=run", "trainer.steps=10")[0] == 0
    assert Run(tmp_path / "run").config["cell"]["hidden_size"] == 6
    code, said = typed(*line)
    assert code == 0 and "already completed" in said


def test_a_completed_run_says_so_and_stays(typed: Typed, templates: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(templates / "whole", tmp_path / "whole")
    for arguments in ((), ("trainer.steps=9",)):
        before = there(whole)
        code, said = typed(f"resume={whole}", *arguments)
        assert code == 0 and "whole is already completed; trainer.steps=N goes on" in said
        assert there(whole) == before


def test_with_more_steps_it_goes_on_and_keeps_to_them(
    typed: Typed, templates: Path, tmp_path: Path
) -> None:
    whole = shutil.copytree(templates / "whole", tmp_path / "whole")
    assert typed(f"resume={whole}", "trainer.steps=12")[0] == 0
    run = Run(whole)
    assert run.summary["steps"] == run.config["trainer"]["steps"] == 12
    assert run.metrics["step"].tolist() == [1, 2, 4, 6, 8, 10, 12]
    said = refused(typed, tmp_path, f"resume={whole}", "trainer.steps=11")
    assert "trainer.steps=11: can only be raised, and this run was planned for 12" in said
    code, said = typed(*LINE[:-1], "hydra.run.dir=whole")  # as it was at first
    assert code == 0 and "already completed" in said


# --- what is refused


WRONG = {
    "resume=nowhere": "resume=nowhere: no such directory",
    "resume=rum": "resume=rum: no such directory",
    "resume=folder": r"resume=folder: is not a run \(it has no .hydra/config.yaml\)$",
    "resume=file": "resume=file: no such directory",
    "resume=.": r"resume=\.: is not a run \(.*\); runs inside it: run",
    "resume=": "resume='': must be the directory of a run",
    "resume=run resume=run": "resume=run: one run goes on at a time: rnngrad resume=DIR",
    "+resume=run": r"\+resume=run: one run goes on at a time",
    "++resume=run": r"\+\+resume=run: one run goes on at a time",
    "-m resume=run": "resume=run: -m cannot stand beside it",
    "resume=run --multirun": "resume=run: --multirun cannot stand beside it",
    "resume=run --cfg job": "resume=run: --cfg cannot stand beside it",
    "resume=run --config-dir .": "resume=run: --config-dir cannot stand beside it",
    "resume=run seed=1": r"seed=1: a run goes on as it is, and in \S*run it is 0;",
    "resume=run cell=lstm": r"cell=lstm: a run goes on as it is, and in \S*run it is rnn;",
    "resume=run optim.lr=1e-3": r"optim.lr=0.001: a run goes on as it is, .*run it is 0.01;",
    "resume=run device=cuda": r"device=cuda: a run goes on as it is, and in \S*run it is cpu;",
    "resume=run foo=1": r"foo=1: no such key in the run in \S*run",
    "resume=run +foo=1": r"\+foo=1: cannot stand beside resume=|foo=1: no such key",
    "resume=run ~task": "~task: cannot stand beside resume=|task",
    "resume=run seed=0,1": "seed=0,1: cannot stand beside resume=",
    "resume=run seed=0 seed=0": "seed=0: cannot stand beside resume=",
    "resume=run trainer.steps=8": "trainer.steps=8: can only be raised, .* planned for 9",
    "resume=run trainer.steps=0": "trainer.steps=0: must be an integer >= 1",
    "resume=run trainer.steps=many": "trainer.steps=many: must be an integer",
    "resume=run trainer.steps=null": "trainer.steps=null: must be an integer",
    "resume=run trainer.steps=9.5": r"trainer.steps=9.5: must be an integer",
    "resume=run strict=perhaps": "strict=perhaps: must be true or false",
    "resume=run trainer.steps": "trainer.steps",
    "resume=run plugins=[nowhere]": "plugins=nowhere: cannot be imported",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_one_line_and_starts_nothing(
    line: str, typed: Typed, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    said = refused(typed, tmp_path, *line.split(" "))
    assert re.match(f"rnngrad: (?:{WRONG[line]})", said.rstrip("\n")), said


def test_a_run_without_a_checkpoint_says_how_it_begins(
    typed: Typed, run: Path, tmp_path: Path
) -> None:
    shutil.rmtree(run / "checkpoint")
    said = refused(typed, tmp_path, "resume=run")
    assert "resume=run: has no checkpoint yet; the command that it was started with" in said


def test_a_longer_run_in_the_same_directory_says_how_it_goes_on(
    typed: Typed, run: Path, tmp_path: Path
) -> None:
    said = refused(typed, tmp_path, *(w.replace("steps=9", "steps=20") for w in LINE))
    assert "name another directory, or go on: rnngrad resume=DIR trainer.steps=N" in said


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_whose_learning_rates_depend_on_its_length_is_not_made_longer(
    schedule: str, typed: Typed, tmp_path: Path
) -> None:
    assert typed(*LINE, f"optim.schedule={schedule}", "optim.warmup_steps=2")[0] == 0
    said = refused(typed, tmp_path, "resume=run", "trainer.steps=12")
    assert "trainer.steps=12: cannot be raised: optim.schedule has its end at step 9" in said


def test_stored_plugins_are_not_imported_until_they_are_typed_again(
    typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "typed_again.py").write_text("print('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with stopped():
        assert typed(*LINE, "plugins=[typed_again]")[0] == 143
    monkeypatch.delitem(sys.modules, "typed_again")
    said = refused(typed, tmp_path, "resume=run")
    assert (
        "plugins=['typed_again']: what is stored is not imported; type plugins=[...] again" in said
    )
    assert "typed_again" not in sys.modules
    code, said = typed("resume=run", "plugins=[typed_again]")
    assert code == 0 and "imported\n" in said


def test_a_live_directory_is_exit_4_and_names_the_process(
    typed: Typed, run: Path, tmp_path: Path
) -> None:
    (run / ".lock").write_text("4711\n")
    with FileLock(run / ".lock"):
        (run / ".lock").write_text("4711\n")
        said = refused(typed, tmp_path, "resume=run", code=4)
    assert "run: a run is going on here (process 4711); wait for it, or stop it" in said
    assert typed("resume=run")[0] == 0


# --- checkpoints that are damaged, or another run's


def test_a_damaged_newest_is_passed_over_loudly_for_the_one_before(
    typed: Typed, run: Path, templates: Path
) -> None:
    name = broken(run, 5)
    code, said = typed("resume=run")
    assert code == 0
    assert re.search(
        f"rnngrad: checkpoint passed over: .*{name}/tensors.safetensors: its sha256", said
    )
    assert "run goes on after step 4" in said
    assert differences(everything(templates / "whole"), everything(run)) == []
    assert f"{name}/tensors.safetensors: its sha256" in (run / "rnngrad.log").read_text()


@pytest.mark.parametrize("line", [["resume=run"], LINE], ids=["resume", "again"])
def test_where_all_are_damaged_each_is_named_and_nothing_begins_anew(
    line: list[str], typed: Typed, run: Path, tmp_path: Path
) -> None:
    names = [broken(run, step) for step in (4, 5)]
    said = refused(typed, tmp_path, *line)
    assert "no usable checkpoint: " in said and all(name in said for name in names)


@pytest.mark.parametrize("line", [["resume=run"], LINE], ids=["resume", "again"])
def test_a_checkpoint_of_another_run_is_told_from_ones_own(
    line: list[str], typed: Typed, run: Path, tmp_path: Path
) -> None:
    with stopped(6):
        assert typed(*LINE[:-1], "hydra.run.dir=other", "seed=1")[0] == 143
    (newest,) = sorted((tmp_path / "other" / "checkpoint").iterdir())[-1:]
    shutil.copytree(newest, run / "checkpoint" / newest.name, dirs_exist_ok=True)
    said = refused(typed, tmp_path, *line)
    assert f"{newest.name}: is of another run (seed is 1 there and 0 here)" in said


@pytest.mark.parametrize("damage", ["cut", "gone", "folder", "link"])
@pytest.mark.parametrize("name", ["metrics.csv", "bptt.f64", "measures.f64", "updates.f32"])
def test_files_that_do_not_reach_as_far_as_the_checkpoint_are_refused(
    name: str, damage: str, typed: Typed, run: Path, tmp_path: Path
) -> None:
    path, size = run / name, load(run / "checkpoint").values["tracker"]["files"][name]
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[: size - 1])
    elif damage == "folder":
        path.mkdir()
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    said = refused(typed, tmp_path, "resume=run")
    tells = {"cut": f"has {size - 1} of the {size} bytes", "link": "is a link, "}
    says = tells.get(damage, "is missing, or not a file")
    assert f"{path.relative_to(tmp_path)}: {says}" in said


def test_a_metrics_file_of_other_columns_is_refused(
    typed: Typed, run: Path, tmp_path: Path
) -> None:
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(text.replace("loss", "lost", 1))
    assert "metrics.csv: its columns are not this run's" in refused(typed, tmp_path, "resume=run")


# --- checkpoints of other settings, shapes and machines


def rename(tree: dict[str, Any], old: str, new: str) -> None:
    tree[new] = tree.pop(old)


POSITIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no mapping": lambda position: 3,
    "files": lambda position: position | {"files": []},
    "negative": lambda position: position | {"files": position["files"] | {"updates.f32": -1}},
    "a boolean": lambda position: position | {"files": position["files"] | {"updates.f32": True}},
    "layouts": lambda position: position | {"layouts": []},
    "no JSON": lambda position: position | {"layouts": {"bptt.json": "{"}},
    "a number": lambda position: position | {"layouts": {"bptt.json": "3"}},
    "sums": lambda position: position | {"clipped": ["a", None]},
    "one sum": lambda position: position | {"clipped": [1.0]},
}
"""What is not where a run's files end."""


def tracked(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any, Any], object]:
    return lambda _, values: values.update(tracker=change(values["tracker"]))


W = "model/rnn.weight_hh_l0"
OTHER: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "cell": (
        lambda _, v: v["settings"]["cell"].update(name="gru"),
        "cell.name is gru there and rnn here",
    ),
    "H": (
        lambda _, v: v["settings"]["cell"].update(hidden_size=5),
        "cell.hidden_size is 5 there and 4 here",
    ),
    "a setting that is new": (
        lambda _, v: v["settings"]["cell"].pop("nonlinearity"),
        "cell.nonlinearity is null there and tanh here",
    ),
    "device of the settings": (
        lambda _, v: v["settings"].update(device="cuda"),
        "device is cuda there and cpu here",
    ),
    "device": (
        lambda _, v: v["environment"].update(device="NVIDIA H200"),
        "was made on NVIDIA H200, and this is cpu",
    ),
    "dtype": (
        lambda t, _: t.update({W: t[W].double()}),
        "rnn.weight_hh_l0 is float64 [4, 4] there and float32 [4, 4] here",
    ),
    "shape": (
        lambda t, _: t.update({W: t[W][:3]}),
        "rnn.weight_hh_l0 is float32 [3, 4] there and float32 [4, 4] here",
    ),
    "a parameter too few": (
        lambda t, _: t.pop(W),
        "rnn.weight_hh_l0 is missing there and float32 [4, 4] here",
    ),
    "a parameter too many": (
        lambda t, _: t.update({"model/rnn.weight_hh_l1": t[W].clone()}),
        "rnn.weight_hh_l1 is float32 [4, 4] there and missing here",
    ),
    "optimiser": (
        lambda _, v: v["optimizer"]["mapping"][1][1]["list"][0]["mapping"].pop(),
        "it is of another optimiser",
    ),
    "clip rule": (
        lambda _, v: v.update(clipper={"mapping": [["history", {"list": []}]]}),
        "clip: the saved state holds ['history'], NormClip has []",
    ),
    "audit": (lambda _, v: v.update(audit={"mapping": []}), "it has an audit"),
    "observer": (lambda _, v: v.update(observer=None), "it has no observer"),
    "step": (lambda _, v: v["progress"].update(step=3), "progress.step is 3"),
    "progress": (lambda _, v: v["progress"].update(loss="low"), "progress.loss is 'low'"),
    "a field of progress too many": (lambda _, v: v["progress"].update(more=1), "more"),
    "random stream": (
        lambda t, _: t.update({"random/torch": t["random/torch"][:-1]}),
        "(RuntimeError: ",
    ),
    "nothing of the tracker": (
        lambda _, v: v.pop("tracker"),
        "the checkpoint does not say where files end",
    ),
    **{
        f"tracker: {name}": (tracked(change), "the checkpoint does not say where files end")
        for name, change in POSITIONS.items()
    },
    "nothing of the optimiser": (lambda _, v: v.pop("optimizer"), "KeyError: 'optimizer'"),
    "nothing of where": (lambda _, v: v.pop("environment"), "does not say where it was made"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_what_does_not_fit_is_named_and_nothing_is_changed(
    kind: str, typed: Typed, run: Path, tmp_path: Path
) -> None:
    change, says = OTHER[kind]
    rewritten(run, change)
    said = refused(typed, tmp_path, "resume=run")
    assert "checkpoint/step-000000005.1: " in said or "tracker" in kind
    assert says in said


def elsewhere(run: Path, **changes: Any) -> None:
    rewritten(run, lambda _, values: values["environment"].update(changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"torch": "1.0"}, f"torch is 1.0 in the checkpoint and {torch.__version__} here"),
        ({"threads": 2}, "threads is 2 in the checkpoint and 1 here"),
        ({"processor": "z80"}, "processor is z80 in the checkpoint and "),
        ({"numba": None}, "numba is null in the checkpoint and "),
    ],
    ids=["torch", "threads", "processor", "numba"],
)
def test_another_environment_is_a_warning_and_with_strict_an_error(
    changes: dict[str, Any], says: str, typed: Typed, run: Path, templates: Path, tmp_path: Path
) -> None:
    elsewhere(run, **changes)
    said = refused(typed, tmp_path, "resume=run", "strict=true")
    assert f"strict=true: {says}" in said
    code, said = typed("resume=run")
    assert code == 0 and f"rnngrad: {says}" in said
    assert "what follows may differ in its last bits (strict=true refuses this)" in said
    assert says in (run / "rnngrad.log").read_text()
    assert differences(everything(templates / "whole"), everything(run)) == []


def test_another_number_of_threads_is_seen(typed: Typed, run: Path, tmp_path: Path) -> None:
    says = "threads is 1 in the checkpoint and 2 here"
    torch.set_num_threads(2)
    try:
        assert f"strict=true: {says}" in refused(typed, tmp_path, "resume=run", "strict=true")
        code, said = typed("resume=run")
    finally:
        torch.set_num_threads(1)
    assert code == 0 and says in said


@pytest.mark.slow
def test_so_it_is_of_a_variable_that_the_system_hands_on(run: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for threads, strict in (("2", "true"), ("2", "false"), ("1", "true")):
        directory = shutil.copytree(run, tmp_path / f"run{threads}{strict}")
        done = subprocess.run(
            [sys.executable, "-m", "rnngrad", f"resume={directory}", f"strict={strict}"],
            env=environment | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == (2 if (threads, strict) == ("2", "true") else 0), done.stderr
        seen = "threads is 1 in the checkpoint and 2 here" in done.stderr
        assert seen == (threads == "2")


# --- in processes of their own


MUTANTS: dict[str, Callable[[Any, Any], object]] = {
    "a weight": lambda t, _: t[W].view(torch.uint8)[0, 1].bitwise_xor_(1),
    "a moment": lambda t, _: t["optimizer/slots/0/exp_avg_sq"].mul_(1.001),
    "a random stream": lambda t, _: t["random/python/1"][5].bitwise_xor_(1),
    "where a file ends": lambda _, v: v["tracker"]["clipped"].__setitem__(1, 3),
}


@pytest.mark.parametrize("kind", MUTANTS)
def test_what_was_saved_otherwise_is_another_run_in_a_new_process_too(
    kind: str, run: Path, templates: Path, processes: Processes, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "mutant")
    rewritten(tmp_path / "mutant", MUTANTS[kind])
    for name, equal in (("run", True), ("mutant", False)):
        code, said = processes.run(tmp_path, f"resume={name}")
        assert code == 0 and "goes on after step 5" in said
        same = differences(everything(templates / "whole"), everything(tmp_path / name)) == []
        assert same == equal


@pytest.mark.parametrize("kind", ["H", "dtype", "device"])
def test_what_does_not_fit_is_refused_in_a_new_process_too(
    kind: str, run: Path, processes: Processes, tmp_path: Path
) -> None:
    change, says = OTHER[kind]
    rewritten(run, change)
    before = there(run)
    code, said = processes.run(tmp_path, "resume=run")
    assert code == 2 and says in said and said.count("\n") == 1
    assert there(run) == before
