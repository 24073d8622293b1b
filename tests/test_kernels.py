"""The compiled kernels against the reference path: special values, threads, runs, segments."""

import math
import mmap
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from rnngrad.bptt import Tape, record
from rnngrad.bptt_clip import BPTT_CLIPS, install
from rnngrad.cells.nonlinearity import NONLINEARITIES
from rnngrad.kernels import fused, kernel_for, memory, native, reference_only
from rnngrad.kernels.activations import ACTIVATIONS
from rnngrad.kernels.cells import CELLS
from rnngrad.nn import GRU, LSTM, RNN

LAYERS: dict[str, Any] = {
    **{f"rnn_{name}": partial(RNN, nonlinearity=name) for name in ACTIVATIONS},
    "lstm": LSTM,
    "gru": GRU,
}
UNBOUNDED = ("rnn_relu", "rnn_linear", "rnn_leaky_relu", "rnn_elu")
SPECIAL = (0.0, -0.0, 1e-45, -1e-40, 1e-38, 1e-20, 88.0, -88.5, -104.0, 1e10, 1e20)
"""Zeros of both signs, subnormals, where float32's exponential ends, large."""


@pytest.fixture(params=LAYERS)
def make(request: pytest.FixtureRequest) -> Any:
    return LAYERS[request.param]


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(fused, "SERIAL_WORK", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def everything(layer: Any, x: Tensor, lengths: list[int] | None = None, **kind: bool) -> Any:
    """Outputs, last states, gradients and records of a loss that uses all outputs."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    given: Any = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
    with record(layer, **kind) as tape:
        output, state = layer(given)
        output = output.data if lengths is not None else output
        last = state[0] if isinstance(state, tuple) else state
        (output.square().sum() + last.sum()).backward()
    found = {"output": output.detach(), "last": last.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in layer.named_parameters()}
    return found | records(tape)


def records(tape: Tape) -> dict[str, Tensor]:
    return {
        f"{name}.{kind}": value
        for name in tape
        for kind, value in vars(tape[name]).items()
        # attribution can be of a sum that cancels, and its digits with it: see test_bptt
        if isinstance(value, Tensor) and kind != "attribution"
    }


def assert_agree(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """NaN and infinities in the same places, zeros of the same sign in outputs, the rest close."""
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        b = theirs[name]
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.equal(a.isinf(), b.isinf()), name
        assert torch.equal(a[a.isinf()], b[b.isinf()]), name
        real = b.isfinite()
        size = b[real].abs().max() if real.any() else 0.0
        assert ((a - b)[real].abs() <= tolerance * size + 1e-43).all(), name


# --- the same numbers


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(LAYERS)),
    double=st.booleans(),
    steps=st.integers(1, 9),
    batch=st.integers(1, 20),
    inputs=st.integers(1, 37),
    hidden=st.integers(1, 70),
    both=st.booleans(),
    bias=st.booleans(),
    threads=st.integers(1, 4),
    data=st.data(),
)
def test_any_shape_and_lengths_agree_with_the_reference_path(
    name: str,
    double: bool,
    steps: int,
    batch: int,
    inputs: int,
    hidden: int,
    both: bool,
    bias: bool,
    threads: int,
    data: st.DataObject,
) -> None:
    torch.manual_seed(0)
    dtype = torch.float64 if double else torch.float32
    lengths = data.draw(st.none() | st.lists(st.integers(1, steps), min_size=batch, max_size=batch))
    layer = LAYERS[name](inputs, hidden, bias=bias, bidirectional=both, dtype=dtype)
    x = torch.randn(max(lengths or [steps]), batch, inputs, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "SERIAL_WORK", 0)
        torch.set_num_threads(threads)
        ours = everything(layer, x, lengths, full=True, weight=True)
        torch.set_num_threads(1)
    with reference_only():
        theirs = everything(layer, x, lengths, full=True, weight=True)
    for found in (ours, theirs):  # the same beyond the ends, where there is nothing
        found |= {name: value.nan_to_num(7.0) for name, value in found.items()}
    assert_agree(ours, theirs, 1e-11 if double else 2e-4)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(LAYERS)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    place=st.integers(0, 6 * 3 * 2 - 1),
    value=st.sampled_from([math.nan, math.inf, -math.inf, *SPECIAL]),
    where=st.sampled_from(["x", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0"]),
)
def test_special_values_come_out_as_from_the_reference_path(
    name: str, dtype: torch.dtype, place: int, value: float, where: str
) -> None:
    # where finite numbers overflow on the way, infinity or NaN is a matter of the order of a sum
    assume(name not in UNBOUNDED or not 1e4 < abs(value) < math.inf)
    torch.manual_seed(1)
    layer = LAYERS[name](2, 5, dtype=dtype)
    x = torch.randn(6, 3, 2, dtype=dtype)
    with torch.no_grad():
        target = x if where == "x" else layer.get_parameter(where)
        target.view(-1)[place % target.numel()] = value
    ours = everything(layer, x)
    with reference_only():
        theirs = everything(layer, x)
    # a large weight multiplies the rounding of what it meets
    assert_agree(ours, theirs, 1e-11 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_step_is_torchs_function_over_the_whole_range(dtype: torch.dtype) -> None:
    """A tanh RNN without recurrence is tanh; an LSTM's closed input gate is a sigmoid."""
    values = torch.cat(
        [
            torch.linspace(-110, 110, 200_001, dtype=dtype),
            torch.logspace(-45, 2, 50_001, dtype=dtype),
            torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype),
        ]
    )
    eps = torch.finfo(dtype).eps
    rnn = RNN(1, 1, bias=False, dtype=dtype)
    nn.init.ones_(rnn.weight_ih_l0)
    tanh = rnn(values.view(1, -1, 1))[0].flatten()
    expected = values.tanh()
    negative = (values < 0) & ~values.isnan()
    assert torch.equal(tanh[negative].signbit(), expected[negative].signbit())
    torch.testing.assert_close(tanh, expected, rtol=4 * eps, atol=0, equal_nan=True)
    assert torch.equal(tanh.abs() == 1, expected.abs() == 1) or dtype == torch.float32
    # c_1 = f c_0 + i g with the input gate at 0
    lstm = LSTM(1, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
        lstm.weight_ih_l0.copy_(torch.tensor([[0.0], [1.0], [0.0], [0.0]]))
    values = values[values.isfinite()]  # infinity times the other gates' weight 0 is NaN
    ones = torch.ones(1, len(values), 1, dtype=dtype)
    _, (_, c) = lstm(values.view(1, -1, 1), (0 * ones, ones))
    tiny = 1e-37 if dtype == torch.float32 else 1e-300
    torch.testing.assert_close(c.flatten(), values.sigmoid(), rtol=4 * eps, atol=tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_one_step_and_its_gradient_are_those_of_torchs_activation(
    name: str, dtype: torch.dtype
) -> None:
    values = torch.cat(
        [
            torch.linspace(-110, 110, 20_001, dtype=dtype),
            torch.logspace(-45, 2, 5_001, dtype=dtype),
            -torch.logspace(-45, 2, 5_001, dtype=dtype),
            torch.tensor([*SPECIAL, math.inf, -math.inf, math.nan], dtype=dtype),
        ]
    )
    rnn = RNN(1, 1, nonlinearity=name, bias=False, dtype=dtype)
    nn.init.ones_(rnn.weight_ih_l0)
    found = []
    for phi in (lambda a: rnn(a.view(1, -1, 1))[0].flatten(), NONLINEARITIES[name](1)):
        a = values.clone().requires_grad_()
        h = phi(a)
        h.backward(torch.full_like(h, 3.0))
        assert a.grad is not None
        found.append((h.detach(), a.grad))
    (ours, our_grad), (theirs, their_grad) = found
    if name in ("relu", "linear", "leaky_relu"):  # to the bit, so that 0 and NaN are as in torch
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(our_grad, their_grad, rtol=0, atol=0, equal_nan=True)
        return
    info = torch.finfo(dtype)
    torch.testing.assert_close(ours, theirs, rtol=4 * info.eps, atol=2 * info.tiny, equal_nan=True)
    # from the state, whose own rounding is felt where the activation is flat; of a NaN torch's
    # elu gives one or another gradient, by whether the entry happens to be in a whole vector
    known = ~values.isnan()
    assert our_grad[~known].isnan().all()
    torch.testing.assert_close(our_grad[known], their_grad[known], rtol=0, atol=24 * info.eps)


def test_norms_of_tiny_and_huge_gradients_neither_underflow_nor_overflow() -> None:
    for dtype, sizes in ((torch.float32, (1e-30, 1e30)), (torch.float64, (1e-250, 1e250))):
        for size in sizes:
            layer = RNN(1, 3, dtype=dtype)
            with record(layer) as tape:
                (layer(torch.ones(1, 1, 1, dtype=dtype))[0] * size).sum().backward()
            expected = pytest.approx(size * math.sqrt(3), rel=1e-6)
            assert tape["l0"].hidden_norm.item() == expected
            assert tape["l0"].direct_norm.item() == expected


def test_nothing_depends_on_what_memory_held_before(make: Any) -> None:
    torch.manual_seed(0)
    layer, x = make(3, 8), torch.randn(20, 4, 3)
    first: dict[str, Tensor] = {}
    for fill in (0.0, 1e30, math.nan):
        held = [torch.full((size,), fill) for size in (10, 50, 100, 300, 1000, 3000) for _ in "ab"]
        del held
        layer.zero_grad()
        with record(layer) as tape:
            _, state = layer(x)
            (state[0] if isinstance(state, tuple) else state).square().sum().backward()
        found = records(tape) | {name: p.grad.clone() for name, p in layer.named_parameters()}
        first = first or found
        assert all(torch.equal(found[name], value) for name, value in first.items())


def test_sizes_that_do_not_fit_are_refused_before_any_memory_is_read() -> None:
    layer = LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    for name, wrong in (
        ("weight_ih_l0", torch.zeros(16, 2)),
        ("weight_hh_l0", torch.zeros(12, 4)),
        ("bias_ih_l0", torch.zeros(15)),
        ("bias_hh_l0", torch.zeros(16, dtype=torch.float64)),
    ):
        with pytest.raises(RuntimeError, match=f"{name.removesuffix('_l0')}: expected"):
            torch.func.functional_call(layer, {name: wrong}, (x,))


@pytest.mark.parametrize("path", [nullcontext, reference_only])
def test_an_overflow_at_a_sequences_end_stays_where_the_loss_does_not_look(path: Any) -> None:
    """Its state is infinite, its gradient 0: together they are no part of any weight's gradient."""
    layer = RNN(1, 4, nonlinearity="relu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.5)
    x = torch.ones(8, 2, 1)
    x[3, 1] = 3e38
    with torch.no_grad():
        layer.weight_ih_l0.fill_(2.0)
    x[:, 0] = 0.1
    with path():
        output, _ = layer(pack_padded_sequence(x, [8, 4]))
        padded, _ = pad_packed_sequence(output)
        assert padded[3, 1].isinf().all()
        padded[:, 0].sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_checkpoint_on_another_number_of_threads_has_the_same_gradients(
    make: Any, three_threads: None
) -> None:
    torch.manual_seed(0)
    layer, x = make(5, 17), torch.randn(30, 8, 5)
    layer(x)[0].square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    again = checkpoint(lambda x: layer(x)[0], x.requires_grad_(), use_reentrant=False)
    torch.set_num_threads(1)
    again.square().sum().backward()
    for parameter, grad in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [torch.nn.Module.half, torch.nn.Module.double])
def test_weights_of_another_dtype_than_in_the_forward_are_refused(make: Any, change: Any) -> None:
    layer = make(3, 4)
    loss = layer(torch.randn(5, 2, 3))[0].sum()
    change(layer)
    with pytest.raises(RuntimeError, match="expected torch.float32|dtype"):
        loss.backward()


def test_tensors_without_memory_and_with_a_lazy_sign_are_right(make: Any) -> None:
    layer, x = make(3, 4), torch.randn(5, 2, 3)
    assert torch.equal(layer(torch._neg_view(x))[0], layer(-x)[0])
    with FakeTensorMode():
        assert make(3, 4)(torch.zeros(5, 2, 3))[0].shape == (5, 2, 4)


def test_a_batched_backward_names_what_can_do_it(make: Any) -> None:
    output = make(3, 4)(x := torch.randn(5, 1, 3, requires_grad=True))[0][-1, 0]
    with pytest.raises(NotImplementedError, match=r"is_grads_batched.*unroll"):
        torch.autograd.grad(output, x, torch.eye(4), is_grads_batched=True)


def test_memory_goes_back_to_the_pool_and_from_there_to_the_system() -> None:
    memory.release()
    first = memory.empty(2**19, torch.float32, spare=64)
    place = first.data_ptr()
    second = memory.empty(2**19, torch.float32, spare=64)
    assert abs(second.data_ptr() - place) >= first.numel() * 4, "two in use never overlap"
    del first
    third = memory.empty(2**19, torch.float32, spare=64)
    assert third.data_ptr() == place
    del second, third
    assert len(memory._IDLE) == 2
    memory.release()
    assert not memory._IDLE


def test_memory_comes_in_small_pages_where_there_are_no_large_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Plain(mmap.mmap):
        def madvise(self, *_: Any) -> None:
            raise OSError("Invalid argument")

    memory.release()
    monkeypatch.setattr(mmap, "mmap", Plain)
    assert memory.empty(2**19, torch.float64, spare=64).numel() >= 2**19


# --- which kernel


def test_the_compiled_kernel_is_used_wherever_it_can_be() -> None:
    x = torch.zeros(2, 3, 4)
    assert isinstance(kernel_for("LSTM", x, projected=False), fused.FusedKernel)
    others = [(x, True), (x.bfloat16(), False), (x.to("meta"), False), (x[:, :0], False)]
    for tensor, projected in others:
        assert not isinstance(kernel_for("LSTM", tensor, projected), fused.FusedKernel)


# --- threads


def test_results_are_bitwise_the_same_again_and_close_on_other_threads(
    make: Any, three_threads: None
) -> None:
    torch.manual_seed(0)
    layer, x = make(5, 17), torch.randn(30, 8, 5)
    one, two = everything(layer, x), everything(layer, x)
    assert all(torch.equal(one[name], value) for name, value in two.items())
    torch.set_num_threads(1)
    assert_agree(everything(layer, x), one, 1e-5)


def test_two_threads_of_the_user_train_at_once(make: Any, three_threads: None) -> None:
    torch.manual_seed(0)
    pairs = [(make(5, 17), torch.randn(30, 8, 5)) for _ in range(2)]
    alone = [everything(*pair) for pair in pairs]
    start = threading.Barrier(2)

    def work(pair: Any) -> Any:
        torch.set_num_threads(3)  # OpenMP counts for each of them
        start.wait()
        return [everything(*pair) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(work, pairs))
    for expected, results in zip(alone, together, strict=True):
        for found in results:
            assert all(torch.equal(found[name], value) for name, value in expected.items())


def _in_child(layer: Any, x: Tensor, results: Any) -> None:
    results.put({name: value.numpy() for name, value in everything(layer, x).items()})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*JAX is multithreaded:RuntimeWarning")  # of another test
def test_a_forked_child_computes_the_same(make: Any, three_threads: None) -> None:
    torch.manual_seed(0)
    layer, x = make(5, 17), torch.randn(30, 8, 5)
    expected = everything(layer, x)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_in_child, args=(layer, x, results))
    child.start()
    found = results.get(timeout=300)
    child.join(10)
    assert child.exitcode == 0
    assert all((found[n] == v.numpy()).all() for n, v in expected.items())


def test_without_openmp_a_pool_does_the_same(
    make: Any, three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = make(5, 17), torch.randn(30, 8, 5)
    expected = everything(layer, x)
    monkeypatch.setattr(native, "_openmp", lambda: None)
    found = everything(layer, x)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# --- clipping inside back-propagation

RULES = [(site, kind) for site in ("preact", "state", "carry") for kind in ("value", "norm")]


def clip_in(layer: Any, site: str, kind: str, threshold: float) -> None:
    key = {"value": "clip_value", "norm": "max_norm"}[kind]
    install(layer, BPTT_CLIPS.default(kind, site=site, **{key: threshold}))


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(sorted(LAYERS)),
    rule=st.sampled_from(RULES),
    threshold=st.floats(-12, 3).map(lambda exponent: 10**exponent),
    steps=st.integers(1, 8),
    batch=st.integers(1, 9),
    hidden=st.integers(1, 40),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_clipped_at_any_threshold_and_size_they_agree(
    name: str,
    rule: tuple[str, str],
    threshold: float,
    steps: int,
    batch: int,
    hidden: int,
    threads: int,
    data: st.DataObject,
) -> None:
    torch.manual_seed(0)
    lengths = data.draw(st.none() | st.lists(st.integers(1, steps), min_size=batch, max_size=batch))
    layer = LAYERS[name](2, hidden, bidirectional=True, dtype=torch.float64)
    clip_in(layer, *rule, threshold)
    x = torch.randn(max(lengths or [steps]), batch, 2, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "SERIAL_WORK", 0)
        torch.set_num_threads(threads)
        ours = everything(layer, x, lengths, full=True, weight=True)
        torch.set_num_threads(1)
    with reference_only():
        theirs = everything(layer, x, lengths, full=True, weight=True)
    assert "l0.clipped" in ours
    assert_agree(ours, theirs, 1e-10)


@pytest.mark.parametrize("rule", RULES, ids="-".join)
@pytest.mark.parametrize(("name", "norm"), [("lstm", 0.6), ("gru", 2.0)])
def test_clipped_in_float32_they_agree(name: str, norm: float, rule: tuple[str, str]) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name](3, 37)
    clip_in(layer, *rule, 0.03 if rule[1] == "value" else norm)
    x = torch.randn(9, 5, 3)
    ours = everything(layer, x)
    with reference_only():
        theirs = everything(layer, x)
    assert 0 < ours["l0.clipped"].mean() < 1
    assert_agree(ours, theirs, 1e-4)


@settings(max_examples=250, deadline=None)
@given(
    name=st.sampled_from(sorted(LAYERS)),
    rule=st.sampled_from(RULES),
    values=st.dictionaries(
        st.integers(0, 4 * 2 * 3 - 1),
        st.sampled_from([math.nan, math.inf, -math.inf, 1e200, -1e300, 1e-200, 5e-324, 0.0]),
        max_size=3,
    ),
    threshold=st.sampled_from([1e-200, 1e-3, 1.0, 1e200]),
)
def test_clipped_special_gradients_come_out_as_from_the_reference_path(
    name: str, rule: tuple[str, str], values: dict[int, float], threshold: float
) -> None:
    # where finite numbers overflow on the way, infinity or NaN is a matter of the order of a sum
    assume(rule[1] == "norm" or threshold < 1e100 or not any(map(math.isinf, values.values())))
    torch.manual_seed(1)
    layer = LAYERS[name](2, 3, dtype=torch.float64)
    clip_in(layer, *rule, threshold)
    x = torch.randn(4, 2, 2, dtype=torch.float64)
    arriving = torch.randn(4, 2, 3, dtype=torch.float64)
    for place, value in values.items():
        arriving.view(-1)[place] = value
    found = []
    for path in (nullcontext, reference_only):
        layer.zero_grad()
        with path(), record(layer, full=True) as tape:
            layer(x)[0].backward(arriving)
        found.append({name: p.grad for name, p in layer.named_parameters()} | records(tape))
    assert_agree(found[0], found[1], 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1e30, 1e-200, 1e200])
