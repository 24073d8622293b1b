"""The command line: what it refuses and how, exit codes, sweeps, directories, signals."""

import errno
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import yaml
from filelock import FileLock

from rnngrad import job
from rnngrad.__main__ import run_command
from rnngrad.checkpoint import load
from rnngrad.outcomes import OUTCOMES
from rnngrad.runs import Run, find_runs

TINY = [
    "task.length=5",
    "cell.hidden_size=4",
    "trainer.steps=3",
    "trainer.batch_size=2",
    "trainer.eval_size=2",
]

TASKS = ", ".join(sorted(p.stem for p in Path(__file__).parents[1].glob("conf/task/*.yaml")))

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Runs a command line in this process, in an empty folder: exit code, and what it said."""
    monkeypatch.chdir(tmp_path)
    handlers = logging.root.handlers[:]

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rnngrad", *arguments])
        capfd.readouterr()
        try:
            code = run_command()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        out, err = capfd.readouterr()
        return code, out + err

    yield run
    for handler in logging.root.handlers[:]:
        handler.close()
    logging.root.handlers[:] = handlers


def whole(path: Path) -> bool:
    """Whether a run directory has everything that a completed run leaves."""
    run = Run(path)
    names = {p.name for p in path.iterdir()}
    return (
        run.summary["status"] == "completed"
        and {".hydra", "metrics.csv", "bptt.f64", "bptt.json", "summary.json"} <= names
        and any(name.startswith("events.out.tfevents") for name in names)
        and run.metrics["step"][-1] == run.summary["steps"]
        and bool(run.bptt)
        and bool(run.config)
    )


BAD = [
    ("trainer.stpes=5", "trainer.stpes=5: no such key; did you mean trainer.steps?"),
    ("trainer.foo=5", "trainer.foo=5: no such key"),
    ("foo=1", "foo=1: no such key; there are task, cell, init, clip, bptt_clip, regularizer, "),
    ("+foo=1", "foo=1: no such key"),
    ("++optim.lrr=3", "optim.lrr=3: no such key; did you mean optim.lr?"),
    ("+cell._target_=os.system", "cell._target_=os.system: no such key"),
    ("dry_run=maybe", "dry_run=maybe: must be true or false"),
    ("trainer.steps=0", "trainer.steps=0: must be an integer >= 1"),
    ("trainer.steps=-3", "trainer.steps=-3: must be an integer >= 1"),
    ("trainer.steps=abc", "trainer.steps=abc: must be an integer >= 1"),
    ("trainer.steps=nan", "trainer.steps=nan: must be an integer >= 1"),
    ("trainer.steps=2.5", "trainer.steps=2.5: must be an integer >= 1"),
    ("trainer.steps=true", "trainer.steps=true: must be an integer >= 1"),
    ("trainer.steps=null", "trainer.steps=null: must be an integer >= 1"),
    ("trainer.steps=[1]", "trainer.steps=[1]: must be an integer >= 1"),
    ("trainer.steps=1,2", "trainer.steps=1,2: several values; to sweep over them add -m"),
    ("trainer.steps=[1", "trainer.steps=[1: cannot be read as KEY=VALUE"),
    ("trainer.stop_when_solved=1", "trainer.stop_when_solved=1: must be true or false"),
    ("trainer=fast", "trainer=fast: must be one of default"),
    ("~trainer", "trainer: is missing; give trainer=default"),
    ("task=nonsense", f"task=nonsense: must be one of {TASKS}"),
    ("task=[adding,copy]", "task=[adding,copy]: one name is needed; to sweep, -m task=A,B"),
    ("tsk=copy", "tsk=copy: no such key; did you mean task?"),
    ("~task", f"task: is missing; give one of {TASKS}"),
    ("+task=copy", "task: is given twice"),
    ("task.name=sort", f"task.name=sort: must be one of {TASKS}"),
    ("~task.length", "task.length: is missing"),
    ("task.length=1", "task.length=1: must be an integer >= 2"),
    ("clip.max_norm=0", "clip.max_norm=0: must be a finite number > 0"),
    ("clip.max_norm=-1", "clip.max_norm=-1: must be a finite number > 0"),
    ("clip.max_norm=nan", "clip.max_norm=nan: must be a finite number > 0"),
    ("clip.max_norm=inf", "clip.max_norm=inf: must be a finite number > 0"),
    ("clip.norm_type=0.5", "clip.norm_type=0.5: must be a number >= 1, or inf"),
    ("clip=none clip.max_norm=1", "clip.max_norm=1: no such key"),
    ("cell=rnn cell.nonlinearity=sin", "cell.nonlinearity=sin: must be one of tanh, "),
    (
        "cell.forget_bias=inf",
        "cell.forget_bias=inf: must be a finite number that float32 holds or null",
    ),
    ("optim.lr=abc", "optim.lr=abc: must be a finite number > 0"),
    ("optim.betas=[0.9]", "optim.betas=[0.9]: must be [a number >= 0 and < 1, a number"),
    ("seed=-1", "seed=-1: must be an integer >= 0"),
    ("~seed", "seed: is missing"),
    ("'seed=${nothing}'", "seed=${nothing}: Interpolation key 'nothing' not found"),
    ("device=banana", "device=banana: is not a device that this torch can use"),
    ("device=3", "device=3: must be a text"),
    ("plugins=[no_such_module]", "plugins=no_such_module: cannot be imported"),
    ("plugins=3", "plugins=3: must be a list of module names"),
    ("experiment=nothing", "experiment=nothing: must be one of arjovsky_adding, "),
    ("resume=somewhere", "resume=somewhere: no such directory"),
    ("=3", "'=3': is not of the form KEY=VALUE"),
    ("''", "'': is not of the form KEY=VALUE"),
    ("foo", "foo: cannot be read as KEY=VALUE"),
    ("seed=ü", "seed=ü: cannot be read as KEY=VALUE; the value may need quotes"),
    ("'seed=\"a'", "cannot be read as KEY=VALUE; the value may need quotes"),
    (
        "cell.hidden_size=5 cell.hidden=3",
        "cell.hidden=3: no such key; did you mean cell.hidden_size?",
    ),
    ("trainer.steps=5 trainer.step=3", "trainer.step=3: no such key; did you mean trainer.steps?"),
    ("task=copy tas=copy", "tas=copy: no such key; did you mean task?"),
    ("task=null", f"task=null: must be one of {TASKS}"),
    ("trainer=3", "trainer=3: must be one of default"),
    ("task=", f"task=: must be one of {TASKS}"),
    ("'task.name=[1]'", f"task.name=[1]: must be one of {TASKS}"),
    ("'task.name={a:1}'", f"task.name={{'a': 1}}: must be one of {TASKS}"),
    ("'task={a:1}'", "task={a:1}: "),
    ("++task=copy", "++task=copy: "),
    ("-m task=null,copy", "task=null"),
    ("-m seed=range(1,1)", "-m: the sweep is empty"),
    ("-m cell.hidden_size=interval(1,3)", "cell.hidden_size=interval(1,3): "),
    ("'seed=\"1\"'", "seed='1': must be an integer >= 0"),
    ("cell.hidden_size=99999999999999", "must be an integer >= 1 and <= 1000000000"),
    ("task.length=11111111111111111111", "must be an integer >= 2 and <= 1000000000"),
    ("device=meta", "device=meta: is not a device that this torch can use"),
    ("device=cpu:0", "device=cpu:0: is not a device that this torch can use"),
    ("hydra.output_subdir=kept", "hydra.output_subdir=kept: must stay null"),
    ("hydra.mode=FOO", "hydra.mode=FOO: "),
    ("--multirun --cfg job", "Only one of --run, --multirun, --cfg"),
    ("--resolve", "The --resolve flag can only be used in conjunction with"),
    ("--experimental-rerun foo", "would run what a stored file says"),
    ("k" * 3000 + "=1", "no such key"),
    ("--bogus", "unrecognized arguments: --bogus; see rnngrad --help"),
    ("--config-name nothing", "Cannot find primary config 'nothing'"),
    ("--config-dir nothing", "Additional config directory"),
    ("hydra/launcher=nothing", "hydra/launcher=nothing: must be one of basic"),
    ("-m trainer.steps=5,0", "trainer.steps=0: must be an integer >= 1"),
    ("-m trainer.steps=5,abc", "trainer.steps=abc: must be an integer >= 1"),
    ("-m trainer.stpes=5,6", "trainer.stpes=5,6: no such key; did you mean trainer.steps?"),
    ("-m cell=lstm,foo", "cell=foo: must be one of bn_lstm, "),
    ("task=cliff", "cell.hidden_size=128: must be 1, as task=cliff has no read-out"),
    ("task=chars", "task.path=null: "),
    ("task=chars task.path=nowhere.txt", "task.path=nowhere.txt: "),
    ("trainer.eval_lengths=[0]", "trainer.eval_lengths=[0]: must be a list"),
    ("task=digits trainer.eval_lengths=[5]", "trainer.eval_lengths=5: "),
    ("trainer.eval_lengths=5", "trainer.eval_lengths=5: must be a list [A,B,...] of which each"),
    ("trainer.tbptt_k2=0", "trainer.tbptt_k2=0: must be an integer >= 1"),
    ("trainer.tbptt_k1=0 trainer.tbptt_k2=3", "trainer.tbptt_k1=0: must be an integer >= 1"),
    ("trainer.tbptt_k1=3", "trainer.tbptt_k1=3: needs trainer.tbptt_k2 as well"),
    (
        "trainer.tbptt_k1=5 trainer.tbptt_k2=3",
        "trainer.tbptt_k1=5: must be at most trainer.tbptt_k2, which is 3",
    ),
    ("cell=bn_rnn trainer.tbptt_k2=3", "trainer.tbptt_k2=3: must be null, as cell=bn_rnn has"),
    ("cell=indrnn trainer.recompute_segments=4", "must be 1, as cell=indrnn is run step by step"),
    ("regularizer=omega", "regularizer=omega: is defined for one layer of cell=rnn with tanh"),
    ("regularizer=omega cell=rnn cell.num_layers=2", "is defined for one layer of cell=rnn"),
    ("regularizer=omega cell=rnn cell.nonlinearity=elu", "is defined for one layer of cell=rnn"),
    (
        "regularizer=orthogonality cell=indrnn",
        "regularizer=orthogonality: needs a recurrent weight matrix that is a parameter",
    ),
    ("trainer.clip_audit=[foo]", "trainer.clip_audit=foo: must name one of agc, autoclip"),
    ("trainer.clip_audit=[norm,norm]", "trainer.clip_audit=norm: stands there twice"),
    (
        "'trainer.clip_audit=[{name:norm,max_norm:-1}]'",
        "trainer.clip_audit.max_norm=-1: must be a finite number > 0",
    ),
    ("'trainer.clip_audit=[{name:norm,foo:1}]'", "trainer.clip_audit.foo=1: no such key"),
    ("'trainer.clip_audit=[norm,{name:norm,max_norm:1.0}]'", "clip_audit=norm: stands there twice"),
    ("trainer.eval_lengths=[5,5]", "trainer.eval_lengths=[5, 5]: must not hold a length twice"),
    ("trainer.clip_audit=norm", "trainer.clip_audit=norm: must be a list [A,B,...]"),
    ("optim=sgd optim.nesterov=true", "optim.nesterov=true: needs optim.momentum > 0"),
    ("init.recurrent=foo", "init.recurrent=foo: must be one of torch, normal"),
    ("init.recurrent=np init.recurrent_scale=2", "init.recurrent_scale=2.0: must be null"),
    ("cell=indrnn init.recurrent=orthogonal", "init.recurrent=orthogonal: must be one of torch"),
    ("cell=orthogonal init.recurrent=normal", "init.recurrent=normal: must be torch, orthogonal"),
    ("cell=bn_rnn trainer.batch_size=1", "trainer.batch_size=1: must be >= 2 with cell=bn_rnn"),
    ("optim.warmup_steps=5 trainer.steps=5", "optim.warmup_steps=5: must be under trainer.steps"),
    (
        "cell=orthogonal init.recurrent=orthogonal init.recurrent_scale=1.1",
        "init.recurrent_scale=1.1: must be null or 1, as weight_hh of",
    ),
    ("clip=agc clip.exclude=nowhere", "clip.exclude=nowhere: "),
    ("'trainer.clip_audit=[{name:agc,exclude:nowhere}]'", "clip_audit.exclude=nowhere: "),
    ("bptt_clip=value bptt_clip.site=here", "bptt_clip.site=here: must be one of preact, state"),
    ("bptt_clip=none bptt_clip.max_norm=1", "bptt_clip.max_norm=1: no such key"),
    ("-m seed=1,1", "is the directory of job 0 and of job 1; every job needs its own"),
    ("-m seed=0,1 hydra.sweep.subdir=same", "every job needs its own"),
]


@pytest.mark.parametrize(("line", "says"), BAD, ids=[line[:60] for line, _ in BAD])
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    line: str, says: str, command: Command, tmp_path: Path
) -> None:
    code, said = command(*shlex.split(line))
    assert code == 2
    assert said.startswith("rnngrad: ") and says in said
    assert said.count("\n") == 1 and "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "file", "other run", "unwritable"])
def test_a_directory_that_is_not_this_runs_is_refused_and_left_as_it_was(
    kind: str, command: Command, tmp_path: Path
) -> None:
    if kind == "folder":
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "notes.txt").write_text("mine")
    elif kind == "file":
        (tmp_path / "there").write_text("mine")
    elif kind == "other run":
        assert command(*TINY, "hydra.run.dir=there", "seed=1")[0] == 0
    target = "/proc/there" if kind == "unwritable" else "there"
    before = snapshot(tmp_path)
    code, said = command(*TINY, f"hydra.run.dir={target}")
    assert code == 2 and said.count("\n") == 1
    expected = {
        "folder": "hydra.run.dir=there: exists and is not a run",
        "file": "hydra.run.dir=there: exists and is not a run",
        "other run": "holds another run (seed is 1 there and 0 here)",
        "unwritable": "/proc/there: cannot be used as a run directory",
    }
    assert expected[kind] in said
    assert snapshot(tmp_path) == before


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in path.glob("**/*") if p.is_file()}


def test_a_sweep_into_another_runs_directory_is_refused_before_job_0(
    command: Command, tmp_path: Path
) -> None:
    assert command(*TINY, "hydra.run.dir=runs/1", "seed=7")[0] == 0
    before = snapshot(tmp_path)
    code, said = command("-m", *TINY, "seed=0,1", "hydra.sweep.subdir=${hydra:job.num}")
    assert code == 2 and "holds another run (seed is 7 there and 1 here)" in said
    assert snapshot(tmp_path) == before


def test_a_directory_that_became_another_runs_during_the_sweep_is_refused_when_its_turn_comes(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ["-m", *TINY, "seed=0,1", "hydra.sweep.dir=runs", "hydra.sweep.subdir=${hydra:job.num}"]
    assert command(*TINY, "hydra.run.dir=other", "seed=7")[0] == 0

    def train(*args: Any, **kwargs: Any) -> tuple[int, float]:
        if not (tmp_path / "runs" / "1" / "summary.json").exists():
            shutil.copytree(tmp_path / "other", tmp_path / "runs" / "1")
        return job.train(*args, **kwargs)

    monkeypatch.setattr("rnngrad.__main__.train", train)
    code, said = command(*sweep)
    assert code == 1 and "holds another run (seed is 7 there and 1 here)" in said
    assert Run(tmp_path / "runs" / "0").summary["status"] == "completed"
    assert Run(tmp_path / "runs" / "1").config["seed"] == 7


def test_a_run_leaves_a_whole_directory_named_after_what_defines_it(
    command: Command, tmp_path: Path
) -> None:
    code, said = command(*TINY, "seed=3")
    assert code == 0 and "completed" in said and "|dL/dh_1|" in said
    (path,) = find_runs(tmp_path / "runs")
    assert path.name.startswith("adding_lstm_norm_s3-") and len(path.name.split("-")[1]) == 8
    assert whole(path)
    assert Run(path).config["trainer"]["steps"] == 3


def test_the_same_command_finds_its_own_run_again(command: Command, tmp_path: Path) -> None:
    command(*TINY)
    before = snapshot(tmp_path / "runs")
    code, said = command(*TINY, "optim.lr=1e-3")  # the default, written otherwise
    assert code == 0 and "is already completed" in said
    after = snapshot(tmp_path / "runs")
    for name in before:
        if ".hydra" not in name:
            assert after[name] == before[name]


def test_an_unfinished_run_goes_on_to_the_same_end(command: Command, tmp_path: Path) -> None:
    command(*TINY)
    (path,) = find_runs(tmp_path)
    metrics, summary = (path / "metrics.csv").read_bytes(), (path / "summary.json").read_text()
    (path / "summary.json").write_text(summary.replace("completed", "interrupted"))
    with (path / "metrics.csv").open("a") as file:
        file.write("half a li")
    assert command(*TINY)[0] == 0
    assert (path / "metrics.csv").read_bytes() == metrics
    assert (path / "summary.json").read_text() == summary


def test_a_live_directory_is_exit_4_and_a_dead_ones_lock_is_not(
    command: Command, tmp_path: Path
) -> None:
    assert command(*TINY, "hydra.run.dir=live")[0] == 0
    before = snapshot(tmp_path)
    with FileLock(tmp_path / "live" / ".lock"):
        code, said = command(*TINY, "hydra.run.dir=live")
        assert code == 4 and "a run is going on here" in said and said.count("\n") == 1
        assert snapshot(tmp_path) == before
    assert command(*TINY, "hydra.run.dir=live")[0] == 0


@pytest.mark.parametrize("text", ["[", "", "3"])
def test_a_stored_configuration_that_cannot_be_read_is_one_line(
    text: str, command: Command, tmp_path: Path
) -> None:
    command(*TINY, "hydra.run.dir=there")
    (tmp_path / "there" / ".hydra" / "config.yaml").write_text(text)
    code, said = command(*TINY, "hydra.run.dir=there")
    assert code == 2 and said.count("\n") == 1 and "cannot be read" in said


def test_a_broken_summary_is_trained_again(command: Command, tmp_path: Path) -> None:
    command(*TINY)
    (path,) = find_runs(tmp_path)
    (path / "summary.json").write_text("{")
    assert command(*TINY)[0] == 0 and whole(path)


def test_the_default_experiment_can_be_written_and_globs_are_matched(command: Command) -> None:
    assert command("experiment=null", *TINY)[0] == 0
    rules = [p.stem for p in Path(__file__).parents[1].glob("conf/clip/*.yaml")]
    code, said = command("-m", "clip=glob(*)", *TINY, "seed=8")
    assert code == 0 and said.count("completed") == len(rules) > 3


WORDS = [
    (path.parent.name, path.stem)
    for path in sorted(Path(__file__).parents[1].glob("conf/*/*.yaml"))
    if path.parent.name != "trainer"
]
EXTRA = {
    "engine=joblib": "hydra_joblib_launcher",
    "experiment=clip_study": "hydra_optuna_sweeper",
}
NEEDED = {
    "task=chars": [f"task.path={Path(__file__).parents[1] / 'README.md'}"],
    "task=cliff": ["cell.hidden_size=1"],
    "regularizer=omega": ["cell=rnn"],
}


@pytest.mark.parametrize(("group", "name"), WORDS, ids=["=".join(word) for word in WORDS])
def test_every_word_of_the_menu_runs_from_the_command_line(
    group: str, name: str, command: Command, tmp_path: Path
) -> None:
    word = f"{group}={name}"
    if word in EXTRA:
        pytest.importorskip(f"hydra_plugins.{EXTRA[word]}", reason="needs an extra")
    small = [key for key in TINY if not (group == "task" and key.startswith("task."))]
    if group == "experiment":  # brings sizes of its own
        small = [key for key in small if key.startswith("trainer.")]
    code, said = command(word, *small, *NEEDED.get(word, []))
    assert code == 0, said
    (path,) = find_runs(tmp_path / "runs")
    assert whole(path)


def test_another_text_of_the_same_name_is_another_run(command: Command, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    small = ["task=chars", "task.path=text.txt", *TINY[1:], "task.length=5"]
    for content in ("abc " * 50, "xyz! " * 50):
        text.write_text(content)
        assert command(*small)[0] == 0
    assert "already completed" in command(*small)[1]
    assert len(list(find_runs(tmp_path / "runs"))) == 2


def test_an_audits_labels_are_the_same_however_it_is_written(
    command: Command, tmp_path: Path
) -> None:
    for audit in (
        "[norm,{name:norm,max_norm:2,norm_type:1}]",
        "[{name:norm,max_norm:1.0},{norm_type:1.0,max_norm:2.0,name:norm}]",
    ):
        assert command(*TINY, f"trainer.clip_audit={audit}")[0] == 0
    for path in find_runs(tmp_path / "runs"):
        assert set(Run(path).summary["clip_audit"]) == {"norm", "norm_max_norm_2.0_norm_type_1.0"}


def test_a_reader_that_has_left_does_not_fail_the_run(command: Command, tmp_path: Path) -> None:
    running = process(tmp_path, "-m", "rnngrad", *TINY)
    assert running.stdout is not None
    running.stdout.close()
    assert running.wait(timeout=300) == 0


def test_divergence_is_exit_3_with_everything_logged(command: Command, tmp_path: Path) -> None:
    line = ["cell=rnn", *TINY, "clip=none", "optim=sgd", "optim.lr=1e38", "trainer.eval_every=100"]
    code, said = command(*line)
    assert code == 3 and "diverged: step 2: " in said and "Traceback" not in said
    (path,) = find_runs(tmp_path)
    run = Run(path)
    assert run.summary["status"] == "diverged" and run.summary["loss"] is None
    assert run.metrics["step"].tolist() == [1, 2] and run.bptt["l0"].step.tolist() == [1]


def test_a_failure_is_exit_1_with_its_traceback_in_the_runs_log(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr("rnngrad.config.Training", broken)
    code, said = command(*TINY)
    assert code == 1 and "failed: ZeroDivisionError: broken on purpose" in said
    assert "Traceback" not in said
    (path,) = find_runs(tmp_path)
    assert "Traceback" in (path / "rnngrad.log").read_text()
    assert Run(path).summary["status"] == "failed"


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=0,1"]])
def test_a_temporary_directory_that_fills_up_fails_no_run(
    sweep: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: str, *arguments: str, **options: str) -> IO[str]:
        stream = open(file, *arguments, **options)  # type: ignore[call-overload]
        if file == os.environ.get(OUTCOMES):
            stream.write("0\t/ha")  # as much as there was room for
            stream.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stream

    monkeypatch.setattr("rnngrad.outcomes.open", full, raising=False)
    code, said = command(*sweep, *TINY)
    assert code == 0 and said.count("completed") == max(1, len(sweep))
    diverging = [*sweep, "cell=rnn", *TINY, "clip=none", "optim=sgd", "optim.lr=1e38"]
    assert command(*diverging)[0] == 3


def test_a_sweep_of_18_runs_completes_with_every_directory_whole(
    command: Command, tmp_path: Path
) -> None:
    tiny = [o for o in TINY if "task" not in o]
    code, said = command(
        "-m",
        "task=copy,adding",
        "cell=rnn,lstm,gru",
        "clip=none,norm,value",
        "task.length=5",
        *tiny,
    )
    assert code == 0 and said.count("completed") == 18
    paths = list(find_runs(tmp_path))
    assert len(paths) == 18 and all(map(whole, paths))
    code, said = command(
        "-m",
        "task=copy,adding",
        "cell=rnn,lstm,gru",
        "clip=none,norm,value",
        "task.length=5",
        *tiny,
    )
    assert code == 0 and "sweep: 18 runs, 18 finished, 0 to run" in said and "#0" not in said


def test_in_a_sweep_divergence_is_3_failure_1_and_the_others_go_on(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["-m", "cell=rnn", *TINY, "clip=none", "optim=sgd", "trainer.eval_every=100"]
    code, _ = command(*line, "optim.lr=1e38,0.01", "seed=0,1")
    assert code == 3
    statuses = sorted(Run(p).summary["status"] for p in find_runs(tmp_path))
    assert statuses == ["completed", "completed", "diverged", "diverged"]

    from rnngrad import training

    real = training.Training

    def sometimes(*args: object, seed: int, **kwargs: object) -> object:
        if seed == 5:
            raise ZeroDivisionError
        return real(*args, seed=seed, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("rnngrad.config.Training", sometimes)
    code, said = command(*line, "optim.lr=0.01", "seed=5,6")
    assert code == 1 and "failed: ZeroDivisionError" in said
    statuses = [Run(p).summary["status"] for p in find_runs(tmp_path) if "_s6-" in p.name]
    assert statuses == ["completed"]


def test_jobs_of_a_sweep_equal_single_runs(command: Command, tmp_path: Path) -> None:
    command("-m", *TINY, "seed=4,5", "hydra.sweep.dir=sweep")
    command(*TINY, "seed=5", "hydra.run.dir=single")
    (job,) = (tmp_path / "sweep").glob("*_s5-*")
    for name in ("metrics.csv", "bptt.f64"):
        assert (job / name).read_bytes() == (tmp_path / "single" / name).read_bytes()


PLUGIN = """
from dataclasses import dataclass
import torch
from rnngrad.cells import CELLS, CellPart

