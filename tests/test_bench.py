"""rnngrad-bench: its contenders compute the same, and its command says what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from rnngrad import bench, rivals
from rnngrad.bptt import record
from rnngrad.nn import convert
from rnngrad.task import TASKS

KINDS = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}


@pytest.mark.parametrize("rival", ["loop_of_cells", "jax_scan"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rivals_norms_are_the_recorded_ones(kind: str, rival: str) -> None:
    if rival == "jax_scan":
        pytest.importorskip("jax")
    torch.manual_seed(0)
    layer, x = KINDS[kind](3, 5), torch.randn(7, 2, 3, requires_grad=True)
    found: Any = getattr(rivals, rival)(layer, x)()
    with record(convert(layer)) as tape:
        layer(x)[0].square().mean().backward()
    ours = tape["l0"]
    expected = [ours.hidden_norm, ours.cell_norm]
    if rival == "jax_scan":
        found = [torch.tensor(norm.tolist()) for norm in found[1]]
        expected.insert(1, ours.direct_norm)
    wanted = [norm.float() for norm in expected if norm is not None]
    assert len(found) == len(wanted)
    for theirs, norm in zip(found, wanted, strict=True):
        torch.testing.assert_close(theirs, norm, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_our_training_step_learns_as_the_loop_by_hand_does(kind: str) -> None:
    task = TASKS.default("temporal_order", length=20)
    for step in (
        bench.training_step(kind, task, 50, 20),
        rivals.loop_by_hand(KINDS[kind](task.input_size, 20), task, 50),
    ):
        losses = [float(step()) for _ in range(300)]  # type: ignore[arg-type]
        assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_operations_are_those_of_the_products() -> None:
    one = 2 * 7 * 5 * 4 * 6  # T B gates H
    # forward: input and recurrence; backward: recurrence, two weights, and the input's gradient
    assert bench.operations("LSTM", 7, 5, 6, 3, grad_x=False) == one * (3 + 6 + 6 + 3 + 6)
    assert bench.operations("LSTM", 7, 5, 6, 3, grad_x=True) == one * (3 + 6 + 6 + 3 + 6 + 3)


def test_the_command_prints_tables_as_json_and_draws_a_figure(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rnngrad.bench", "--quick", "--json", "--out", "figures"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"processor", "threads", "versions"} <= found["conditions"].keys()
    titles = " ".join(table["title"] for table in found["tables"])
    for word in ("Layers", "Recording", "sgemm", "Training steps", "Growth", "Memory", "Start-up"):
        assert word in titles
    for table in found["tables"]:
        assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
    with Image.open(tmp_path / "figures" / "bench.png") as picture:
        assert picture.size[0] > 800


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "rnngrad.bench", "--quick", "--out", "file/there"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == "rnngrad-bench: --out=file/there: cannot be written (Not a directory)"
    )