@pytest.mark.parametrize("path", [nullcontext, reference_only])
def test_rows_whose_squares_leave_the_range_are_scaled_to_the_norm(
    dtype: torch.dtype, size: float, path: Any
) -> None:
    if not 0 < torch.tensor(size, dtype=dtype).item() < math.inf:
        pytest.skip("not a number of this type")
    layer = LSTM(1, 4, dtype=dtype)
    clip_in(layer, "state", "norm", size)
    with path(), record(layer, full=True) as tape:
        (layer(torch.ones(1, 1, 1, dtype=dtype))[0] * (3 * size)).sum().backward()
    assert tape["l0"].hidden_norm.item() == pytest.approx(size, rel=1e-6)
    torch.testing.assert_close(
        tape["l0"].hidden_grad, torch.full((1, 1, 4), size / 2, dtype=dtype), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("path", [nullcontext, reference_only])
@pytest.mark.parametrize("rule", RULES, ids="-".join)
def test_clipped_runs_under_vmap_are_the_single_runs(path: Any, rule: tuple[str, str]) -> None:
    torch.manual_seed(0)
    runs = [LSTM(3, 4, dtype=torch.float64) for _ in range(3)]
    for run in runs:
        clip_in(run, *rule, 0.3)
    weights, _ = torch.func.stack_module_state(runs)
    x = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    with path():
        outputs = torch.vmap(lambda w, x: torch.func.functional_call(runs[0], w, (x,))[0])(
            weights, x
        )
        outputs.square().sum().backward()
        for r, run in enumerate(runs):
            run(x[r])[0].square().sum().backward()
            for name, parameter in run.named_parameters():
                grad = weights[name].grad
                assert grad is not None
                torch.testing.assert_close(grad[r], parameter.grad, rtol=1e-12, atol=1e-12)


# --- several runs at once


@pytest.mark.parametrize("path", [nullcontext, reference_only])
@pytest.mark.parametrize("shared", [False, True], ids=["own_data", "shared_data"])
def test_stacked_runs_under_vmap_are_the_single_runs(make: Any, path: Any, shared: bool) -> None:
    torch.manual_seed(0)
    runs = [make(3, 5, 2, bidirectional=True, dtype=torch.float64) for _ in range(4)]
    weights, _ = torch.func.stack_module_state(runs)
    x = torch.randn(4, 7, 6, 3, dtype=torch.float64)
    x = x[0] if shared else x
    with path():
        outputs = torch.vmap(
            lambda w, x: torch.func.functional_call(runs[0], w, (x,))[0],
            in_dims=(0, None if shared else 0),
        )(weights, x)
        outputs.square().sum().backward()
        for r, run in enumerate(runs):
            output = run(x if shared else x[r])[0]
            output.square().sum().backward()
            torch.testing.assert_close(outputs[r], output, rtol=1e-12, atol=1e-12)
            for name, parameter in run.named_parameters():
                grad = weights[name].grad
                assert grad is not None
                torch.testing.assert_close(grad[r], parameter.grad, rtol=1e-11, atol=1e-11)


def test_recording_under_vmap_says_that_it_cannot() -> None:
    layer = GRU(3, 4)
    weights, _ = torch.func.stack_module_state([layer, layer])
    with pytest.raises(RuntimeError, match=r"inside torch.vmap, which cannot"), record(layer):
        torch.vmap(lambda w: torch.func.functional_call(layer, w, (torch.zeros(2, 1, 3),))[0])(
            weights
        ).sum().backward()


# --- segments


@pytest.mark.parametrize("path", [nullcontext, reference_only])
@pytest.mark.parametrize("lengths", [None, [11, 3, 10, 1, 7]])
@pytest.mark.parametrize("segments", [2, 3, 11, 100])
def test_segments_change_nothing_but_rounding(
    make: Any, path: Any, lengths: list[int] | None, segments: int
) -> None:
    torch.manual_seed(0)
    layer = make(3, 6, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(11, 5, 3, dtype=torch.float64)
    with path():
        whole = everything(layer, x, lengths, full=True, weight=True)
        layer.recompute_segments = segments
        parts = everything(layer, x, lengths, full=True, weight=True)
    assert_agree(parts, whole, 1e-12)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, None])
