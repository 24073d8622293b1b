"""What TensorBoard is given: read back from event files, and through its own server."""

import gc
import io
import json
import math
import urllib.request
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from rnngrad.bptt import Tape, record
from rnngrad.nn import GRU, RNN, unroll
from rnngrad.norms import log10_rms
from rnngrad.runs import Run, find_runs
from rnngrad.tracking import Result, Tracker, heatmap, log, summarize
from rnngrad.tracking.events import _record
from rnngrad.tracking.heatmap import picture
from rnngrad.tracking.hparams import flatten, group_name
from rnngrad.tracking.loop import KEPT, _Seen
from rnngrad.tracking.profile import BINS, over_time
from rnngrad.tracking.scalars import NoiseScale, of_measures
from rnngrad.tracking.sweep import CURVES, Trace, group_seeds
from tests.sweeps import (
    CELLS,
    CHANCE,
    CLIPS,
    LENGTH,
    SEEDS,
    fetch,
    loss_at,
    make_run,
    make_sweep,
    quantities,
    settings,
    tensorboard,
)

ALL = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
OF_SESSIONS = {"allowedStatuses": ALL, "colParams": [], "startIndex": 0, "sliceSize": 100}


def events(path: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(path), size_guidance={"histograms": 0, "images": 0})
    accumulator.Reload()
    return accumulator


# --- pictures


FIELD = slice(64, 64 + 250), slice(76, 76 + 464)
"""Where the field is in a picture without row names."""


def test_a_heatmap_shows_late_steps_on_top_zero_black_and_nan_red() -> None:
    field = np.full((3, 10), -5.0)
    field[:, 9], field[:, 0], field[2, 5] = 2.0, -np.inf, np.nan
    image = heatmap(np.array([1, 5, 9]), field, "title")
    inside = image[FIELD]
    assert inside[0, 5].tolist() == [253, 231, 37]
    assert inside[-1, 5].tolist() == [0, 0, 0]
    assert inside[125 - 10, -1].tolist() == [220, 20, 20]
    assert image.dtype == np.uint8 and image.ndim == 3
    assert image.shape[1] == 640, "twice TensorBoard's card"


@given(st.floats(-30, 10), st.floats(-30, 10), st.integers(1, 50), st.integers(1, 400))
def test_a_value_has_the_same_colour_in_every_heatmap(
    value: float, other: float, steps: int, length: int
) -> None:
    alone = heatmap(np.array([1]), np.array([[value]]), "")[FIELD]
    field = np.full((steps, length), other)
    field[0, 0] = value
    beside = heatmap(np.arange(steps), field, "another title")[FIELD]
    assert (alone == alone[0, 0]).all()
    if length <= 250:
        assert beside[-1, 0].tolist() == alone[0, 0].tolist()


def test_a_field_larger_than_the_picture_is_sampled_as_a_small_one_is_enlarged() -> None:
    small = np.random.default_rng(0).uniform(-12, 2, (58, 50))
    small[:, 30:] = np.where(np.arange(58)[:, None] % 2, np.nan, small[:, 30:])
    large = small.repeat(16, 0).repeat(25, 1)  # 928 x 1250 in 464 x 250
    a, b = (heatmap(np.arange(len(f)), f, "")[FIELD] for f in (small, large))
    inner = np.ix_(np.arange(2, 250, 5), np.arange(4, 464, 8))  # the middle of each value
    assert a[inner].tolist() == b[inner].tolist()
    assert [230, 230, 230] in a[inner].reshape(-1, 3).tolist()


def test_what_is_not_there_is_grey_where_rows_are_no_time_steps() -> None:
    field = np.array([[np.nan, 0.0], [0.0, np.nan]])
    drawn = picture(np.array([1, 2]), field, "", rows=["a", "b"], absent=True)
    image = np.asarray(drawn.convert("RGB"))[FIELD]
    assert image[0, -1].tolist() == image[-1, 0].tolist() == [230, 230, 230]
    assert image[0, 0].tolist() == image[-1, -1].tolist() != [230, 230, 230]


def test_values_with_a_sign_are_white_at_zero_and_mirror_in_brightness() -> None:
    field = np.array([[-5.0, 0.0, 5.0]])
    options: dict[str, Any] = {"low": -5.0, "high": 5.0, "diverging": True}
    image = heatmap(np.array([1]), field, "", **options)[FIELD].astype(int)
    low, middle, high = image[-10, 9], image[125, 9], image[9, 9]
    assert middle.min() > 240 and low[2] > low[0] and high[0] > high[2]


