"""The tutorial: its commands run, its numbers are what is computed, and that is what torch says."""

import io
import math
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rnngrad import tutorial
from rnngrad.initial import gaussian
from rnngrad.runs import Run, find_runs
from rnngrad.task import TASKS, training_generator

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"^\$ (.*)$", "\n".join(re.findall(r"^```console\n(.*?)^```", PAGE, re.M | re.S)), re.M
)
TEXT = re.findall(r"^```text\n(.*?)^```", PAGE, re.M | re.S)


def run(command: str, folder: Path, *more: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "rnngrad"
    done = subprocess.run(
        [sys.executable, "-m", "rnngrad", *arguments, *more],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def figure(name: str, folder: Path) -> list[str]:
    """What ``python -m rnngrad.tutorial NAME`` prints, in ``folder``."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["rnngrad.tutorial", name])
        tutorial.main()
    first, *lines = out.getvalue().splitlines()
    assert (folder / first).read_bytes().startswith(b"\x89PNG")
    return [line.strip() for line in lines]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the page's commands print as they stand there, but that adding trains for 2 steps."""
    folder = tmp_path_factory.mktemp("tutorial")

    def train(command: str) -> None:
        short = ("trainer.steps=2", "trainer.eval_size=2") if "task=adding" in command else ()
        run(command, folder, *short)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, [c for c in COMMANDS if c.startswith("rnngrad ")]))
    figures = [c for c in COMMANDS if not c.startswith("rnngrad ")]
    assert all(c.startswith("python -m rnngrad.tutorial ") for c in figures)
    found = {name: figure(name, folder) for name in (c.split()[-1] for c in figures)}
    assert len(list(find_runs(folder))) == 8
    return found


def test_the_page_has_a_command_for_every_figure_and_shows_it() -> None:
    made = [command.split()[-1] for command in COMMANDS if "rnngrad.tutorial" in command]
    assert made == list(tutorial.FIGURES)
    shown = re.findall(r"^!\[[^]]+\]\(tutorial/(\w+)\.png\)$", PAGE, re.M)
    assert shown == made
    files = sorted(path.stem for path in (ROOT / "docs" / "tutorial").iterdir())
    assert files == sorted(made)


FROM_LONG_RUNS = ("regularizer=", "clip=", "tanh RNN, ", "LSTM, ")
"""How lines begin that the whole of the training is needed for, or the same rounding."""


def test_the_numbers_of_the_page_are_those_that_the_commands_print(
    printed: dict[str, list[str]],
) -> None:
    written = [line.strip() for block in TEXT for line in block.splitlines()]
    compared = 0
    for lines in printed.values():
        for line in lines:
            if not line.startswith(FROM_LONG_RUNS):
                assert any(same(line, other) for other in written), line
                compared += 1
    assert compared == 4 + 7 + 4 + 5 + 19 + 1 + 2


def same(line: str, other: str) -> bool:
    """Whether two lines have the same words, and numbers that differ by rounding at most."""
    words, others = line.split(), other.split()
    return len(words) == len(others) and all(map(close, words, others))


def close(word: str, other: str) -> bool:
    """Within 2 % and half a unit of the last digit that ``other`` has."""
    word, other = word.strip(","), other.strip(",")
    try:
        difference = abs(float(word) - float(other))
    except ValueError:
        return word == other
    digits, _, exponent = other.lower().partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return difference <= 0.02 * abs(float(other)) + unit / 2 * (1 + 1e-9)


def test_lines_with_other_numbers_are_not_the_same() -> None:
    assert same("w = 2 a step 1.28, then", "w = 2 a  step 1.281, then")
    assert not same("w = 2 a step 1.28", "w = 2 a step 1.35")
    assert not same("20 of 100", "32 of 100") and not same("a 1", "b 1")
    assert same("0.0021, -4.4e-05", "0.0021, -4.37e-05") and not same("0.0021", "0.0025")
    assert not same("1.2e-09", "3.4e-09") and not same("-0.003", "0.000")


