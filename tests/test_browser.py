"""TensorBoard and the report as a person sees them, in Chromium.

``RNNGRAD_SCREENSHOTS=DIR`` keeps a picture of every page.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rnngrad.report import write
from rnngrad.runs import Run
from rnngrad.tracking import summarize
from tests.sweeps import make_large_sweep, make_run, make_sweep, tensorboard

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="needs Chromium and its driver: apt-get install chromium chromium-driver",
    ),
]

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,1100",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)

TEXT = """
const said = [];
const walk = (node) => {
  if (node.nodeType === Node.TEXT_NODE) said.push(node.textContent.trim());
  if (["STYLE", "SCRIPT", "TEMPLATE"].includes(node.nodeName)) return;
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
};
walk(document.body);
return said.filter((text) => text).join("\\n");
"""
"""All text of a page, also inside the components that most of TensorBoard is made of."""

IMAGES = """
const found = [];
const walk = (node) => {
  if (node.nodeName === "IMG") found.push(node.complete ? node.naturalWidth : 0);
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
};
walk(document.body);
return found;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    selenium = pytest.importorskip("selenium", reason="needs pip install 'rnngrad[browser]'")
    from selenium import webdriver

    assert selenium and CHROMIUM
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("sweep")
    summarize(directory, make_sweep(directory))
    with tensorboard(directory, runs=37) as address:
        yield address


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large")
    summarize(directory, make_large_sweep(directory))
    return directory


@pytest.fixture(scope="module")
def large_sweep(large: Path) -> Iterator[str]:
    with tensorboard(large, runs=331) as address:
        yield address


@pytest.fixture(scope="module")
def large_summary(large: Path) -> Iterator[str]:
    with tensorboard(large / "_summary", runs=31) as address:
        yield address


def look(browser: Any, address: str, expected: tuple[str, ...], name: str, tmp_path: Path) -> str:
    """Opens a page, waits for words on it, keeps its picture, and returns its text."""
    browser.get("about:blank")  # else another tab of the same page is not loaded anew
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(address)
    deadline, said = time.monotonic() + 60, ""
    while time.monotonic() < deadline and not all(word in said for word in expected):
        time.sleep(0.3)
        said = browser.execute_script(TEXT)
    time.sleep(2)  # charts are drawn after their titles
    folder = Path(os.environ.get("RNNGRAD_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(folder / f"{name}.png"))
    missing = [word for word in expected if word not in said]
    assert not missing, f"{missing} not on the page, which says: {said[:3000]}"
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, errors
    return str(browser.execute_script(TEXT))


TABS = {
    "timeseries": ("/eval_loss_median", "bptt_hidden_pre_clip", "adding_gru_none_s0"),
    "scalars": ("_summary/eval_loss_median", "grad_norm", "update_ratio", "lag"),
    "images": ("_summary/eval_loss_over_chance", "bptt_hidden_pre_clip", "weight_contribution"),
    "histograms": ("bptt_hidden_pre_clip/l0_over_t_log10_plus_12", "adding_rnn_none_s0"),
    "hparams": ("cell.name", "clip.name", "lstm", "value", "Trial ID", "accuracy/eval"),
    "custom_scalars": ("Over seeds: median and quartiles", "loss, and chance", "Gradient"),
    "text": ("27 runs of 9 settings", "diagnosis", "stop_when_solved: false"),
}


@pytest.mark.parametrize("tab", TABS)
def test_every_tab_shows_a_sweep(tab: str, browser: Any, sweep: str, tmp_path: Path) -> None:
    said = look(browser, f"{sweep}#{tab}", TABS[tab], f"sweep_{tab}", tmp_path)
    assert "do not match" not in said and "No data" not in said
    if tab == "images":
        widths = browser.execute_script(IMAGES)
        assert len(widths) > 6 and min(widths) >= 640, "twice as large as they are shown"
    if tab == "hparams":
        assert said.count("adding_") == 9, "a line a setting"


LARGE_TABS = {
    "timeseries": ("/eval_loss_median", "/eval_loss_over_chance", "_summary/cell=gru"),
    "hparams": ("cell.name", "optim.lr", "0.010000", "gru"),
    "scalars": ("_summary/eval_loss_median", "_summary/cell=rnn,optim.lr=0.01", "grad_norm"),
    "custom_scalars": ("Over seeds: median and quartiles", "Matches (30)", "Gradient"),
    "images": ("_summary/eval_loss_over_chance", "_summary/first_over_last"),
    "histograms": ("bptt_hidden_pre_clip/l0_over_t_log10_plus_12", "adding_lstm_norm_s0"),
    "text": ("300 runs of 30 settings", "cell.name=lstm", "optim.lr=0.0001"),
}
FILTERS = {"timeseries": "", "hparams": "", "histograms": "&regexInput=lstm_norm_s0"}
"""Of runs: with more than 40 the other tabs tick none until they are fewer."""


@pytest.mark.parametrize("tab", LARGE_TABS)
def test_a_sweep_of_300_runs_opens_usefully(
    tab: str, browser: Any, large_sweep: str, tmp_path: Path
) -> None:
    address = f"{large_sweep}#{tab}{FILTERS.get(tab, '&regexInput=_summary')}"
    look(browser, address, LARGE_TABS[tab], f"large_{tab}", tmp_path)
    if tab in ("timeseries", "images"):  # the first page is not blank, nor are its pictures
        assert 640 <= max(browser.execute_script(IMAGES))


SUMMARY_TABS = {
    "timeseries": ("/eval_loss_median", "cell=gru,optim.lr=0.0001"),
    "custom_scalars": ("Over seeds: median and quartiles", "Matches (30)"),
    "images": ("eval_loss_over_chance", "first_over_last"),
}


@pytest.mark.parametrize("tab", SUMMARY_TABS)
def test_its_summary_opens_by_itself(
    tab: str, browser: Any, large_summary: str, tmp_path: Path
) -> None:
    name = f"large_summary_{tab}"
    look(browser, f"{large_summary}#{tab}", SUMMARY_TABS[tab], name, tmp_path)
    if tab == "images":
        assert len(browser.execute_script(IMAGES)) == 2


def test_the_report_opens_offline_and_asks_for_nothing(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write([Run(run.path)], tmp_path / "report")
    page = (tmp_path / "report" / "index.html").as_uri()
    look(browser, page, ("completed",), "report", tmp_path)
    assert browser.execute_script(IMAGES) and min(browser.execute_script(IMAGES)) > 0
    messages = (json.loads(e["message"])["message"] for e in browser.get_log("performance"))
    asked = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert page in asked
    assert all(url == page or url.startswith("data:") for url in asked)