# --- numbers


def test_measures_become_few_scalars_with_known_values() -> None:
    found = of_measures(quantities("lstm"))
    for layer in ("l0", "l1"):
        assert found[f"lag/{layer}_slope_decades_per_step"] == pytest.approx(-0.1)
        assert found[f"lag/{layer}_horizon_steps"] == LENGTH - 1  # -1.9 at the end
        assert found[f"recurrence/{layer}_spectral_radius"] == pytest.approx(0.8)
        assert found[f"saturation/{layer}_gates_fraction"] == pytest.approx(0.3)
        assert found[f"saturation/{layer}_hidden_fraction"] == 0.25
        # sqrt(.003^2 + .004^2) beside sqrt(3^2 + 4^2)
        assert found[f"update_ratio/{layer}_log10"] == pytest.approx(-3)
        assert f"saturation/{layer}_dead_fraction" not in found, "NaN: not a relu"
    assert found["clip/cosine"] == 0.9
    assert len(found) == 2 * 6 + 1
    assert of_measures(quantities("rnn"))["lag/l0_horizon_steps"] == 5  # 10^-3 at lag 5


@pytest.mark.parametrize("missing", ["lag", "gate_low", "spectral_radius", "saturated", "norm"])
def test_what_a_preset_does_not_measure_is_left_out(missing: str) -> None:
    known = quantities("lstm")
    fewer = {name: v for name, v in known.items() if f"/{missing}" not in name}
    if missing == "norm":
        fewer = {name: v for name, v in known.items() if not name.startswith("parameter/")}
    before, after = of_measures(known), of_measures(fewer)
    assert after.items() < before.items()


def test_a_vanished_update_is_minus_infinity_and_full_presets_numbers_are_taken() -> None:
    found = of_measures(
        {
            "parameter/readout.weight/norm": 2.0,
            "parameter/readout.weight/update_norm": 0.0,
            "l0/lyapunov": np.array([-0.5, -1.0]),
            "l0/lag": np.full(5, np.nan),
        }
    )
    assert found == {
        "update_ratio/readout_log10": -math.inf,
        "recurrence/l0_lyapunov_nats_per_step": -0.5,
    }


def test_the_noise_scale_divides_means_and_not_single_steps() -> None:
    noise = NoiseScale()
    assert noise.add({}) == {}
    assert noise.add({"noise/signal": -1.0, "noise/variance": 6.0}) == {}, "no scale yet"
    assert noise.add({"noise/signal": math.nan, "noise/variance": 1.0}) == {}
    assert noise.add({"noise/signal": 4.0, "noise/variance": 3.0}) == {
        "noise/scale_sequences": 9.0 / 3.0
    }


profiles = st.integers(1, 130).flatmap(
    lambda n: arrays(np.float64, n, elements=st.floats(-30, 10, allow_nan=False))
)


@given(profiles)
def test_a_histogram_over_time_has_the_mean_of_each_bins_steps(hidden: Any) -> None:
    values = over_time(hidden)
    edges = [0.0, *values["bucket_limits"]]
    assert len(values["bucket_counts"]) == BINS and edges[-1] == values["max"] == len(hidden)
    for k, height in enumerate(values["bucket_counts"]):
        within = [
            min(max(value, -12.0), 2.0) + 12
            for t, value in enumerate(hidden)
            if t < edges[k + 1] - 1e-6 and t + 1 > edges[k] + 1e-6
        ]
        assert height == pytest.approx(sum(within) / len(within), abs=1e-9)


def test_what_is_no_number_has_no_height_in_a_histogram() -> None:
    hidden = np.full(BINS, -12.0)
    assert not any(over_time(np.full(BINS, np.nan))["bucket_counts"])
    assert not any(over_time(np.full(BINS, -np.inf))["bucket_counts"])
    hidden[3] = np.inf
    assert max(over_time(hidden)["bucket_counts"]) == 14


# --- settings and ends