def test_lines_of_runs_differ_from_the_pages_in_nothing_but_numbers(
    printed: dict[str, list[str]],
) -> None:
    def words(line: str) -> str:
        line = re.sub(r"not solved|solved at \d+", "", line.strip())
        return " ".join(re.sub(r"[-\d.%e]+", "#", line).split())

    written = {words(line) for block in TEXT for line in block.splitlines()}
    for lines in printed.values():
        assert {words(line) for line in lines} <= written
    (thrown,) = (line for line in printed["cliff"] if line.startswith("clip=none"))
    assert thrown.endswith("in the end error 0.09, gradient 0")


CHANCE = "0.158"
CLAIMS = [
    ("which is {:.1e}.", 0.25**20),
    ("At `h = 0.97` it is {:.3f}".lower(), 1 - 0.97**2),
    ("`1 - 0.36 = {:.2f}`", 1 - 0.6**2),
    ("# 0.8^10 = {:.4f}", 0.8**10),
    ("`1/√3 = {:.3f}`", 3**-0.5),
    ("`log10 √3 = {:.2f}` decades", math.log10(3) / 2),
    ("`√(1/3 · 1/2) = {:.3f}`", tutorial.expected_factor(1 / 3, 1 / 2)),
    ("or {:.3f} decades a step", -math.log10(tutorial.expected_factor(1 / 3, 1 / 2))),
    ("and {:,} routes lead", math.comb(39 + 5, 5)),
    ("`σ(1) = {:.2f}`", 1 / (1 + math.exp(-1))),
    ("`(1 - 0.7)² = {:.2f}`", (1 - 0.7) ** 2),
    ("`2^-24` is {:.1f} decades", -math.log10(tutorial.VISIBLE)),
]


@pytest.mark.parametrize(("text", "value"), CLAIMS)
def test_the_arithmetic_of_the_text_is_right(text: str, value: float) -> None:
    assert text.format(value).lower() in " ".join(PAGE.split()).lower()


REPEATED = [
    ("the gradient loses 23 decades in 100 steps", "decades a step           -0.23"),
    ("the estimate 0.24 is close", "-0.239"),
    ("measured below is 0.393", "relu               -0.393 "),
    ("going down 5 layers costs 1.4 decades here", "first layer, last step -1.4"),
    ("going back 39 steps 9.6", "last layer, first step -9.6"),
    ("the far corner 8.2", "first layer, first step -8.2"),
    ("the sigmoid stays under 0.28", "at most 0.278"),
    ("loses 4.4 decades", "length=20                         -4.4"),
    ("in place of 20.7", "length=100                       -20.7"),
    ("1.9 decades are lost in place of 23.9", "omega                      -1.9"),
    ("1.9 decades are lost in place of 23.9", "none                      -23.9"),
    ("one step is 17.3 long", "a step 17.3 long"),
    ("the first 68 time steps", "the last 32 of 100"),
]


@pytest.mark.parametrize(("prose", "block"), REPEATED)
def test_the_prose_says_what_the_blocks_say(prose: str, block: str) -> None:
    assert prose in " ".join(PAGE.split()).lower()
    assert any(block in text for text in TEXT)


def test_the_number_of_routes_is_what_counting_them_gives() -> None:
    """One step back or one layer down at a time, from the loss to the far corner."""
    routes = np.zeros((6, 40), dtype=np.int64)
    routes[0] = routes[:, 0] = 1
    for down in range(1, 6):
        for back in range(1, 40):
            routes[down, back] = routes[down - 1, back] + routes[down, back - 1]
    assert routes[-1, -1] == 1_086_008


def test_chance_on_the_evaluations_sequences_is_what_the_page_says() -> None:
    task = TASKS.default("adding", length=100)
    batches = [task.evaluation_batch(i, 100) for i in range(10)]
    losses = [task.loss(task.memoryless(b.targets), b.targets).item() for b in batches]
    assert f"{np.mean(losses):.3f}" == CHANCE
    assert PAGE.count(CHANCE) >= 2


