"""Every task: data against a restatement in plain Python, chance against a measurement."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rnngrad.cliff import surface
from rnngrad.parts import InputError, Interval
from rnngrad.task import (
    EVALUATION_CHUNK,
    TASKS,
    Batch,
    Task,
    evaluation_generator,
    training_generator,
)
from rnngrad.tasks import chars, digits
from tests.small import TEXT, small_task

NAMES = sorted(TASKS.load())


def variants(name: str) -> list[Task]:
    """A small task, with every value of those fields that have only a few, and both lengths."""
    task: Any = small_task(name)
    hints = get_type_hints(type(task), include_extras=True)
    choices: dict[str, list[Any]] = {}
    for field in fields(task):
        hint = hints[field.name]
        intervals = [a for a in getattr(hint, "__metadata__", ()) if isinstance(a, Interval)]
        if get_origin(hint) is Literal:
            choices[field.name] = list(get_args(hint))
        elif hint is bool:
            choices[field.name] = [False, True]
        elif intervals and get_args(hint)[0] is int and intervals[0].high - intervals[0].low < 5:
            choices[field.name] = list(range(int(intervals[0].low), int(intervals[0].high) + 1))
        elif field.name == "min_length":
            choices[field.name] = [None, task.length - 2]
    return [
        replace(task, **dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]


VARIANTS = [task for name in NAMES for task in variants(name)]


@pytest.fixture(params=VARIANTS, ids=repr)
def task(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=NAMES)
def small(request: pytest.FixtureRequest) -> Any:
    return small_task(request.param)


def name_of(task: Task) -> str:
    return next(name for name, kind in TASKS.items() if kind is type(task))


def draws_nothing(task: Task) -> bool:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    task.batch(5, generator)
    return torch.equal(before, generator.get_state())


def test_the_variants_hold_every_form_there_is() -> None:
    count = Counter(map(name_of, VARIANTS))
    assert count["copy"] == 12 and count["adding"] == 6 and count["temporal_order"] == 8
    assert count["digits"] == 2 and set(count) == set(NAMES)


# every task


def test_shapes_and_dtypes_fit_the_model(task: Task) -> None:
    for batch in (
        Batch(*task.batch(5, training_generator(0, 1))),
        task.training_batch(0, 1, 5),
        task.evaluation_batch(0, 5),
    ):
        inputs, targets, continues = batch
        assert inputs.shape[1:] == (5, task.input_size) and inputs.dtype == torch.float32
        assert 1 <= len(inputs) <= task.time_steps and not continues
        assert targets.dtype in (torch.float32, torch.int64)
        outputs = torch.zeros(5, task.output_size)
        if not task.last_step_only:
            outputs = outputs.expand(len(inputs), 5, task.output_size)
        loss, accuracy = task.loss(outputs, targets), task.accuracy(outputs, targets)
        assert loss.shape == accuracy.shape == () and loss > 0 and 0 <= accuracy <= 1
        assert task.memoryless(targets).shape == outputs.shape


def test_data_is_a_function_of_seed_and_step_alone(task: Task) -> None:
    def draw() -> list[Batch]:
        torch.manual_seed(99)
        torch.rand(1)
        return [
            task.training_batch(3, 7, 5),
            task.training_batch(3, 8, 5),
            task.training_batch(5, 7, 5),
            task.evaluation_batch(7, 5),
            Batch(*task.batch(5, training_generator(3, 7))),
        ]

    state = torch.get_rng_state()
    first = draw()
    torch.set_rng_state(state)
    task.training_batch(11, 3, 4)
    for a, b in zip(first, draw(), strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
        assert a.continues == b.continues
    if not draws_nothing(task):
        for a, b in itertools.combinations(first[:4], 2):
            assert a.inputs.shape != b.inputs.shape or not torch.equal(a.inputs, b.inputs)


def test_nothing_is_drawn_from_the_global_generator(small: Task) -> None:
    before = torch.get_rng_state()
    small.training_batch(0, 1, 3)
    small.evaluation_batch(0, 3)
    assert torch.equal(before, torch.get_rng_state())


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
    _, targets, _ = task.evaluation_batch(0, 100)
    perfect = targets.clone()
    if targets.dtype == torch.int64:
        perfect = 50.0 * torch.nn.functional.one_hot(targets, task.output_size)
    loss, accuracy = task.loss(perfect, targets).item(), task.accuracy(perfect, targets).item()
    assert loss < 1e-3 and accuracy == 1.0 and task.solved(loss, accuracy)
    guess = task.memoryless(targets)
    assert not task.solved(task.chance_loss, task.accuracy(guess, targets).item())


def test_chance_loss_is_what_a_predictor_without_memory_gets(task: Task) -> None:
    """The conditional mean, or distribution, given the time step alone: on 100,000 samples of the
    defaults, and a tenth of that of the other variants; of what is held out, on all there is."""
    losses = {}
    for index in range(1000 if task == small_task(name_of(task)) else 100):
        _, targets, _ = task.evaluation_batch(index, 100)
        loss = task.loss(task.memoryless(targets), targets).item()
        losses[index if targets.is_floating_point() else targets.numpy().tobytes()] = loss
    measured = torch.tensor(list(losses.values())).double()
    deviation = measured.std().item() if len(losses) > 1 else 0.0
    standard_error = max(deviation / math.sqrt(len(losses)), 2e-7)
    assert abs(measured.mean().item() - task.chance_loss) < 4 * standard_error


def test_a_predictor_without_memory_looks_at_the_shape_of_the_targets_alone(task: Task) -> None:
    _, targets, _ = task.training_batch(0, 1, 5)
    assert torch.equal(task.memoryless(targets), task.memoryless(torch.zeros_like(targets)))


def test_lengths_are_drawn_from_the_whole_range_and_no_other(task: Task) -> None:
    """Of batches, up to the longest that ``time_steps`` announces."""
    drawn = {len(task.evaluation_batch(index, 1).inputs) for index in range(60)}
    assert max(drawn) == task.time_steps and drawn == set(range(min(drawn), max(drawn) + 1))
    if getattr(task, "min_length", None) is not None:
        assert len(drawn) >= 3


def test_at_length_is_the_same_task_at_that_length(task: Task) -> None:
    if not hasattr(task, "length"):
        with pytest.raises(InputError, match="length=30: "):
            task.at_length(30)
        return
    longer: Any = task.at_length(30)
    same: Any = replace(longer, length=task.length)
    assert longer.length == 30 and longer.time_steps >= 30
    assert same == (replace(task, min_length=None) if hasattr(task, "min_length") else task)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="length=0: must be an integer >= "):
        task.at_length(0)


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(small_task(n), "min_length")])
@pytest.mark.parametrize("min_length", [0, 13, "5"])
def test_a_least_length_that_is_none_is_refused(name: str, min_length: Any) -> None:
    with pytest.raises(InputError, match=r"task.min_length='?\d+'?: must be an integer >= \d+"):
        small_task(name, min_length=min_length)


# each task, restated in plain Python: one sequence of inputs -> what is asked for


def of_marked(task: Any, x: list[list[float]]) -> list[float]:
    return [number for number, marker in x if marker == 1]


def adding(task: Any, x: list[list[float]]) -> list[float]:
    total = sum(of_marked(task, x))
    return [{"sum": total, "mean": total / 2, "signed": 0.5 + total / 4}[task.form]]


def hot(step: list[float]) -> int:
    assert sorted(step) == [0] * (len(step) - 1) + [1]
    return step.index(1)


def copied(task: Any, x: list[list[float]]) -> list[int]:
    if task.coding == "scalar":
        shown = [{0: 8, 9: 9}.get(round(v), round(v) - 1) for [v] in x]
    else:
        shown = [hot(step) for step in x]
    return [8] * (len(x) - 10) + shown[:10]


def memorized(task: Any, x: list[list[float]]) -> list[int]:
    pattern = [hot(step) for step in x][: task.n_positions]
    return [task.n_values] * (len(x) - task.n_positions) + pattern


def selected(task: Any, x: list[list[float]]) -> list[int]:
    shown = [hot(step) for step in x]
    tokens = [s for s in shown if 0 < s < task.vocabulary - 1]
    return [0] * (len(x) - len(tokens)) + tokens


def order(task: Any, x: list[list[float]]) -> int:
    letters = "".join("XY"[s] for s in map(hot, x) if s < 2)
    return ["".join(w) for w in itertools.product("XY", repeat=task.symbols)].index(letters)


def parity(task: Any, x: list[list[float]]) -> int | list[int]:
    odd = [sum(bit == 1 for [bit] in x[: t + 1]) % 2 for t in range(len(x))]
    return odd[-1] if task.scored == "last" else odd


def digit(task: Any, x: list[list[float]]) -> int:
    """No two of scikit-learn's digits have the same pixels, whatever their order."""
    return labels_by_pixels()[tuple(sorted(round(16 * v) for [v] in x))]