def test_settings_keep_their_types_and_get_text_where_there_is_none() -> None:
    flat = flatten(settings("lstm", "norm", 3) | {"empty": {}, "many": [{"name": "agc"}]})
    assert flat["cell.hidden_size"] == 8 and flat["trainer.stop_when_solved"] is False
    assert flat["task.min_length"] == "null" and flat["optim.betas"] == "[0.9, 0.999]"
    assert flat["empty"] == "{}" and flat["many"] == '[{"name": "agc"}]'
    assert all(isinstance(value, str | bool | int | float) for value in flat.values())


def test_runs_share_a_group_if_only_their_seeds_differ() -> None:
    names = {
        (cell, clip, lr): {group_name(settings(cell, clip, seed, lr)) for seed in SEEDS}
        for cell in CELLS
        for clip in CLIPS
        for lr in (1e-3, 1e-2)
    }
    assert all(len(name) == 1 for name in names.values())
    assert len(set.union(*names.values())) == 18


@pytest.mark.parametrize(
    ("status", "expected"),
    [("completed", 1), ("diverged", 2), ("failed", 2), ("interrupted", None)],
)
def test_a_run_ends_as_success_or_failure_unless_it_was_interrupted(
    status: str, expected: int | None, tmp_path: Path
) -> None:
    result = Result(status, 1, 0.1, None, None, None, 0.0)
    with Tracker(tmp_path, CHANCE, LENGTH, settings=settings("rnn", "none", 0)) as tracker:
        tracker.finish(result)
    content = events(tmp_path).PluginTagToContent("hparams")
    assert metadata.SESSION_START_INFO_TAG in content
    end = content.get(metadata.SESSION_END_INFO_TAG)
    assert (end and metadata.parse_session_end_info_plugin_data(end).status) == expected


def test_a_run_that_raises_is_a_failure_and_one_without_settings_is_in_no_table(
    tmp_path: Path,
) -> None:
    with pytest.raises(ZeroDivisionError):
        with Tracker(tmp_path / "a", CHANCE, LENGTH, settings=settings("rnn", "none", 0)):
            raise ZeroDivisionError
    content = events(tmp_path / "a").PluginTagToContent("hparams")
    end = metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG])
    assert end.status == 2
    with Tracker(tmp_path / "b", CHANCE, LENGTH):
        pass
    tags = events(tmp_path / "b").Tags()["tensors"]
    assert not any("hparams" in tag for tag in tags) and "config/text_summary" not in tags


def test_the_diagnosis_is_in_the_summary_with_null_for_what_is_no_number(tmp_path: Path) -> None:
    diagnosis = {
        "verdict": "numerical",
        "findings": [
            {
                "symptom": "overflow",
                "level": "alarm",
                "value": math.inf,
                "threshold": np.float64(1e18),
                "evidence": "|h| > 1e18",
                "steps": list(range(20)),
                "remedies": ["clip=norm"],
            }
        ],
    }
    with Tracker(tmp_path, CHANCE, LENGTH) as tracker:
        assert Run(tmp_path).summary["verdict"] is Run(tmp_path).summary["diagnosis"] is None
        tracker.finish(Result("completed", 1, math.nan, None, None, None, 0.0))
        tracker.diagnosed(diagnosis)
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["verdict"] == summary["diagnosis"]["verdict"] == "numerical"
    assert summary["diagnosis"]["findings"][0] == diagnosis["findings"][0] | {"value": None}
    tensor = events(tmp_path).Tensors("diagnosis/text_summary")[0].tensor_proto
    said = tensor.string_val[0].decode()
    for part in ("Verdict: numerical", "alarm: overflow", "inf (threshold 1e+18)", "`clip=norm`"):
        assert part in said
    assert "Steps 0, 1, 2, 3, 4, 5, 6, 7, ...." in said


# --- one run's event file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("one") / "run", "lstm")


def test_a_run_is_one_event_file_and_no_directory_but_its_own(run: Run) -> None:
    assert [p.name for p in run.path.iterdir() if p.is_dir()] == [".hydra"]
    assert len(list(run.path.rglob("events.out.tfevents.*"))) == 1