def test_links_lead_somewhere() -> None:
    for name in re.findall(r"\]\((?!http)([^)]+)\)", PAGE):
        assert (ROOT / "docs" / name).exists(), name


# activations

PHI: dict[str, Any] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky_relu": torch.nn.functional.leaky_relu,
}


@pytest.mark.parametrize("name", tutorial.ACTIVATIONS)
def test_activations_and_slopes_are_torchs(name: str) -> None:
    phi, slope, most, _ = tutorial.ACTIVATIONS[name]
    a = torch.cat([torch.zeros(1), torch.linspace(-30, 30, 1001)]).double().requires_grad_()
    value = PHI[name](a)
    value.sum().backward()
    np.testing.assert_allclose(phi(a.detach().numpy()), value.detach(), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(slope(a.detach().numpy()), a.grad, rtol=1e-9, atol=1e-15)
    assert a.grad.max() == pytest.approx(most, abs=1e-3)


@given(st.floats(-50, 50))
def test_no_slope_exceeds_its_maximum_and_the_page_says_where_it_is_reached(a: float) -> None:
    for _, slope, most, where in tutorial.ACTIVATIONS.values():
        assert slope(np.array(a)) <= most
        reached = slope(np.array(a)) == most
        assert where == "at every a > 0" or slope(np.array(0.0)) == most
        if where == "at every a > 0":
            assert reached == (a > 0)
        elif abs(a) > 1e-6:
            assert not reached


# one unit


@pytest.mark.parametrize("weight", [-1.5, 0.5, 1.25, 2.0])
def test_products_of_a_unit_are_autograds(weight: float) -> None:
    products = tutorial.unit_products(weight, 12, x=0.3, h=0.1)
    states = [torch.tensor(0.1, dtype=torch.float64, requires_grad=True)]
    for _ in range(12):
        states.append(torch.tanh(weight * states[-1] + 0.3))
        states[-1].retain_grad()
    states[-1].backward()
    grads = [state.grad.item() for state in reversed(states)]
    np.testing.assert_allclose(products, grads, rtol=1e-12)


def test_a_unit_that_is_held_loses_the_same_factor_at_every_step() -> None:
    for weight, products in tutorial.unit().products.items():
        np.testing.assert_allclose(products, (0.64 * weight) ** np.arange(31), rtol=1e-9)


def test_a_unit_at_rest_never_gains() -> None:
    found = tutorial.unit()
    for name in ("tanh", "sigmoid"):
        assert (found.factors[name] <= 1).all()
    below = found.weights < 0.99
    np.testing.assert_allclose(found.factors["tanh"][below], found.weights[below], rtol=1e-9)
    np.testing.assert_array_equal(found.factors["relu"], found.weights)


def test_the_resting_state_of_a_tanh_unit_solves_its_equation() -> None:
    (factor,) = tutorial.resting_factors("tanh", np.array([2.0]))
    h = math.sqrt(1 - factor / 2)  # factor = w (1 - h²)
    assert h > 0.9 and math.tanh(2 * h) == pytest.approx(h, abs=1e-12)


# one layer


def test_jacobians_and_weights_are_those_of_torchs_rnn_at_the_same_seed() -> None:
    found = tutorial.layer(seed=3, lags=6)
    torch.manual_seed(3)
    rnn = torch.nn.RNN(7, 64)
    rnn.reset_parameters()  # an initialisation draws anew
    rnn.double()
    weight = rnn.weight_hh_l0.detach()
    assert found.largest == pytest.approx(torch.linalg.svdvals(weight)[0].item(), rel=1e-12)
    assert found.radius == pytest.approx(torch.linalg.eigvals(weight).abs().max().item(), rel=1e-9)
    x = gaussian(7, seed=3)[:, 0]

    def last(h: Any) -> Any:
        return rnn(x[3:], h.unsqueeze(0))[0][-1]  # four steps on

    start = rnn(x[:3])[0][-1].detach()
    jacobian = torch.autograd.functional.jacobian(last, start)
    assert found.jacobian[4] == pytest.approx(torch.linalg.svdvals(jacobian)[0].item(), rel=1e-9)
    batch = rnn(gaussian(7, seed=3)[:3])[0][-1].detach().requires_grad_()
    rnn(gaussian(7, seed=3)[3:], batch.unsqueeze(0))[0][-1].sum().backward()
    norm = batch.grad.norm(dim=1).square().mean().sqrt().item()
    assert found.gradient[4] == pytest.approx(math.log10(norm / 8), rel=1e-9)  # ‖∂L/∂h_T‖ = √64


@given(st.integers(0, 2**20))
def test_the_bound_of_the_largest_singular_value_holds(seed: int) -> None:
    found = tutorial.layer(seed, lags=8)
    bound = found.largest ** np.arange(9)
    assert (found.jacobian <= bound * (1 + 1e-9)).all()
    assert (10**found.gradient <= bound * (1 + 1e-9)).all()


@pytest.mark.parametrize(("relu", "mean_square"), [(False, 1.0), (True, 0.5)])
def test_the_expected_factor_is_that_of_random_weights(relu: bool, mean_square: float) -> None:
    generator = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(300):
        weight = (2 * torch.rand(64, 64, generator=generator) - 1) / 8  # U(-1/√H, 1/√H)
        delta = torch.randn(64, generator=generator)
        slopes = (torch.rand(64, generator=generator) < 0.5).float() if relu else torch.ones(64)
        squares.append(((delta * slopes) @ weight).square().sum().item() / delta.square().sum())
    mean, error = np.mean(squares), np.std(squares) / math.sqrt(len(squares))
    assert abs(tutorial.expected_factor(1 / 3, mean_square) ** 2 - mean) < 4 * error
    assert error < 0.01


# depth against time


def test_a_stack_of_known_layers_loses_what_it_must() -> None:
    linear = torch.nn.Linear(5, 5, bias=False).double()
    torch.nn.init.eye_(linear.weight).data.mul_(0.5)
    found = tutorial.through([linear] * 6, torch.zeros(5, dtype=torch.float64))  # tanh' = 1 at 0
    np.testing.assert_allclose(found, math.log10(0.5) * np.arange(7), rtol=1e-12)


def test_recurrences_spread_more_than_stacks() -> None:
    found = tutorial.depth()
    assert np.ptp(found.recurrences[:, -1]) > 2 * np.ptp(found.stacks[:, -1])
    page = " ".join(PAGE.split())
    assert f"within {np.ptp(found.stacks[:, -1]):.1f} decades of each other" in page
    assert f"the 10 recurrences within {np.ptp(found.recurrences[:, -1]):.1f}:" in page
    assert found.field[-1, -1] == 0 and found.field[0, 0] > found.field[-1, 0]


# exploding


# what clipping does not do


@pytest.fixture(scope="module")
def contributions() -> Any:
    return tutorial.contributions(40)


def test_clipping_leaves_the_time_steps_shares_as_they_were(contributions: Any) -> None:
    before, after, norm, coefficient = contributions
    assert 0 < coefficient < 0.5
    np.testing.assert_allclose(after[1:] - before[1:], math.log10(coefficient), rtol=1e-9)


def test_the_time_steps_parts_are_those_of_a_copy_of_the_weight_for_every_step(
    contributions: Any,
) -> None:
    before, _, norm, coefficient = contributions
    model, task = tutorial.adding_model("rnn", 40), TASKS.default("adding", length=40)
    w = {name.removesuffix("_l0"): p.detach() for name, p in model.rnn.named_parameters()}
    inputs, targets = task.batch(50, training_generator(0, 1))
    copies = [w["weight_hh"].clone().requires_grad_() for _ in range(40)]
    h = torch.zeros(50, 64, dtype=torch.float64)
    for x, copy in zip(inputs.double(), copies, strict=True):
        h = torch.tanh(x @ w["weight_ih"].t() + w["bias_ih"] + h @ copy.t() + w["bias_hh"])
    task.loss(model.readout(h), targets.double()).backward()
    parts = torch.stack([copy.grad for copy in copies if copy.grad is not None])
    assert len(parts) == 40
    norms = parts.flatten(1).norm(dim=1)
    np.testing.assert_allclose(10 ** before[1:], norms[1:], rtol=1e-9)
    assert norms[0] == 0 and before[0] == -np.inf  # h_0 is 0
    assert norm == pytest.approx(parts.sum(0).norm().item(), rel=1e-12)
    kept = tutorial.left_out(40)
    rest = [parts[: 40 - k].sum(0).norm().item() / norm for k in range(1, 41)]
    np.testing.assert_allclose(kept, rest, rtol=1e-6, atol=1e-14)


# the command


def test_every_axis_says_what_it_shows(
    printed: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    runs = tmp_path_factory.getbasetemp() / "tutorial0" / "runs" / "tutorial"
    for name, make in tutorial.FIGURES.items():
        drawn, _ = make(runs)
        for axis in drawn.axes:
            assert axis.get_ylabel() or name == "remedies", name
            shared = axis.get_label() == "<colorbar>" or axis.get_xlabel()
            assert shared or axis.bbox.bounds == drawn.axes[0].bbox.bounds, name  # twin axes


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["cosine"], "'cosine': no such figure; there are activations, unit, layer, depth"),
        (["clipping"], "runs/tutorial/clipping: no run of 'tanh RNN, no clipping'; the commands"),
        (["cliff", "--runs", "nowhere"], "nowhere/cliff: no run of 'none'; the commands"),
        (["activations", "--out", "file"], "--out=file: cannot be written (File exists)"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["rnngrad.tutorial", *arguments])
    with pytest.raises(SystemExit) as exit:
        tutorial.main()
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"python -m rnngrad.tutorial: {line}")
    assert captured.err.count("\n") == 1 and not captured.out


