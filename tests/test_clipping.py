"""Clip rules against gold vectors, a float64 oracle, and what they promise."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rnngrad.clipping import CLIPS, Clip, total_norm
from rnngrad.clipping.none import NoClip
from rnngrad.clipping.norm import NormClip
from rnngrad.clipping.value import ValueClip
from rnngrad.parts import InputError


@pytest.fixture(params=sorted(CLIPS.load()))
def clip(request: pytest.FixtureRequest) -> Clip:
    return CLIPS.default(request.param)


def parameters(*grads: Any, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    made = []
    for grad in grads:
        tensor = torch.as_tensor(grad, dtype=dtype) if not isinstance(grad, Tensor) else grad
        parameter = nn.Parameter(torch.zeros_like(tensor))
        parameter.grad = tensor.clone()
        made.append(parameter)
    return made


def grads_of(made: list[nn.Parameter]) -> list[list[float]]:
    return [p.grad.flatten().tolist() for p in made if p.grad is not None]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (NormClip(1.0, 2.0), [[0.2307692, 0.3076923], [0.9230769]]),
        (NormClip(1.0, math.inf), [[0.25, 0.3333333], [1.0]]),
        (NormClip(1.0, 1.0), [[0.1578947, 0.2105263], [0.6315789]]),
        (ValueClip(3.5), [[3.0, 3.5], [3.5]]),
        (NoClip(), [[3.0, 4.0], [12.0]]),
    ],
    ids=repr,
)
def test_gold_vectors(rule: Clip, expected: list[list[float]]) -> None:
    made = parameters([3.0, 4.0], [12.0])
    report = rule(made)
    for grad, gold in zip(grads_of(made), expected, strict=True):
        assert grad == pytest.approx(gold, rel=5e-7)
    assert report.norm_pre == 13.0 and report.finite
    assert report.clipped == (not isinstance(rule, NoClip))
    assert report.norm_post == pytest.approx(math.hypot(*sum(expected, [])), rel=1e-6)
    assert report.coef == pytest.approx(report.norm_post / 13)


def test_value_clipping_keeps_signs() -> None:
    made = parameters([3.0, -4.0], [12.0])
    ValueClip(3.5)(made)
    assert grads_of(made) == [[3.0, -3.5], [3.5]]


def test_a_gradient_at_the_threshold_is_untouched_bit_for_bit() -> None:
    for rule in (NormClip(5.0, 2.0), ValueClip(4.0), NormClip(4.0, math.inf), NormClip(7.0, 1.0)):
        made = parameters([3.0, -4.0])
        assert not rule(made).clipped and grads_of(made) == [[3.0, -4.0]]


SCALES = [0.0, 1e-30, 1e-7, 1.0, 1e20, 1e30, 3e38]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 50.0, math.inf])
def test_norm_clipping_agrees_with_a_float64_oracle_at_every_scale(scale: float, p: float) -> None:
    torch.manual_seed(0)
    base = [torch.rand(4, 3) - 0.5, torch.rand(7) - 0.5]
    made = parameters(*[(scale * g.double()).float() for g in base])
    exact = torch.cat([q.grad.double().flatten() for q in made if q.grad is not None])
    report = NormClip(1.0, p)(made)
    largest = exact.abs().max().clamp_min(1e-300)
    norm = (largest * torch.linalg.vector_norm(exact / largest, p)).item()
    expected = exact if norm <= 1 else exact / norm
    clipped = torch.cat([q.grad.double().flatten() for q in made if q.grad is not None])
    assert report.finite and report.clipped == (norm > 1)
    torch.testing.assert_close(clipped, expected, rtol=1e-6, atol=1e-44)
    if scale:
        cosine = torch.nn.functional.cosine_similarity(
            clipped / clipped.abs().max(), exact / largest, dim=0
        )
        assert cosine == pytest.approx(1, abs=1e-6)


def test_a_finite_gradient_of_1e30_is_not_infinite(clip: Clip) -> None:
    made = parameters([1e30, 1e30])
    report = clip(made)
    assert report.finite and report.norm_pre == pytest.approx(math.sqrt(2) * 1e30, rel=1e-6)
    assert all(map(math.isfinite, grads_of(made)[0])) and any(grads_of(made)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_reported_and_left_as_it_was(
    clip: Clip, bad: float
) -> None:
    made = parameters([1.0, bad], [3.0])
    report = clip(made)
    assert not report.finite and not report.clipped and report.coef == 1
    assert not math.isfinite(report.norm_pre)
    assert str(grads_of(made)) == str([[1.0, bad], [3.0]])


def test_before_backward_there_is_nothing_to_clip_and_the_rule_says_where_it_belongs(
    clip: Clip,
) -> None:
    """The bug of widely copied code: zero_grad, forward, clip, backward."""
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="between loss.backward"):
        clip(model.parameters())


def test_zero_gradients_have_coefficient_1(clip: Clip) -> None:
    report = clip(parameters([0.0, 0.0]))
    assert (report.norm_pre, report.norm_post, report.coef, report.clipped) == (0, 0, 1, False)


def test_parameters_without_gradient_and_mixed_dtypes_are_fine(clip: Clip) -> None:
    made = parameters(torch.tensor([3.0, 4.0]), torch.tensor([12.0], dtype=torch.float64))
    report = clip([*made, nn.Parameter(torch.zeros(3))])
    assert report.norm_pre == 13.0
    assert [p.grad.dtype for p in made if p.grad is not None] == [torch.float32, torch.float64]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8),
    st.floats(1e-6, 1e6),
    st.sampled_from(["norm", "value"]),
)
def test_clipping_keeps_to_its_threshold_and_twice_is_once(
    grad: list[float], threshold: float, kind: str
) -> None:
    rule = NormClip(threshold, 2.0) if kind == "norm" else ValueClip(threshold)
    made = parameters(grad)
    report = rule(made)
    measured = (
        math.hypot(*grads_of(made)[0]) if kind == "norm" else max(map(abs, grads_of(made)[0]))
    )
    assert measured <= threshold * (1 + 1e-6)
    assert report.norm_post == pytest.approx(math.hypot(*grads_of(made)[0]), rel=1e-9)
    once = torch.tensor(grads_of(made)[0])
    rule(made)
    torch.testing.assert_close(torch.tensor(grads_of(made)[0]), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_is_kept_to_the_gradients_own_rounding(dtype: torch.dtype) -> None:
    made = parameters(torch.linspace(-3, 5, 50, dtype=dtype))
    report = NormClip(1.0, 2.0)(made)
    assert abs(report.norm_post - 1) <= max(1e-6, 4 * torch.finfo(dtype).eps)


def test_total_norm_is_that_of_float64_even_where_squares_are_not() -> None:
    tiny = torch.full((100,), 1e-300, dtype=torch.float64)
    huge = torch.full((100,), 1e300, dtype=torch.float64)
    assert total_norm([tiny]) == pytest.approx(1e-299)
    assert total_norm([huge, tiny]) == pytest.approx(1e301)
    assert total_norm([torch.zeros(3)]) == 0
    assert math.isnan(total_norm([torch.tensor([math.nan, math.inf])]))


def test_large_p_keeps_its_digits() -> None:
    """1e5 entries whose 100th powers leave the range, and one slightly larger."""
    entries = torch.full((100_001,), 10**-3.235, dtype=torch.float64)
    entries[0] = 10**-3.22
    ratio = 10 ** (-3.235 + 3.22)
    expected = 10**-3.22 * (1 + 1e5 * ratio**100) ** 0.01
    assert total_norm([entries], 100.0) == pytest.approx(expected, rel=1e-12)


def test_norm_clipping_is_torchs_up_to_its_epsilon() -> None:
    torch.manual_seed(0)
    ours, theirs = (parameters(*(torch.randn(4, 3) for _ in range(3))) for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        b.grad = a.grad.clone() if a.grad is not None else None
    norm = nn.utils.clip_grad_norm_(theirs, 0.7)
    report = NormClip(0.7, 2.0)(ours)
    assert report.norm_pre == pytest.approx(norm.item(), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("threshold", [0, -1, math.nan, math.inf, -math.inf, "1", None, True])
@pytest.mark.parametrize("make", [lambda c: NormClip(c, 2.0), ValueClip], ids=["norm", "value"])
def test_thresholds_must_be_finite_and_positive(make: Any, threshold: Any) -> None:
    with pytest.raises(InputError, match="must be a finite number > 0"):
        make(threshold)


@pytest.mark.parametrize("p", [0, 0.5, -math.inf, math.nan])
def test_p_must_be_at_least_1(p: float) -> None:
    with pytest.raises(InputError, match="must be a number >= 1, or inf"):
        NormClip(1.0, p)


def test_a_rule_that_breaks_its_promise_is_caught() -> None:
    class Broken(Tensor):
        """A gradient that cannot be scaled."""

        def mul_(self, *_: Any) -> Any:
            return self

    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0]).as_subclass(Broken)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="after clipping at 1.0; this is a bug"):
        NormClip(1.0, 2.0)([parameter])


def test_rules_are_values(clip: Clip) -> None:
    assert clip == dataclasses.replace(clip)