def test_scalars_have_the_values_of_the_runs_own_files(run: Run) -> None:
    read = events(run.path)
    for tag, column in (
        ("loss/train", "loss"),
        ("loss/eval", "eval_loss"),
        ("grad_norm/pre_clip", "grad_norm_pre"),
        ("grad_norm/post_clip", "grad_norm_post"),
        ("clip/coef", "clip_coef"),
    ):
        points = read.Scalars(tag)
        assert [point.step for point in points] == run.metrics["step"].tolist()
        np.testing.assert_allclose([p.value for p in points], run.metrics[column], rtol=1e-6)
    for layer, history in run.bptt.items():
        for end, t in (("first", 0), ("last", -1)):
            points = read.Scalars(f"bptt_hidden_pre_clip/{layer}_{end}_log10")
            expected = history.hidden[:, t]
            np.testing.assert_allclose([p.value for p in points], expected, rtol=1e-6)
    assert {point.value for point in read.Scalars("loss/chance")} == {np.float32(CHANCE)}


def test_tags_are_few_and_without_brackets_which_custom_charts_cannot_read(run: Run) -> None:
    tags = events(run.path).Tags()
    assert len(tags["scalars"]) < 32
    for kind in ("scalars", "images", "histograms"):
        assert not [tag for tag in tags[kind] if set(tag) & set("() ")]
    names = [*tags["scalars"], *tags["images"], *tags["histograms"]]
    assert len(set(names)) == len(names), "a tag has one kind of data in TensorBoard"


def test_every_layer_has_its_pictures_and_its_profile_over_training(run: Run) -> None:
    read = events(run.path)
    of_a_layer = {
        "bptt_hidden_pre_clip/{}",
        "bptt_cell_pre_clip/{}",
        "lag/{}",
        "weight_contribution/{}_norm",
        "weight_contribution/{}_share",
    }
    tags = {tag.format(layer) for tag in of_a_layer for layer in ("l0", "l1")}
    tags |= {"bptt_hidden_pre_clip/layers", "bptt_input_pre_clip/x"}
    assert set(read.Tags()["images"]) == tags
    for tag in tags:
        drawn = read.Images(tag)[-1]
        assert drawn.step == 100
        with Image.open(io.BytesIO(drawn.encoded_image_string)) as image:
            assert image.size == (drawn.width, drawn.height) and image.format == "PNG"
    for layer, history in run.bptt.items():
        shapes = read.Histograms(f"bptt_hidden_pre_clip/{layer}_over_t_log10_plus_12")
        assert [shape.step for shape in shapes] == history.step.tolist()
        expected = over_time(history.hidden[-1])["bucket_counts"]
        assert shapes[-1].histogram_value.bucket == pytest.approx(expected)


def test_the_picture_in_the_event_file_is_that_of_the_recorded_field(run: Run) -> None:
    history = run.bptt["l1"]
    stored = events(run.path).Images("bptt_hidden_pre_clip/l1")[-1].encoded_image_string
    with Image.open(io.BytesIO(stored)) as image:
        inside = np.asarray(image.convert("RGB"))[FIELD]
    expected = heatmap(history.step, history.hidden, "any title")[FIELD]
    assert inside.tolist() == expected.tolist()


def test_an_even_attribution_is_one_everywhere(run: Run) -> None:
    stored = events(run.path).Images("weight_contribution/l0_share")[-1].encoded_image_string
    with Image.open(io.BytesIO(stored)) as image:
        inside = np.asarray(image.convert("RGB"))[FIELD]
    one = heatmap(np.array([1]), np.ones((1, 1)), "", low=-5.0, high=5.0, diverging=True)[FIELD]
    assert (inside == one[0, 0]).all()


# --- a sweep, through TensorBoard's own server


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sweep")
    summarize(directory, make_sweep(directory))
    return directory


@pytest.fixture(scope="module")
def server(sweep: Path) -> Iterator[str]:
    with tensorboard(sweep, runs=27 + 9 + 1) as address:
        yield address


def test_the_server_lists_runs_settings_and_summary_and_nothing_else(
    server: str, sweep: Path
) -> None:
    runs = set(fetch(server, "data/runs"))
    own = {f"adding_{cell}_{clip}_s{seed}" for cell in CELLS for clip in CLIPS for seed in SEEDS}
    settings_ = {f"_summary/cell={cell},clip={clip}" for cell in CELLS for clip in CLIPS}
    assert runs == own | settings_ | {"_summary"}
    assert {path.name for path in find_runs(sweep)} == own, "the summary is no run"


