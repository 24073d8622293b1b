"""Published experiments, run again: each can be run, judged and read by others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hydra
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from rnngrad.config import experiment as checked
from rnngrad.launcher import plain, register_python_text, register_run_name
from rnngrad.reproduce import Criterion, Experiment, Published, Quick, Rows, Seen, store
from rnngrad.reproduce.command import main
from rnngrad.reproduce.experiments import EXPERIMENTS
from rnngrad.reproduce.page import kept, page, table
from rnngrad.reproduce.running import commands, run
from rnngrad.reproduce.store import Results
from rnngrad.stored import Unreadable

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
KEPT = sorted(path.stem for path in RESULTS.glob("*.json"))
SWEPT = [name for name, one in EXPERIMENTS.items() if one.sweeps]


def command(
    *words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Exit code, output and errors of ``rnngrad-reproduce``."""
    monkeypatch.setattr("sys.argv", ["rnngrad-reproduce", *words])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def configuration() -> Iterator[None]:
    register_run_name()
    register_python_text()
    with hydra.initialize_config_module("rnngrad.conf", version_base="1.3"):
        yield


def words_of(sweep: str) -> list[str]:
    """The first run of a sweep, as it is typed alone."""
    parsed = OverridesParser.create().parse_overrides(sweep.split())
    words = []
    for one in parsed:
        value = next(iter(one.sweep_string_iterator())) if one.is_sweep_override() else None
        words.append(f"{one.get_key_element()}={value or one.get_value_element_as_str()}")
    return words