@cache
def labels_by_pixels() -> dict[tuple[int, ...], int]:
    data = import_module("sklearn.datasets").load_digits()
    table = {
        tuple(sorted(map(int, x))): int(y) for x, y in zip(data.data, data.target, strict=True)
    }
    assert len(table) == 1797
    return table


RESTATED: dict[str, Callable[[Any, list[list[float]]], Any]] = {
    "adding": adding,
    "multiplication": lambda task, x: [math.prod(of_marked(task, x))],
    "copy": copied,
    "memorization": memorized,
    "selective_copying": selected,
    "temporal_order": order,
    "permutation": lambda task, x: hot(x[0]),
    "parity": parity,
    "digits": digit,
    "cliff": lambda task, x: [0.7],
}


def test_targets_are_those_of_a_restatement_in_plain_python(task: Task) -> None:
    if name_of(task) not in RESTATED:
        pytest.skip(f"no restatement of {name_of(task)} in RESTATED")
    batches = [task.training_batch(0, 1, 20), task.training_batch(0, 2, 20)]
    for inputs, targets, _ in [*batches, task.evaluation_batch(0, 20)]:
        for b in range(20):
            asked = RESTATED[name_of(task)](task, inputs[:, b].tolist())
            each = targets[:, b] if targets.ndim == 2 and not task.last_step_only else targets[b]
            assert each.tolist() == pytest.approx(asked, abs=1e-6)