def test_the_table_of_runs_has_a_line_a_setting_with_means_over_seeds(server: str) -> None:
    found = fetch(server, "data/plugin/hparams/session_groups", OF_SESSIONS)["sessionGroups"]
    assert len(found) == 9
    for group in found:
        cell, clip = (group["hparams"][f"{part}.name"] for part in ("cell", "clip"))
        assert "seed" not in group["hparams"]
        assert {s["name"] for s in group["sessions"]} == {
            f"adding_{cell}_{clip}_s{seed}" for seed in SEEDS
        }
        values = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
        mean = np.mean([loss_at(100, cell, seed) for seed in SEEDS])
        assert values["loss/eval"] == pytest.approx(mean, rel=1e-5)
        statuses = {s["name"]: s["status"] for s in group["sessions"]}
        for name, status in statuses.items():
            diverged = name == "adding_rnn_none_s1"
            assert status == ("STATUS_FAILURE" if diverged else "STATUS_SUCCESS")


def test_the_table_has_one_set_of_keys_those_that_differ_first(server: str) -> None:
    experiment = fetch(server, "data/plugin/hparams/experiment", {"experimentName": ""})
    names = [info["name"] for info in experiment["hparamInfos"]]
    differ = [info["name"] for info in experiment["hparamInfos"] if info.get("differs")]
    assert names[:2] == differ == ["cell.name", "clip.name"]
    expected = set().union(*(flatten(settings(c, "norm", 0)) for c in CELLS)) - {"seed"}
    assert set(names) == expected
    assert {metric["name"].get("group", "") for metric in experiment["metricInfos"]} == {""}


def test_the_server_has_scalars_images_and_histograms_of_every_run(server: str) -> None:
    scalars = fetch(server, "data/plugin/scalars/tags")
    images = fetch(server, "data/plugin/images/tags")
    histograms = fetch(server, "data/plugin/histograms/tags")
    for cell in CELLS:
        name = f"adding_{cell}_norm_s0"
        assert {"loss/train", "grad_norm/pre_clip", "lag/l0_slope_decades_per_step"} <= set(
            scalars[name]
        )
        assert ("bptt_cell_pre_clip/l0" in images[name]) == (cell == "lstm")
        assert "bptt_hidden_pre_clip/l1" in images[name]
        assert len(histograms[name]) == 2
    tag = "bptt_hidden_pre_clip/l0_over_t_log10_plus_12"
    query = {"run": "adding_rnn_norm_s0", "tag": tag}
    _, step, buckets = fetch(server, "data/plugin/histograms/histograms", **query)[-1]
    assert step == 100 and len(buckets) == BINS
    assert [right for _, right, _ in buckets][-1] == LENGTH
    assert buckets[-1][2] == pytest.approx(12) and buckets[0][2] == pytest.approx(0.6)
    query = {"run": "adding_rnn_norm_s0", "tag": "bptt_hidden_pre_clip/l0", "sample": "0"}
    image = fetch(server, "data/plugin/images/images", **query)[-1]
    address = f"{server}data/plugin/images/individualImage?{image['query']}"
    with urllib.request.urlopen(address) as answer, Image.open(answer) as drawn:
        assert drawn.size == (640, 380)


def test_the_custom_charts_are_the_same_for_all_runs_and_find_their_tags(server: str) -> None:
    layout = fetch(server, "data/plugin/custom_scalars/layout")
    charts = {c["title"]: [chart["title"] for chart in c["chart"]] for c in layout["category"]}
    assert list(charts) == ["Over seeds: median and quartiles", "Training", "Gradient"]
    assert all(len(set(titles)) == len(titles) for titles in charts.values())
    for category in layout["category"][1:]:
        for chart in category["chart"]:
            for tag in chart["multiline"]["tag"]:
                query = {"run": "adding_lstm_norm_s0", "tag": tag}
                found = fetch(server, "data/plugin/custom_scalars/scalars", **query)
                assert found["regex_valid"]
                assert found["tag_to_events"] or tag == "clip/threshold$"
    tags = fetch(server, "data/plugin/scalars/tags")["_summary/cell=gru,clip=none"]
    for chart in layout["category"][0]["chart"]:
        assert set(chart["margin"]["series"][0].values()) <= set(tags)


