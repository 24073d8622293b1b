"""Every task: data against a restatement in plain Python, chance against a measurement."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rnngrad.task import TASKS, Task, evaluation_generator, training_generator
from rnngrad.tasks.adding import Adding
from rnngrad.tasks.copy import Copy

NAMES = sorted(TASKS.load())


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS.default(request.param, length=12)


def outputs_like(task: Task, targets: Tensor, value: float = 0.0) -> Tensor:
    batch = targets.shape[0 if task.last_step_only else 1]
    shape = (batch,) if task.last_step_only else (len(targets), batch)
    return torch.full((*shape, task.output_size), value)


def test_shapes_and_dtypes_fit_the_model(task: Task) -> None:
    inputs, targets = task.batch(5, training_generator(0, 1))
    assert inputs.shape[1:] == (5, task.input_size) and inputs.dtype == torch.float32
    loss = task.loss(outputs_like(task, targets), targets)
    accuracy = task.accuracy(outputs_like(task, targets), targets)
    assert loss.shape == accuracy.shape == () and 0 <= accuracy <= 1


def test_a_batch_is_a_function_of_seed_and_step_alone(task: Task) -> None:
    first = task.batch(5, training_generator(3, 7))
    torch.manual_seed(99)
    again = task.batch(5, training_generator(3, 7))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (training_generator(3, 8), training_generator(4, 7), evaluation_generator(7)):
        assert not torch.equal(task.batch(5, other)[0], first[0])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(0, 2**40))
def test_training_never_draws_from_the_evaluation_stream(seed: int, step: int, index: int) -> None:
    """torch's CPU generator keeps 32 bits of a seed; the streams differ in one of them."""
    training, evaluation = training_generator(seed, step), evaluation_generator(index)
    assert training.initial_seed() % 2**32 < 2**31 <= evaluation.initial_seed() % 2**32
    assert not torch.equal(torch.rand(8, generator=training), torch.rand(8, generator=evaluation))


def test_the_generator_keeps_only_32_bits_so_the_streams_must_differ_in_those() -> None:
    low = torch.rand(4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(low, torch.rand(4, generator=torch.Generator().manual_seed(5 + 2**32)))


def test_perfect_outputs_are_solved_and_chance_is_not(task: Task) -> None:
    _, targets = task.batch(50, training_generator(0, 1))
    perfect = perfect_outputs(task, targets)
    loss, accuracy = task.loss(perfect, targets).item(), task.accuracy(perfect, targets).item()
    assert loss < 1e-3 and accuracy == 1.0 and task.solved(loss, accuracy)
    assert not task.solved(task.chance_loss, 0.2)


def perfect_outputs(task: Task, targets: Tensor) -> Tensor:
    if targets.dtype == torch.int64:
        return 50.0 * torch.nn.functional.one_hot(targets, task.output_size)
    return targets.clone()


def test_chance_loss_is_what_a_predictor_without_memory_gets_on_100k_samples(task: Task) -> None:
    """The best one: the conditional mean, or distribution, given the time step alone."""
    losses = []
    for step in range(100):
        _, targets = task.batch(1000, training_generator(1, step))
        losses.append(task.loss(memoryless_outputs(task, targets), targets).item())
    measured = torch.tensor(losses).double()
    standard_error = max(measured.std().item() / math.sqrt(len(losses)), 1e-7)
    assert abs(measured.mean().item() - task.chance_loss) < 4 * standard_error


def memoryless_outputs(task: Task, targets: Tensor) -> Tensor:
    if isinstance(task, Adding):
        return torch.ones_like(targets)
    assert isinstance(task, Copy), f"say what a memoryless predictor of {type(task)} says"
    logits = torch.full((*targets.shape, 9), -50.0)
    logits[..., 8] = 50
    logits[-10:] = torch.tensor([0.0] * 8 + [-50.0])
    return logits


@pytest.mark.parametrize(
    ("length", "published"), [(100, 0.17329), (200, 0.09452), (300, 0.06498), (1000, 0.02039)]
)
def test_copys_chance_loss_is_the_published_baseline(length: int, published: float) -> None:
    assert Copy(length=length).chance_loss == pytest.approx(published, abs=5e-6)


@pytest.mark.parametrize("length", [1, 5])
def test_copy_is_the_layout_of_arjovsky_2016(length: int) -> None:
    inputs, targets = Copy(length=length).batch(4, training_generator(0, 1))
    symbols_in = inputs.argmax(-1)
    assert inputs.sum(-1).eq(1).all()
    for b in range(4):
        symbols = symbols_in[:10, b].tolist()
        assert all(0 <= s < 8 for s in symbols)
        assert symbols_in[:, b].tolist() == symbols + [8] * (length - 1) + [9] + [8] * 10
        assert targets[:, b].tolist() == [8] * (length + 10) + symbols


def test_copys_accuracy_looks_at_the_recalled_symbols_alone() -> None:
    task = Copy(length=50)
    _, targets = task.batch(20, training_generator(0, 1))
    blanks = torch.zeros(*targets.shape, 9)
    blanks[..., 8] = 1
    assert task.accuracy(blanks, targets) == 0
    half = blanks.clone()
    half[-10:-5] = torch.nn.functional.one_hot(targets[-10:-5], 9) * 2.0
    assert task.accuracy(half, targets) == 0.5


@pytest.mark.parametrize("length", [2, 5, 12])
def test_adding_marks_one_number_in_each_half_and_asks_for_their_sum(length: int) -> None:
    inputs, targets = Adding(length=length).batch(200, training_generator(0, 1))
    numbers, marker = inputs.unbind(-1)
    assert ((numbers >= 0) & (numbers < 1)).all() and ((marker == 0) | (marker == 1)).all()
    assert (marker[: length // 2].sum(0) == 1).all() and (marker[length // 2 :].sum(0) == 1).all()
    for b in range(200):
        marked = [numbers[t, b].item() for t in range(length) if marker[t, b] == 1]
        assert targets[b].item() == pytest.approx(sum(marked))


def test_adding_counts_a_sum_within_four_hundredths_as_right() -> None:
    task: Any = Adding(length=4)
    targets = torch.tensor([[1.0], [1.0], [1.0], [1.0]])
    outputs = torch.tensor([[1.03], [0.97], [1.05], [0.0]])
    assert task.accuracy(outputs, targets) == 0.5