# what each task shows


@pytest.mark.parametrize(
    ("name", "seed", "step", "digest"),
    [
        ("adding", 0, 1, "73c82b4ea7c73f11"),
        ("adding", 3, 77, "4247b67f88c0216a"),
        ("adding", None, 2, "2b12742f4c0f86f2"),
        ("copy", 0, 1, "f360fa48a1844f29"),
        ("copy", 3, 77, "5700fa810772dc79"),
        ("copy", None, 2, "0f418006e49703bf"),
    ],
)
def test_the_data_of_published_results_stay_as_they_were(
    name: str, seed: int | None, step: int, digest: str
) -> None:
    task = TASKS.default(name, length=100)
    batch = task.evaluation_batch(step, 4) if seed is None else task.training_batch(seed, step, 4)
    content = batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes()
    assert sha256(content).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("name", "changes", "published"),
    [
        ("copy", {"length": 100}, 0.17329),
        ("copy", {"length": 200, "layout": "lezcano2019"}, 0.09452),
        ("copy", {"length": 300}, 0.06498),
        ("copy", {"length": 1000, "layout": "tcn2018", "coding": "scalar"}, 0.02039),
        ("copy", {"length": 2, "min_length": 1}, 10 * math.log(8) * (1 / 21 + 1 / 22) / 2),
        ("adding", {"form": "sum"}, 0.16667),
        ("adding", {"form": "mean"}, 0.041667),
        ("adding", {"form": "signed"}, (2 - 0.1 - 0.9 / 48) / 48),
        ("multiplication", {"form": "pascanu2013"}, 0.048611),
        ("temporal_order", {"symbols": 2}, 1.3863),
        ("temporal_order", {"symbols": 3}, 2.0794),
        ("permutation", {}, 0.69315),
        ("parity", {"scored": "every"}, 0.69315),
        ("memorization", {"length": 100, "n_positions": 5, "n_values": 2}, 5 * math.log(2) / 110),
        ("selective_copying", {}, math.log(14)),
    ],
)
def test_chance_losses_are_the_published_ones(
    name: str, changes: dict[str, Any], published: float
) -> None:
    """Which are printed with four or five digits."""
    assert TASKS.default(name, **changes).chance_loss == pytest.approx(
        published, rel=3e-5, abs=5e-6
    )