def test_the_server_has_configuration_result_and_diagnosis_as_text(server: str) -> None:
    tags = fetch(server, "data/plugin/text/tags")
    for name in ("adding_rnn_none_s1", "adding_gru_value_s2"):
        expected = ("config", "diagnosis", "result")
        assert set(tags[name]) == {f"{tag}/text_summary" for tag in expected}
    said = {}
    for tag in tags["adding_rnn_none_s1"]:
        query = {"run": "adding_rnn_none_s1", "tag": tag}
        said[tag.split("/")[0]] = fetch(server, "data/plugin/text/text", **query)[0]["text"]
    assert "max_norm" not in said["config"] and "forget_bias" not in said["config"]
    assert "stop_when_solved: false" in said["config"] and "<code>" in said["config"]
    assert "<td>diverged</td>" in said["result"] and "the loss is nan" in said["result"]
    assert "Verdict: vanishing" in said["diagnosis"] and "<li>" in said["diagnosis"]
    assert "<code>cell=lstm</code>" in said["diagnosis"]


# --- the summary of a sweep


def curve(path: Path, quantity: str, name: str = "median") -> tuple[list[int], list[float]]:
    points = events(path).Scalars(f"_summary/{quantity}_{name}")
    return [point.step for point in points], [point.value for point in points]


def test_the_summary_has_median_and_quartiles_over_seeds(sweep: Path) -> None:
    path = sweep / "_summary" / "cell=lstm,clip=value"
    grid = [1, *range(10, 101, 10)]
    losses = [[loss_at(step, "lstm", seed) for step in grid] for seed in SEEDS]
    for name, q in (("q25", 25), ("median", 50), ("q75", 75)):
        steps, values = curve(path, "eval_loss", name)
        assert steps == grid
        np.testing.assert_allclose(values, np.percentile(losses, q, axis=0), rtol=1e-5)
    _, ratios = curve(path, "first_over_last_log10")
    np.testing.assert_allclose(ratios, -0.1 * (LENGTH - 1), rtol=1e-5)
    norms = [[math.log10(2 + math.sin(step + seed)) for step in grid] for seed in SEEDS]
    _, values = curve(path, "grad_norm_pre_clip_log10")
    np.testing.assert_allclose(values, np.median(norms, 0), rtol=1e-5)


def test_a_run_that_diverged_counts_ten_times_chance_from_there_on(sweep: Path) -> None:
    path = sweep / "_summary" / "cell=rnn,clip=none"
    steps, upper = curve(path, "eval_loss", "q75")
    _, median = curve(path, "eval_loss")
    np.testing.assert_allclose(median, CHANCE, rtol=1e-5)
    for step, value in zip(steps, upper, strict=True):
        assert value == pytest.approx(CHANCE if step < 50 else 10 * CHANCE, rel=1e-5)


def test_the_overview_counts_ranks_and_names_what_went_wrong(sweep: Path) -> None:
    read = events(sweep / "_summary")
    said = {
        name: read.Tensors(f"_summary/{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("overview", "by_setting", "runs")
    }
    assert "27 runs of 9 settings: 26 completed, 1 diverged; 18 solved" in said["overview"]
    lines = said["overview"].splitlines()
    assert lines[4].startswith("| cell=gru,clip=none | 3 | 3 | 0 | ")
    assert lines[12].startswith("| cell=rnn,clip=value | 3 | 0 | 0 | 0.1667 | -11.4 |")
    assert "- adding_rnn_none_s1: step 50: the loss is nan" in said["overview"]
    assert "| cell.name=rnn | 9 | 0 | 1 | 0.1667 | -11.4 |" in said["by_setting"]
    assert "| clip.name=norm | 9 | 6 | 0 | " in said["by_setting"]
    assert "forget_bias" not in said["by_setting"]
    assert said["runs"].count("    adding_") == 27
    images = {"_summary/eval_loss_over_chance", "_summary/first_over_last"}
    assert set(read.Tags()["images"]) == images


def test_a_new_summary_replaces_the_old_one_and_touches_nothing_else(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"r{seed}", seed=seed, steps=20) for seed in SEEDS]
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    target = summarize(tmp_path, [*runs, make_run(tmp_path / "gru", "gru", steps=20)])
    assert len(list(target.iterdir())) == 3, "two settings and an event file"
    (target / "notes.txt").write_text("mine")
    assert summarize(tmp_path, runs) == target
    files = {path.relative_to(target) for path in target.rglob("*") if path.is_file()}
    assert len(files) == 3 and Path("notes.txt") in files
    assert {path.parent.name for path in files} == {"", "adding_lstm_norm"}
    assert before <= set(tmp_path.rglob("*"))


