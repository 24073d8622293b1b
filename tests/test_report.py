"""Reports of made-up runs, so that what they must show is known; and of tapes."""

import csv
import html
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from scipy import stats  # type: ignore[import-untyped]
from torch.nn.utils.rnn import pack_padded_sequence

from rnngrad.bptt import LayerRecord, record
from rnngrad.diagnosis import diagnose_run
from rnngrad.nn import GRU, LSTM
from rnngrad.norms import log10_rms
from rnngrad.report import figure, main, plot, write
from rnngrad.report.curves import losses
from rnngrad.report.exhibit import Exhibit, Saved, Table, code, save
from rnngrad.report.groups import grouped, looks, panels, read
from rnngrad.report.many import at_other_lengths, solving, survival
from rnngrad.report.one import exhibits
from rnngrad.report.page import markdown, page
from rnngrad.report.reading import Reading
from rnngrad.report.several import exhibits as several
from rnngrad.report.several import setups
from rnngrad.report.statistics import kaplan_meier, mean_band, t975, wilson
from rnngrad.report.style import field
from rnngrad.report.sweeps import success, sweeps
from rnngrad.report.tape import rms
from rnngrad.runs import METRICS, Run
from rnngrad.tracking import Result, Tracker

T, EVERY = 30, 10
LAYERS = ("l0", "l1")
GATES = "ifgo"


def made_up(
    path: Path,
    *,
    status: str = "completed",
    steps: int = 40,
    loss: float = 0.1,
    solved_at: int | None = None,
    measures: bool = False,
    columns: Sequence[str] = (),
    **config: Any,
) -> Run:
    """A run whose loss falls from 1 to ``loss``, of two layers if it has measures."""
    path.mkdir(parents=True)
    for name, data in written_files(steps, loss, measures, tuple(columns)).items():
        (path / name).write_bytes(data)
    summary = json.loads((path / "summary.json").read_text())
    summary |= {"status": status, "solved_at": solved_at}
    summary["reason"] = "step 9: the loss is inf" if status == "diverged" else None
    (path / "summary.json").write_text(json.dumps(summary))
    parts: dict[str, Any] = {
        "task": {"name": "adding", "length": T},
        "cell": {"name": "lstm"},
        "clip": {"name": "norm", "max_norm": 2.0},
        "trainer": {"steps": 40, "batch_size": 8},
        "seed": 0,
    }
    for key, value in config.items():
        group, _, name = key.partition("__")
        parts[group] = {**parts[group], name: value} if name else value
    (path / ".hydra").mkdir()
    (path / ".hydra" / "config.yaml").write_text(json.dumps(parts))
    return Run(path)


@cache
def written_files(
    steps: int, loss: float, measures: bool, columns: tuple[str, ...]
) -> dict[str, bytes]:
    """What the tracker writes of such a run; without TensorBoard's file, which takes longest."""
    rng = np.random.default_rng(0)
    layers = LAYERS if measures else LAYERS[:1]
    with TemporaryDirectory() as folder:
        with Tracker(folder, 1 / 6, T, columns) as tracker:
            level = np.geomspace(1, loss, steps)
            for step in range(1, steps + 1):
                norm = 0.5 + (step % 7)
                tracker.updated(level[step - 1], norm, min(1.0, 2 / norm))
                if step == 1 or step % EVERY == 0:
                    row: dict[str, Any] = {"step": step, "loss": level[step - 1], "accuracy": 0.5}
                    row |= {"grad_norm_pre": norm, "grad_norm_post": min(norm, 2.0), "clipped": 1}
                    row |= {"clip_coef": min(1.0, 2 / norm), "clip_threshold": 2.0, "skipped": 0}
                    row |= {column: 0.25 for column in columns}
                    if step % EVERY == 0:
                        row["eval_loss"] = level[step - 1]
                    records = {f"rnn.{layer}": layer_record() for layer in layers}
                    tracker.recorded(step, records)
                    tracker.log(row)
                    if measures:
                        tracker.measured(step, measured(rng))
            audit = {"agc": {"clip_fraction": 0.25, "mean_coef": 0.5}} if measures else {}
            result = Result("completed", steps, loss, loss, 0.5, None, 0.5, clip_audit=audit)
            tracker.finish(result)
        found = Path(folder).iterdir()
        return {p.name: p.read_bytes() for p in found if not p.name.startswith("events")}


def layer_record() -> LayerRecord:
    """Half of the gradient is lost every step."""
    norms = 0.5 ** torch.arange(T - 1, -1, -1, dtype=torch.float64)[:, None].expand(T, 3)
    return LayerRecord(norms, norms / 2, norms * 2)