@pytest.mark.parametrize(
    ("name", "changes", "right"),
    [
        ("adding", {"form": "mean"}, 0.640),
        ("multiplication", {"form": "pascanu2013"}, 0.610),
        ("adding", {"form": "sum"}, 1 - 0.9216),
    ],
)
def test_a_constant_guess_is_right_as_often_as_the_papers_rule_lets_it(
    name: str, changes: dict[str, Any], right: float
) -> None:
    """A squared error up to 0.04 counts as right in Pascanu's code, an absolute one elsewhere."""
    task = TASKS.default(name, length=10, **changes)
    _, targets = task.batch(200_000, training_generator(0, 1))
    assert task.accuracy(task.memoryless(targets), targets).item() == pytest.approx(
        right, abs=0.004
    )


COPY_LAYOUTS = {
    "arjovsky2016": lambda n: [8] * (n - 1) + [9] + [8] * 10,
    "lezcano2019": lambda n: [8] * n + [9] + [8] * 9,
    "tcn2018": lambda n: [8] * (n - 1) + [9] * 11,
}


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("layout", COPY_LAYOUTS)
@pytest.mark.parametrize("coding", ["onehot", "scalar"])
def test_copy_shows_symbols_blanks_and_markers_where_its_layout_has_them(
    length: int, layout: str, coding: str
) -> None:
    task = TASKS.default("copy", length=length, layout=layout, coding=coding)
    inputs, _ = task.batch(4, training_generator(0, 1))
    code = [1, 2, 3, 4, 5, 6, 7, 8, 0, 9]  # scalar: of symbols 0 to 7, blank, marker
    for b in range(4):
        shown = [
            code.index(int(x[0])) if coding == "scalar" else hot(x) for x in inputs[:, b].tolist()
        ]
        assert all(0 <= s < 8 for s in shown[:10])
        assert shown[10:] == COPY_LAYOUTS[layout](length)


def test_copys_accuracy_looks_at_the_recalled_symbols_alone() -> None:
    task = TASKS.default("copy", length=50)
    _, targets = task.batch(20, training_generator(0, 1))
    blanks = torch.zeros(*targets.shape, 9)
    blanks[..., 8] = 1
    assert task.accuracy(blanks, targets) == 0
    half = blanks.clone()
    half[-10:-5] = torch.nn.functional.one_hot(targets[-10:-5], 9) * 2.0
    assert task.accuracy(half, targets) == 0.5


@pytest.mark.parametrize(("positions", "values"), [(10, 5), (5, 2), (1, 3)])
def test_memorization_shows_pattern_blanks_marker_blanks(positions: int, values: int) -> None:
    task: Any = TASKS.default("memorization", length=3, n_positions=positions, n_values=values)
    inputs, _ = task.batch(200, training_generator(0, 1))
    assert inputs.shape == (3 + 2 * positions, 200, values + 2)
    seen: set[tuple[int, ...]] = set()
    for b in range(200):
        shown = [hot(x) for x in inputs[:, b].tolist()]
        assert shown[positions:] == [values] * 3 + [values + 1] + [values] * (positions - 1)
        seen.add(tuple(shown[:positions]))
    assert {s for pattern in seen for s in pattern} == set(range(values))
    if positions == 5:
        assert len(seen) == 32


def test_one_wrong_step_makes_a_memorized_sequence_wrong() -> None:
    task = TASKS.default("memorization", length=3)
    _, targets = task.batch(4, training_generator(0, 1))
    outputs = torch.nn.functional.one_hot(targets, task.output_size).float()
    assert task.accuracy(outputs, targets) == 1
    outputs[0, 2] = outputs[0, 2].roll(1)
    assert task.accuracy(outputs, targets) == 0.75


