"""What SECURITY.md says: no data runs code, nothing is written elsewhere, nothing listens."""

from __future__ import annotations

from pathlib import Path

import pytest

from rnngrad.runs import find_runs

from .test_command import TINY, Command, command, snapshot, whole

__all__ = ["command"]  # a fixture

# --- yaml files of --config-dir


EVIL = {
    "a callback": "callbacks: {mine: {_target_: pathlib.Path.touch, self: {_target_: pathlib.Path, "
    "_args_: [canary]}}}",
    "a callback in place of ours": "callbacks: {gate: {_target_: pathlib.Path}}",
    "no callback": "callbacks: {gate: null}",
    "a log beside Hydra's": "hydra_logging: {handlers: {mine: {class: logging.FileHandler, "
    "filename: canary}}, root: {handlers: [mine], level: DEBUG}}",
    "another log": "job_logging: {handlers: {file: {filename: canary}}}",
    "a log's class": "job_logging: {handlers: {file: {class: subprocess.Popen}}}",
    "a log's name": "job: {name: ../../canary}",
    "the environment": "job: {env_set: {PYTHONSTARTUP: canary}}",
    "what is taken from the environment": "job: {env_copy: [HOME]}",
    "a launcher": "launcher: {_target_: pathlib.Path}",
    "a sweeper": "sweeper: {_target_: pathlib.Path}",
    "inside a sweeper's values": "sweeper: {params: {seed: {_target_: pathlib.Path.cwd}}}",
}


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["run", "sweep"])
@pytest.mark.parametrize("content", EVIL.values(), ids=EVIL)
def test_a_file_has_no_code_for_hydra_to_run(
    content: str, sweep: list[str], command: Command, tmp_path: Path
) -> None:
    experiment = tmp_path / "own" / "experiment"
    experiment.mkdir(parents=True)
    (experiment / "evil.yaml").write_text(f"# @package _global_\nhydra: {{{content}}}\n")
    before = snapshot(tmp_path)
    code, said = command(*sweep, "--config-dir", "own", "experiment=evil", *TINY)
    assert code == 2 and said.startswith("rnngrad: hydra.") and said.count("\n") == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [
        ["--config-dir", "own", "--config-name", "evil"],
        ["--config-path", "{}/own", "--config-name", "evil"],
        ["hydra.searchpath=[file://{}/own]", "experiment=evil"],
        ["-m", "--config-dir", "own", "experiment=null,evil"],
        ["--config-dir", "own", "--cfg", "job", "experiment=evil"],
    ],
    ids=["name", "path", "searchpath", "swept", "shown"],
)
def test_nor_has_it_however_it_is_found(words: list[str], command: Command, tmp_path: Path) -> None:
    evil = f"# @package _global_\nhydra: {{{EVIL['a callback']}}}\n"
    experiment = tmp_path / "own" / "experiment"
    experiment.mkdir(parents=True)
    (experiment / "evil.yaml").write_text(evil)
    (tmp_path / "own" / "evil.yaml").write_text(evil)
    before = snapshot(tmp_path)
    code, said = command(*(word.format(tmp_path) for word in words), *TINY)
    assert code == 2 and said.count("\n") == 1 and "Traceback" not in said
    assert snapshot(tmp_path) == before


def test_files_may_say_where_runs_lie_and_what_is_swept(command: Command, tmp_path: Path) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "hydra: {mode: MULTIRUN, sweep: {dir: there}, sweeper: {params: {seed: '3,4'}}}\n"
    )
    code, said = command("--config-dir", "own", "experiment=mine", *TINY)
    assert code == 0, said
    found = [*find_runs(tmp_path / "there")]
    assert [path.name.split("-")[0] for path in found] == [f"adding_lstm_norm_s{n}" for n in (3, 4)]
    assert all(map(whole, found))


def test_what_is_typed_beside_files_is_taken(command: Command, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text("defaults: [config, _self_]\nseed: 4\n")
    typed = ["hydra.job.name=mine", "+hydra.job.env_set.RNNGRAD_TEST=1"]
    code, said = command("--config-dir", "own", "--config-name", "mine", *typed, *TINY)
    assert code == 0, said
    (path,) = find_runs(tmp_path)
    assert path.name.startswith("adding_lstm_norm_s4-") and (path / "mine.log").exists()