def measured(rng: np.random.Generator) -> dict[str, Any]:
    lag = -0.2 * np.arange(T)
    share = rng.dirichlet(np.ones(T))
    found: dict[str, Any] = {"input_norm": lag[::-1] - 3, "clip/cosine": 0.99}
    for layer in LAYERS:
        found |= {f"{layer}/lag": lag, f"{layer}/lag_p5": lag - 1, f"{layer}/lag_p95": lag + 1}
        found |= {f"{layer}/lag_cell": lag / 2, f"{layer}/attribution": share}
        found |= {f"{layer}/weight_norm": np.r_[-np.inf, lag[:0:-1]]}
        found |= {f"{layer}/saturated": 0.1, f"{layer}/dead": np.nan}
        found |= {f"{layer}/lyapunov": np.array([-0.4, -0.6])}
        found |= {f"{layer}/jacobian_norm": np.linspace(1, 2, 8)}
        for gate in GATES:
            found |= {f"{layer}/gate_low/{gate}": 0.1, f"{layer}/gate_high/{gate}": 0.2}
            found |= {f"{layer}/spectral_radius/{gate}": 0.9, f"{layer}/sigma_max/{gate}": 1.1}
            found |= {f"{layer}/nonnormality/{gate}": 0.3, f"{layer}/gate_norm/{gate}": lag}
        for name in ("weight_ih", "weight_hh", "bias_hh"):
            parameter = f"parameter/rnn.{name}_{layer}"
            found |= {f"{parameter}/norm": 3.0, f"{parameter}/grad_norm": 0.1}
            found |= {f"{parameter}/update_norm": 3e-3}
    found |= {"noise/signal": 1e-4, "noise/variance": 1e-2}
    return found | {f"clip_effect/{rule}": share / 2 for rule in ("norm", "agc", "value")}


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made_up(tmp_path_factory.mktemp("one") / "run", measures=True)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """3 cells x 3 clips x 2 seeds; an RNN never solves it, and one of them diverges."""
    folder = tmp_path_factory.mktemp("sweep")
    runs = []
    for cell in ("rnn", "lstm", "gru"):
        for clip in ("none", "norm", "value"):
            for seed in (0, 1):
                solved = None if cell == "rnn" else 20 + 10 * seed
                runs.append(
                    made_up(
                        folder / f"adding_{cell}_{clip}_s{seed}-0",
                        measures=clip != "none",
                        loss=0.15 if cell == "rnn" else 0.005,
                        status="diverged"
                        if (cell, clip, seed) == ("rnn", "none", 1)
                        else "completed",
                        solved_at=solved,
                        columns=("audit_agc_coef",) if clip == "value" else (),
                        cell__name=cell,
                        clip__name=clip,
                        seed=seed,
                    )
                )
    return runs


@dataclass(frozen=True)
class Made:
    """A report, and its figures as they were laid out."""

    folder: Path
    figures: list[Figure]


@pytest.fixture(scope="module", params=["one", "many"])
def made_report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of one run with everything measured, and of the sweep."""
    runs = request.getfixturevalue("measured_run" if request.param == "one" else "sweep")
    figures: list[Figure] = []

    def kept(exhibit: Exhibit, out: Path) -> Saved:
        figures.extend([exhibit.figure] if exhibit.figure is not None else [])
        return save(exhibit, out)

    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rnngrad.report.writing.save", kept)
        write([runs] if request.param == "one" else runs, folder)
    return Made(folder, figures)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, where it is not these that matter."""
    monkeypatch.setattr("rnngrad.report.writing.save", lambda exhibit, _: Saved(exhibit, []))


# --- intervals and survival, beside scipy and first principles


def test_the_quantiles_of_t_are_scipys() -> None:
    freedom = np.r_[1:40, 50, 100, 1000]
    assert [t975(n) for n in freedom] == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-5)
    assert math.isnan(t975(0))


def test_a_band_is_scipys_interval_of_what_is_there_and_none_for_one_value() -> None:
    values = np.random.default_rng(0).normal(size=(5, 3))
    values[3:, 1], values[1:, 2] = np.nan, np.nan
    mean, low, high = mean_band(values)
    for column, count in ((0, 5), (1, 3)):
        there = values[:count, column]
        expected = stats.t.interval(0.95, count - 1, there.mean(), stats.sem(there))
        assert (low[column], high[column]) == pytest.approx(expected, rel=1e-4)
    assert mean[2] == values[0, 2] and np.isnan([low[2], high[2]]).all()


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_ends_are_where_the_score_test_just_rejects(counts: tuple[int, int]) -> None:
    successes, trials = counts
    for end in wilson(successes, trials):
        assert 0 <= end <= 1
        distance = abs(successes / trials - end)
        assert distance == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / trials), abs=1e-9)


def redistributed(times: list[int], happened: list[bool]) -> dict[int, float]:
    """Efron's way to the product-limit estimate: the censored hand their mass to the right."""
    order = sorted(range(len(times)), key=lambda i: (times[i], not happened[i]))
    mass = dict.fromkeys(order, 1 / len(times))
    left, found = 1.0, {}
    for place, i in enumerate(order):
        if happened[i]:
            left -= mass[i]
            found[times[i]] = left
        elif later := order[place + 1 :]:
            for j in later:
                mass[j] += mass[i] / len(later)
    return found


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=12))
def test_kaplan_meier_is_efrons_redistribution_to_the_right(runs: list[tuple[int, bool]]) -> None:
    times, happened = [t for t, _ in runs], [h for _, h in runs]
    expected = redistributed(times, happened)
    estimate = kaplan_meier(times, happened)
    assert estimate.time.tolist() == sorted(expected)
    assert estimate.fraction == pytest.approx([expected[t] for t in sorted(expected)], abs=1e-12)


def test_runs_that_never_solve_it_move_the_median_where_a_mean_would_leave_them_out() -> None:
    assert kaplan_meier([10, 20, 30], [True] * 3).median == 20
    assert kaplan_meier([10, 20, 30, 99, 99], [True] * 3 + [False] * 2).median == 30
    assert kaplan_meier([10, 99, 99], [True, False, False]).median == math.inf


# --- set-ups


def test_runs_that_differ_in_their_seed_are_one_setup(sweep: list[Run]) -> None:
    groups = grouped(read(sweep)[0])
    assert len(groups) == 9 and all(len(group.digests) == 2 for group in groups)
    assert {group.name for group in groups} >= {"rnn none", "gru value"}
    assert grouped(read(sweep[:2])[0])[0].name == ""