@pytest.mark.parametrize("length", [2, 5, 12])
def test_adding_marks_one_number_in_each_half(length: int) -> None:
    inputs, _ = TASKS.default("adding", length=length).batch(200, training_generator(0, 1))
    numbers, marker = inputs.unbind(-1)
    assert ((numbers >= 0) & (numbers < 1)).all() and ((marker == 0) | (marker == 1)).all()
    assert (marker[: length // 2].sum(0) == 1).all() and (marker[length // 2 :].sum(0) == 1).all()


PASCANU = [("adding", "mean"), ("multiplication", "pascanu2013")]
HOCHREITER = [("adding", "signed"), ("multiplication", "hochreiter1997")]


@pytest.mark.parametrize(("name", "form"), PASCANU)
@pytest.mark.parametrize("length", [10, 25, 58])
def test_pascanus_marks_stand_in_the_first_tenth_and_in_the_next_four(
    name: str, form: str, length: int
) -> None:
    task = TASKS.default(name, length=length, form=form)
    steps = set()
    for step in range(30):
        inputs, _ = task.batch(1000, training_generator(0, step))
        numbers, marker = inputs.unbind(-1)
        n = len(inputs)
        steps.add(n)
        assert ((numbers >= 0) & (numbers < 1)).all()
        places = [tuple(row.nonzero().flatten().tolist()) for row in marker.T]
        assert {first for first, _ in places} == set(range(int(n * 0.1)))
        assert {second for _, second in places} == set(
            range(int(n * 0.1), int(n * 0.1) + int(n * 0.4))
        )
    assert steps == set(range(length, length + int(length * 0.1)))


@pytest.mark.parametrize(("name", "form"), HOCHREITER)
@pytest.mark.parametrize("length", [6, 12, 22, 40])
def test_hochreiters_marks_stand_in_the_first_ten_and_in_the_first_half(
    name: str, form: str, length: int
) -> None:
    task = TASKS.default(name, length=length, form=form)
    low, neutral = (-1, 0) if form == "signed" else (0, 1)
    steps, chosen, pairs = set(), 0, set()
    for step in range(60):
        inputs, _ = task.batch(100, training_generator(0, step))
        steps.add(len(inputs))
        for b in range(100):
            numbers, marker = inputs[:, b].T.tolist()
            assert marker[0] == marker[-1] == -1 and set(marker[1:-1]) <= {0, 1}
            assert all(low <= x <= 1 for x in numbers)
            places = [t for t, m in enumerate(marker) if m == 1]
            if len(places) == 1:  # the first step is the other, and counts as nothing
                assert numbers[0] == neutral
                chosen += 1
                places = [0, *places]
            else:
                assert numbers[0] != neutral
            assert len(places) == 2 and places[0] < 10
            pairs.add(tuple(places))
    half = length // 2 - 1
    assert steps == set(range(length, length + length // 10 + 1))
    if length <= 22:
        assert pairs == {(i, j) for i in range(half) for j in range(i + 1, half)}
    assert {j for _, j in pairs} == set(range(1, half))
    ten = min(10, half)
    q = 1 / ten + (1 - 1 / ten) / (half - 1)
    assert abs(chosen / 6000 - q) < 4 * math.sqrt(q / 6000)


@pytest.mark.parametrize(
    ("name", "form", "near"),
    [
        ("adding", "sum", 0.04),
        ("adding", "signed", 0.04),
        ("adding", "mean", 0.2),
        ("multiplication", "pascanu2013", 0.2),
        ("multiplication", "hochreiter1997", 0.04),
    ],
)
def test_how_near_a_number_must_come_to_be_right(name: str, form: str, near: float) -> None:
    task = TASKS.default(name, length=12, form=form)
    targets = torch.ones(4, 1)
    errors = torch.tensor([[0.97], [-0.97], [1.03], [25.0]]) * near
    assert task.accuracy(targets + errors, targets) == 0.5


ORDER_PLACES = {
    ("pascanu2013", 2): [(10, 19), (50, 59)],
    ("pascanu2013", 3): [(10, 19), (30, 39), (60, 69)],
    ("hochreiter1997", 2): [(10, 20), (50, 60)],
    ("hochreiter1997", 3): [(10, 20), (33, 43), (66, 76)],
}


@pytest.mark.parametrize(("form", "symbols"), ORDER_PLACES)
def test_temporal_order_is_that_of_its_paper_at_a_length_of_100(form: str, symbols: int) -> None:
    task = TASKS.default("temporal_order", length=100, form=form, symbols=symbols)
    places: list[set[int]] = [set() for _ in range(symbols)]
    steps, classes = set(), set()
    for step in range(60):
        inputs, targets = task.batch(20, training_generator(0, step))
        steps.add(len(inputs))
        classes |= set(targets.tolist())
        for row in inputs.argmax(-1).T.tolist():
            where = [t for t, s in enumerate(row) if s < 2]
            assert len(where) == symbols
            for k, t in enumerate(where):
                places[k].add(t)
            if form == "hochreiter1997":
                assert row[0] == 6 and row[-1] == 7
                row = row[1:-1]
            assert set(row) <= {0, 1, 2, 3, 4, 5}
    assert [(min(p), max(p)) for p in places] == ORDER_PLACES[form, symbols]
    assert steps == (set(range(100, 111)) if form == "hochreiter1997" else {100})
    assert classes == set(range(2**symbols))


@given(st.integers(10, 10**6), st.sampled_from([1, 3, 4, 5, 6]))
def test_tenths_in_integers_are_those_of_pascanus_code(length: int, tenths: int) -> None:
    assert int(length * (tenths / 10)) == tenths * length // 10


def test_after_the_first_step_the_permutation_problem_shows_all_other_symbols() -> None:
    inputs, targets = TASKS.default("permutation", length=60).batch(200, training_generator(0, 1))
    shown = inputs.argmax(-1)
    assert set(shown[0].tolist()) == set(targets.tolist()) == {0, 1}
    assert set(shown[1:].flatten().tolist()) == set(range(2, 100))


def test_selective_copying_puts_its_tokens_anywhere_before_the_markers() -> None:
    task: Any = TASKS.default("selective_copying", length=6, n_tokens=3, vocabulary=5)
    inputs, _ = task.batch(2000, training_generator(0, 1))
    shown = inputs.argmax(-1)
    assert (shown[9:] == 4).all() and (shown[:9] < 4).all()
    is_token = shown[:9] > 0
    assert (is_token.sum(0) == 3).all()
    places = Counter(tuple(row.nonzero().flatten().tolist()) for row in is_token.T)
    assert len(places) == math.comb(9, 3) and max(places.values()) < 3 * 2000 / math.comb(9, 3)
    assert Counter(shown[:9][is_token].tolist()).keys() == {1, 2, 3}


def test_parity_shows_fair_bits() -> None:
    inputs, targets = TASKS.default("parity", length=50).batch(2000, training_generator(0, 1))
    assert set(inputs.flatten().tolist()) == {0.0, 1.0}
    assert inputs.mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(inputs.numel()))
    assert targets.float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2000))


# cliff


def slope(w: float, b: float, steps: int) -> tuple[float, float, float]:
    """The paper's own variables: ``E = (σ(x_T) - 0.7)²``, ``∂E/∂w`` and ``∂E/∂b``."""

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    x, dw, db = 0.5, 0.0, 0.0
    for _ in range(steps):
        s = sigma(x)
        dw, db = s + w * s * (1 - s) * dw, 1 + w * s * (1 - s) * db
        x = w * s + b
    s = sigma(x)
    error = 2 * (s - 0.7) * s * (1 - s)
    return (s - 0.7) ** 2, error * dw, error * db


@pytest.mark.parametrize("b", [-2.613, -2.612341, -2.6123, -2.612, -2.45, -3.0, 0.0])
def test_one_sigmoid_unit_on_the_cliffs_data_has_the_papers_error_and_slope(b: float) -> None:
    task: Any = TASKS.default("cliff")
    inputs, targets, _ = task.training_batch(0, 1, 2)
    w_, b_ = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (5.0, b))
    h = torch.full((2, 1), task.initial_hidden, dtype=torch.float64)
    for x in inputs.double():
        h = (w_ * h + b_ + 3.0 * x).sigmoid()
    loss = task.loss(h, targets.double())
    loss.backward()
    # the target is a float32, so 0.7 to 7 digits
    expected = slope(5.0, b, task.length)
    assert [loss.item(), w_.grad.item(), b_.grad.item()] == pytest.approx(expected, rel=1e-6)
    if b == -2.612341:
        assert math.hypot(*expected[1:]) == pytest.approx(6773, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 20, 50])