def test_segments_must_be_a_positive_integer(count: Any) -> None:
    layer = RNN(2, 3)
    layer.recompute_segments = count
    with pytest.raises(ValueError, match="recompute_segments must be an integer >= 1"):
        layer(torch.zeros(4, 1, 2))


# --- compilation


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": root} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


USE = "import torch, rnngrad.nn as n; n.RNN(2, 3)(torch.zeros(4, 1, 2))[0].sum().backward()"


def test_only_the_cell_in_use_is_compiled_once_and_it_says_so(tmp_path: Path) -> None:
    first, second = (run_python(USE, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    lines = first.stderr.splitlines()
    assert [line.split(" for float32")[0] for line in lines] == [
        "rnngrad: compiling the matrix product",
        "rnngrad: compiling the RNN TANH kernel, forward",
        "rnngrad: compiling the RNN TANH kernel, backward",
    ]
    assert all(line.endswith(" s") for line in lines)
    assert second.stderr == ""


def compiled_parts(function: Any) -> Iterator[Any]:
    """The functions that a kernel is compiled from, down to the last one."""
    cells = [c.cell_contents for c in function.__closure__ or ()]
    for value in [*cells, *(function.__globals__.get(n) for n in function.__code__.co_names)]:
        if isinstance(value, Dispatcher):
            yield value.py_func
            yield from compiled_parts(value.py_func)


def contents(function: Any) -> Any:
    """What a function does: its code, and that of the functions it was made with."""
    cells = [c.cell_contents for c in function.__closure__ or ()]
    inner = [contents(c.py_func) if isinstance(c, Dispatcher) else c for c in cells]
    return function.__code__, inner


def test_no_two_functions_of_the_kernels_have_one_name_and_different_code() -> None:
    """Code that two processes have kept would be linked under one symbol."""
    found: dict[tuple[str, str], Any] = {}
    kernels = [k.__qualname__ for c in CELLS.values() for k in (c.forward, c.backward, c.clipped)]
    assert len(set(kernels)) == 3 * len(CELLS)
    for cell in CELLS.values():
        for kernel in (cell.forward, cell.backward, cell.clipped):
            for part in compiled_parts(kernel):
                name = part.__module__, part.__qualname__
                assert found.setdefault(name, contents(part)) == contents(part), name
    assert len(found) > 50


ALONE = """
import sys, torch, rnngrad.nn as n
x = torch.linspace(-1, 1, 24).view(4, 2, 3)
for mode in sys.argv[1:]:
    torch.manual_seed(0)
    kind, _, phi = mode.partition("_")
    layer = getattr(n, kind)(3, 5, **{"nonlinearity": phi} if phi else {})
    layer(x)[0].sum().backward()
    print([p.grad.tolist() for p in layer.parameters()])
"""


@pytest.mark.slow
def test_kernels_that_several_processes_have_compiled_do_not_mix(tmp_path: Path) -> None:
    modes = (*(f"RNN_{name}" for name in ACTIVATIONS), "GRU", "LSTM")
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    ahead = ALONE.replace("for mode", "torch.set_grad_enabled(False)\nfor mode")
    run_python(
        ahead.replace("(x)[0].sum().backward()", "(x)").partition("    print")[0], *modes, **cache
    )
    alone = [run_python(ALONE, mode, **cache).stdout for mode in modes]
    together = run_python(ALONE, *modes, **cache)
    assert together.stdout == "".join(alone) and together.stderr == ""


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_python(USE, NUMBA_CACHE_DIR=str(tmp_path / "file"), HOME=str(tmp_path / "file"))
    assert done.returncode == 0, done.stderr


def test_without_numbas_compiler_the_reference_path_is_taken() -> None:
    done = run_python(USE, NUMBA_DISABLE_JIT="1")
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_importing_the_layers_does_not_import_numba() -> None:
    done = run_python("import sys, rnngrad.nn; assert 'numba' not in sys.modules")
    assert done.returncode == 0, done.stderr