def test_runs_without_a_configuration_are_no_seeds_of_each_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        made_up(tmp_path / name)
        (tmp_path / name / ".hydra" / "config.yaml").unlink()
    groups = grouped(read([Run(tmp_path / "a"), Run(tmp_path / "b")])[0])
    assert [group.name for group in groups] == ["run=a", "run=b"]


def test_setups_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """One has a key that the other's version of the program did not have."""
    runs = [made_up(tmp_path / "a"), made_up(tmp_path / "b", trainer__new=1)]
    groups = grouped(read(runs)[0])
    assert len({group.name for group in groups}) == 2


def test_setups_that_differ_in_very_much_are_named_after_their_directory(tmp_path: Path) -> None:
    keys = [f"a_long_name_of_a_key_{number}" for number in range(9)]
    made = [
        made_up(tmp_path / f"run_{value}", **{f"trainer__{key}": value for key in keys}, seed=value)
        for value in (0, 1)
    ]
    assert [group.name for group in grouped(read(made)[0])] == ["run_0", "run_1"]
    drawn = figure(made)
    drawn.draw_without_rendering()
    assert [axis.get_title() for axis in drawn.axes] == ["Loss", "run_0", "run_1"]
    assert all(axis.get_position().width > 0.2 for axis in drawn.axes), "there is room for them"


def test_names_of_any_letters_are_shown_as_they_are(tmp_path: Path) -> None:
    names = ("cost_$5_$^", "$y$", "_old")
    made = [made_up(tmp_path / name, solved_at=9, task__note=name) for name in names]
    drawn = [figure(made)]
    for exhibit in several(grouped(read(made)[0]), {}, ""):
        drawn += [exhibit.figure] if exhibit.figure is not None else []
    assert len(drawn) > 3
    for each in drawn:
        each.draw_without_rendering()
        legends = [*each.legends, *(a.get_legend() for a in each.axes if a.get_legend())]
        places = [t for g in legends for t in g.get_texts()]
        places += [t for a in each.axes for t in (a.title, *a.get_xticklabels())]
        for name in names:
            shown = [t for t in places if name.strip("$^") in t.get_text().replace("\\", "")]
            assert shown, name
            assert not any(is_math_text(text.get_text()) for text in shown)


def test_nine_setups_are_three_panels_and_a_line_looks_the_same_in_all(sweep: list[Run]) -> None:
    found = panels(grouped(read(sweep)[0]))
    assert found is not None
    assert [panel.title for panel in found] == ["rnn", "lstm", "gru"]
    assert [list(panel.groups) for panel in found] == [list(found[0].groups)] * 3
    assert sorted(looks(found).values()) == [0, 1, 2]


def test_a_curve_goes_on_after_the_task_was_solved_and_not_after_it_diverged(
    tmp_path: Path,
) -> None:
    made = [
        made_up(tmp_path / "long", loss=0.01, seed=0),
        made_up(tmp_path / "solved", loss=0.001, steps=20, solved_at=20, seed=1),
        made_up(tmp_path / "diverged", loss=0.5, steps=20, status="diverged", seed=2),
    ]
    (group,) = grouped(read(made)[0])
    steps, rows = losses(group)
    assert steps.tolist() == [10, 20, 30, 40]
    assert rows[1, 2:] == pytest.approx([-3, -3]) and np.isnan(rows[2, 2:]).all()
    assert rows[0, -1] == pytest.approx(-2)


def test_what_diverged_counts_as_unsolved_to_the_end_and_what_was_interrupted_until_then(
    tmp_path: Path,
) -> None:
    made = [
        made_up(tmp_path / "a", steps=30, solved_at=30, seed=0),
        made_up(tmp_path / "b", steps=10, status="diverged", seed=1),
        made_up(tmp_path / "c", steps=10, status="interrupted", seed=2),
    ]
    (group,) = grouped(read(made)[0])
    assert survival(group).fraction.tolist() == [0.5], "of the two that were there at step 30"
    assert group.digests[1].loss != group.digests[1].loss, "a diverged run has no last loss"


@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_run_without_a_chance_loss_has_no_line_and_keeps_nobody_elses(
    count: int, tmp_path: Path
) -> None:
    made = [made_up(tmp_path / f"r{n}", measures=n == 0, task__length=n) for n in range(count)]
    summary = made[0].summary | {"chance_loss": None}
    (made[0].path / "summary.json").write_text(json.dumps(summary))
    groups = grouped(read(made)[0])
    found = several(groups, {}, "") if count > 1 else exhibits(Reading(made[0].path))
    drawn = {exhibit.name: exhibit.figure for exhibit in found}
    for each in (figure(made), drawn["loss"]):
        assert each is not None
        labels = [str(label) for axis in each.axes for label in drawn_lines(axis)]
        assert any(label.startswith("chance") for label in labels) == (count > 1)


def test_nothing_is_said_of_steps_that_no_run_has_reached(tmp_path: Path) -> None:
    made = [
        made_up(tmp_path / f"{seed}", steps=10, solved_at=5 if seed == 4 else None, seed=seed,
                status="completed" if seed == 4 else "interrupted", trainer__steps=1000)
        for seed in range(5)
    ]  # fmt: skip
    groups = grouped(read(made)[0])
    assert survival(groups[0]).end == 10
    (row,) = setups(groups).rows
    assert row[4] == "over 10"
    shown = solving(groups)
    assert shown is not None and shown.figure is not None
    (line,) = shown.figure.axes[0].get_lines()
    assert line.get_xdata().tolist() == [0, 5, 10]  # type: ignore[union-attr]


