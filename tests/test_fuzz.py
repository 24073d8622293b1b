"""Whatever comes in, what is wrong with it is said in one line: inputs by the thousand."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rnngrad.__main__ import run_command
from rnngrad.checkpoint import STATE, TENSORS, Loaded, load
from rnngrad.config import REGISTRIES, experiment
from rnngrad.explain import explain
from rnngrad.launcher import plain, register_run_name
from rnngrad.parts import InputError, NothingUsable
from rnngrad.resume import plain_settings, stored_config
from rnngrad.runs import Run
from rnngrad.snapshot import restore
from rnngrad.stored import Unreadable, one_line
from rnngrad.task import TASKS
from rnngrad.tracking import Tracker
from rnngrad.training import Training

from .faults import forge
from .small import TEXT, small_task

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
"""Of what made a test fail."""

MADE: Counter[str] = Counter()
"""Inputs that were generated, by the kind."""
REFUSED: Counter[str] = Counter()
"""How often one of them was."""
ORDINARY = {
    "overrides": 30,
    "configurations": 500,
    "run files": 350,
    "checkpoints": 150,
    "forged checkpoints": 150,
    "forged states": 100,
    "texts": 150,
    "stored configurations": 100,
}
MANY = {
    "overrides": 300,
    "configurations": 8000,
    "run files": 5000,
    "checkpoints": 2000,
    "forged checkpoints": 1800,
    "forged states": 1200,
    "texts": 1200,
    "stored configurations": 1200,
}
CANARY = "canary_module"
TINY = (
    "task.length=5",
    "cell.hidden_size=4",
    "trainer.steps=2",
    "trainer.batch_size=2",
    "trainer.eval_size=2",
)

# --- what is generated

KEYS = (
    "task cell clip init optim trainer measure bptt_clip regularizer experiment plugins strict "
    "seed device task.length task.form task.name cell.name cell.hidden_size cell.num_layers "
    "clip.max_norm optim.lr optim.betas trainer.steps trainer.eval_lengths trainer.clip_audit "
    "trainer.checkpoint_every trainer.log_every hydra.run.dir hydra.sweep.dir hydra.sweep.subdir "
    "hydra.mode hydra.verbose hydra.job.name hydra.job.num hydra.job.chdir hydra.output_subdir "
    "hydra.callbacks hydra.launcher hydra/launcher hydra/sweeper hydra/job_logging hydra "
    "hydra.searchpath hydra.runtime.output_dir hydra.sweeper.params hydra.help _target_ "
    "cell._target_ foo task.foo.bar ${seed} a@b task@cell :: task: .a a. a..b 3 ü"
).split()
WORDS = [
    *(
        "1 0 -1 2.5 nan inf 1e-3 1e400 abc null true [] {} [1,2] {a:1} ${seed} ${.} ${task} ${"
    ).split(),
    *("${hydra:job.num} ${nothing} ${oc.env:HOME} ${oc.env:NOPE} ${rnngrad.run_name:}").split(),
    *("../x .. ~ ~/x /proc/x /dev/null /dev/null/x 😀 ü a,b 1,2 range(1,3) interval(0,1)").split(),
    *("choice(1,2) glob(*) sort(3,1) shuffle(1,2) tag(a,1) int(3) float(x) norm none rnn").split(),
    *("gru copy cliff chars adding [norm,value] [{name:norm}] os.system here RUN MULTIRUN").split(),
    *("basic default disabled 30s = a=b a:b @ -1,2 \\ \\' \" 'a $ % *").split(),
    *("{_target_:os.system}", f"{{_target_:{CANARY}.made}}", "a b", "a\nb", "\x1b[2J", "\0", " "),
    *("\t", "", "9" * 30, "9" * 5000, "x/" * 200 + "y", "y" * 300, "z" * 100_000),
    *("[" * 200 + "]" * 200, "{a:" * 100, "[" * 1000),
]
OPTIONS = (
    "-m --multirun --help --hydra-help --version --cfg job --cfg=job --cfg=all --resolve --package "
    "--info --info=all --info=bogus -c --run -r --config-name nothing --config-name=config "
    "--config-dir nowhere --config-dir=. --config-path --config-path=/ --experimental-rerun "
    "--bogus -x -- - -cjob --cfg=bogus -h"
).split()
PREFIXES = ["", "", "", "", "", "", "+", "++", "~", "+++", "~~"]

TREES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e300, -1e300, 1e-300, 1e39, 10**9),
    *(float("nan"), float("inf"), float("-inf"), 2**31, 2**53, 2**63, 10**30, 10**400, 10**4000),
    *("", "a", "nan", "1e-3", "norm", "rnn", "30s", "1e400s", "０s", "../../x", "/dev/zero", "~"),
    *("\x1b[2J", "a\nb", "\0", "\ud800", "😀", "x" * 300, "x" * 1_000_000, "l0", "l0_reverse"),
    *("cuda", "cuda:99", "meta", "cpu:0", "mps", "cpu\0", " cpu", "${oc.env:HOME}"),
    *([], {}, [1], [None], [[1]], {"a": 1}, {"name": None}, {"name": "norm"}, {"name": ["norm"]}),
    *([{}], ["norm"], ["norm", {"name": "agc", "exclude": "\n"}], {"_target_": f"{CANARY}.made"}),
    *({"tensor": "x"}, {"list": [1]}, {"tuple": 3}, {"mapping": [[1]]}, {"list of numbers": "x"}),
]
ATOMS = st.sampled_from(TREES)
NAMES = st.sampled_from(["name", "_target_", "step", "hydra", "a.b", "a\nb", "\0", "", "x" * 9999])
ANY = ATOMS | st.recursive(
    ATOMS | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
KINDS = st.sampled_from(["inside"] * 7 + ["remove", "rename", "add"])
DICES = st.integers(0, 7)
NEAR: dict[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-1, 50),
    float: st.floats(-0.1, 10),
    type(None): st.none() | st.integers(0, 20) | st.floats(0, 1),
    str: st.sampled_from(["norm", "none", "orthogonal", "tanh", "relu", "cosine", "sum", "cpu"]),
}
"""What stands where a value of this type stood, half of the time."""


@st.composite
def changed(draw: st.DrawFn, tree: Any, times: int = 1) -> Any:
    """A tree with values anywhere in it replaced, removed, renamed or added."""
    for _ in range(draw(st.integers(1, times)) if times > 1 else 1):
        tree = _changed_once(draw, tree)
    return tree


def _changed_once(draw: st.DrawFn, tree: Any, depth: int = 0) -> Any:
    if not isinstance(tree, dict | list) or not tree or (depth and draw(DICES) == 0):
        return draw(NEAR.get(type(tree), ANY) if draw(DICES) < 4 else ANY)
    kind = draw(KINDS)
    if isinstance(tree, list):
        place = draw(st.integers(0, len(tree) - 1))
        new = [_changed_once(draw, tree[place], depth + 1)] if kind == "inside" else []
        new = [tree[place]] * 2 if kind == "add" else new
        return [*tree[:place], *new, *tree[place + 1 :]]
    key, tree = draw(st.sampled_from([*tree])), dict(tree)
    if kind == "inside":
        tree[key] = _changed_once(draw, tree[key], depth + 1)
    elif kind == "remove":
        del tree[key]
    else:
        tree[draw(NAMES)] = tree.pop(key) if kind == "rename" else draw(ANY)
    return tree


PIECES = st.binary(max_size=9) | st.sampled_from(
    [b"nan", b"inf", b"-1", b"1e308", b"1_0", b"9" * 30, b"\0", b'"', b"\n", b",", b"\xef\xbb\xbf"]
)


@st.composite
def spoilt(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes that were cut off, flipped, spliced or overwritten."""
    for _ in range(draw(st.integers(1, 3))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        kind = draw(st.sampled_from(["cut", "flip", "double", "remove", "insert", "overwrite"]))
        piece = draw(PIECES)
        if kind == "flip":
            bit = bytes([data[start] ^ 1 << draw(DICES)]) if start < len(data) else b""
            data = data[:start] + bit + data[start + 1 :]
        elif kind == "overwrite":
            data = data[:start] + piece + data[start + len(piece) :]
        else:
            between = {"cut": b"", "remove": b"", "double": data[start:end] * 2, "insert": piece}
            after = {"cut": b"", "insert": data[start:]}.get(kind, data[end:])
            data = data[:start] + between[kind] + after
    return data


NUMBER = re.compile(rb"[0-9.eE+-]+")


@st.composite
def renumbered(draw: st.DrawFn, data: bytes) -> bytes:
    """A text in which something else stands for one of its numbers."""
    found = [*NUMBER.finditer(data)]
    if not found:
        return draw(spoilt(data))
    there = draw(st.sampled_from(found))
    return data[: there.start()] + draw(PIECES) + data[there.end() :]


def spoilt_file(name: str, data: bytes) -> st.SearchStrategy[bytes]:
    """What may stand in a file's place: changed as bytes, or as what they say."""
    if name.endswith((".json", ".yaml")):
        tree = yaml.safe_load(data) if name.endswith(".yaml") else json.loads(data)
        return spoilt(data) | changed(tree).map(_encoded)
    return spoilt(data) | renumbered(data) if name.endswith(".csv") else spoilt(data)


def _encoded(tree: Any) -> bytes:
    """As JSON, which YAML can read as well."""
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(tree).encode()
    finally:
        sys.set_int_max_str_digits(digits)


# --- what must hold of every one


def generate(
    kind: str, inputs: st.SearchStrategy[Any], body: Callable[[Any], object], many: bool
) -> None:
    """Gives a body so many inputs of a kind; it does what it does, or refuses in one line."""

    @settings(
        max_examples=(MANY if many else ORDINARY)[kind],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(inputs)
    def each(value: Any) -> None:
        MADE[kind] += 1
        body(value)

    made, refused = MADE[kind], REFUSED[kind]
    each()
    made, refused = MADE[kind] - made, REFUSED[kind] - refused
    print(f"{kind}: {made} inputs, {refused} refused")
    assert made // 20 < refused, "what is generated is too tame"


@contextlib.contextmanager
def refusal(kind: str, documented: type[Exception]) -> Iterator[None]:
    """Inside, this error may be raised, in one line, and no other."""
    try:
        yield
    except documented as error:
        REFUSED[kind] += 1
        assert str(error).isprintable() and len(str(error)) < 2000, str(error)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, beside which nothing may be written, and a module to be left alone."""
    folder = tmp_path / "here"
    (tmp_path / "home").mkdir()
    folder.mkdir()
    (folder / f"{CANARY}.py").write_text("open('canary', 'w')\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "here"))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    stream = torch.get_rng_state()
    yield folder
    torch.set_rng_state(stream)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "home"]
    assert not any((tmp_path / "home").iterdir()) and not (folder / "canary").exists()
    assert CANARY not in sys.modules


@pytest.fixture(scope="module")
def run_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What lies in a run's directory, by path."""
    folder = tmp_path_factory.mktemp("trained") / "there"
    words = [*TINY, "trainer.log_every=1", "trainer.clip_audit=[norm]", f"hydra.run.dir={folder}"]
    handlers = logging.root.handlers[:]
    assert said(words)[0] == 0
    for handler in {*logging.root.handlers} - {*handlers}:
        logging.root.removeHandler(handler)
        handler.close()
    files = (path for path in folder.glob("**/*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def put(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


# --- configurations


@cache
def defaults() -> dict[str, Any]:
    with initialize_config_module("rnngrad.conf", version_base="1.3"):
        return plain(compose("config"))


@cache
def parts() -> dict[str, list[dict[str, Any]]]:
    """The settings of every part there is, by group."""
    known: dict[str, list[dict[str, Any]]] = {}
    for group, registry in REGISTRIES.items():
        make = small_task if group == "task" else registry.default
        files = (TEXT.parent / "conf" / group).glob("*.yaml")
        names = sorted(registry.load().keys() & {path.stem for path in files})
        known[group] = [plain_settings({"name": n} | asdict(make(n))) for n in names]
    return known


@st.composite
def configurations(draw: st.DrawFn) -> Any:
    """The defaults with other parts here and there, changed in one to three places."""
    chosen = {group: draw(st.sampled_from(known)) for group, known in parts().items()}
    groups = draw(st.sets(st.sampled_from([*chosen]), max_size=2))
    values = defaults() | {group: part for group, part in chosen.items() if group in groups}
    return draw(changed(values, times=3))


def check_configurations(many: bool) -> None:
    def body(values: Any) -> None:
        if isinstance(values, dict):
            with refusal("configurations", InputError):
                experiment(values)

    generate("configurations", configurations(), body, many)


ASSIGNMENTS = st.builds(
    "{}{}={}".format, st.sampled_from(PREFIXES), st.sampled_from(KEYS), st.sampled_from(WORDS)
) | st.sampled_from(KEYS).map("~{}".format)


def check_overrides(many: bool) -> None:
    def body(overrides: list[str]) -> None:
        try:
            with initialize_config_module("rnngrad.conf", version_base="1.3"):
                values = plain(compose("config", overrides))
        except Exception as error:  # Hydra's are of many types
            REFUSED["overrides"] += 1
            assert one_line(explain(error, overrides)).strip()
            return
        with refusal("overrides", InputError):
            experiment(values)

    register_run_name()
    generate("overrides", st.lists(ASSIGNMENTS, min_size=1, max_size=3), body, many)


# --- stored files

READ = ["config", "summary", "metrics", "bptt", "measures", "updates"]
STORED = {
    **{".hydra/config.yaml": 2, "summary.json": 2, "metrics.csv": 2, "updates.f32": 1},
    **{"bptt.json": 2, "bptt.f64": 1, "measures.json": 2, "measures.f64": 1},
}
"""Files that are read, and how often one is spoilt."""


def check_run_files(here: Path, files: Mapping[str, bytes], many: bool) -> None:
    names = [name for name, often in STORED.items() for _ in range(often)]
    one = st.one_of([st.tuples(st.just(n), spoilt_file(n, files[n])) for n in names])
    folder = here / "run"
    put(folder, files)

    def body(spoilt_files: list[tuple[str, bytes]]) -> None:
        put(folder, dict(spoilt_files))
        for what in READ:
            with refusal("run files", Unreadable):
                getattr(Run(folder), what)
        put(folder, {name: files[name] for name, _ in spoilt_files})

    generate("run files", st.lists(one, min_size=1, max_size=2), body, many)


def check_stored_configurations(here: Path, files: Mapping[str, bytes], many: bool) -> None:
    folder, name = here / "stored", ".hydra/config.yaml"
    put(folder, files)

    def body(data: bytes) -> None:
        put(folder, {name: data})
        with refusal("stored configurations", InputError):
            values = stored_config(folder)
            assert isinstance(values, dict)
            experiment(values)

    generate("stored configurations", spoilt_file(name, files[name]), body, many)


def check_texts(here: Path, many: bool) -> None:
    path = here / "text"
    known = TEXT.read_bytes()[:3000]
    marks = st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n", b"\0", b"\xed\xa0\x80", b"a"])
    some = st.lists(marks | st.text(max_size=9).map(lambda t: t.encode()) | PIECES).map(b"".join)

    def body(data: bytes) -> None:
        path.write_bytes(data)
        os.utime(path, ns=(MADE["texts"],) * 2)  # one that is as it was is not read again
        with refusal("texts", InputError):
            task = TASKS.default("chars", path=str(path), length=2)
            task.training_batch(0, 1, 2)
            assert task.chance_loss >= 0

    generate("texts", some | spoilt(known), body, many)


# --- checkpoints


@dataclass
class Saved:
    """A run's last checkpoint, and the run that it is of."""

    files: dict[str, bytes]
    loaded: Loaded
    training: Callable[[], Training]


def saved(here: Path, files: Mapping[str, bytes]) -> Saved:
    folder = here / "run"
    put(folder, files)
    loaded = load(folder / "checkpoint")
    spec = experiment(stored_config(folder))
    columns = (spec.task.chance_loss, spec.task.time_steps, spec.columns)
    tracker = Tracker(here / "run", *columns, {}, loaded.values["tracker"])
    read = {path.name: path.read_bytes() for path in loaded.path.iterdir()}
    return Saved(read, loaded, lambda: spec.training(tracker))


def check_checkpoints(here: Path, run: Saved, many: bool) -> None:
    folder = here / "spoilt" / run.loaded.path.name
    each = [st.tuples(st.just(n), spoilt(data)) for n, data in run.files.items()]

    def body(file: tuple[str, bytes]) -> None:
        put(folder, run.files | dict([file]))
        name, data = file
        if data == run.files[name]:
            load(folder.parent)
            return
        with refusal("checkpoints", NothingUsable):
            load(folder.parent)
            raise AssertionError(f"{name} was changed, and nobody saw it")

    generate("checkpoints", st.one_of(each), body, many)


def check_forged_checkpoints(here: Path, run: Saved, many: bool) -> None:
    folder, step = here / "forged", run.loaded.step
    state, tensors = run.files[STATE], run.files[TENSORS]
    forged = st.tuples(st.just(tensors), spoilt_file(STATE, state))
    header = int.from_bytes(tensors[:8], "little") + 8
    heads = spoilt(tensors[:header]).map(lambda head: head + tensors[header:])
    forged |= st.tuples(spoilt(tensors) | heads, st.just(state))

    def body(contents: tuple[bytes, bytes]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        forge(folder, step, tensors=contents[0], state=contents[1])
        with refusal("forged checkpoints", NothingUsable):
            restore(run.training(), load(folder))

    generate("forged checkpoints", forged, body, many)


def check_forged_states(here: Path, run: Saved, many: bool) -> None:
    names = st.sampled_from([*run.loaded.tensors])
    shapes = st.sampled_from([(), (0,), (3,), (2, 2), (625,), (5056,)])
    kinds = st.sampled_from([torch.float32, torch.int64, torch.uint8, torch.bool, torch.bfloat16])
    other = st.dictionaries(names, st.builds(lambda s, k: torch.ones(s, dtype=k), shapes, kinds))
    values = st.just(run.loaded.values) | changed(run.loaded.values, times=2)

    def body(state: tuple[Any, dict[str, torch.Tensor]]) -> None:
        tensors = run.loaded.tensors | state[1]
        if isinstance(state[0], dict):  # as `load` sees to
            with refusal("forged states", NothingUsable):
                training = run.training()
                restore(training, replace(run.loaded, tensors=tensors, values=state[0]))
                training.tracker.finish(training.result())
                assert Run(training.tracker.directory).summary["steps"] == run.loaded.step

    generate("forged states", st.tuples(values, other), body, many)


# --- command lines


class Hung(BaseException):
    """A command that has not ended in time."""


def said(words: list[str]) -> tuple[int, str, str]:
    """Exit code of a command line in this process, and what it wrote to stdout and stderr."""
    handlers = logging.root.handlers[:]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["rnngrad", *words])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = run_command()
            except SystemExit as exit:
                code = exit.code if isinstance(exit.code, int) else 1
    for handler in logging.root.handlers[:]:
        if handler not in handlers:
            handler.close()
    logging.root.handlers[:] = handlers
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command_line(choose: random.Random) -> list[str]:
    """One to three words that may be anything, among those that make a run small."""
    words = [_word(choose) for _ in range(choose.choice([1, 1, 2, 3]))]
    words += [word for word in TINY if choose.random() < 0.97]
    if choose.random() < 0.3:
        choose.shuffle(words)
    return ["-m", *words] if choose.random() < 0.1 else words


def _word(choose: random.Random) -> str:
    dice = choose.random()
    if dice < 0.12:
        return choose.choice(OPTIONS)
    if dice < 0.16:
        return choose.choice([*WORDS, *KEYS])
    prefix, key = choose.choice(PREFIXES), choose.choice([*KEYS, "resume"])
    if prefix == "~" and choose.random() < 0.7:
        return prefix + key
    return f"{prefix}{key}={choose.choice(WORDS)}"


def check_command_lines(here: Path, number: int) -> Counter[int]:
    """Runs so many, each in a folder of its own; how often each exit code came out."""
    choose, codes = random.Random(0), Counter[int]()
    for index in range(number):
        words = command_line(choose)
        shown = str([word[:80] for word in words])
        folder = here / str(index)
        folder.mkdir()
        (folder / f"{CANARY}.py").write_text("open('canary', 'w')\n")
        os.chdir(folder)
        with alarm(40):
            code, out, err = said(words)
        os.chdir(here)
        left = {path.name for path in folder.iterdir()} - {f"{CANARY}.py"}
        codes[code] += 1
        assert code in (0, 2, 3), f"{code} of {shown}: {err}"
        assert "Traceback" not in out + err, f"{shown}: {err}"
        assert "canary" not in left, shown
        if code == 2:
            assert re.fullmatch(r"rnngrad: [^\n]+\n", err) and err[:-1].isprintable(), (shown, err)
            assert not left, f"{left} of {shown}"
        beside = {path.name for path in here.iterdir()} - {str(index), f"{CANARY}.py"}
        assert not beside, f"{beside} of {shown}"
        shutil.rmtree(folder)
    return codes


# --- the claims


def test_no_configuration_is_refused_but_in_one_line(here: Path) -> None:
    check_configurations(many=False)


def test_no_override_is_refused_but_in_one_line(here: Path) -> None:
    check_overrides(many=False)


def test_no_file_of_a_run_is_refused_but_in_one_line(
    here: Path, run_files: dict[str, bytes]
) -> None:
    check_run_files(here, run_files, many=False)


def test_no_stored_configuration_is_refused_but_in_one_line(
    here: Path, run_files: dict[str, bytes]
) -> None:
    check_stored_configurations(here, run_files, many=False)


def test_no_text_is_refused_but_in_one_line(here: Path) -> None:
    check_texts(here, many=False)


def test_no_checkpoint_that_was_changed_is_loaded(here: Path, run_files: dict[str, bytes]) -> None:
    check_checkpoints(here, saved(here, run_files), many=False)


def test_no_forged_checkpoint_is_refused_but_in_one_line(
    here: Path, run_files: dict[str, bytes]
) -> None:
    check_forged_checkpoints(here, saved(here, run_files), many=False)


def test_no_forged_state_is_refused_but_in_one_line(
    here: Path, run_files: dict[str, bytes]
) -> None:
    check_forged_states(here, saved(here, run_files), many=False)


@pytest.mark.parametrize("key", ["a\nb", "\ue000", "\x1b[2J"])
def test_a_state_is_refused_in_one_line_whatever_its_keys_are(
    key: str, here: Path, run_files: dict[str, bytes]
) -> None:
    run = saved(here, run_files)
    values = run.loaded.values | {"extra": {key: 1}}
    with pytest.raises(NothingUsable) as refused:
        restore(run.training(), replace(run.loaded, values=values))
    assert str(refused.value).isprintable()


IMPOSSIBLE: dict[str, list[Any]] = {
    "step": [-1, 1, 3, 2**60],
    "clipped": [-1, 3, 10**400],
    "skipped": [-1, 3],
    "nonfinite": [-1, 3],
    "in_a_row": [-1, 3],
    "loss": [1e305],
    "best": [math.nan],
    "solved_at": [-1, 0, 3, 2**60],
    "evaluation": [{"loss": 10**400, "accuracy": 0.5}, {"loss": -1e305}],
    "row": [{}, {"step": 1}, {"step": -(2**60)}],
}
"""What progress cannot be after the second of two updates."""


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_state_that_no_run_comes_to_is_refused(
    name: str, here: Path, run_files: dict[str, bytes]
) -> None:
    run = saved(here, run_files)
    for value in IMPOSSIBLE[name]:
        progress = run.loaded.values["progress"] | {name: value}
        with pytest.raises(NothingUsable, match=f"of this run: (progress.|eval_)?{name[:4]}"):
            restore(
                run.training(),
                replace(run.loaded, values=run.loaded.values | {"progress": progress}),
            )


def test_files_of_which_more_was_clipped_than_there_is_are_refused(
    here: Path, run_files: dict[str, bytes]
) -> None:
    position = saved(here, run_files).loaded.values["tracker"]
    for clipped in ([1e305, 1], [-1.0, 1], [0.0, -1], [math.inf, 2]):
        with pytest.raises(NothingUsable, match="does not say where files end"):
            Tracker(here / "run", 1.0, 5, (), {}, position | {"clipped": clipped})


def test_a_random_state_of_negative_numbers_is_refused(
    here: Path, run_files: dict[str, bytes]
) -> None:
    run = saved(here, run_files)
    tensors = dict(run.loaded.tensors)
    (state,) = [name for name in tensors if name.startswith("random/python")]
    tensors[state] = -1 - tensors[state]
    with pytest.raises(NothingUsable, match="OverflowError"):
        restore(run.training(), replace(run.loaded, tensors=tensors))


def test_thirty_command_lines_end_as_they_should(here: Path) -> None:
    codes = check_command_lines(here, 30)
    assert codes[2] and codes[0]


@pytest.mark.slow
def test_twenty_thousand_inputs_are_taken_or_refused_in_one_line(
    here: Path, run_files: dict[str, bytes]
) -> None:
    before, start = MADE.total(), time.monotonic()
    run = saved(here, run_files)
    check_configurations(many=True)
    check_overrides(many=True)
    check_texts(here, many=True)
    check_run_files(here, run_files, many=True)
    check_stored_configurations(here, run_files, many=True)
    check_checkpoints(here, run, many=True)
    check_forged_checkpoints(here, run, many=True)
    check_forged_states(here, run, many=True)
    made = MADE.total() - before
    print(f"{made} inputs in {time.monotonic() - start:.0f} s")
    assert made >= 20_000


@pytest.mark.slow
def test_two_hundred_command_lines_end_as_they_should(here: Path) -> None:
    codes = check_command_lines(here, 200)
    print(f"exit codes of 200 command lines: {dict(codes)}")
    assert codes[2] > 100 and codes[0]
