"""What SECURITY.md says: no data runs code, nothing is written elsewhere, nothing listens."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import rnngrad.report
from rnngrad.__main__ import run_command
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


# --- run directories


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory, as the command leaves it, but interrupted."""
    folder = tmp_path_factory.mktemp("trained") / "there"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["rnngrad", *TINY, f"hydra.run.dir={folder}"])
        handlers = logging.root.handlers[:]
        assert run_command() == 0
        for handler in {*logging.root.handlers} - {*handlers}:
            logging.root.removeHandler(handler)
            handler.close()
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    return folder


ODD = ["metrics.csv", "bptt.f64", "summary.json", "rnngrad.log", ".lock", "checkpoint", ".hydra"]


@pytest.mark.parametrize("name", [*ODD, ".hydra/overrides.yaml", "events.out.tfevents.1.x.1.0"])
def test_a_run_writes_through_no_link(
    name: str, trained: Path, command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "there"
    shutil.copytree(trained, folder)
    if (folder / name).exists():
        (folder / name).rename(tmp_path / "target")
    else:
        (tmp_path / "target").write_text("mine")
    (folder / name).symlink_to(tmp_path / "target")
    before = snapshot(tmp_path)
    for words in ([*TINY, "hydra.run.dir=there"], ["resume=there"]):
        code, said = command(*words)
        assert code == 2 and said.count("\n") == 1
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["metrics.csv", "rnngrad.log", ".lock"])
def test_a_run_waits_for_no_reader_of_a_pipe(
    name: str, trained: Path, command: Command, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "there")
    (tmp_path / "there" / name).unlink()
    os.mkfifo(tmp_path / "there" / name)
    for words in ([*TINY, "hydra.run.dir=there"], ["resume=there"]):
        code, said = command(*words)
        assert code == 2 and said.count("\n") == 1 and "would be written to" in said


def report(*arguments: str, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(cwd)
    monkeypatch.setattr("sys.argv", ["rnngrad-report", *arguments])
    try:
        rnngrad.report.main()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1
    return 0


@pytest.mark.parametrize("name", ["report", "report/report.md", "report/gradients.png"])
def test_a_report_writes_through_no_link(
    name: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(trained, tmp_path / "there")
    target = tmp_path / "target"
    if name == "report":
        target.mkdir()
    else:
        target.write_text("mine")
        (tmp_path / "there" / "report").mkdir()
    (tmp_path / "there" / name).symlink_to(target)
    before = snapshot(tmp_path)
    assert report("there", cwd=tmp_path, monkeypatch=monkeypatch) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "link" in said
    assert snapshot(tmp_path) == before


def test_a_report_shows_what_a_run_says_and_obeys_none_of_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(trained, folder)
    summary = json.loads((folder / "summary.json").read_text())
    evil = "</title><script>alert(1)</script>\"'`<b>` [x](javascript:alert(1)) \x1b[2J"
    for finding in summary["diagnosis"]["findings"]:
        finding |= {"symptom": evil, "evidence": evil, "remedies": [evil], "level": evil}
    summary |= {"status": evil, "reason": evil, "rnngrad": evil, "eval_at": {evil: {"loss": 1}}}
    summary["diagnosis"] |= {"verdict": evil, "because": [evil]}
    (folder / "summary.json").write_text(json.dumps(summary))
    config = folder / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("device: cpu", f"device: {json.dumps(evil)}"))
    assert report(folder.name, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    page = Scripts()
    page.feed((folder / "report" / "index.html").read_text())
    assert page.found == []
    assert "&lt;script&gt;" in (folder / "report" / "index.html").read_text()


class Scripts(HTMLParser):
    """Whatever a browser would run, or load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "form", "b"):
            self.found.append(tag)
        for name, value in attrs:
            local = re.fullmatch(r"#?\w+(\.\w+)?|data:(,|image/svg\+xml;base64,.*)", value or "")
            if name.startswith("on") or (name in ("href", "src") and not local):
                self.found.append(f"{name}={value}")


# --- the source itself


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
    *("torch.load", "hydra.utils.instantiate", "instantiate", "pty.spawn"),
}
FORBIDDEN_OPTIONS = {"allow_pickle": True, "weights_only": False, "shell": True}
ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for folder in ("rnngrad", "tasks", "conf") for path in (ROOT / folder).rglob("*.py")
)


def forbidden(source: str) -> list[str]:
    """What a source does that would run what data say, or open it to others."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in FORBIDDEN_CALLS else []
            found += [
                f"{option.arg}={option.value.value}"
                for option in node.keywords
                if isinstance(option.value, ast.Constant)
                and FORBIDDEN_OPTIONS.get(option.arg or "", ...) is option.value.value
            ]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [w for w in ("0.0.0.0", "--bind_all", "bind_all=") if w in node.value]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_runs_what_data_say_or_listens_to_others(path: Path) -> None:
    assert forbidden(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "torch.load(p)",
        "yaml.load(f)",
        "np.load(p, allow_pickle=True)",
        "run('ls', shell=True)",
        "serve('0.0.0.0')",
    ],
)
def test_what_is_looked_for_in_the_source_is_found(source: str) -> None:
    assert len(forbidden(source)) == 1


def test_only_our_own_callback_is_named_as_code_in_configurations() -> None:
    named = {
        line.strip()
        for path in (ROOT / "conf").rglob("*.yaml")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "_target_" in line
    }
    ours = "_target_: rnngrad.gate.Gate"
    assert ours in named
    assert all(line.startswith("_target_: hydra_plugins.rnngrad_") for line in named - {ours})


def test_no_page_tells_anyone_to_open_tensorboard_to_the_network() -> None:
    for page in [ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        assert "--bind_all" not in text and "--host" not in text