def test_runs_of_different_lengths_and_states_are_summarised(tmp_path: Path) -> None:
    short = make_run(tmp_path / "short", seed=0, steps=20)
    long = make_run(tmp_path / "long", seed=1, steps=40)
    with Tracker(tmp_path / "empty", CHANCE, LENGTH):
        runs = [short, long, Run(tmp_path / "empty")]
        group, other = group_seeds([Trace(run) for run in runs])
        target = summarize(tmp_path, runs)
    assert {path.name for path in target.iterdir() if path.is_dir()} == {group.name, "empty"}
    assert other.name == "empty", "without a configuration a run is a setting of its own"
    steps, values = curve(target / group.name, "eval_loss")
    assert steps == [1, 10, 20, 30, 40]
    carried = [(loss_at(min(step, 20), "lstm", 0), loss_at(step, "lstm", 1)) for step in steps]
    np.testing.assert_allclose(values, np.median(carried, 1), rtol=1e-5)


def test_a_sweep_of_nothing_has_a_summary_that_says_so(tmp_path: Path) -> None:
    target = summarize(tmp_path, [])
    said = events(target).Tensors("_summary/overview/text_summary")[0].tensor_proto
    assert b"0 runs of 0 settings" in said.string_val[0]


def test_settings_beyond_tensorboards_forty_runs_have_no_curves_but_a_line(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"r{k}", lr=(k + 1) * 1e-5, steps=10, measures=False)
        for k in range(CURVES + 3)
    ]
    target = summarize(tmp_path, runs)
    assert sum(path.is_dir() for path in target.iterdir()) == CURVES
    said = events(target).Tensors("_summary/overview/text_summary")[0].tensor_proto
    assert said.string_val[0].decode().count("optim.lr=") == CURVES + 3


# --- a training loop of one's own


def taped(model: torch.nn.Module, *shape: int, seed: int = 0) -> Tape:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    with record(model) as tape:
        model(x)[0][-1].square().mean().backward()
    return tape


def test_a_loop_of_ones_own_shows_norms_slope_histogram_and_heatmap(tmp_path: Path) -> None:
    model = RNN(3, 8, num_layers=2)
    fields: dict[str, list[Any]] = {"l0": [], "l1": []}
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1, 6):
            tape = taped(model, 40, 4, 3, seed=step)
            log(writer, tape, step, draw=step == 5)
            for layer in fields:
                fields[layer].append(log10_rms(tape[layer].hidden_norm).numpy())
    read = events(tmp_path)
    for layer, rows in fields.items():
        tag = f"bptt_hidden_pre_clip/{layer}"
        hidden = np.stack(rows)
        for end, expected in (
            ("first_log10", hidden[:, 0]),
            ("last_log10", hidden[:, -1]),
            ("slope_decades_per_step", [np.polyfit(range(30), r[::-1][10:], 1)[0] for r in rows]),
        ):
            points = read.Scalars(f"{tag}_{end}")
            assert [point.step for point in points] == [1, 2, 3, 4, 5]
            np.testing.assert_allclose([p.value for p in points], expected, rtol=1e-4)
        shapes = read.Histograms(f"{tag}_over_t_log10_plus_12")
        assert shapes[2].histogram_value.bucket == pytest.approx(
            over_time(rows[2])["bucket_counts"]
        )
        (drawn,) = read.Images(tag)
        with Image.open(io.BytesIO(drawn.encoded_image_string)) as image:
            inside = np.asarray(image.convert("RGB"))[FIELD]
        assert inside.tolist() == heatmap(np.arange(5), hidden, "")[FIELD].tolist()


def test_the_slope_of_the_other_direction_is_taken_where_its_way_back_goes(tmp_path: Path) -> None:
    model = GRU(3, 8, bidirectional=True)
    with record(model) as tape:
        out, _ = model(torch.randn(40, 4, 3, generator=torch.Generator().manual_seed(0)))
        (out[-1, :, :8].sum() + out[0, :, 8:].sum()).backward()
    with SummaryWriter(str(tmp_path)) as writer:
        log(writer, tape, 1)
    read = events(tmp_path)
    for layer in ("l0", "l0_reverse"):
        (slope,) = read.Scalars(f"bptt_hidden_pre_clip/{layer}_slope_decades_per_step")
        assert slope.value < -0.05


