"""What `make run` shows: an LSTM solves the adding problem where a tanh RNN stays at chance."""

from pathlib import Path

import pytest

from rnngrad.__main__ import run_command
from rnngrad.runs import Run, find_runs


def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[Run]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["rnngrad", "-m", "experiment=first_look", *overrides])
    assert run_command() == 0
    return [Run(path) for path in find_runs(tmp_path)]


def test_an_lstm_solves_short_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = sweep(tmp_path, monkeypatch, "cell=lstm", "task.length=10", "trainer.steps=1500")
    assert run.summary["eval_loss"] < 0.01
    assert run.summary["solved_at"] == run.summary["steps"] < 1500


@pytest.mark.slow
def test_of_5_seeds_the_lstm_solves_100_steps_in_all_and_the_tanh_rnn_in_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in sweep(tmp_path, monkeypatch, "cell=rnn,lstm", "seed=0,1,2,3,4"):
        loss, profile = run.summary["eval_loss"], run.bptt["l0"].hidden
        print(run, run.summary)
        if run.config["cell"]["name"] == "lstm":
            assert loss < 0.01 and profile[-1, -1] - profile[-1, 0] < 3
        else:
            assert 0.15 < loss < 0.19 and profile[0, -1] - profile[0, 0] > 15
