"""Clip rules against gold vectors, float64 oracles, and what they promise."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rnngrad.clipping import (
    CLIPS,
    Clip,
    ClipAudit,
    ClipCount,
    Clipper,
    ClipReport,
    Gradient,
    Outcome,
    total_norm,
)
from rnngrad.clipping.per_layer_norm import layers_of
from rnngrad.parts import InputError
from tests.small import documented

RULES = sorted(CLIPS.load())
STATEFUL = [name for name in RULES if CLIPS.default(name).initial_state()]
# short histories, so that warm-up, window and thinning all happen in a short stream
SHORT: dict[str, dict[str, Any]] = {
    "autoclip": {"history_length": 8},
    "quantile": {"history_length": 6},
    "zclip": {"warmup_steps": 5},
    "spike_skip": {"history_length": 12, "min_observations": 4},
}


def rule(name: str, **changes: Any) -> Clip:
    return CLIPS.default(name, **changes)


@pytest.fixture(params=RULES)
def clip(request: pytest.FixtureRequest) -> Clip:
    return rule(request.param)


Named = list[tuple[str, nn.Parameter]]


def names_of(count: int) -> list[str]:
    """A read-out last, layers of two parameters before it."""
    kinds = ("weight_hh", "bias_hh")
    rnn = [f"rnn.{kinds[i % 2]}_l{i // 2}" for i in range(count - 1)]
    return [*rnn, "readout.weight"]


def parameters(*grads: Any, dtype: torch.dtype = torch.float32, weight: Any = 0.0) -> Named:
    """Parameters with these gradients."""
    made = []
    for name, grad in zip(names_of(len(grads)), grads, strict=True):
        tensor = torch.as_tensor(grad, dtype=dtype) if not isinstance(grad, Tensor) else grad
        parameter = nn.Parameter(torch.full_like(tensor, weight))
        parameter.grad = tensor.detach().clone()
        made.append((name, parameter))
    return made


def grads_of(made: Named) -> list[Any]:
    return [p.grad.tolist() for _, p in made if p.grad is not None]


def copies_of(made: Named) -> list[Tensor]:
    return [p.grad.clone() for _, p in made if p.grad is not None]


def set_grads(made: Named, grads: Sequence[Tensor]) -> None:
    for (_, parameter), grad in zip(made, grads, strict=True):
        parameter.grad = grad.clone()


def arrays(made: Named) -> list[np.ndarray]:
    """The gradients as they are now, in float64."""
    return [np.array(p.grad.double().numpy()) for _, p in made if p.grad is not None]


def bits(grads: Sequence[Tensor]) -> list[bytes]:
    return [grad.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for grad in grads]


def once(clip: Clip, made: Named) -> ClipReport:
    return Clipper(clip, made)()


def flat(made: Named) -> Tensor:
    return torch.cat([p.grad.double().flatten() for _, p in made if p.grad is not None])


# -- gold vectors


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        (rule("norm"), [[0.2307692, 0.3076923], [0.9230769]]),
        (rule("norm", norm_type=math.inf), [[0.25, 0.3333333], [1.0]]),
        (rule("norm", norm_type=1), [[0.1578947, 0.2105263], [0.6315789]]),
        (rule("value", clip_value=3.5), [[3.0, 3.5], [3.5]]),
        (rule("none"), [[3.0, 4.0], [12.0]]),
        (rule("per_parameter_norm"), [[0.6, 0.8], [1.0]]),
        (rule("per_layer_norm", split="none"), [[0.6, 0.8], [1.0]]),
        (rule("per_layer_norm"), [[0.42426407, 0.56568542], [0.70710678]]),
        (rule("normalize"), [[3 / 13, 4 / 13], [12 / 13]]),
        (rule("soft"), [[3 / 14, 4 / 14], [12 / 14]]),
        (rule("soft", max_norm=13, kind="tanh"), [[2.2847825, 3.0463766], [9.1391299]]),
        (rule("quantile_tracking", initial_norm=1), [[0.2307692, 0.3076923], [0.9230769]]),
    ],
    ids=repr,
)
def test_gold_vectors(clip: Clip, expected: list[list[float]]) -> None:
    made = parameters([3.0, 4.0], [12.0])
    report = once(clip, made)
    for grad, gold in zip(grads_of(made), expected, strict=True):
        assert grad == pytest.approx(gold, rel=5e-7)
    assert report.norm_pre == 13.0 and report.finite and not report.skipped
    assert report.clipped == (clip != rule("none"))
    assert report.norm_post == pytest.approx(math.hypot(*sum(expected, [])), rel=1e-6)
    assert report.coef == pytest.approx(report.norm_post / 13)


def test_gold_vectors_of_agc() -> None:
    weight = torch.tensor([[3.0, 4.0], [9.0, 40.0], [0.0, 0.0]])
    made = parameters([[7.0, 24.0], [5.0, 12.0], [1.0, 0.0]])
    made[0][1].data.copy_(weight)
    report = once(rule("agc", clipping=0.5, exclude=None), made)
    gold = torch.tensor([[0.7, 2.4], [5.0, 12.0], [5e-4, 0.0]])
    torch.testing.assert_close(made[0][1].grad, gold, rtol=1e-6, atol=0)
    assert report.clipped and report.threshold == 0.5


def test_agc_takes_a_bias_as_a_whole_and_leaves_the_read_out_alone() -> None:
    made = parameters([[0.0, 0.0], [3.0, 4.0]], [3.0, 4.0], [[3.0, 4.0]], weight=1.0)
    once(rule("agc"), made)
    row, bias = 0.01 * math.sqrt(2) / 5, 0.01 * math.sqrt(2) / 5
    grads = grads_of(made)
    assert grads[0][0] == [0.0, 0.0] and grads[0][1] == pytest.approx([3 * row, 4 * row])
    assert grads[1] == pytest.approx([3 * bias, 4 * bias])
    assert grads[2] == [[3.0, 4.0]]


def test_agc_lets_a_unit_of_zero_weights_learn() -> None:
    made = parameters([[1.0, 0.0]], weight=0.0)
    once(rule("agc", exclude=None), made)
    assert grads_of(made) == [[[pytest.approx(1e-5), 0.0]]]


def test_agc_says_which_modules_there_are_if_the_excluded_one_is_not_there() -> None:
    made = parameters([1.0], [2.0])
    allowed = "exclude=fc: must be null or the path of a module with parameters: readout, rnn"
    with pytest.raises(InputError, match=allowed):
        Clipper(rule("agc", exclude="fc"), made)
    with pytest.raises(InputError, match=allowed):
        ClipAudit({"agc": rule("agc", exclude="fc")}, made)
    with pytest.raises(InputError, match="exclude=read:"):
        Clipper(rule("agc", exclude="read"), made)


def test_zclip_pulls_an_outlier_nearly_back_to_the_mean() -> None:
    """Warm-up of five norms of mean 1 and variance 0.02, one more, and then a spike of 10."""
    made = parameters([1.0])
    clipper = Clipper(rule("zclip", warmup_steps=5), made)
    for norm in (1.0, 1.2, 0.8, 1.1, 0.9, 1.0):
        made[0][1].grad = torch.tensor([norm])
        assert not clipper().clipped
    made[0][1].grad = torch.tensor([10.0])
    report = clipper()
    assert report.norm_post == pytest.approx(1.0134723, rel=1e-6)
    assert report.threshold == pytest.approx(1 + 2.5 * (math.sqrt(0.0194) + 1e-6), rel=1e-7)
    state = clipper.state_dict()
    assert state["mean"] == pytest.approx(1.0004042, rel=1e-7)
    assert state["std"] ** 2 == pytest.approx(0.0188231, rel=1e-5)


# -- every rule against an independent float64 restatement, over streams of gradients

Oracle = Callable[[list[np.ndarray], list[np.ndarray]], list[np.ndarray] | None]
"""Weights and gradients as float64 -> gradients, or None for a skipped step."""


def whole(grads: list[np.ndarray], p: float = 2.0) -> float:
    return float(np.linalg.norm(np.concatenate([g.ravel() for g in grads]), p))


def at_most(grads: list[np.ndarray], limit: float, norm: float) -> list[np.ndarray]:
    return [g * min(1.0, limit / norm) if norm > 0 else g for g in grads]


def norm_oracle(c: Any) -> Oracle:
    return lambda _, grads: at_most(grads, c.max_norm, whole(grads, c.norm_type))


def per_layer_oracle(c: Any) -> Oracle:
    """Of the names in ``names_of``."""

    def step(_: list[np.ndarray], grads: list[np.ndarray]) -> list[np.ndarray]:
        layers = [grads[i : min(i + 2, len(grads) - 1)] for i in range(0, len(grads) - 1, 2)]
        layers.append(grads[-1:])
        limit = c.max_norm / (len(layers) ** 0.5 if c.split == "uniform" else 1)
        return [g for layer in layers for g in at_most(layer, limit, whole(layer))]

    return step


def agc_oracle(c: Any) -> Oracle:
    def unit(w: np.ndarray, g: np.ndarray) -> np.ndarray:
        return at_most([g], c.clipping * max(float(np.linalg.norm(w)), c.eps), whole([g]))[0]

    def step(weights: list[np.ndarray], grads: list[np.ndarray]) -> list[np.ndarray]:
        rows = [
            np.stack([unit(a, b) for a, b in zip(w, g, strict=True)]) if g.ndim > 1 else unit(w, g)
            for w, g in zip(weights, grads, strict=True)
        ]
        return [*rows[:-1], grads[-1] if c.exclude else rows[-1]]

    return step


def autoclip_oracle(c: Any) -> Oracle:
    """Exact up to ``history_length``; beyond, a list of norms with the steps they stand for."""
    kept: list[float] = []
    seen, every = 0, 1

    def step(_: list[np.ndarray], grads: list[np.ndarray]) -> list[np.ndarray]:
        nonlocal kept, seen, every
        norm = whole(grads)
        if norm == 0:
            return grads
        if len(kept) == c.history_length and seen % every == 0:
            kept, every = sorted(kept)[::2], every * 2
        limit = float(np.percentile([*kept, norm], c.percentile))
        if seen % every == 0:
            kept.append(norm)
        seen += 1
        return at_most(grads, limit, norm)

    return step


def quantile_oracle(c: Any) -> Oracle:
    past: list[float] = []

    def step(_: list[np.ndarray], grads: list[np.ndarray]) -> list[np.ndarray]:
        norm = whole(grads)
        window = past[-c.history_length :]
        limit = float(np.quantile(window, c.quantile)) if window else math.inf
        past.extend([norm] if norm else [])
        return at_most(grads, limit, norm)

    return step


def quantile_tracking_oracle(c: Any) -> Oracle:
    log_c = math.log(c.initial_norm)

    def step(_: list[np.ndarray], grads: list[np.ndarray]) -> list[np.ndarray]:
        nonlocal log_c
        norm, limit = whole(grads), math.exp(log_c)
        if norm:
            log_c -= c.lr * (float(norm <= limit) - c.quantile)
            log_c = min(max(log_c, math.log(c.initial_norm) - 20), math.log(c.initial_norm) + 20)
        return at_most(grads, limit, norm)

    return step


def zclip_oracle(c: Any) -> Oracle:
    warm: list[float] = []
    mean = var = 0.0

    def step(_: list[np.ndarray], grads: list[np.ndarray]) -> list[np.ndarray]:
        nonlocal mean, var
        norm, limit = whole(grads), math.inf
        if norm and len(warm) < c.warmup_steps:
            warm.append(norm)
            mean, var = float(np.mean(warm)), float(np.var(warm))
        elif norm:
            z = (norm - mean) / (var**0.5 + c.eps * mean)
            if z > c.z_threshold:
                limit = mean + c.z_threshold * var**0.5 / (z / c.z_threshold)
            mean = c.alpha * mean + (1 - c.alpha) * min(norm, limit)
            var = c.alpha * var + (1 - c.alpha) * (min(norm, limit) - mean) ** 2
        return at_most(grads, min(limit, c.max_norm or math.inf), norm)

    return step


def spike_skip_oracle(c: Any) -> Oracle:
    past: list[float] = []

    def step(_: list[np.ndarray], grads: list[np.ndarray]) -> list[np.ndarray] | None:
        norm, window = whole(grads), past[-c.history_length :]
        past.extend([norm] if norm else [])
        if norm == 0 or len(window) < c.min_observations:
            return grads
        mean, std = float(np.mean(window)), float(np.std(window, ddof=1))
        spike = norm > mean + c.sigma_factor * max(std, c.std_floor * mean)
        return None if spike else grads

    return step


def soft_oracle(c: Any) -> Oracle:
    def coef(n: float) -> float:
        if c.kind == "rational":
            return c.max_norm / (c.max_norm + n)
        return c.max_norm * float(np.tanh(n / c.max_norm)) / n if n else 1.0

    return lambda _, grads: [g * coef(whole(grads)) for g in grads]


ORACLES: dict[str, Callable[[Any], Oracle]] = {
    "none": lambda c: lambda _, grads: grads,
    "norm": norm_oracle,
    "value": lambda c: lambda _, grads: [np.clip(g, -c.clip_value, c.clip_value) for g in grads],
    "per_parameter_norm": lambda c: (
        lambda _, grads: [at_most([g], c.max_norm, whole([g]))[0] for g in grads]
    ),
    "per_layer_norm": per_layer_oracle,
    "agc": agc_oracle,
    "autoclip": autoclip_oracle,
    "quantile": quantile_oracle,
    "quantile_tracking": quantile_tracking_oracle,
    "zclip": zclip_oracle,
    "spike_skip": spike_skip_oracle,
    "normalize": lambda c: lambda _, grads: [g / (whole(grads) + c.beta) for g in grads],
    "soft": soft_oracle,
}


def oracle_of(name: str, clip: Clip) -> Oracle:
    if name not in ORACLES:
        pytest.skip(f"no independent restatement of {name} yet")
    return ORACLES[name](clip)


def shapes(kind: str) -> list[Tensor]:
    """Gradients of order 1 in many forms; a read-out last."""
    generator = torch.Generator().manual_seed(3)

    def draw(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    single = torch.float32
    if kind == "mixed dtypes":
        return [draw(4, 3, dtype=single), draw(4), draw(3, dtype=torch.bfloat16), draw(2, 4)]
    if kind == "not contiguous":
        return [draw(3, 4, dtype=single).t(), draw(12, dtype=single)[::3], draw(4, 6)[:, ::2]]
    if kind == "0-dim":
        return [draw(dtype=single), draw(), draw(dtype=single)]
    return [draw(4, 3, dtype=single), draw(4, dtype=single), draw(2, 4, dtype=single)]


CHANGED = [
    ("norm", {"norm_type": 1}),
    ("norm", {"norm_type": math.inf, "max_norm": 0.3}),
    ("per_layer_norm", {"split": "none"}),
    ("agc", {"exclude": None, "clipping": 0.5}),
    ("soft", {"kind": "tanh"}),
    ("zclip", {"max_norm": 0.5, "warmup_steps": 3}),
    ("autoclip", {"percentile": 75, "history_length": 3}),
]
SETTINGS = [(name, SHORT.get(name, {})) for name in RULES] + CHANGED


@pytest.mark.parametrize("kind", ["plain", "mixed dtypes", "not contiguous", "0-dim"])
@pytest.mark.parametrize(("name", "changes"), SETTINGS, ids=str)
def test_every_rule_agrees_with_float64_along_a_stream(
    name: str, changes: dict[str, Any], kind: str
) -> None:
    """Sizes of order 1, spikes, zeros, a lasting rise, and the extremes of float32."""
    clip = rule(name, **changes)
    oracle = oracle_of(name, clip)
    base = shapes(kind)
    made = parameters(*base, weight=0.25)
    clipper = Clipper(clip, made)
    weights = [p.detach().double().numpy() for _, p in made]
    scales = [
        1,
        1.3,
        0.8,
        0.0,
        1.1,
        0.9,
        30,
        1.2,
        1.0,
        1e-7,
        1,
        1e20,
        1,
        1e-30,
        1,
        2,
        2.2,
        2.1,
        1.9,
    ]
    reports = []
    for scale in scales:
        for (_, parameter), g in zip(made, base, strict=True):  # its strides kept
            parameter.grad = torch.empty_strided(g.size(), g.stride(), dtype=g.dtype)
            parameter.grad.copy_(scale * g.double())
        before = arrays(made)
        report = clipper()
        reports.append(report)
        expected = oracle(weights, before)
        assert report.skipped == (expected is None)
        expected = [0 * g for g in before] if expected is None else expected
        for (_, parameter), want in zip(made, expected, strict=True):
            assert parameter.grad is not None
            eps = torch.finfo(parameter.dtype).eps
            np.testing.assert_allclose(
                parameter.grad.double().numpy(), want, rtol=max(1e-6, 2 * eps), atol=1e-44
            )
        assert report.finite and report.norm_pre == pytest.approx(whole(before), rel=1e-12)
        after = arrays(made)
        assert report.norm_post == pytest.approx(whole(after), rel=1e-12, abs=0)
        changed = any(np.any(a != b) for a, b in zip(after, before, strict=True))
        assert report.clipped or not changed
    assert any(r.clipped for r in reports) == (name != "none")


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-7, 1.0, 1e20, 1e38])
def test_every_rules_first_step_agrees_with_float64(clip: Clip, scale: float) -> None:
    (name,) = [name for name in RULES if type(clip) is CLIPS[name]]
    made = parameters(*[(scale * g.double()).float() for g in shapes("plain")], weight=0.25)
    before = arrays(made)
    expected = oracle_of(name, clip)([p.detach().double().numpy() for _, p in made], before)
    once(clip, made)
    assert expected is not None
    for (_, parameter), want in zip(made, expected, strict=True):
        np.testing.assert_allclose(parameter.grad.numpy(), want, rtol=1e-6, atol=1e-44)


SCALES = [0.0, 1e-30, 1e-7, 1.0, 1e20, 1e30, 3e38]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 50.0, math.inf])
def test_norm_clipping_agrees_with_a_float64_oracle_at_every_scale(scale: float, p: float) -> None:
    torch.manual_seed(0)
    base = [torch.rand(4, 3) - 0.5, torch.rand(7) - 0.5]
    made = parameters(*[(scale * g.double()).float() for g in base])
    exact = flat(made)
    report = once(rule("norm", norm_type=p), made)
    largest = exact.abs().max().clamp_min(1e-300)
    norm = (largest * torch.linalg.vector_norm(exact / largest, p)).item()
    expected = exact if norm <= 1 else exact / norm
    assert report.finite and report.clipped == (norm > 1)
    torch.testing.assert_close(flat(made), expected, rtol=1e-6, atol=1e-44)


# -- what holds for every rule


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", RULES)
def test_a_gradient_that_is_not_finite_leaves_itself_and_the_state_as_they_were(
    name: str, bad: float
) -> None:
    made = parameters([1.0, 2.0], [3.0])
    clipper = Clipper(rule(name, **SHORT.get(name, {})), made)
    for scale in (1.0, 2.0, 0.5, 1.0, 3.0, 1.0):
        set_grads(made, [torch.tensor([scale, 2.0]), torch.tensor([3.0])])
        clipper()
    state = clipper.state_dict()
    set_grads(made, [torch.tensor([1.0, bad]), torch.tensor([3.0])])
    report = clipper()
    assert not report.finite and not report.clipped and not report.skipped and report.coef == 1
    assert not math.isfinite(report.norm_pre) and math.isnan(report.threshold)
    assert str(grads_of(made)) == str([[1.0, bad], [3.0]])
    assert clipper.state_dict() == state


@pytest.mark.parametrize("kind", ["plain", "mixed dtypes", "not contiguous", "0-dim"])
@pytest.mark.parametrize("where", [0, -1])
def test_what_is_not_finite_is_seen_and_left_in_gradients_of_every_form(
    where: int, kind: str, clip: Clip
) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        made = parameters(*shapes(kind), weight=0.25)
        for (_, parameter), grad in zip(made, shapes(kind), strict=True):  # its strides kept
            parameter.grad = grad
        spoilt = made[where][1].grad
        assert spoilt is not None
        spoilt[(-1,) * spoilt.dim()] = bad
        before = bits(copies_of(made))
        report = once(clip, made)
        assert not report.finite and not report.clipped and report.coef == 1
        assert bits(copies_of(made)) == before


def test_a_finite_gradient_of_1e30_is_not_infinite(clip: Clip) -> None:
    made = parameters([1e30, 1e30], [1e30])
    report = once(clip, made)
    assert report.finite and report.norm_pre == pytest.approx(math.sqrt(3) * 1e30, rel=1e-6)
    assert flat(made).isfinite().all() and flat(made).any()


def test_a_norm_beyond_float64_counts_as_not_finite(clip: Clip) -> None:
    made = parameters(torch.full((100,), 1.7e308, dtype=torch.float64))
    assert not once(clip, made).finite


def test_before_backward_there_is_nothing_to_clip_and_the_rule_says_where_it_belongs(
    clip: Clip,
) -> None:
    """The bug of widely copied code: zero_grad, forward, clip, backward."""
    model = nn.ModuleDict({"readout": nn.Linear(2, 2)})
    with pytest.raises(RuntimeError, match="between loss.backward"):
        Clipper(clip, model.named_parameters())()
    with pytest.raises(RuntimeError, match="between loss.backward"):
        ClipAudit({"it": clip}, model.named_parameters())()


@pytest.mark.parametrize("name", sorted(set(RULES) - {"agc"}))
def test_no_parameters_at_all_are_told_like_a_missing_backward(name: str) -> None:
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        Clipper(rule(name), [])()


def test_agc_of_no_parameters_has_none_to_exclude() -> None:
    with pytest.raises(InputError, match="exclude=readout: must be null"):
        Clipper(rule("agc"), [])
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        Clipper(rule("agc", exclude=None), [])()


@pytest.mark.parametrize("name", RULES)
def test_zero_gradients_have_coefficient_1_and_say_nothing_about_the_scale(name: str) -> None:
    made = parameters([0.0, 0.0], [0.0])
    clipper = Clipper(rule(name), made)
    state = clipper.state_dict()
    for _ in range(200):
        report = clipper()
        assert (report.norm_pre, report.norm_post, report.coef, report.clipped) == (0, 0, 1, False)
    assert clipper.state_dict() == state
    set_grads(made, [torch.tensor([0.3, 0.4]), torch.tensor([0.0])])
    assert clipper().norm_post > 0


def test_parameters_without_gradient_and_mixed_dtypes_are_fine(clip: Clip) -> None:
    made = parameters(
        torch.tensor([3.0, 4.0]), torch.tensor([12.0], dtype=torch.float64), torch.zeros(0)
    )
    report = once(clip, [*made, ("frozen", nn.Parameter(torch.zeros(3)))])
    assert report.norm_pre == 13.0
    dtypes = [p.grad.dtype for _, p in made if p.grad is not None]
    assert dtypes == [torch.float32, torch.float64, torch.float32]


def test_a_stream_of_equal_gradients_is_never_stopped(clip: Clip) -> None:
    made = parameters([3.0, 4.0], [12.0], weight=1.0)
    clipper = Clipper(clip, made)
    grads, posts = copies_of(made), []
    for _ in range(150):
        set_grads(made, grads)
        report = clipper()
        posts.append(report.norm_post)
        assert not report.skipped and math.isfinite(report.norm_post)
    assert min(posts) > 0.05 and posts[-1] > 0.05


@pytest.mark.parametrize("name", RULES)
def test_every_rule_goes_on_after_a_lasting_rise_of_the_norm(name: str) -> None:
    """A spike rule that forgot its spikes would skip for ever."""
    made = parameters([1.0])
    clipper = Clipper(rule(name), made)
    generator = torch.Generator().manual_seed(0)
    reports = []
    for step in range(200):
        size = (1.0 if step < 150 else 1000.0) * (1 + 0.1 * torch.rand(1, generator=generator))
        set_grads(made, [size])
        reports.append(clipper())
    assert not any(r.skipped for r in reports[:150])
    assert all(r.norm_post > 0 for r in reports[155:])


@pytest.mark.parametrize("drop", [0.5, 1e-3, 1e-6])
def test_a_norm_that_drops_is_a_step_like_any_other(clip: Clip, drop: float) -> None:
    """20 deviations down, as when a task is suddenly learnt."""
    made = parameters([1.0])
    clipper = Clipper(clip, made)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        set_grads(made, [1 + 0.01 * torch.randn(1, generator=generator)])
        clipper()
    set_grads(made, [torch.tensor([drop])])
    report = clipper()
    assert not report.skipped and report.norm_post > 0


@pytest.mark.parametrize("name", RULES)
def test_a_run_continued_from_json_is_the_uninterrupted_one_bit_for_bit(name: str) -> None:
    clip = rule(name, **SHORT.get(name, {}))
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randn(40, generator=generator, dtype=torch.float64).exp() ** 2
    stream = [[torch.randn(3, generator=generator) * s.item() for _ in range(2)] for s in sizes]
    made = parameters(*stream[0], weight=0.5)

    def run(clipper: Clipper, steps: range) -> list[Any]:
        seen = []
        for step in steps:
            set_grads(made, stream[step])
            seen.append((clipper(), bits(copies_of(made))))
        return seen

    whole_run = run(Clipper(clip, made), range(40))
    for k in (1, 3, 7, 23):
        first = Clipper(clip, made)
        before = run(first, range(k))
        state = first.state_dict()
        text = json.dumps(state, allow_nan=False)
        run(first, range(k, k + 5))
        assert json.dumps(state, allow_nan=False) == text, "a saved state must not change"
        second = Clipper(clip, made)
        loaded = json.loads(text)
        second.load_state_dict(loaded)
        assert str(before + run(second, range(k, 40))) == str(whole_run)
        assert json.dumps(loaded) == text, "what was loaded must not change either"


def test_the_state_of_another_rule_is_refused() -> None:
    made = parameters([1.0])
    with pytest.raises(ValueError, match="the saved state holds"):
        Clipper(rule("quantile"), made).load_state_dict(Clipper(rule("zclip"), made).state_dict())
    audit = ClipAudit({"norm": rule("norm")}, made)
    with pytest.raises(ValueError, match=r"is of \['value'\], the rules are \['norm'\]"):
        audit.load_state_dict(ClipAudit({"value": rule("value")}, made).state_dict())


@pytest.mark.parametrize("last", [0.5, 1.0])
@pytest.mark.parametrize("steps", [30_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STATEFUL)
def test_the_memory_of_a_rule_is_bounded_however_many_steps_there_are(
    name: str, steps: int, last: float
) -> None:
    """Norms that fall, or stay the same, so that little is clipped: the test is of the state."""
    clip = rule(name)
    state, grads = clip.initial_state(), [torch.ones(1, dtype=torch.float64)]
    limit = max([200, *(v for v in dataclasses.asdict(clip).values() if isinstance(v, int))])
    for norm in torch.linspace(1.0, last, steps, dtype=torch.float64).tolist():
        grads[0].fill_(norm)
        outcome = clip.clip_(Gradient(("readout.weight",), grads, grads, norm), state)
        assert math.isnan(outcome.threshold) or 0 < outcome.threshold < math.inf
        assert not outcome.skip and grads[0].item() > 0
    assert sum(len(v) if isinstance(v, list) else 1 for v in state.values()) <= 2 * limit + 3


def test_autoclip_stands_for_all_of_the_past_in_bounded_memory() -> None:
    """Beside the percentile of all norms: in rank, off by less than a twentieth of the history."""
    clip: Any = rule("autoclip", history_length=100)
    generator = np.random.default_rng(0)
    norms = np.exp(generator.normal(size=3000)) * np.linspace(1, 5, 3000)
    state = clip.initial_state()
    for norm in norms.tolist():
        grad = torch.tensor([norm], dtype=torch.float64)
        outcome = clip.clip_(Gradient(("w",), [grad], [grad], norm), state)
    rank = float((norms <= outcome.threshold).mean())
    assert abs(rank - 0.1) < 0.05 and 50 <= len(state["ordered"]) <= 100


STREAMS = st.lists(
    st.one_of(
        st.floats(2.0**-140, 2.0**120, width=32),
        st.sampled_from([0.0, 1e-45, 1.0, 1.0, math.nan, math.inf]),
    ),
    min_size=1,
    max_size=30,
)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=40, deadline=None)
@given(stream=STREAMS)
def test_no_stream_of_gradients_breaks_a_rule(name: str, stream: list[float]) -> None:
    made = parameters([1.0, 0.0], weight=0.1)
    clipper = Clipper(rule(name, **SHORT.get(name, {})), made)
    clean = Clipper(rule(name, **SHORT.get(name, {})), made)
    for size in stream:
        set_grads(made, [torch.tensor([size, -size])])
        report = clipper()
        assert report.finite == math.isfinite(size)
        if report.finite:
            assert math.isfinite(report.norm_post) and 0 <= report.coef < math.inf
            assert math.isnan(report.threshold) or 0 < report.threshold < math.inf
            assert report.coef <= 1 + 1e-6 or name == "normalize"
            assert flat(made).isfinite().all()
            set_grads(made, [torch.tensor([size, -size])])
            assert str(clean()) == str(report), "what is not finite leaves no trace"
        json.dumps(clipper.state_dict(), allow_nan=False)
    assert clipper.state_dict() == clean.state_dict()


ONE_DIRECTION = {"none", "norm", "autoclip", "quantile", "quantile_tracking", "zclip"}
ONE_DIRECTION |= {"normalize", "soft"}
TWICE_IS_ONCE = {"none", "norm", "value", "per_parameter_norm", "per_layer_norm", "agc"}


@pytest.mark.parametrize("name", sorted(ONE_DIRECTION))
@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 1e20])
def test_the_direction_stays_where_that_is_promised(name: str, scale: float) -> None:
    made = parameters(*[(scale * g.double()).float() for g in shapes("plain")])
    clipper = Clipper(rule(name, **SHORT.get(name, {})), made)
    grads = copies_of(made)
    for factor in (0.5, 0.6, 0.7, 0.5, 0.6, 0.6, 1.0):
        set_grads(made, [factor * g for g in grads])
        before = flat(made)
        clipper()
        after = flat(made)
        cosine = nn.functional.cosine_similarity(
            before / before.abs().max(), after / after.abs().max(), dim=0
        )
        assert cosine == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", sorted(TWICE_IS_ONCE))
@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 1e20])
def test_twice_is_once_where_that_is_promised(name: str, scale: float) -> None:
    made = parameters(*[(scale * g.double()).float() for g in shapes("plain")], weight=1.0)
    clipper = Clipper(rule(name), made)
    clipper()
    before = copies_of(made)
    clipper()
    for (_, parameter), grad in zip(made, before, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [2.0**-20, 0.3, 1e4])
def test_agc_scales_with_weights_and_gradients_and_normalize_not_at_all(scale: float) -> None:
    grads = [torch.randn(4, 3), torch.randn(2, 4)]
    one, other = parameters(*grads, weight=1.0), parameters(*grads, weight=scale)
    set_grads(other, [scale * g for g in grads])
    for made in (one, other):
        once(rule("agc", eps=1e-9), made)
    torch.testing.assert_close(flat(other), scale * flat(one), rtol=1e-6, atol=0)
    one, other = parameters(*grads), parameters(*(scale * g for g in grads))
    for made in (one, other):
        once(rule("normalize", beta=1e-12), made)
    torch.testing.assert_close(flat(other), flat(one), rtol=2e-6, atol=0)


def test_the_rule_of_per_layer_norm_keeps_the_whole_below_its_threshold() -> None:
    made = parameters(*(10 * torch.randn(3, 3) for _ in range(7)))
    report = once(rule("per_layer_norm", max_norm=0.5), made)
    assert report.norm_post == pytest.approx(0.5, rel=1e-6)
    assert report.threshold == pytest.approx(0.5 / 2)


def test_layers_are_found_by_name_in_torchs_layers_and_in_lists_of_cells() -> None:
    rnn = nn.GRU(2, 3, num_layers=2, bidirectional=True)
    model = nn.ModuleDict({"rnn": rnn, "readout": nn.Linear(6, 1)})
    names = tuple(name for name, _ in model.named_parameters())
    assert [len(layer) for layer in layers_of(names)] == [4, 4, 4, 4, 2]
    for layer in layers_of(names)[:4]:
        (suffix,) = {names[i].partition("_l")[2] for i in layer}
        assert suffix in ("0", "0_reverse", "1", "1_reverse")
    cells = nn.ModuleList([nn.LSTMCell(2, 3), nn.LSTMCell(3, 3)])
    stack = nn.ModuleDict({"rnn": nn.ModuleDict({"cells": cells}), "readout": nn.Linear(3, 1)})
    names = tuple(name for name, _ in stack.named_parameters())
    assert [len(layer) for layer in layers_of(names)] == [4, 4, 2]
    assert layers_of(("weight", "l0.weight", "weight_ih_l0")) == ((0,), (1,), (2,))


# -- promises of single rules


@pytest.mark.parametrize("name", ["norm", "per_parameter_norm", "per_layer_norm"])
@pytest.mark.parametrize(
    ("size", "max_norm", "dtype"),
    [(3e38, 1e-6, torch.float32), (1e200, 1.0, torch.float64), (1e-200, 1e-201, torch.float64)],
    ids=str,
)
def test_norms_are_clipped_over_more_than_float32s_range(
    name: str, size: float, max_norm: float, dtype: torch.dtype
) -> None:
    made = parameters([size, -size], dtype=dtype)
    report = once(rule(name, max_norm=max_norm), made)
    assert report.norm_pre == pytest.approx(math.sqrt(2) * size, rel=1e-6, abs=0)
    expected = max_norm / math.sqrt(2)
    assert grads_of(made) == [pytest.approx([expected, -expected], rel=2e-7, abs=0)]


ONE_ENTRY: dict[tuple[str, str], Callable[[float, float], float]] = {
    ("norm", "max_norm"): min,
    ("per_parameter_norm", "max_norm"): min,
    ("per_layer_norm", "max_norm"): min,
    ("quantile_tracking", "initial_norm"): min,
    ("soft", "max_norm"): lambda g, c: g / (1 + g / c) if g < c else c / (1 + c / g),
    ("normalize", "beta"): lambda g, c: g / (g + c),
}
MAGNITUDES = st.builds(lambda m, e: m * 10.0**e, st.floats(1, 9.9), st.integers(-320, 306))


@pytest.mark.parametrize(("name", "key"), ONE_ENTRY, ids=[name for name, _ in ONE_ENTRY])
@settings(max_examples=150, deadline=None)
@given(size=MAGNITUDES, setting=MAGNITUDES)
@example(size=1e20, setting=1e-300)
@example(size=1e-310, setting=1e-320)
def test_any_gradient_of_float64_meets_any_threshold_of_float64(
    name: str, key: str, size: float, setting: float
) -> None:
    """Also where threshold / norm is no float64; of one entry, whose norm is itself."""
    made = parameters([-size], dtype=torch.float64)
    report = once(rule(name, **{key: setting}), made)
    expected = ONE_ENTRY[name, key](size, setting)
    assert grads_of(made) == [[pytest.approx(-expected, rel=1e-12, abs=2e-323)]]
    assert report.finite and report.norm_post == pytest.approx(expected, rel=1e-12, abs=2e-323)


@pytest.mark.parametrize("p", [1.0, 1.5])
def test_a_p_norm_beyond_float64_is_clipped_and_not_zeroed(p: float) -> None:
    """The L2 norm is not, so the gradient counts as finite."""
    made = parameters(torch.full((100,), 1e307, dtype=torch.float64))
    report = once(rule("norm", norm_type=p, max_norm=2.0), made)
    assert report.finite and report.clipped
    entry = 2 / 100 ** (1 / p)
    assert grads_of(made) == [pytest.approx([entry] * 100, rel=1e-12)]


@pytest.mark.parametrize("ratio", [1e-300, 1e-8, 0.99e-4, 1.01e-4, 1e-3])
def test_the_tanh_of_soft_clipping_is_right_where_it_is_hardly_less_than_1(ratio: float) -> None:
    made = parameters([ratio * 1e-30], dtype=torch.float64)
    once(rule("soft", kind="tanh", max_norm=1e-30), made)
    series = 1 - ratio**2 / 3 + 2 * ratio**4 / 15
    assert grads_of(made) == [pytest.approx([ratio * 1e-30 * series], rel=1e-15, abs=0)]
    made = parameters([1e-300], dtype=torch.float64)
    once(rule("soft", kind="tanh", max_norm=1e50), made)
    assert grads_of(made) == [[1e-300]]


def test_the_tracked_threshold_counts_a_norm_at_it_as_below_and_stays_in_range() -> None:
    made = parameters([1.0])
    clipper = Clipper(rule("quantile_tracking", initial_norm=1), made)
    clipper()
    assert clipper.state_dict()["threshold"] == pytest.approx(math.exp(-0.1), rel=1e-15)
    for size, end in ((1e-30, math.exp(-20)), (1e30, math.exp(20))):
        for _ in range(500):
            set_grads(made, [torch.tensor([size])])
            clipper()
        assert clipper.state_dict()["threshold"] == pytest.approx(end, rel=1e-12)


def test_norms_that_hardly_vary_are_no_reason_to_skip_the_next() -> None:
    made = parameters([1.0])
    for size, skipped in ((1.0059, False), (1.0061, True)):
        clipper = Clipper(rule("spike_skip", min_observations=2), made)
        for norm in (1.0, 1.0, 1.0, size):
            set_grads(made, [torch.tensor([norm])])
            report = clipper()
        assert report.skipped == skipped


def test_parameters_without_entries_are_in_nobodys_way(clip: Clip) -> None:
    made = parameters(torch.zeros(0, 3), torch.zeros(0), torch.ones(2))
    assert once(clip, made).norm_pre == pytest.approx(math.sqrt(2))


def test_value_clipping_keeps_signs() -> None:
    made = parameters([3.0, -4.0], [12.0])
    once(rule("value", clip_value=3.5), made)
    assert grads_of(made) == [[3.0, -3.5], [3.5]]


def test_a_gradient_at_the_threshold_is_untouched_bit_for_bit() -> None:
    for clip in (
        rule("norm", max_norm=5),
        rule("value", clip_value=4),
        rule("norm", max_norm=4, norm_type=math.inf),
        rule("norm", max_norm=7, norm_type=1),
        rule("per_parameter_norm", max_norm=5),
        rule("per_layer_norm", max_norm=5),
        rule("agc", clipping=5 / math.sqrt(2), exclude=None),
    ):
        made = parameters([3.0, -4.0], weight=1.0)
        assert not once(clip, made).clipped and grads_of(made) == [[3.0, -4.0]]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8),
    st.floats(1e-6, 1e6),
    st.sampled_from(["norm", "value", "per_parameter_norm", "per_layer_norm", "soft"]),
)
def test_clipping_keeps_to_its_threshold(grad: list[float], threshold: float, kind: str) -> None:
    key = "clip_value" if kind == "value" else "max_norm"
    made = parameters(grad)
    report = once(rule(kind, **{key: threshold}), made)
    (clipped,) = grads_of(made)
    measured = max(map(abs, clipped)) if kind == "value" else math.hypot(*clipped)
    assert measured <= threshold * (1 + 1e-6)
    assert report.norm_post == pytest.approx(math.hypot(*clipped), rel=1e-9)


def test_a_threshold_among_the_smallest_numbers_is_kept_to_their_spacing() -> None:
    """Where float32 has 1e-45, 3e-45 and little else, rounding alone exceeds a threshold."""
    for threshold in (1e-44, 3e-42, 1e-38):
        made = parameters([1.0, 2.0, 3.0, 4.0])
        report = once(rule("norm", max_norm=threshold), made)
        assert abs(report.norm_post - threshold) <= 4e-45 + 1e-6 * threshold


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["norm", "per_layer_norm", "per_parameter_norm"])
def test_the_norm_is_kept_to_the_gradients_own_rounding(dtype: torch.dtype, name: str) -> None:
    made = parameters(torch.linspace(-3, 5, 50, dtype=dtype))
    report = once(rule(name), made)
    assert abs(report.norm_post - 1) <= max(1e-6, 4 * torch.finfo(dtype).eps)


def test_total_norm_is_that_of_float64_even_where_squares_are_not() -> None:
    tiny = torch.full((100,), 1e-300, dtype=torch.float64)
    huge = torch.full((100,), 1e300, dtype=torch.float64)
    assert total_norm([tiny]) == pytest.approx(1e-299)
    assert total_norm([huge, tiny]) == pytest.approx(1e301)
    assert total_norm([torch.zeros(3)]) == 0
    assert total_norm([torch.zeros(0)]) == total_norm([torch.zeros(0)], math.inf) == 0
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
    set_grads(theirs, copies_of(ours))
    norm = nn.utils.clip_grad_norm_([p for _, p in theirs], 0.7)
    report = once(rule("norm", max_norm=0.7), ours)
    assert report.norm_pre == pytest.approx(norm.item(), rel=1e-6)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-5, atol=1e-7)


def test_skipping_zeroes_the_gradient_and_says_so() -> None:
    made = parameters([1.0], [0.0])
    clipper = Clipper(rule("spike_skip", min_observations=2), made)
    for size in (1.0, 1.1, 0.9, 1.0):
        set_grads(made, [torch.tensor([size]), torch.tensor([0.0])])
        assert not clipper().skipped
    set_grads(made, [torch.tensor([100.0]), torch.tensor([0.0])])
    report = clipper()
    assert report.skipped and report.clipped and grads_of(made) == [[0.0], [0.0]]
    assert (report.norm_pre, report.norm_post, report.coef) == (100.0, 0.0, 0.0)
    mean, std = 1.0, math.sqrt(0.02 / 3)
    assert report.threshold == pytest.approx(mean + 6 * std, rel=1e-6)


def test_zclip_clips_by_max_norm_while_it_warms_up_if_that_is_given() -> None:
    made = parameters([3.0])
    assert not once(rule("zclip"), made).clipped
    report = once(rule("zclip", max_norm=2), made)
    assert report.clipped and report.threshold == 2 and grads_of(made) == [[2.0]]


@pytest.mark.parametrize("threshold", [0, -1, math.nan, math.inf, -math.inf, "1", None, True])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("norm", "max_norm"),
        ("value", "clip_value"),
        ("per_layer_norm", "max_norm"),
        ("per_parameter_norm", "max_norm"),
        ("soft", "max_norm"),
        ("agc", "clipping"),
        ("agc", "eps"),
        ("normalize", "beta"),
        ("quantile_tracking", "initial_norm"),
        ("spike_skip", "sigma_factor"),
    ],
)
def test_thresholds_must_be_finite_and_positive(name: str, key: str, threshold: Any) -> None:
    with pytest.raises(InputError, match="must be a finite number > 0"):
        rule(name, **{key: threshold})


@pytest.mark.parametrize(
    ("name", "changes", "allowed"),
    [
        ("norm", {"norm_type": 0.5}, "must be a number >= 1, or inf"),
        ("norm", {"norm_type": 0}, "must be a number >= 1, or inf"),
        ("norm", {"norm_type": -math.inf}, "must be a number >= 1, or inf"),
        ("norm", {"norm_type": math.nan}, "must be a number >= 1, or inf"),
        ("autoclip", {"percentile": 101}, "must be a number >= 0 and <= 100"),
        ("quantile", {"quantile": math.nan}, "must be a number >= 0 and <= 1"),
        ("quantile", {"history_length": 0}, "must be an integer >= 1"),
        ("zclip", {"alpha": 1}, "must be a number > 0 and < 1"),
        ("zclip", {"max_norm": 0}, "must be a finite number > 0 or null"),
        ("soft", {"kind": "hard"}, "must be one of rational, tanh"),
        ("per_layer_norm", {"split": None}, "must be one of uniform, none"),
        ("spike_skip", {"min_observations": 129}, "must be at most history_length, 128"),
        ("spike_skip", {"min_observations": 1}, "must be an integer >= 2"),
    ],
)
def test_bad_settings_are_refused_with_what_is_allowed(
    name: str, changes: dict[str, Any], allowed: str
) -> None:
    with pytest.raises(InputError, match=allowed):
        rule(name, **changes)


@pytest.mark.parametrize("name", ["norm", "value", "per_parameter_norm", "per_layer_norm", "agc"])
def test_a_rule_that_breaks_its_promise_is_caught(name: str) -> None:
    class Broken(Tensor):
        """A gradient that cannot be changed."""

        def mul_(self, *_: Any) -> Any:
            return self

        def clamp_(self, *_: Any) -> Any:
            return self

    made = parameters([3.0, 4.0], [1.0])
    made[0][1].grad = torch.tensor([3.0, 4.0]).as_subclass(Broken)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"after clipping at .*; this is a bug"):
        once(rule(name), made)


def test_rules_are_values(clip: Clip) -> None:
    assert clip == dataclasses.replace(clip)


def test_a_rule_of_ones_own_needs_nothing_but_clip_() -> None:
    @dataclasses.dataclass(frozen=True)
    class Halve(Clip):
        def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
            assert gradient.names == ("rnn.weight_hh_l0", "readout.weight")
            for grad in gradient.grads:
                grad.mul_(0.5)
            return Outcome(clipped=True)

    made = parameters([3.0, 4.0], [12.0])
    report = once(Halve(), made)
    assert (report.norm_post, report.coef, report.clipped) == (6.5, 0.5, True)


# -- the audit


def test_an_audit_reports_what_each_rule_would_have_done_and_touches_nothing() -> None:
    """Beside one model a rule, given the same gradients."""
    clips = {name: rule(name, **SHORT.get(name, {})) for name in RULES}
    made = parameters(*shapes("mixed dtypes"), weight=0.25)
    audit = ClipAudit(clips, made)
    alone = {}
    for name, clip in clips.items():
        other = parameters(*shapes("mixed dtypes"), weight=0.25)
        alone[name] = (Clipper(clip, other), other)
    generator = torch.Generator().manual_seed(0)
    fired = dict.fromkeys(RULES, 0)
    coefs: dict[str, list[float]] = {name: [] for name in RULES}
    steps = 0
    for step in range(40):
        size = 1e6 if step == 30 else math.nan if step == 20 else 0.0 if step == 10 else 1.0
        size *= (1 + torch.rand(1, generator=generator)).item()
        set_grads(made, [(g.double() * size).to(g.dtype) for g in shapes("mixed dtypes")])
        grads = [p.grad for _, p in made if p.grad is not None]
        before, versions = bits(grads), [g._version for g in grads]
        state = torch.get_rng_state()
        reports = audit()
        assert bits(grads) == before and [g._version for g in grads] == versions
        assert torch.equal(torch.get_rng_state(), state)
        assert [p.grad for _, p in made if p.grad is not None] == grads
        steps += reports["none"].finite
        for name, (clipper, other) in alone.items():
            set_grads(other, grads)
            report = clipper()
            assert str(report) == str(reports[name])
            fired[name] += report.clipped
            coefs[name] += [report.coef] if report.clipped else []
    assert steps == 39
    for name in RULES:
        count = audit.counts[name]
        assert count.fraction == fired[name] / 39
        assert (
            count.mean_coef == pytest.approx(sum(coefs[name]) / fired[name])
            if fired[name]
            else math.isnan(count.mean_coef)
        )
    assert fired["none"] == 0 and fired["spike_skip"] == 1 and fired["soft"] == 38


def test_an_audit_continued_from_json_is_the_uninterrupted_one() -> None:
    clips = {name: rule(name, **SHORT.get(name, {})) for name in RULES}
    made = parameters([1.0, 2.0], [3.0])
    audit, resumed = ClipAudit(clips, made), ClipAudit(clips, made)
    stream = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).exp()
    seen = []
    for step, grad in enumerate(stream):
        set_grads(made, [grad, torch.tensor([1.0])])
        if step == 9:
            resumed.load_state_dict(json.loads(json.dumps(audit.state_dict(), allow_nan=False)))
        reports = audit()
        if step >= 9:
            seen.append(str(resumed()) == str(reports))
    assert all(seen) and len(seen) == 11
    assert resumed.counts == audit.counts and resumed.state_dict() == audit.state_dict()


DOCS = (Path(__file__).parent.parent / "docs" / "clipping.md").read_text(encoding="utf-8")


def test_the_documentation_lists_every_rule_of_the_package() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", DOCS, re.M))
    assert listed == documented("clip") <= set(RULES)


def test_the_documentations_python_runs_as_it_stands_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", DOCS, re.M | re.S)
    exec(compile(block, "docs/clipping.md", "exec"), {})
    assert re.fullmatch(r"100% of steps, by \d.*\n", capsys.readouterr().out)


def test_counts_before_the_first_step_are_no_numbers() -> None:
    count = ClipCount()
    assert math.isnan(count.fraction) and math.isnan(count.mean_coef)
    assert ClipAudit({}, parameters([1.0]))() == {}
