"""What each scheme draws, gate by gate, and what that does to the gradient over 100 steps."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnngrad.bptt import record
from rnngrad.cells import CELLS, CellPart
from rnngrad.init import INITS, ROLES, SCHEMES, Init, SchemesInit
from rnngrad.model import SequenceModel, build_model
from rnngrad.parts import InputError
from rnngrad.task import TASKS, training_generator

CONF = Path(__file__).parent.parent / "conf" / "init"
TASK = TASKS.default("adding", length=100)
INPUTS, HIDDEN, OUTPUTS = 48, 64, 40


def wide_model(cell: str = "lstm", layers: int = 1, **settings: Any) -> SequenceModel:
    """Wide enough for statistics of every block."""
    part = CELLS.default(cell, hidden_size=HIDDEN, num_layers=layers)
    rnn = part.layers(INPUTS)
    model = SequenceModel(rnn, nn.Linear(HIDDEN, OUTPUTS), last_step_only=True)
    torch.manual_seed(3)
    INITS.default("torch", **settings)(model)
    return model


def blocks_of(model: nn.Module, role: str) -> list[Tensor]:
    """The weights of one role as matrices, one a gate and layer."""
    if role == "output":
        return [model.readout.weight.detach()]
    key = {"input": "weight_ih", "recurrent": "weight_hh"}[role]
    weights = [p.detach() for name, p in model.named_parameters() if key in name]
    return [block for weight in weights for block in weight.split(HIDDEN)]


def spectral_radius(weight: Tensor) -> float:
    return torch.linalg.eigvals(weight.double()).abs().max().item()


def is_normal(std: Callable[[int, int], float]) -> Callable[[Tensor], None]:
    def check(weight: Tensor) -> None:
        expected = std(*weight.shape)
        assert abs(weight.mean()) < 0.1 * expected
        assert weight.std().item() == pytest.approx(expected, rel=0.1)
        assert (weight.abs() > 2 * expected).float().mean() == pytest.approx(0.0455, abs=0.02)

    return check


def is_uniform(half_width: Callable[[int, int], float]) -> Callable[[Tensor], None]:
    def check(weight: Tensor) -> None:
        expected = half_width(*weight.shape)
        assert 0.98 * expected < weight.abs().max() <= expected
        assert weight.std().item() == pytest.approx(expected / math.sqrt(3), rel=0.1)

    return check


def is_orthogonal(gain: float) -> Callable[[Tensor], None]:
    def check(weight: Tensor) -> None:
        tall = weight if len(weight) >= weight.shape[1] else weight.T
        expected = gain**2 * torch.eye(tall.shape[1])
        torch.testing.assert_close(tall.T @ tall, expected, rtol=0, atol=1e-5)

    return check


def is_identity(factor: float) -> Callable[[Tensor], None]:
    def check(weight: Tensor) -> None:
        assert torch.equal(weight, factor * torch.eye(len(weight)))

    return check


def is_np(weight: Tensor) -> None:
    assert torch.allclose(weight, weight.T)
    eigenvalues = torch.linalg.eigvalsh(weight.double())
    assert eigenvalues[-1].item() == pytest.approx(1, abs=1e-5) and eigenvalues[0] > 0
    # I + RᵀR/H has eigenvalues from 1 to about 1 + 4
    assert eigenvalues[0].item() == pytest.approx(1 / 5, rel=0.3)


def is_sparse(radius: float) -> Callable[[Tensor], None]:
    def check(weight: Tensor) -> None:
        assert ((weight != 0).sum(0) == 15).all()
        assert (weight != 0).sum(1).float().std() > 1, "other rows in every column"
        assert spectral_radius(weight) == pytest.approx(radius, rel=1e-5)

    return check


EXPECTED: dict[str, Callable[[float | None], Callable[[Tensor], None]]] = {
    "normal": lambda s: is_normal(lambda n, m: s or 0.1),
    "uniform": lambda s: is_uniform(lambda n, m: s or 0.1),
    "xavier_uniform": lambda s: is_uniform(lambda n, m: (s or 1) * math.sqrt(6 / (n + m))),
    "xavier_normal": lambda s: is_normal(lambda n, m: (s or 1) * math.sqrt(2 / (n + m))),
    "kaiming_uniform": lambda s: is_uniform(lambda n, m: (s or 2**0.5) * math.sqrt(3 / m)),
    "kaiming_normal": lambda s: is_normal(lambda n, m: (s or 2**0.5) / math.sqrt(m)),
    "orthogonal": lambda s: is_orthogonal(s or 1),
    "identity": lambda s: is_identity(s or 1),
    "np": lambda s: is_np,
    "np_input": lambda s: is_normal(
        lambda n, m: math.sqrt(2) * math.exp(1.2 / (n - 2.4)) / math.sqrt(n)
    ),
    "sparse": lambda s: is_sparse(s or 0.95),
}
CASES = [
    (name, role, scale)
    for name, scheme in SCHEMES.items()
    for role in scheme.roles
    for scale in ([None, 0.37] if scheme.takes_scale else [None])
]


@pytest.mark.parametrize(("name", "role", "scale"), CASES)
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_a_scheme_draws_what_it_says_in_every_gate(
    name: str, role: str, scale: float | None, cell: str
) -> None:
    blocks = blocks_of(wide_model(cell, **{role: name, f"{role}_scale": scale}), role)
    assert len(blocks) == (1 if role == "output" else {"rnn": 1, "gru": 3, "lstm": 4}[cell])
    for block in blocks:
        EXPECTED[name](scale)(block)
    if name != "identity":
        assert len({block.sum().item() for block in blocks}) == len(blocks), "gates differ"


@pytest.mark.parametrize("cell", sorted(CELLS.load()))
def test_unrolled_cells_and_every_layer_of_a_stack_are_reached(cell: str) -> None:
    settings: dict[str, Any] = {role: "normal" for role in ROLES}
    settings |= {f"{role}_scale": 0.003 for role in ROLES}
    if cell == "orthogonal":
        settings |= {"recurrent": "torch", "recurrent_scale": None}
    before = wide_model(cell, layers=2)
    model = wide_model(cell, layers=2, **settings)
    for (name, old), (_, new) in zip(
        before.named_parameters(), model.named_parameters(), strict=True
    ):
        drawn = "weight_ih" in name or name == "readout.weight"
        drawn |= "weight_hh" in name and cell != "orthogonal"
        assert torch.equal(old, new) != drawn, name
        if drawn:
            assert new.std().item() == pytest.approx(0.003, rel=0.2)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("cell", ["lstm", "ln_rnn"])
def test_what_a_role_draws_does_not_depend_on_the_others(role: str, cell: str) -> None:
    others = [other for other in ROLES if other != role]
    alone = wide_model(cell, **{role: "normal"})
    among = wide_model(cell, **{role: "normal"}, **{o: "orthogonal" for o in others}, bias="zero")
    for a, b in zip(blocks_of(alone, role), blocks_of(among, role), strict=True):
        assert torch.equal(a, b)
    for other in others:
        a, b = blocks_of(alone, other)[0], blocks_of(among, other)[0]
        assert not torch.equal(a, b)


@pytest.mark.parametrize("cell", sorted(CELLS.load()))
def test_torchs_preset_draws_what_the_modules_draw(cell: str) -> None:
    part = CELLS.default(cell, hidden_size=7, num_layers=2)
    ours = SequenceModel(part.layers(3), nn.Linear(7, 2), True)
    torch.manual_seed(11)
    INITS.default("torch")(ours)
    theirs = SequenceModel(part.layers(3), nn.Linear(7, 2), True)
    torch.manual_seed(11)
    for module in theirs.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for (name, a), (_, b) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_number_is_that_of_every_bias_and_of_nothing_else() -> None:
    cell = CELLS.default("rnn", hidden_size=5)
    zero, same = (
        dict(build_model(cell, TASK, INITS.default("torch", bias=bias), seed=0).named_parameters())
        for bias in ("zero", -1.225)
    )
    for name, parameter in same.items():
        expected = torch.full_like(parameter, -1.225) if "bias" in name else zero[name]
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("cell", sorted(CELLS.load()))
def test_zero_biases_are_zero_but_for_what_the_cell_asks_for(cell: str) -> None:
    part = CELLS.default(cell, hidden_size=5)
    model = build_model(part, TASK, INITS.default("torch", bias="zero"), seed=0)
    biases = {n: b for n, b in model.named_parameters() if "bias_" in n or n == "readout.bias"}
    total = sum(b.sum().item() for b in biases.values())
    assert total == (5 if getattr(part, "forget_bias", None) == 1 else 0)
    other = build_model(part, TASK, INITS.default("torch"), seed=0)
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b) or name in biases


# --- presets

PRESETS = {
    "torch": (("torch", None), ("torch", None), ("torch", None), "torch"),
    "schemes": (("torch", None), ("torch", None), ("torch", None), "torch"),
    "glorot": (("xavier_uniform", None),) * 3 + ("zero",),
    "irnn": (("normal", 0.001), ("identity", 1.0), ("normal", 0.001), "zero"),
    "np_rnn": (("np_input", None), ("np", None), ("xavier_uniform", None), "zero"),
    "pascanu2013_sigmoid": (("normal", 0.01),) * 3 + ("zero",),
    "pascanu2013_basic_tanh": (("normal", 0.1),) * 3 + ("zero",),
    "pascanu2013_smart_tanh": (("normal", 0.01), ("sparse", 0.95), ("normal", 0.01), "zero"),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_a_preset_is_what_its_paper_says_and_trains(name: str) -> None:
    init = INITS.default(name)
    assert isinstance(init, SchemesInit)
    roles = tuple((getattr(init, role), getattr(init, f"{role}_scale")) for role in ROLES)
    assert (*roles, init.bias) == PRESETS[name]
    model = build_model(CELLS.default("rnn", hidden_size=20), TASK, init, seed=0)
    x, y = TASK.batch(3, training_generator(0, 1))
    TASK.loss(model(x).outputs, y).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_every_registered_initialisation_has_its_yaml() -> None:
    for name in INITS.load():
        assert isinstance(INITS.default(name), Init)


def test_every_scheme_is_described_with_its_source_and_listed() -> None:
    comment = (CONF / "schemes.yaml").read_text()
    for name, scheme in SCHEMES.items():
        text = inspect.getdoc(scheme.fill)
        assert text and "Reference:" in text and text.splitlines()[0].endswith("."), name
        assert f"``{name}``" in (SchemesInit.__doc__ or "") and name in comment
        assert name in EXPECTED, "and its statistics are tested"


# --- errors


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"recurrent": "ortho"}, "init.recurrent=ortho: must be one of torch, normal, "),
        ({"input": "identity"}, "init.input=identity: must be one of torch, normal, "),
        ({"output": "np"}, "init.output=np: must be one of torch, normal, "),
        ({"recurrent": "np_input"}, "init.recurrent=np_input: must be one of torch, "),
        ({"recurrent": "np", "recurrent_scale": 2.0}, "init.recurrent_scale=2.0: must be null"),
        ({"input_scale": 1.0}, "init.input_scale=1.0: must be null, as no number goes with"),
        ({"output": "normal", "output_scale": 0}, "init.output_scale=0: must be a finite number"),
        ({"bias": "one"}, "init.bias=one: must be one of torch, zero or a finite number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        INITS.default("torch", **settings)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("name", ["xavier_uniform", "orthogonal", "identity", "np", "sparse"])
def test_what_needs_a_matrix_is_refused_for_the_vector_of_an_indrnn(name: str) -> None:
    says = f"init.recurrent={name}: must be one of torch, normal, uniform, for weight_hh of IndRNN"
    with pytest.raises(InputError, match=says):
        wide_model("indrnn", recurrent=name)


@pytest.mark.parametrize("name", ["normal", "sparse", "np"])
def test_what_is_not_orthogonal_is_refused_where_the_weight_has_to_be(name: str) -> None:
    with pytest.raises(InputError, match=f"init.recurrent={name}: must be torch, orthogonal or id"):
        wide_model("orthogonal", recurrent=name)
    with pytest.raises(InputError, match="as weight_hh of .* is orthogonal throughout"):
        wide_model("orthogonal", recurrent="orthogonal", recurrent_scale=0.9)


@pytest.mark.parametrize(
    ("name", "check"), [("orthogonal", is_orthogonal), ("identity", is_identity)]
)
def test_an_orthogonal_cell_starts_from_the_orthogonal_matrix_it_is_given(
    name: str, check: Callable[[float], Callable[[Tensor], None]]
) -> None:
    model = wide_model("orthogonal", layers=2, recurrent=name)
    for cell in model.rnn.cells:
        check(1)(cell.weight_hh.detach())


def test_a_square_scheme_is_refused_for_a_projected_lstm() -> None:
    model = SequenceModel(nn.LSTM(3, 6, proj_size=2), nn.Linear(2, 1), False)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"init.recurrent=identity: .*weight_hh_l0 of LSTM"):
        INITS.default("torch", recurrent="identity")(model)
    INITS.default("torch", recurrent="orthogonal")(model)


def test_a_cell_without_the_weight_that_a_scheme_is_for_is_refused() -> None:
    model = SequenceModel(nn.Linear(3, 6), nn.Linear(6, 1), False)
    with pytest.raises(InputError, match="init.input=normal: must be torch, as the cell has no"):
        INITS.default("torch", input="normal")(model)


# --- what it does to the gradient


def decay(part: CellPart, init: Init, seed: int) -> float:
    """By what factor the gradient changes from a step to the one before, over 100 steps."""
    model = build_model(part, TASK, init, seed).double()
    x, y = TASK.batch(20, training_generator(seed, 1))
    with record(model) as tape:
        TASK.loss(model(x.double()).outputs, y.double()).backward()
    (layer,) = tape.values()
    norm = (layer.hidden_norm if layer.cell_norm is None else layer.cell_norm).mean(1)
    return float((norm[0] / norm[-1]) ** (1 / 99))


@pytest.mark.parametrize(
    ("cell", "init", "low", "high"),
    [
        # 0.757 in the logs of github.com/ratschlab/uRNN, a rerun of Arjovsky et al. (2016)
        ({"name": "lstm", "forget_bias": None}, {"name": "glorot"}, 0.68, 0.79),
        ({"name": "lstm", "forget_bias": 1.0}, {"name": "glorot"}, 0.86, 0.98),
        ({"name": "lstm", "forget_bias": None}, {"name": "torch"}, 0.58, 0.70),
        ({"name": "orthogonal", "nonlinearity": "linear"}, {"name": "torch"}, 0.999, 1.001),
        ({"name": "orthogonal", "nonlinearity": "modrelu"}, {"name": "torch"}, 0.99, 1.005),
        (
            {"name": "orthogonal", "nonlinearity": "tanh"},
            {"name": "torch", "recurrent": "orthogonal"},
            0.70,
            0.90,
        ),
    ],
)
def test_the_gradients_initial_decay_is_that_of_the_literature(
    cell: dict[str, Any], init: dict[str, Any], low: float, high: float
) -> None:
    """Means of 10 seeds; 30 units on the adding problem over 100 steps."""
    part = CELLS.default(**cell, hidden_size=30)
    factors = [decay(part, INITS.default(**init), seed) for seed in range(10)]
    assert low < sum(factors) / 10 < high, factors


@pytest.mark.parametrize("gain", [0.9, 1.0, 1.1])
def test_a_linear_rnn_with_an_orthogonal_weight_decays_by_its_gain(gain: float) -> None:
    part = CELLS.default("rnn", hidden_size=16, nonlinearity="linear")
    init = INITS.default("torch", recurrent="orthogonal", recurrent_scale=gain)
    assert decay(part, init, seed=0) == pytest.approx(gain, abs=1e-6)