def test_a_cell_called_step_by_step_is_shown_as_one_sequence(tmp_path: Path) -> None:
    cell = torch.nn.GRUCell(3, 4)
    with record(cell) as tape:
        x, state = torch.randn(6, 2, 3), None
        for t in range(6):
            _, state = unroll(cell, x[t : t + 1], state)
        assert state is not None
        state.sum().backward()
    with SummaryWriter(str(tmp_path)) as writer:
        log(writer, tape, 1)
    read = events(tmp_path)
    first, last = (
        read.Scalars(f"bptt_hidden_pre_clip/l0_{end}_log10")[0].value for end in ("first", "last")
    )
    norms = [record.hidden_norm for record in tape.calls("l0")]
    assert first == pytest.approx(log10_rms(norms[0]).item())
    assert last == pytest.approx(log10_rms(norms[5]).item())


def test_packed_sequences_end_where_the_longest_does(tmp_path: Path) -> None:
    model = GRU(3, 4)
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(9, 2, 3), torch.tensor([9, 5]))
    with record(model) as tape:
        model(packed)[1].sum().backward()
    with SummaryWriter(str(tmp_path)) as writer:
        log(writer, tape, 1)
    (last,) = events(tmp_path).Scalars("bptt_hidden_pre_clip/l0_last_log10")
    assert last.value == pytest.approx(tape["l0"].hidden_norm[8, 0].log10().item())


class Writer:
    """Of another library: what it is given, in order."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert isinstance(value, float)
        self.said.append(("scalar", tag, step))

    def add_histogram_raw(self, tag: str, *, global_step: int, **values: Any) -> None:
        self.said.append(("histogram", tag, global_step))

    def add_image(self, tag: str, image: Any, step: int, dataformats: str) -> None:
        assert dataformats == "HWC" and image.dtype == np.uint8
        self.said.append(("image", tag, step))


def test_heatmaps_are_drawn_ever_more_rarely_and_when_told_to() -> None:
    writer, tape = Writer(), taped(GRU(2, 3), 15, 2, 2)
    for step in range(1, 31):
        log(writer, tape, step)
    drawn = [step for kind, _, step in writer.said if kind == "image"]
    assert drawn == [1, 2, 3, 5, 8, 12, 18, 27]
    log(writer, tape, 31, draw=True)
    log(writer, tape, 32, draw=False)
    assert [step for kind, _, step in writer.said if kind == "image"][8:] == [31]
    assert sum(kind == "histogram" for kind, *_ in writer.said) == 32


def test_a_writer_keeps_its_own_profiles_and_takes_them_with_it() -> None:
    from rnngrad.tracking.loop import _SEEN

    a, b = Writer(), Writer()
    tape = taped(GRU(2, 3), 15, 2, 2)
    log(a, tape, 1)
    log(a, tape, 2)
    log(b, tape, 7)
    assert _SEEN[a].field("l0")[0].tolist() == [1, 2] and _SEEN[b].field("l0")[0].tolist() == [7]
    gone = weakref.ref(_SEEN[a])
    del a
    gc.collect()
    assert gone() is None and b in _SEEN


@given(st.integers(1, 3 * KEPT))
def test_however_long_a_loop_is_its_first_and_last_profiles_are_kept(count: int) -> None:
    seen = _Seen()
    for step in range(count):
        seen.add("l0", step, np.full(1 + step % 3, float(step)))
    steps, field = seen.field("l0")
    assert steps[0] == 0 and steps[-1] == count - 1 and (np.diff(steps) > 0).all()
    assert min(count, KEPT // 2) <= len(steps) <= KEPT
    assert field[:, 0].tolist() == steps.tolist()
    assert np.isnan(field[steps % 3 == 0, 1:]).all()


@given(st.binary(max_size=300))
def test_a_record_is_the_one_that_tensorboards_own_writer_makes(data: bytes) -> None:
    expected = io.BytesIO()
    RecordWriter(expected).write(data)
    assert _record(data) == expected.getvalue()