def test_the_cliffs_surface_has_the_papers_error_and_slope_at_every_place(steps: int) -> None:
    places = [(5.0, -2.613), (5.0, -2.612341), (5.0, -2.45), (0.0, 0.0), (7.0, -3.9), (-2.0, 9.0)]
    weights, biases = zip(*places, strict=True)
    found = surface(weights, biases, steps)
    for number, (w, b) in enumerate(places):
        there = [found.error[number], found.by_weight[number], found.by_bias[number]]
        assert there == pytest.approx(slope(w, b, steps), rel=1e-9)
        assert found.norm[number] == pytest.approx(math.hypot(*there[1:]))
    grid = surface(np.array([5.0, 0.0]), np.array([[-2.613], [0.0]]), steps).error
    assert grid.shape == (2, 2) and grid[0, 0] == found.error[0] and grid[1, 1] == found.error[3]


def test_the_cliffs_layers_are_the_output_and_start_where_the_paper_does() -> None:
    task = TASKS.default("cliff")
    assert not task.reads_out and task.output_size == 1
    assert task.initial_hidden == pytest.approx(0.6224593312)


def test_all_other_tasks_have_a_read_out_and_start_from_zero() -> None:
    for name in NAMES:
        if name != "cliff":
            assert small_task(name).reads_out and small_task(name).initial_hidden == 0


