"""Claims about sweeps of very many runs, tried on few."""

import csv
from pathlib import Path

import pytest

from rnngrad.config import experiment
from rnngrad.report import sweeps, write, writing
from rnngrad.runs import SUMMARY, Run, find_runs
from rnngrad.stored import Unreadable, _tree, yaml_mapping
from rnngrad.tracking import summarize, sweep
from tests.simulated import simulate
from tests.sweeps import make_run


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("simulated") / "runs"
    folder.mkdir()
    simulate(folder, 30)
    return [Run(path) for path in find_runs(folder)]


def test_a_simulated_run_reads_as_the_one_that_its_name_says(simulated: list[Run]) -> None:
    assert len(simulated) == 30
    for run in simulated:
        assert experiment(run.config).run_name == run.path.name
        assert run.summary["status"] and len(run.metrics["step"]) and run.bptt and run.measures


def test_the_folders_that_a_run_makes_are_not_searched_for_runs(tmp_path: Path) -> None:
    for inner in ("a", "a/checkpoint/step-1", "a/.hydra", "a/more/b", "checkpoint"):
        (tmp_path / inner).mkdir(parents=True, exist_ok=True)
        (tmp_path / inner / SUMMARY).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)]
    assert found == ["a", "a/more/b", "checkpoint"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1\n",
        "a: 1",
        "a: 1\na: 2\n",
        "a:\n  b: 1\n  c: [1, 2.5, null]\nd:\n- 1\n- x: y\ne: {}\n",
        "a: x\n  y\nb: 'it''s'\n",
        "a: 'x\nb: y'\n",
        'a: "x\nb: y"\n',
        "a: |\n  b: 1\n\n  c\nd: 1\n",
        "a: [1,\nb: 2]\n",
        "a: &x 1\nb: *x\n",
        "a: &x 1\nb: 2\n",
        "a: 1\n---\nb: 2\n",
        "a: 1\n...\n",
        "a: 1\rb: 2\n",
        "a: 1\u2028b: 2\n",
        "a: 1\n# b: 2\nc: 3\n",
        "yes: 1\nno: 2\n",
        "a:\n  1: x\n",
        "a:\n  yes: x\n  b: .inf\n  c: -0.0\n",
        "a: .nan\n",
        "a: !!python/name:os.system\n",
        "a: 2026-11-30\nb: 1_000\nc: 0x1f\nd: 1e3\n",
        "a: - b\n",
        "- a\nb: 1\n",
        "a:\n  b: 1\n  b: 2\n",
    ],
)
def test_a_configuration_read_by_its_entries_is_the_same_as_whole(
    text: str, tmp_path: Path
) -> None:
    def outcome(read: object) -> str:
        try:
            tree = read()  # type: ignore[operator]
        except Unreadable as error:
            return str(error)
        mapping = isinstance(tree, dict) and all(isinstance(key, str) for key in tree)
        return repr(tree) if mapping else "refused"

    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode())
    whole = outcome(lambda: _tree(path, text))
    for _ in range(2):  # the second time from what was kept
        found = outcome(lambda: yaml_mapping(path))
        assert found == whole or (whole == "refused" and "mapping" in found or "key" in found)


def test_what_is_done_to_a_configuration_is_not_done_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a:\n  b: [1]\n")
    yaml_mapping(path)["a"]["b"].append(2)
    assert yaml_mapping(path) == {"a": {"b": [1]}}


def test_of_many_values_neighbours_are_taken_together() -> None:
    assert sweeps._binned([1, 2, 3]) == [[1], [2], [3]]
    bins = sweeps._binned(range(1000))
    assert len(bins) == sweeps.BINS and {len(values) for values in bins} == {25}
    assert [value for values in bins for value in values] == [*range(1000)]


def test_a_report_of_very_many_runs_is_a_table_of_runs_and_one_of_setups(
    simulated: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "IN_STEPS", 29)
    page = write(simulated, tmp_path).page.read_text()
    assert "steps.csv and measures.csv are not written" in page
    assert not (tmp_path / "steps.csv").exists() and not (tmp_path / "measures.csv").exists()
    with (tmp_path / "runs.csv").open() as file:
        assert len([*csv.DictReader(file)]) == 30
    with (tmp_path / "setups.csv").open() as file:
        setups = [*csv.DictReader(file)]
    assert sum(int(row["runs"]) for row in setups) == 30
    assert sorted(row["cell.name"] for row in setups) == ["lstm", "rnn", "rnn"]
    assert all(float(row["log10_hidden_grad_first_t_median"]) < 0 for row in setups)


def test_tensorboard_s_tables_end_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "LINES", 2)
    runs = [make_run(tmp_path / f"r{i}", lr=1e-3 * 2**i) for i in range(4)]
    target = summarize(tmp_path, runs)
    (events,) = target.glob("events.out.tfevents.*")
    said = events.read_bytes()
    assert b"and 2 more runs: see rnngrad-report" in said
    assert b"and 2 more settings: see rnngrad-report" in said
    assert b"optim.lr: 4 values" in said