class MinimalCell(torch.nn.Module):
    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.inner = torch.nn.Linear(input_size + hidden_size, hidden_size)

    def forward(self, x, h):
        h = x.new_zeros(len(x), self.inner.out_features) if h is None else h
        return torch.tanh(self.inner(torch.cat([x, h], -1)))

@CELLS.register("minimal")
@dataclass(frozen=True)
class Minimal(CellPart):
    def cell(self, input_size):
        return MinimalCell(input_size, self.hidden_size)
"""


def test_a_users_own_cell_is_a_module_and_a_yaml(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "own" / "cell").mkdir(parents=True)
    (tmp_path / "own" / "cell" / "minimal.yaml").write_text(
        "name: minimal\nhidden_size: 4\nnum_layers: 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, said = command("plugins=[mine]", "--config-dir", "own", "cell=minimal", *TINY)
    assert code == 0, said
    (path,) = find_runs(tmp_path / "runs")
    assert list(Run(path).bptt) == ["l0", "l1"]


def test_a_users_own_clip_rule_can_watch(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "halving.py").write_text(
        "from dataclasses import dataclass\n"
        "from rnngrad.clipping import CLIPS, Clip, Outcome\n"
        "@CLIPS.register('halving')\n"
        "@dataclass(frozen=True)\n"
        "class Halving(Clip):\n"
        "    by: float\n"
        "    def clip_(self, gradient, state):\n"
        "        for grad in gradient.grads:\n"
        "            grad.mul_(self.by)\n"
        "        return Outcome(clipped=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    watching = ["plugins=[halving]", "trainer.clip_audit=[{name:halving,by:0.5}]"]
    assert command(*watching, *TINY)[0] == 0
    (path,) = find_runs(tmp_path / "runs")
    audit = Run(path).summary["clip_audit"]
    assert audit["halving_by_0.5"] == {"clip_fraction": 1.0, "mean_coef": pytest.approx(0.5)}
    code, said = command("plugins=[halving]", "trainer.clip_audit=[halving]", *TINY)
    assert code == 2 and "trainer.clip_audit.by: is missing" in said


FAILING_RULE = """\
import sys
from dataclasses import dataclass
from rnngrad.clipping import CLIPS, Clip