# digits


def test_an_evaluation_shows_every_held_out_digit_once_and_training_none() -> None:
    def seen(batches: list[Batch]) -> list[tuple[float, ...]]:
        return [tuple(row) for batch in batches for row in batch.inputs[:, :, 0].T.tolist()]

    task = small_task("digits")
    sizes = [100, 100, 100, 60]  # as an evaluation of 360 asks for them
    held_out = seen([task.evaluation_batch(i, size) for i, size in enumerate(sizes)])
    trained = set(seen([task.training_batch(0, step, 1000) for step in range(1, 21)]))
    assert len(held_out) == len(set(held_out)) == 360
    assert len(trained) == 1797 - 360 and not trained & set(held_out)
    again = task.evaluation_batch(3, 100).inputs
    assert torch.equal(again[:, 60:], task.evaluation_batch(0, 40).inputs)


def test_permuted_digits_have_every_pixel_once_in_one_order() -> None:
    plain = small_task("digits").evaluation_batch(0, 100)
    permuted = small_task("digits", permuted=True).evaluation_batch(0, 100)
    assert torch.equal(plain.targets, permuted.targets)
    columns = [tuple(c) for c in plain.inputs[:, :, 0].tolist()]
    moved = [tuple(c) for c in permuted.inputs[:, :, 0].tolist()]
    assert sorted(columns) == sorted(moved) and columns != moved
    assert plain.inputs.min() == 0 and plain.inputs.max() == 1


def test_digits_without_scikit_learn_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    digits._digits.cache_clear()
    monkeypatch.setattr(digits, "import_module", missing)
    with pytest.raises(InputError, match=re.escape("pip install 'rnngrad[digits]'")) as error:
        TASKS.default("digits")
    assert error.value.key == "task.name"


# chars


def text_task(tmp_path: Path, text: str, **changes: Any) -> Any:
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    return TASKS.default("chars", path=str(file), **changes)


def read(task: Any, numbers: Tensor) -> str:
    return "".join(task.characters[i] for i in numbers.tolist())