def test_success_is_counted_by_length(tmp_path: Path) -> None:
    made = [
        made_up(tmp_path / f"{length}_{seed}", task__length=length, seed=seed,
                solved_at=10 if seed < 20 / length else None, steps=10)
        for length in (20, 10) for seed in (0, 1)
    ]  # fmt: skip
    shown = success(grouped(read(made)[0]))
    assert shown is not None and shown.data["length"] == [10, 20]
    assert shown.data["solved"] == [2, 1] and shown.data["runs"] == [2, 2]
    assert (shown.data["low"][1], shown.data["high"][1]) == wilson(1, 2)


# --- tables


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("quick")
def test_the_tables_hold_every_run_every_step_and_every_key_that_differs(
    sweep: list[Run], tmp_path: Path
) -> None:
    write(sweep, tmp_path)
    runs = {row["run"]: row for row in rows_of(tmp_path / "runs.csv")}
    assert set(runs) == {run.path.name for run in sweep}
    for run in sweep:
        row = runs[run.path.name]
        assert float(row["eval_loss"]) == run.summary["eval_loss"]
        assert row["cell.name"] == run.config["cell"]["name"]
        assert row["seed"] == str(run.config["seed"]) and "task.length" not in row
        assert "clip.max_norm" not in row, "it is the same wherever there is one"
        assert (row["solved_at"] == "") == (run.summary["solved_at"] is None)
        assert row["status"] == run.summary["status"]
    steps = rows_of(tmp_path / "steps.csv")
    for run in sweep:
        mine = [row for row in steps if row["run"] == run.path.name]
        with (run.path / METRICS).open() as file:
            theirs = list(csv.DictReader(file))
        assert [{k: row[k] for k in theirs[0]} for row in mine] == theirs, "digit by digit"
    absent = [row for row in steps if "_none_" in row["run"]]
    assert absent and all(row["audit_agc_coef"] == "" for row in absent)
    measures = rows_of(tmp_path / "measures.csv")
    assert len(measures) == 5 * sum(run.config["clip"]["name"] != "none" for run in sweep)


@pytest.mark.usefixtures("quick")
def test_the_last_gradient_and_the_slope_of_the_lag_are_in_the_table(
    measured_run: Run, tmp_path: Path
) -> None:
    write([measured_run], tmp_path)
    (row,) = rows_of(tmp_path / "runs.csv")
    assert float(row["lag_slope"]) == pytest.approx(-0.2)
    assert float(row["lag_half_life"]) == pytest.approx(math.log10(2) / 0.2)
    assert float(row["lag_horizon"]) == 15, "0.001 is three decades, 0.2 a step"
    first, last = (float(row[f"log10_hidden_grad_{end}_t"]) for end in ("first", "last"))
    assert (first, last) == pytest.approx(((T - 1) * math.log10(0.5), 0.0))


# --- the page