# the runs in full


@pytest.mark.slow
def test_what_the_page_says_of_its_runs_holds(tmp_path: Path) -> None:
    """Not to the digit: after hundreds of steps rounding tells machines apart."""
    for command in COMMANDS:
        if command.startswith("rnngrad"):
            run(command, tmp_path)
        if "runs/tutorial/clipping" in command:
            run(command, tmp_path, "seed=1,2", "hydra.sweep.dir=seeds")
    others = [Run(path) for path in find_runs(tmp_path / "seeds")]
    assert len(others) == 8
    for other in others:
        solves = other.summary["solved_at"] is not None
        assert solves == (other.config["cell"]["name"] == "lstm"), other
    runs = tmp_path / "runs" / "tutorial"
    clips = tutorial.clipping(runs)
    invisible = math.log10(tutorial.VISIBLE)
    for name, profile in clips.profiles.items():
        if name.startswith("LSTM"):
            assert clips.solved[name] is not None and profile[0] > -2
        else:
            assert clips.solved[name] is None and profile[0] < invisible
            assert clips.losses[name][-1] > 0.9 * clips.chance
    assert clips.clipped["tanh RNN, clipped at 0.1"] > 0.5
    found = tutorial.remedies(runs)
    assert found.penalty["none"][500][-1] < -15 and found.penalty["omega"][500][-1] > -5
    assert found.penalty_loss["omega"] == pytest.approx(float(CHANCE), abs=0.01)
    wall = tutorial.cliff(runs)
    assert wall.norm["none"].max() > 10 and wall.norm["none"][-1] == 0
    assert wall.loss["none"][-1] == pytest.approx(0.09, abs=1e-6)
    assert wall.length["norm"].max() == pytest.approx(0.1, rel=1e-6)
    assert {Run(path).summary["status"] for path in find_runs(runs)} == {"completed"}


def test_the_python_of_the_page_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    first, last = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    exec(compile(first, "tutorial.md", "exec"), {})
    assert capsys.readouterr().out == "0.1074\n"
    exec(compile(last, "tutorial.md", "exec"), {})
    values = capsys.readouterr().out
    profile = [float(value) for value in re.findall(r"-\d+\.\d+", values)]
    assert len(profile) == 5 and profile == sorted(profile)