def deeper(error):
    if error == "RecursionError":
        deeper(error)
    if error == "SystemExit":
        sys.exit(0)
    raise {"MemoryError": MemoryError, "ValueError": ValueError("too\\nlong")}[error]

@CLIPS.register("failing")
@dataclass(frozen=True)
class Failing(Clip):
    error: str
    def clip_(self, gradient, state):
        deeper(self.error)
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("ValueError", "ValueError: too; at FILE, line 10, in deeper"),
        ("MemoryError", "MemoryError; at FILE, line 10, in deeper"),
        ("RecursionError", "RecursionError: maximum recursion.*; at FILE, line [67], in deeper"),
        ("SystemExit", "SystemExit: 0; at FILE, line 9, in deeper"),
    ],
)
def test_what_a_plugin_raises_is_exit_1_and_one_line_that_says_where(
    error: str, said: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing.py").write_text(FAILING_RULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "failing", raising=False)
    rule = f"trainer.clip_audit=[{{name:failing,error:{error}}}]"
    code, out = command("plugins=[failing]", rule, *TINY)
    (line,) = (line for line in out.splitlines() if "failed" in line and line[:7] == "rnngrad")
    (path,) = find_runs(tmp_path)
    said = said.replace("FILE", re.escape(str(tmp_path / "failing.py")))
    log = re.escape(str(path / "rnngrad.log"))
    assert code == 1 and re.fullmatch(rf"rnngrad: failed: {said} \(traceback in {log}\)", line)
    assert "Traceback" not in out and Run(path).summary["status"] == "failed"
    assert "in deeper" in (path / "rnngrad.log").read_text()
    assert load(path / "checkpoint").step == 0


FAILING_TASK = """\
from dataclasses import dataclass
from rnngrad.task import TASKS

@TASKS.register("failing")
@dataclass(frozen=True)
class Failing(TASKS.load()["adding"]):
    def loss(self, outputs, targets):
        return outputs @ targets.flatten().repeat(7)
"""


def test_where_a_plugin_was_is_said_of_what_others_raise(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's error, in the task's loss."""
    (tmp_path / "own" / "task").mkdir(parents=True)
    (tmp_path / "own" / "task" / "failing.yaml").write_text(
        "name: failing\nlength: 5\nmin_length: null\nform: sum\n"
    )
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "tasks.py").write_text(FAILING_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    code, out = command("plugins=[lab.tasks]", "--config-dir", "own", "task=failing", *TINY)
    assert code == 1 and "rnngrad: failed: RuntimeError: " in out
    assert f"; at {tmp_path / 'lab' / 'tasks.py'}, line 8, in loss (traceback in " in out
    assert "Traceback" not in out


def test_plugins_named_by_a_file_are_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "sly.yaml").write_text(
        "# @package _global_\nplugins: [this]\n"
    )
    code, said = command("--config-dir", "own", "experiment=sly")
    assert code == 2 and "is only taken from the command line" in said
    assert "this" not in sys.modules


def test_defaults_stand_in_the_yaml_alone_and_read_the_same_everywhere() -> None:
    """PyYAML takes 1e-3 for a text: a default must be written so that both agree."""
    from omegaconf import OmegaConf

    folder = Path(__file__).parent.parent / "conf"
    files = list(folder.glob("**/*.yaml"))
    assert len(files) >= 13
    for file in files:
        if file.name != "config.yaml":
            plain = yaml.safe_load(file.read_text())
            assert plain == OmegaConf.to_container(OmegaConf.load(file)), file


# --- in a process of their own


def process(tmp_path: Path, *arguments: str, **options: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["-sc", "query=bash"]])
def test_help_config_and_completion_answer_without_importing_torch(
    arguments: list[str], tmp_path: Path
) -> None:
    code = (
        f"import sys; sys.argv = ['rnngrad', *{arguments!r}]\n"
        "from rnngrad.__main__ import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    environment = {"COMP_LINE": "rnngrad tas", "COMP_POINT": "11"}
    os.environ.update(environment)
    running = process(tmp_path, "-c", code)
    out, _ = running.communicate(timeout=300)
    for name in environment:
        del os.environ[name]
    assert running.returncode == 0 and out.rstrip().endswith("False")
    assert {"--help": f"task: {TASKS}", "--cfg": "max_norm: 1.0", "-sc": "task="}[
        arguments[0]
    ] in out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("sweep", [False, True])
def test_a_signal_ends_the_run_after_its_step_with_everything_logged(
    number: int, code: int, sweep: bool, tmp_path: Path
) -> None:
    line = ["-m", "rnngrad", *(["-m", "seed=0,1"] if sweep else []), *TINY]
    running = process(tmp_path, *line, "trainer.steps=1000000", "trainer.log_every=10")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        metrics = [Run(p).metrics["step"] for p in find_runs(tmp_path)]
        if metrics and len(metrics[0]) > 3:
            break
        time.sleep(0.05)
    running.send_signal(number)
    out, _ = running.communicate(timeout=300)
    assert running.returncode == code, out
    assert "interrupted after step" in out and "Traceback" not in out
    (path,) = find_runs(tmp_path)
    run = Run(path)
    assert run.summary["status"] == "interrupted"
    assert run.metrics["step"][-1] == run.summary["steps"] >= 30


def test_two_processes_never_write_to_one_directory(tmp_path: Path) -> None:
    line = ["-m", "rnngrad", *TINY, "trainer.steps=300"]
    running = [process(tmp_path, *line) for _ in range(2)]
    codes = sorted(r.wait(timeout=300) for r in running)
    for r in running:
        assert r.stdout is not None
        r.stdout.close()
    assert codes in ([0, 4], [0, 0]), "the second waits for nothing: in use, or already completed"
    (path,) = find_runs(tmp_path)
    assert Run(path).metrics["step"].tolist() == [1, 50, 100, 150, 200, 250, 300]