class Requests(HTMLParser):
    """What a page would load, and where it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster") or (tag == "link" and name == "href"):
                self.loads.append(value or "")
            elif name == "href":
                self.links.append(value or "")


def test_a_report_is_one_page_without_a_request_and_names_files_that_are_there(
    made_report: Made,
) -> None:
    folder = made_report.folder
    assert (folder / "gradients.png").stat().st_size > 10_000
    text = (folder / "index.html").read_text(encoding="utf-8")
    found = Requests()
    found.feed(text)
    assert len(found.loads) > 7 and all(load.startswith("data:") for load in found.loads)
    assert "script" not in found.tags and "http" not in text and "url(" not in text
    for link in found.links:
        if link.startswith("#"):
            assert f'id="{link[1:]}"' in text
        else:
            assert (folder / link).is_file(), link
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (folder / "report.md").read_text())
    assert len(pictures) == text.count("<img") == len(made_report.figures)
    for name in pictures:
        assert (folder / name).is_file() and (folder / name).with_suffix(".svg").is_file()


def test_what_comes_from_a_run_is_escaped() -> None:
    assert "<b>" not in page("<b>", "<b>", [], [], "<b>")
    sections = [Saved(Exhibit("a", "t", "<b>", tables=[Table(["<b>"], [["<b>"]])]), [])]
    written = markdown("<b>", "<b> and `<i>`", sections, [])
    assert written.count("\\<b>") == written.count("<b>") == 5
    assert "`<i>`" in written, "code is not HTML"


@pytest.mark.parametrize("text", ["a", "a`b", "`a``b`", "<a>`"])
def test_code_is_code_with_backticks_of_its_own(text: str) -> None:
    shown = page("", f"see {code(text)} and {code('x')}", [], [], "")
    assert f"<p>see <code>{html.escape(text)}</code> and <code>x</code></p>" in shown
    assert f"see {code(text)} and `x`" in markdown("", f"see {code(text)} and `x`", [], [])


def test_the_same_runs_give_the_same_bytes_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "there"):
        for seed in (0, 1):
            made_up(
                tmp_path / folder / "sweep" / f"adding_s{seed}-0", measures=seed == 0, seed=seed
            )
    written = []
    for folder in ("here", "there"):
        monkeypatch.chdir(tmp_path / folder)
        runs = [Run(f"sweep/adding_s{seed}-0") for seed in (0, 1)]
        write(runs, tmp_path / folder / "out")
        files = sorted((tmp_path / folder / "out").iterdir())
        written.append({path.name: path.read_bytes() for path in files})
    assert written[0].keys() == written[1].keys() and len(written[0]) > 10
    for name, data in written[0].items():
        assert data == written[1][name], name


def test_files_of_an_earlier_report_do_not_stay_and_others_do(
    measured_run: Run, tmp_path: Path
) -> None:
    (tmp_path / "mine.csv").write_text("1")
    write([measured_run], tmp_path)
    earlier = {path.name for path in tmp_path.iterdir()}
    bare = made_up(tmp_path.with_name(f"{tmp_path.name}_bare"))
    write([bare], tmp_path)
    now = {path.name for path in tmp_path.iterdir()}
    assert earlier - now >= {"measures.csv", "lag.png", "lag.svg", "lag.csv"}
    linked = Requests()
    linked.feed((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert now == {*(x for x in linked.links if x[0] != "#"), "index.html", "report.md", "mine.csv"}


def test_a_page_that_is_no_report_is_no_list_of_files_to_remove(
    measured_run: Run, tmp_path: Path, quick: None
) -> None:
    (tmp_path / "mine.csv").write_text("1")
    (tmp_path / "index.html").write_text('<a href="mine.csv">mine</a>')
    write([measured_run], tmp_path)
    assert (tmp_path / "mine.csv").exists()


def test_a_run_with_everything_measured_shows_it_all(measured_run: Run) -> None:
    names = {exhibit.name for exhibit in exhibits(Reading(measured_run.path))}
    assert names >= {
        "summary", "verdict", "loss", "through_time", "heatmap", "lag", "norms", "thresholds",
        "audit", "clip_effect", "layers", "contribution", "inputs", "gate_norms", "gates",
        "updates", "spectrum", "lyapunov", "noise",
    }  # fmt: skip
    assert "left_out" not in names


IN_THE_TABLES = {"gradients", "gates", "updates", "spectrum", "audit", "heatmaps"}
"""Figures of what runs.csv and measures.csv have, or the figures and CSVs of single runs."""


def test_every_curve_is_in_a_csv(made_report: Made) -> None:
    shown = {path.stem for path in made_report.folder.glob("*.png")}
    for name in shown - IN_THE_TABLES:
        assert len(rows_of(made_report.folder / f"{name}.csv")) > 1, name


@pytest.mark.parametrize(
    ("name", "column", "quantity", "place"),
    [
        ("lag", "p95", "lag_p95", "lag"),
        ("lag", "log10_cell", "lag_cell", "lag"),
        ("contribution", "log10_weight_norm", "weight_norm", "t"),
        ("contribution", "attribution", "attribution", "t"),
        ("gate_norms", "log10_f", "gate_norm/f", "t"),
        ("lyapunov", "lyapunov", "lyapunov", "index"),
        ("lyapunov", "jacobian_norm", "jacobian_norm", "index"),
        ("inputs", "log10_input", "input_norm", "t"),
        ("heatmap", "log10_hidden", "", "t"),
    ],
)
def test_the_csv_has_what_was_measured_at_its_step_layer_and_place(
    measured_run: Run, name: str, column: str, quantity: str, place: str
) -> None:
    (data,) = (e.data for e in exhibits(Reading(measured_run.path)) if e.name == name)
    found = {
        key: value
        for *key_, value in zip(data["step"], data.get("layer", [""] * len(data["step"])),
                                data[place], data[column], strict=True)
        for key in [tuple(key_)] if not np.isnan(value)
    }  # fmt: skip
    expected: dict[tuple[int, str, int], float] = {}
    for layer in LAYERS if "layer" in data else [""]:
        if quantity:
            steps = measured_run.measures["step"]
            field_ = measured_run.measures[f"{layer}/{quantity}".lstrip("/")]
        else:
            steps, field_ = measured_run.bptt[layer].step, measured_run.bptt[layer].hidden
        for step, row in zip(steps, field_, strict=True):
            expected |= {(step, layer, i): value for i, value in enumerate(row)}
    assert found == expected


def test_the_csvs_of_a_sweep_have_its_means(sweep: list[Run]) -> None:
    groups = grouped(read(sweep)[0])
    shown = sweeps(groups)
    assert shown is not None
    rows = list(zip(*(shown.data[k] for k in ("key", "value", "by", "runs")), strict=True))
    assert ("cell.name", "rnn", "clip=none", 1) in rows, "the other diverged"
    place = rows.index(("cell.name", "gru", "clip=norm", 2))
    assert shown.data["mean_log10_loss"][place] == pytest.approx(math.log10(0.005))
    solved = solving(groups)
    assert solved is not None
    staircase = [row for row in zip(*solved.data.values(), strict=True) if row[0] == "gru norm"]
    assert [row[1:] for row in staircase] == [(0, 0), (20, 50), (30, 100), (40, 100)]


def test_what_was_not_measured_is_left_out_with_the_preset_that_measures_it(
    tmp_path: Path,
) -> None:
    found = {exhibit.name: exhibit for exhibit in exhibits(Reading(made_up(tmp_path / "a").path))}
    assert {"loss", "heatmap", "norms"} <= set(found) and "lag" not in found
    said = found["left_out"].text
    assert "lag-resolved curve (`measure=standard` measures it, unless" in said
    assert "Lyapunov exponents and one-step Jacobian (`measure=full` measures it)" in said


def test_updates_are_shown_also_where_gradients_were_not_measured(tmp_path: Path) -> None:
    with Tracker(tmp_path, 1 / 6, T) as tracker:
        for step in (1, 2):
            sizes = {"norm": 2.0, "update_norm": 4e-3}
            tracker.measured(step, {f"parameter/weight/{k}": size for k, size in sizes.items()})
    shown = next(e for e in exhibits(Reading(tmp_path)) if e.name == "updates")
    assert shown.tables[0].rows == [("weight", "2", "2", "0.002")]


def test_the_verdict_comes_with_its_findings_the_worst_first(tmp_path: Path) -> None:
    run = made_up(tmp_path / "a")
    findings = [
        {"symptom": "quiet", "level": "ok", "value": 1, "threshold": 2, "evidence": "e",
         "steps": [], "remedies": []},
        {"symptom": "loud", "level": "alarm", "value": None, "threshold": 1e-3, "evidence": "e",
         "steps": list(range(9)), "remedies": ["cell=lstm cell.forget_bias=1", "other words"],
         "in_place_of": ["cell=rnn", ""]},
    ]  # fmt: skip
    summary = run.summary | {
        "verdict": "vanishing",
        "diagnosis": {"verdict": "vanishing", "findings": findings},
    }
    (run.path / "summary.json").write_text(json.dumps(summary))
    shown = next(e for e in exhibits(Reading(run.path)) if e.name == "verdict")
    assert shown.title == "Verdict: vanishing"
    loud, quiet = shown.tables[0].rows
    assert loud[1:4] == ("loud", "-", "0.001") and quiet[1] == "quiet"
    tried = "`cell=lstm cell.forget_bias=1` in place of `cell=rnn`, other words"
    assert loud[5:] == ("0, 1, ... 8", tried)


def test_a_run_that_has_no_diagnosis_yet_gets_one_of_what_is_there(measured_run: Run) -> None:
    shown = next(e for e in exhibits(Reading(measured_run.path)) if e.name == "verdict")
    expected = diagnose_run(measured_run)
    assert shown.title == f"Verdict up to step 40: {expected.verdict}"
    assert {row[1] for row in shown.tables[0].rows} == {f.symptom for f in expected.findings}


@pytest.mark.usefixtures("quick")
def test_failed_and_diverged_runs_are_listed_with_their_reasons(
    sweep: list[Run], tmp_path: Path
) -> None:
    write(sweep, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| adding_rnn_none_s1-0 | diverged | 40 | step 9: the loss is inf |" in text
    assert "1 of 18 runs failed or diverged" in text


def test_every_axis_says_what_it_shows_and_no_legend_or_title_is_in_the_way(
    made_report: Made,
) -> None:
    assert len(made_report.figures) > 6
    for each in made_report.figures:
        panels_ = each.axes
        boxes = [axis.get_position() for axis in panels_]
        for axis, box in zip(panels_, boxes, strict=True):
            row = [a for a, b in zip(panels_, boxes, strict=True) if abs(b.y0 - box.y0) < 1e-3]
            column = [a for a, b in zip(panels_, boxes, strict=True) if abs(b.x0 - box.x0) < 1e-3]
            assert any(a.get_ylabel() for a in row), f"{axis}: what goes up"
            if axis.get_label() != "<colorbar>":
                assert any(a.get_xlabel() for a in column), f"{axis}: what goes across"
        legends = [*each.legends, *(a.get_legend() for a in panels_ if a.get_legend())]
        inside = [axis.get_window_extent() for axis in panels_]
        for legend in legends:
            extent = legend.get_window_extent()
            assert not any(extent.overlaps(box) for box in inside), "a legend covers a panel"
        whole = each.bbox.padded(1)
        extents = [t.get_window_extent() for g in legends for t in g.get_texts()]
        for axis in panels_:
            sides = (axis.xaxis.get_tightbbox(), axis.yaxis.get_tightbbox())  # with their labels
            extents += [side for side in sides if side]
            extents += [axis.title.get_window_extent()] if axis.get_title() else []
        for extent in extents:
            assert whole.contains(extent.x0, extent.y0), extent
            assert whole.contains(extent.x1, extent.y1), extent


def test_a_field_shows_zero_black_and_beyond_the_end_grey() -> None:
    drawn = Figure(figsize=(4, 3), dpi=100)
    axis = drawn.add_axes((0, 0, 1, 1))
    values = np.full((2, 3), -1.0)
    values[0, 0], values[1, 2] = -np.inf, np.nan
    field(axis, [1, 2], values, -2, 0)
    axis.set(xticks=[], yticks=[])
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    assert pixels[250, 100].tolist() == [0, 0, 0]
    assert pixels[50, 300].tolist() == [217, 217, 217]
    assert pixels[150, 100].tolist() == [33, 145, 140], "the middle of viridis"


def test_the_loss_figure_marks_chance_solving_and_the_updates_that_were_clipped(
    tmp_path: Path,
) -> None:
    run = made_up(tmp_path / "a", solved_at=30)
    shown = next(e for e in exhibits(Reading(run.path)) if e.name == "loss")
    assert shown.figure is not None
    axis, strip = shown.figure.axes
    levels = {line.get_label(): line for line in axis.get_lines()}
    assert levels["chance, 0.1667"].get_ydata() == pytest.approx([1 / 6, 1 / 6])
    assert levels["solved at 30"].get_xdata() == [30, 30]
    (stairs,) = strip.patches
    assert isinstance(stairs, StepPatch)
    heights, *_ = stairs.get_data()
    clipped = np.array([0.5 + (step % 7) > 2 for step in range(1, 41)])
    assert heights == pytest.approx(100.0 * clipped)


def test_suggested_thresholds_clip_the_fraction_they_say(tmp_path: Path) -> None:
    run = Reading(made_up(tmp_path / "a").path)
    shown = next(e for e in exhibits(run) if e.name == "thresholds")
    norms = 10.0 ** run.updates["log10_grad_norm"]
    assert len(shown.tables[0].rows) > 2
    for override, _, fraction in shown.tables[0].rows:
        threshold = float(override.strip("`").split("=")[-1])
        assert "norm_type" not in override
        above = 100 * np.mean(norms > threshold * (1 + 1e-6))
        assert above == pytest.approx(float(fraction.split()[0]), abs=0.6)


def test_thresholds_of_the_l2_norm_say_so_to_a_run_with_another_norm(tmp_path: Path) -> None:
    run = Reading(made_up(tmp_path / "a", clip__norm_type="inf").path)
    found = {exhibit.name: exhibit for exhibit in exhibits(run)}
    for override, *_ in found["thresholds"].tables[0].rows:
        assert override.endswith(" clip.norm_type=2`")
    assert "may be of something else than this norm" in found["norms"].text


@pytest.mark.parametrize(
    "rates", [(1e-4, 4e-3, 5e-3), (1e-4, 1.1e-4, 1.2e-4, 2e-3), (0.001, 0.0011, 0.0012), (1, 9)]
)
@pytest.mark.parametrize("keys", [1, 3])
def test_ticks_of_swept_values_do_not_run_into_each_other(
    rates: tuple[float, ...], keys: int, tmp_path: Path
) -> None:
    made = [
        made_up(tmp_path / f"{rate}_{other}", task__rate=rate, task__b=other, task__c=other)
        for rate in rates
        for other in range(1 if keys == 1 else 2)
    ]
    shown = sweeps(grouped(read(made)[0]))
    assert shown is not None and shown.figure is not None
    drawn = shown.figure
    drawn.draw_without_rendering()
    (axis,) = (axis for axis in drawn.axes if axis.get_xlabel() == "task.rate")
    labels = [label for label in axis.get_xticklabels() if label.get_text()]
    texts = [label.get_text() for label in labels]
    assert texts[0] == f"{rates[0]:g}" and texts[-1] == f"{rates[-1]:g}"
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_a_band_over_two_seeds_does_not_flatten_the_lengths(tmp_path: Path) -> None:
    made = []
    for seed in (0, 1):
        run = made_up(tmp_path / f"{seed}", seed=seed)
        scores = {"10": {"loss": 0.1 * 10**-seed}, "20": {"loss": 0.2}}
        summary = run.summary | {"eval_at": scores}
        (run.path / "summary.json").write_text(json.dumps(summary))
        made.append(run)
    shown = at_other_lengths(grouped(read(made)[0]))
    assert shown is not None and shown.figure is not None
    (axis,) = shown.figure.axes
    low, high = axis.get_ylim()
    assert 1e-3 < low and high < 10, "Student's t with one degree of freedom is decades wide"


def test_a_noise_scale_that_is_negative_throughout_is_no_empty_figure(tmp_path: Path) -> None:
    with Tracker(tmp_path, 1 / 6, T) as tracker:
        for step in (1, 2):
            tracker.measured(step, {"noise/signal": -1e-4, "noise/variance": 1e-2})
    found = {exhibit.name: exhibit for exhibit in exhibits(Reading(tmp_path))}
    assert "noise" not in found and "came out negative" in found["left_out"].text


# --- the command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "'nowhere': no run in this directory"),
        ([""], "'': no run in this directory"),
        (["run", "--out", "/dev/null/x"], "--out=/dev/null/x: cannot be written"),
        (["broken"], "broken: a run's files cannot be read"),
    ],
)
def test_the_report_says_in_one_line_what_it_cannot_do(
    arguments: list[str],
    says: str,
    measured_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(measured_run.path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    monkeypatch.setattr("sys.argv", ["rnngrad-report", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1 and says in said


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", "{}"),
        (METRICS, "step,loss\n1,x\n"),
        ("bptt.json", "{"),
        (".hydra/config.yaml", "a: [\n"),
        (".hydra/config.yaml", ""),
    ],
)
def test_a_broken_file_is_told_from_one_that_is_not(
    file: str, content: str, tmp_path: Path
) -> None:
    runs = [made_up(tmp_path / name) for name in ("bad", "good")]
    (tmp_path / "bad" / file).write_text(content)
    digests, unreadable = read(runs)
    assert [digest.label for digest in digests] == ["good"] and list(unreadable) == ["bad"]
    assert unreadable["bad"] and "\n" not in unreadable["bad"]


@pytest.mark.usefixtures("quick")
def test_a_run_that_cannot_be_read_is_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a_bad", "b", "c"):
        made_up(tmp_path / name)
    (tmp_path / "a_bad" / "bptt.json").write_text("{")
    monkeypatch.setattr("sys.argv", ["rnngrad-report", str(tmp_path)])
    main()
    out, said = capsys.readouterr()
    assert said.count("\n") == 1 and "rnngrad-report: a_bad: left out, its files cannot" in said
    assert out.count("completed") == 2 and "a_bad" not in out
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| a_bad | unreadable | - |" in text and "2 runs of 1 set-ups: 2 completed" in text


@pytest.mark.usefixtures("quick")
def test_a_run_named_twice_is_reported_once(
    measured_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(measured_run.path)
    monkeypatch.setattr("sys.argv", ["rnngrad-report", path, path])
    main()
    out = capsys.readouterr().out
    assert out.count("completed") == 1
    assert "figure       report/gradients.png\nreport       report/index.html\n" in out


@pytest.mark.usefixtures("quick")
def test_of_very_many_runs_the_first_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rnngrad.report.command.LINES", 2)
    for name in "abcd":
        made_up(tmp_path / name, steps=1)
    monkeypatch.setattr("sys.argv", ["rnngrad-report", str(tmp_path), "--out", str(tmp_path / "o")])
    main()
    out = capsys.readouterr().out
    assert out.count("completed") == 2 and f"... and 2 more: {tmp_path / 'o' / 'runs.csv'}" in out
    assert len(rows_of(tmp_path / "o" / "runs.csv")) == 4


@pytest.mark.parametrize("count", [1, 5, 12])
def test_a_figure_has_a_panel_a_run_or_one_for_many(measured_run: Run, count: int) -> None:
    drawn = figure([measured_run] * count)
    assert len(drawn.axes) == (1 + count if count <= 5 else 2)
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in drawn.axes)


@pytest.mark.parametrize("together", [False, True])
def test_runs_that_have_logged_nothing_yet_have_a_report(together: bool, tmp_path: Path) -> None:
    for name in ("a", "b"):
        with Tracker(tmp_path / name, 1 / 6, 6):
            pass
    runs = [Run(tmp_path / "a"), Run(tmp_path / "b")] if together else [Run(tmp_path / "a")]
    written = write(runs, tmp_path / "report")
    assert "failed" in written.page.read_text(encoding="utf-8")


# --- a tape of one's own


def drawn_lines(axis: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axis.get_lines()}


@pytest.fixture(autouse=True)
def _close_figures() -> Any:
    yield
    plt.close("all")


def test_a_plot_of_a_tape_has_a_panel_a_layer_and_direction_with_the_tapes_norms() -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"rnn": LSTM(3, 4, num_layers=2, bidirectional=True)})
    with record(model) as tape:
        model["rnn"](torch.randn(9, 2, 3))[0].square().sum().backward()
    axes = plot(tape).axes
    assert [axis.get_title() for axis in axes] == list(tape)
    for axis in axes:
        layer = tape[axis.get_title()]
        total = drawn_lines(axis)[r"total, $\partial L/\partial h_t$"].get_ydata()
        assert total == pytest.approx(log10_rms(layer.hidden_norm).numpy(), abs=1e-12)
        assert layer.cell_norm is not None
        cell = drawn_lines(axis)[r"cell, $\partial L/\partial c_t$"].get_ydata()
        assert cell == pytest.approx(log10_rms(layer.cell_norm).numpy(), abs=1e-12)
        assert axis.get_xlabel() == "time step $t$"
    assert axes[0].get_ylabel()


def test_packed_sequences_are_averaged_where_they_are() -> None:
    torch.manual_seed(0)
    gru, lengths = GRU(2, 3), [5, 3]
    with record(gru) as tape:
        _, h = gru(pack_padded_sequence(torch.randn(5, 2, 2), lengths))
        h.square().sum().backward()
    norm = tape["l0"].hidden_norm.numpy()
    expected = [math.log10(math.sqrt(np.mean(norm[t, : 2 if t < 3 else 1] ** 2))) for t in range(5)]
    assert rms(norm) == pytest.approx(expected, abs=1e-12)
    (axis,) = plot(tape).axes
    shown = drawn_lines(axis)[r"total, $\partial L/\partial h_t$"].get_ydata()
    assert shown == pytest.approx(expected, abs=1e-12)


@given(st.integers(-250, 250), st.integers(1, 4))
def test_the_mean_over_the_batch_neither_under_nor_overflows(exponent: int, batch: int) -> None:
    norm = np.full((2, batch), 3.0) * 10.0**exponent
    norm[1] = 0.0
    level = rms(norm)
    assert level[0] == pytest.approx(math.log10(3) + exponent, abs=1e-9) and level[1] == -math.inf


def test_a_gradient_that_is_nan_is_not_taken_for_the_end_of_a_sequence() -> None:
    norm = np.ones((3, 2))
    norm[1, 0] = np.nan
    assert rms(norm).tolist() == [0.0, pytest.approx(math.nan, nan_ok=True), 0.0]
    assert np.isnan(rms(np.full((2, 1), np.nan))).all()


def test_a_decoder_called_step_by_step_is_one_curve_and_longer_calls_one_each() -> None:
    torch.manual_seed(0)
    cell = GRU(2, 3)
    for length, count in ((1, 6), (4, 3)):
        with record(cell) as tape:
            h, loss = None, torch.zeros(())
            for _ in range(count):
                y, h = cell(torch.randn(length, 1, 2), h)
                loss = loss + y.square().sum()
            loss.backward()
        (axis,) = plot(tape).axes
        lines = [line for line in axis.get_lines() if "total" in str(line.get_label())
                 or "call" in str(line.get_label())]  # fmt: skip
        assert axis.get_title() == f"l0 ({count} calls)"
        assert len(lines) == (1 if length == 1 else count)
        assert len(lines[0].get_ydata()) == (count if length == 1 else length)
        assert ("call" in axis.get_xlabel()) == (length == 1)


def test_a_deep_stack_shares_one_panel() -> None:
    lstm = LSTM(2, 2, num_layers=14)
    with record(lstm) as tape:
        lstm(torch.randn(3, 1, 2))[0].sum().backward()
    (axis,) = plot(tape).axes
    assert [line.get_label() for line in axis.get_lines()] == list(tape)


def test_exact_zeros_are_ticks_at_the_bottom() -> None:
    lstm = LSTM(2, 2)
    with record(lstm) as tape:
        lstm(torch.randn(4, 1, 2))[0][-1].sum().backward()
    (axis,) = plot(tape).axes
    ticks = drawn_lines(axis)["a norm of exactly 0"]
    assert ticks.get_xdata().tolist() == [0, 1, 2], "nothing arrives directly before the last step"


def test_a_tape_without_a_record_says_so() -> None:
    lstm = LSTM(2, 2)
    with record(lstm) as tape:
        with pytest.raises(ValueError, match="the tape is empty"):
            plot(tape)
        output, _ = lstm(torch.randn(4, 1, 2))
        with pytest.raises(RuntimeError, match="call loss.backward"):
            plot(tape)
        output.sum().backward()