TEXT_OF_5000 = "".join(chr(97 + (i * i // 7 + i % 5) % 26) for i in range(5000))


def test_each_row_reads_its_own_stretch_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    task = text_task(tmp_path, TEXT_OF_5000, length=20, valid_fraction=0.2)
    rows, windows = 7, (4000 - 1 - 20) // (7 * 20)
    stretches, last = [""] * rows, [""] * rows
    for step in range(1, windows + 1):
        inputs, targets, continues = task.training_batch(3, step, rows)
        assert continues == (step > 1)
        for row in range(rows):
            shown = read(task, inputs[:, row].argmax(-1))
            assert read(task, targets[:, row])[:-1] == shown[1:]
            if step > 1:
                assert last[row] == shown[0]
            stretches[row] += shown
        last = [read(task, targets[-1:, row]) for row in range(rows)]
    whole = "".join(stretches)
    assert len(whole) == rows * windows * 20 and whole in TEXT_OF_5000[:4000]
    again = task.training_batch(3, windows + 1, rows)
    assert not again.continues
    assert read(task, again.inputs[:, 0].argmax(-1)) in TEXT_OF_5000[:200]


def test_another_seed_reads_the_text_a_little_aside(tmp_path: Path) -> None:
    task = text_task(tmp_path, TEXT_OF_5000, length=20)
    starts = {read(task, task.training_batch(s, 1, 7).inputs[:, 0].argmax(-1)) for s in range(40)}
    assert len(starts) > 10


def test_the_evaluation_reads_the_last_part_in_the_rows_of_its_largest_batch(
    tmp_path: Path,
) -> None:
    text = TEXT_OF_5000 * 10
    task = text_task(tmp_path, text, length=20, valid_fraction=0.2)
    assert len(text) // 5 // (EVALUATION_CHUNK * 20) == 5
    whole = [""] * 100
    for index in range(4):
        batch = task.evaluation_batch(index, 100)
        assert batch.continues == (index > 0)
        fewer = task.evaluation_batch(index, 30)
        assert torch.equal(fewer.inputs, batch.inputs[:, :30])
        assert fewer.continues == batch.continues
        for row in range(100):
            whole[row] += read(task, batch.inputs[:, row].argmax(-1))
    assert "".join(whole) in text[40_000:]
    assert not task.evaluation_batch(4, 100).continues


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_readers_stay_within_the_text_and_apart_where_it_is_long_enough(
    data: st.DataObject,
) -> None:
    length, readers = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 60))
    size = data.draw(st.integers(length + 1, 5000))
    task: Any = small_task("chars", length=length)
    windows, spacing, spare = task._stretches(size, readers)
    end = spare + (readers - 1) * spacing + windows * length  # the last character asked for
    assert windows >= 1 and spacing >= 0 and spare >= 0 and end == size - 1
    if size > (readers + 1) * length and readers > 1:
        assert spacing == windows * length and length <= spare < (readers + 1) * length
    elif size <= (readers + 1) * length:
        assert windows == 1


def test_chance_of_a_text_is_the_entropy_of_its_last_part_in_bits(tmp_path: Path) -> None:
    task = text_task(tmp_path, "abcd" * 500 + "aaab" * 100, length=10, valid_fraction=400 / 2400)
    assert task.chance_loss == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    _, targets, _ = task.evaluation_batch(0, 3)
    uniform = torch.zeros(10, 3, 4)
    assert task.loss(uniform, targets).item() == pytest.approx(2)  # bits


@pytest.mark.parametrize("letters", ["ab", "aäΩ€😀", "".join(map(chr, range(0x4E00, 0x4F40)))])
def test_any_characters_are_numbered_in_their_order(tmp_path: Path, letters: str) -> None:
    task = text_task(tmp_path, letters[::-1] * 200, length=10)
    assert task.characters == letters and task.input_size == len(letters)
    inputs, _ = task.batch(200, training_generator(0, 1))
    for row in range(200):
        assert read(task, inputs[:, row].argmax(-1)) in letters[::-1] * 200


def test_a_text_is_read_once_and_changes_no_more(tmp_path: Path) -> None:
    task = text_task(tmp_path, "abcdefgh" * 100, length=10)
    before = task.training_batch(0, 1, 2).inputs
    (tmp_path / "text.txt").write_text("something else")
    assert torch.equal(task.training_batch(0, 1, 2).inputs, before)


BAD_TEXTS = [
    (b"", "must be a text file: with at least 2 different characters"),
    (b"aaaaaaaa" * 100, "with at least 2 different characters"),
    (b"abc\xff" * 100, "byte 3 is not UTF-8"),
    (b"ab" * 100, "length=100: must be under 20, "),
    (b"ab" * 600, "has 1,200 bytes; 1,000 are allowed"),
]


@pytest.mark.parametrize(("content", "message"), BAD_TEXTS)
def test_a_bad_text_is_refused_in_one_line(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chars, "MAX_BYTES", 1000)
    file = tmp_path / "text"
    file.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        TASKS.default("chars", path=str(file))
    assert "\n" not in str(error.value) and error.value.key in ("task.path", "task.length")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "task.path=null: must be a text file; give task.path=FILE"),
        ("/no/such/file", "task.path=/no/such/file: must be a text file: No such file"),
        (str(TEXT.parent), "is a directory or a device"),
        ("", "is a directory or a device"),
        ("a\0b", "must be a text file"),
        (3, "task.path=3: must be a text or null"),
    ],
)
def test_a_path_without_a_text_is_refused(path: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        TASKS.default("chars", path=path)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 0.99999])
def test_both_parts_of_a_text_have_something_to_read(fraction: float) -> None:
    with pytest.raises(InputError, match=r"task\.(valid_fraction|length)"):
        TASKS.default("chars", path=str(TEXT), valid_fraction=fraction)


# the small instances of other tests


def test_a_task_that_cannot_be_as_short_as_the_others_is_taken_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TASKS["parity"], "shortest", 40)
    assert small_task("parity") == TASKS.default("parity")
    with pytest.raises(InputError):
        small_task("parity", length=5)