@pytest.mark.parametrize("name", SWEPT)
def test_every_sweep_of_an_experiment_is_a_setup_that_can_be_typed(
    name: str, configuration: None
) -> None:
    for sweep in (*EXPERIMENTS[name].sweeps, *EXPERIMENTS[name].quick.sweeps):
        values = plain(hydra.compose("config", words_of(sweep)))
        assert checked(values)
        keys = [key for key in EXPERIMENTS[name].keys.values() if isinstance(key, str)]
        assert all(key.partition(".")[0] in values for key in keys)


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "experiment").glob("*.yaml")), ids=str)
def test_every_setup_cites_what_it_is_after(path: Path) -> None:
    comment = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")][1:]
    assert comment and yaml.safe_load(path.read_text())["defaults"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_criterion_says_what_it_is_compared_with_and_how_that_is_known(name: str) -> None:
    one = EXPERIMENTS[name]
    for criterion in (*one.criteria, *one.quick.criteria):
        assert all(criterion.published) and criterion.statement
    assert one.criteria and one.quick.criteria and one.calibrated and one.settings


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_list_has_name_paper_claim_and_minutes(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said, _ = command("--list", capsys=capsys, monkeypatch=monkeypatch)
    one = EXPERIMENTS[name]
    assert code == 0 and f"{name} ({one.minutes:g} min)" in said
    assert one.paper in said and one.claim in said


def test_listing_starts_neither_matplotlib_nor_hydra() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--list']\n"
        "from rnngrad.reproduce.command import main\nmain()\n"
        "print([m for m in ('matplotlib', 'hydra') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["adding"], f"'adding': must be one of {', '.join(EXPERIMENTS)}"),
        (["irnn_rmsprop", "--seeds", "1,-2"], "--seeds=1,-2: must be whole numbers >= 0, as 0,1,2"),
        (["irnn_rmsprop", "--seeds", "a"], "--seeds=a: must be whole numbers >= 0, as 0,1,2"),
    ],
)
def test_a_wrong_word_is_one_line_that_says_what_may_be(
    words: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, said = command(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert (code, said) == (2, f"rnngrad-reproduce: {line}\n") and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", KEPT)
def test_kept_rows_tell_what_ran_and_name_version_and_seeds(name: str) -> None:
    results = store.read(RESULTS / f"{name}.json")
    names = [EXPERIMENTS[name].name_of(row) for row in results.rows]
    assert len({*names}) == len(names)
    for one in results.made:
        assert one["rnngrad"] and one["torch"] and one["seeds"] and one["day"]
    assert (RESULTS / f"{name}.png").is_file()


@pytest.mark.skipif(not KEPT, reason="nothing is kept yet")
def test_the_page_and_the_readme_are_what_todays_criteria_say_of_the_kept_rows() -> None:
    found = kept(RESULTS)
    experiments = [*EXPERIMENTS.values()]
    written = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert written == page(found, experiments)
    for line in table(found, experiments, "docs/results.md"):
        assert line in (ROOT / "README.md").read_text(encoding="utf-8")


PUBLISHED = Published("3", "a paper, section 1", "paper")
SMALL = Experiment(
    name="small",
    title="A small one",
    paper="nobody",
    claim="It runs.",
    minutes=0.1,
    sweeps=("task=adding task.length=4 cell=rnn cell.hidden_size=3 trainer.steps=3 seed=0,1",),
    keys={"cell": "cell.name", "threshold": ("clip.clip_value", "clip.max_norm")},
    criteria=(
        Criterion("two runs", lambda rows: Seen(str(len(rows)), len(rows) == 2), PUBLISHED),
        Criterion("of 5 steps", lambda rows: Seen("3", set(rows.of("steps")) == {5}), PUBLISHED),
    ),
    quick=Quick(criteria=(), sweeps=("task=adding trainer.steps=1",)),
    draw=lambda rows: None,  # type: ignore[arg-type,return-value]
    settings="small",
    calibrated="never",
)


def test_an_experiment_is_run_once_and_gives_a_row_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(SMALL, tmp_path / "runs", [], quick=False)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("run again"))
    monkeypatch.setattr("rnngrad.reproduce.running.commands", lambda *_, **__: iter(()))
    again = run(SMALL, tmp_path / "runs", [], quick=False)
    assert first.rows == again.rows and len(first.rows) == 2
    assert {(row["seed"], row["cell"], row["threshold"]) for row in first.rows} == {
        (0, "rnn", 1.0),
        (1, "rnn", 1.0),
    }
    seen = [criterion.judge(first.rows) for criterion in SMALL.criteria]
    assert SMALL.verdict(seen) == "partly"
    assert "small: partly" not in page({"small": first}, [SMALL])
    assert "## A small one: partly" in page({"small": first}, [SMALL])


def test_other_seeds_take_the_place_of_its_own() -> None:
    ((*_, seeds, engine, folder),) = commands(SMALL, Path("there"), [7, 8], quick=False)
    assert (seeds, engine, folder) == ("seed=7,8", "engine=stacked", "hydra.sweep.dir=there")


def test_all_some_or_no_criteria_make_the_verdict() -> None:
    yes, no = Seen("", True), Seen("", False)
    assert SMALL.verdict([yes, yes]) == "reproduced"
    assert SMALL.verdict([yes, no]) == "partly"
    assert SMALL.verdict([no, no]) == "not reproduced"
    assert replace(SMALL, finding=True).verdict([no]) == "a finding"


numbers = st.none() | st.floats(-1e9, 1e9).map(lambda x: float(f"{x:.6g}")) | st.integers(0, 10**6)
rows = st.lists(
    st.fixed_dictionaries({"seed": st.integers(0, 5), "cell": st.sampled_from("ab"), "x": numbers}),
    max_size=6,
    unique_by=lambda row: (row["seed"], row["cell"]),
)


@given(older=rows, newer=rows)
def test_what_is_written_is_read_again_and_newer_rows_stand_in_for_older_ones(
    older: list[dict[str, object]], newer: list[dict[str, object]], tmp_path_factory: object
) -> None:
    path = Path(tmp_path_factory.mktemp("kept")) / "small.json"  # type: ignore[attr-defined]
    one = replace(SMALL, keys={"cell": "cell.name"})
    older = sorted(older, key=one.name_of)
    both = Results(Rows(older), ({"day": "1"},)).joined(Results(Rows(newer), ({"day": "2"},)), one)
    store.write(path, both)
    assert store.read(path) == both == both.joined(Results(Rows(newer), ({"day": "3"},)), one)
    for row in newer:
        assert row in both.rows
    names = {one.name_of(row) for row in newer}
    assert [row for row in both.rows if one.name_of(row) not in names] == sorted(
        (row for row in older if one.name_of(row) not in names), key=one.name_of
    )


def test_a_file_of_something_else_is_told_by_name(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps({"rows": 3, "made": []}))
    with pytest.raises(Unreadable, match=r"small\.json"):
        store.read(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_short_form_of_every_experiment_holds(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rnngrad.reproduce", name, "--quick"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
