"""Our layers against a loop of torch.nn's cells in float64, and against torch.nn's own layers."""

import copy
import io
import itertools
import pickle
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from rnngrad.bptt import record
from rnngrad.cells import RNNCell
from rnngrad.cells.base import Unrolled
from rnngrad.check import compare_layer, is_right
from rnngrad.kernels.activations import ACTIVATIONS
from rnngrad.nn import GRU, LSTM, RNN, convert

KINDS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "rnn_tanh": (RNN, nn.RNN, {}),
    "rnn_relu": (RNN, nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (LSTM, nn.LSTM, {}),
    "lstm_projected": (LSTM, nn.LSTM, {"proj_size": 3}),
    "gru": (GRU, nn.GRU, {}),
}
OWN = {f"rnn_{name}": (RNN, None, {"nonlinearity": name}) for name in ACTIVATIONS[2:]}
"""Those that torch.nn has no layer of."""
NOTICE = "ignore:LSTM with projections is not supported with oneDNN"

pytestmark = [pytest.mark.filterwarnings(NOTICE), pytest.mark.usefixtures("every_kernel")]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]


@pytest.fixture(params=KINDS | OWN)
def ours(request: pytest.FixtureRequest) -> Any:
    make, _, options = (KINDS | OWN)[request.param]
    torch.manual_seed(0)
    return make(4, 6, 2, **options)


def pair(kind: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Ours and torch.nn's with the same weights."""
    make, make_torch, options = kind
    torch.manual_seed(0)
    ours, theirs = make(*args, **options, **kwargs), make_torch(*args, **options, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def outcome(layer: Any, x: Any, hx: Any = None) -> list[Tensor]:
    """Outputs, states, and the gradients of weights, input and states of a loss that uses all."""
    leaves = [x.data if isinstance(x, PackedSequence) else x, *flat(hx), *layer.parameters()]
    for leaf in leaves:
        leaf.grad = None
        leaf.requires_grad_()
    output, last = layer(x, hx)
    values = [output.data if isinstance(output, PackedSequence) else output, *flat(last)]
    weights = [torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view_as(v) for v in values]
    sum((w * v + v.square()).sum() for w, v in zip(weights, values, strict=True)).backward()  # type: ignore[union-attr]
    return [v.detach() for v in values] + [leaf.grad.clone() for leaf in leaves]


def flat(hx: Any) -> list[Tensor]:
    return [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-30)


GRID = [
    pytest.param(layers, both, first, packed, bias, given, id="-".join(filter(None, words)))
    for layers, both, first, packed, bias, given in itertools.product((1, 3), *[(False, True)] * 5)
    if (
        words := [
            f"{layers}layers",
            "bidirectional" * both,
            "batch_first" * first,
            "packed" * packed,
            "no_bias" * (not bias),
            "given_states" * given,
        ]
    )
]


@pytest.mark.parametrize("name", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
@pytest.mark.parametrize(("layers", "both", "first", "packed", "bias", "given"), GRID)
def test_outputs_gradients_and_norms_equal_float64_autograd_through_a_loop_of_cells(
    name: str, layers: int, both: bool, first: bool, packed: bool, bias: bool, given: bool
) -> None:
    compare_with_the_loop(name, layers, both, first, packed, bias, given)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(("layers", "both", "first", "packed", "bias", "given"), GRID[::21])
def test_the_activations_that_torch_nn_lacks_equal_the_loop_as_well(
    name: str, layers: int, both: bool, first: bool, packed: bool, bias: bool, given: bool
) -> None:
    compare_with_the_loop(name, layers, both, first, packed, bias, given)


def compare_with_the_loop(
    name: str, layers: int, both: bool, first: bool, packed: bool, bias: bool, given: bool
) -> None:
    make, _, options = (KINDS | OWN)[name]
    torch.manual_seed(1)
    layer = make(
        2,
        3,
        layers,
        bias=bias,
        batch_first=first,
        bidirectional=both,
        dtype=torch.float64,
        **options,
    )
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    shape = (layers * (2 if both else 1), 3, 3)
    count = 2 if name == "lstm" else 1
    states = [torch.randn(shape, dtype=torch.float64) for _ in range(count)] if given else None
    lengths = [2, 4, 1] if packed else None
    errors = compare_layer(layer, x, states, lengths, difference=False)
    assert is_right(errors), errors
    assert {"output", "gradients", "hidden_norm", "direct_norm", "weight_norm"} <= errors.keys()
    assert ("cell_norm" in errors) == (name == "lstm")


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["rnn_tanh", "lstm", "gru", *OWN]),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    hidden=st.integers(1, 5),
    layers=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_any_lengths_and_sizes_agree_with_the_loop(
    name: str, lengths: list[int], hidden: int, layers: int, seed: int
) -> None:
    make, _, options = (KINDS | OWN)[name]
    torch.manual_seed(seed)
    layer = make(2, hidden, layers, bidirectional=seed % 2 == 0, dtype=torch.float64, **options)
    x = torch.randn(max(lengths), len(lengths), 2, dtype=torch.float64)
    errors = compare_layer(layer, x, lengths=lengths, difference=False)
    assert is_right(errors), errors


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_outputs_and_gradients_equal_torch_nn(
    kind: Any,
    dtype: torch.dtype,
    tolerance: float,
    layers: int,
    both: bool,
    packed: bool,
    given: bool,
) -> None:
    ours, theirs = pair(kind, 4, 6, layers, bidirectional=both, dtype=dtype)
    x = torch.randn(7, 5, 4, dtype=dtype)
    data: Any = pack_padded_sequence(x, [3, 7, 1, 7, 5], enforce_sorted=False) if packed else x
    hx = [torch.randn_like(s) for s in flat(theirs(data)[1])] if given else None
    state: Any = hx if hx is None else tuple(hx) if len(hx) == 2 else hx[0]
    assert_close(outcome(ours, data, state), outcome(theirs, data, state), tolerance)


def test_unbatched_input_and_batch_first_equal_torch_nn(kind: Any) -> None:
    for shape, options in (
        ((7, 4), {}),
        ((5, 7, 4), {"batch_first": True}),
        ((7, 4), {"batch_first": True}),
    ):
        ours, theirs = pair(kind, 4, 6, 2, bidirectional=True, dtype=torch.float64, **options)
        x = torch.randn(shape, dtype=torch.float64)
        assert_close(outcome(ours, x), outcome(theirs, x), 1e-12)


def test_dropout_between_layers_draws_what_torch_nn_draws(kind: Any) -> None:
    ours, theirs = pair(kind, 4, 6, 3, dropout=0.5, dtype=torch.float64)
    x = torch.randn(7, 5, 4, dtype=torch.float64)
    outcomes = []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        outcomes.append(outcome(layer, x))
    assert_close(outcomes[0], outcomes[1], 1e-12)
    assert_close(outcome(ours.eval(), x), outcome(theirs.eval(), x), 1e-12)
    assert not torch.equal(outcomes[0][0], ours(x)[0])


def test_initial_values_and_state_dict_are_torch_nns_both_ways(kind: Any) -> None:
    make, make_torch, options = kind
    states = []
    for factory in (make, make_torch):
        torch.manual_seed(5)
        states.append(factory(4, 6, 2, bidirectional=True, **options).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(
        torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True)
    )
    make(4, 6, 2, bidirectional=True, **options).load_state_dict(states[1])
    make_torch(4, 6, 2, bidirectional=True, **options).load_state_dict(states[0])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_any_nonlinearity_has_the_parameters_of_torch_nns_rnn(name: str) -> None:
    layers: list[Any] = []
    for make, arguments in ((nn.RNN, ()), (RNN, (name,)), (partial(RNN, nonlinearity=name), ())):
        torch.manual_seed(5)
        layers.append(make(4, 6, 2, *arguments, bidirectional=True))
    theirs, *ours = layers
    for layer in ours:
        assert layer.nonlinearity == name and layer.mode == f"RNN_{name.upper()}"
        assert (f"nonlinearity={name}" in repr(layer)) == (f"rnn_{name}" in OWN)
        assert list(layer.state_dict()) == list(theirs.state_dict())
        assert all(map(torch.equal, layer.parameters(), theirs.parameters()))
        theirs.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("name", ["sin", "RELU", None, ["tanh"]])
def test_a_nonlinearity_that_there_is_not_is_refused_with_those_that_there_are(name: Any) -> None:
    with pytest.raises(ValueError, match=f"{', '.join(ACTIVATIONS)}, got {re.escape(repr(name))}"):
        RNN(4, 6, nonlinearity=name)
    with pytest.raises(ValueError, match="must be one of"):
        RNN(4, 6, 1, name)


def test_cudnn_is_asked_for_a_layout_only_of_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.nn asks whenever a layer is moved; for another mode that raises, on a GPU."""
    asked = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda layer: asked.append(layer.mode))
    for name in ACTIVATIONS:
        layer = RNN(4, 6, nonlinearity=name)
        asked.clear()
        layer.double().flatten_parameters()
        assert asked == ([layer.mode] * 2 if f"rnn_{name}" in KINDS else [])


@pytest.mark.parametrize("make", [RNN, LSTM, GRU])
def test_the_example_of_torchs_documentation_runs_unchanged(make: Any) -> None:
    rnn = make(10, 20, 2)
    input = torch.randn(5, 3, 10)
    h0 = torch.randn(2, 3, 20)
    if make is LSTM:
        c0 = torch.randn(2, 3, 20)
        output, (hn, cn) = rnn(input, (h0, c0))
        assert cn.shape == (2, 3, 20)
    else:
        output, hn = rnn(input, h0)
    assert output.shape == (5, 3, 20) and hn.shape == (2, 3, 20)
    assert "10, 20, num_layers=2" in repr(rnn)


@pytest.mark.parametrize(
    "fault",
    [
        lambda layer: layer(torch.zeros(2, 3, 4, 5)),
        lambda layer: layer(torch.zeros(7, 5, 9)),
        lambda layer: layer(torch.zeros(0, 5, 4)),
        lambda layer: layer(torch.zeros(7, 5, 4, dtype=torch.float64)),
        lambda layer: layer(torch.zeros(7, 5, 4), *bad_state(layer, 3)),
        lambda layer: layer(torch.zeros(7, 5, 4), *bad_state(layer, 2)),
        lambda layer: layer(torch.zeros(7, 5, 4), *bad_state(layer, 3, torch.float64)),
    ],
    ids=["4-D", "width", "empty", "dtype", "state size", "state dims", "state dtype"],
)
def test_wrong_arguments_raise_what_torch_nn_raises(kind: Any, fault: Any) -> None:
    raised = []
    for layer in pair(kind, 4, 6):
        with pytest.raises((ValueError, RuntimeError)) as error:
            fault(layer)
        raised.append(error.type)
    assert raised[0] is raised[1]


def bad_state(layer: Any, dims: int, dtype: torch.dtype = torch.float32) -> tuple[Any]:
    rows = 5 if dtype == torch.float64 else 9
    state = torch.zeros(*(1, rows)[-(dims - 1) :], 6, dtype=dtype)
    projected = state[..., :3] if layer.proj_size else state
    return ((projected, state) if layer.mode == "LSTM" else state,)


def test_states_of_another_kind_of_layer_are_refused(kind: Any) -> None:
    """torch.nn fails on these too, somewhere inside; taking them would drop one silently."""
    ours, _ = pair(kind, 4, 6)
    h = torch.zeros(1, 5, 6)
    for hx in ((h, h, h), (), (h,), *([h] if ours.mode == "LSTM" else [(h, h), [h, h]])):
        with pytest.raises(TypeError, match="hx must be"):
            ours(torch.zeros(7, 5, 4), hx)


def test_output_may_be_changed_in_place(ours: Any) -> None:
    x = torch.randn(7, 5, 4)
    ours(x)[0].sum().backward()
    once = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    ours(x)[0].mul_(2).sum().backward()
    for p, grad in zip(ours.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)


def test_frozen_weights_and_inputs_without_gradient_get_none(kind: Any) -> None:
    ours, theirs = pair(kind, 4, 6)
    for layer in (ours, theirs):
        layer.weight_hh_l0.requires_grad_(False)
        layer(torch.randn(7, 5, 4))[0].sum().backward()
        assert layer.weight_hh_l0.grad is None and layer.weight_ih_l0.grad is not None


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_share_no_memory_so_that_each_can_be_scaled_in_place(
    kind: Any, size: int
) -> None:
    make, _, options = kind
    options = options | ({"proj_size": 1} if "proj_size" in options else {})
    layer = make(1, size + ("proj_size" in options), **options)
    layer(torch.randn(4, 2, 1))[0].sum().backward()
    places = [parameter.grad.data_ptr() for parameter in layer.parameters()]
    assert len(set(places)) == len(places)


def test_copies_and_pickles_give_the_same_layer(ours: Any) -> None:
    x = torch.randn(7, 5, 4)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):  # noqa: S301
        assert type(twin) is type(ours) and repr(twin) == repr(ours)
        assert torch.equal(twin(x)[0], ours(x)[0])
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    ours.load_state_dict(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize("name", ["rnn_tanh", "lstm", "lstm_projected", "gru", *OWN])
def test_gradcheck(name: str) -> None:
    make, _, options = (KINDS | OWN)[name]
    layer = make(2, 4, 2, bidirectional=True, dtype=torch.float64, **options)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: flat(layer(x)[1]) + [layer(x)[0]], x)


# --- beside the rest of torch: each works, or says in one line what to do instead


def test_double_backward_names_unroll(kind: Any) -> None:
    ours, _ = pair(kind, 4, 6)
    x = torch.randn(7, 5, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"no double backward.*rnngrad\.nn\.unroll"):
        torch.autograd.grad(ours(x)[0].sum(), x, create_graph=True)


def test_autocast_computes_in_the_weights_own_precision_and_is_recorded(ours: Any) -> None:
    x = torch.randn(7, 5, 4)
    plain = outcome(ours, x)
    with torch.autocast("cpu", torch.bfloat16), record(ours) as tape:
        inside = outcome(ours, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert tape["l0"].hidden_norm.shape == (7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x.bfloat16())[0].dtype == torch.float32


def test_bfloat16_layers_agree_with_float64_to_their_rounding(ours: Any) -> None:
    x = torch.randn(7, 5, 4)
    exact = outcome(copy.deepcopy(ours).double(), x.double())
    rough = outcome(ours.bfloat16(), x.bfloat16())
    for a, b in zip(rough, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).abs().max() < 0.05 * b.abs().max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*isinstance.*LeafSpec:FutureWarning")
def test_compiled_models_run_the_layer_eagerly_and_are_recorded(kind: Any) -> None:
    ours, _ = pair(kind, 4, 6)
    model = nn.Sequential(ours)
    x = torch.randn(7, 5, 4)
    plain = outcome(model[0], x)
    compiled = torch.compile(model, backend="eager")
    with record(model) as tape:
        compiled(x)[0].sum().backward()
    assert tape["0.l0"].hidden_norm.shape == (7, 5)
    assert torch.equal(compiled(x)[0], plain[0])


class Inside(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_gets_torch_nns_layer_with_the_same_weights(kind: Any) -> None:
    ours, _ = pair(kind, 4, 6, 2, bidirectional=True)
    x = torch.randn(7, 5, 4)
    expected = ours(x)[0]
    # torch.jit.script cannot call even torch.nn's layer unless it is inside a module
    for module in (torch.jit.script(Inside(ours)), torch.jit.trace(Inside(ours), x)):
        torch.testing.assert_close(module(x), expected)
        buffer = io.BytesIO()
        torch.jit.save(module, buffer)
    assert type(ours) is kind[0], "scripting leaves the layer as it was"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["rnn_tanh", "lstm", "gru"])
def test_onnx_export_gives_torch_nns_graph(name: str) -> None:
    ours, theirs = pair(KINDS[name], 4, 6)
    x = torch.randn(7, 5, 4)
    graphs = [
        {
            node.op_type
            for node in torch.onnx.export(m, (x,), dynamo=True, verbose=False).model.graph
        }
        for m in (ours.eval(), theirs.eval())
    ]
    assert graphs[0] == graphs[1]


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all tests: where a group dies with its model, gloo's thread can wait for itself."""
    folder = tmp_path_factory.mktemp("gloo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def scripted(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.script(model)


def traced(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(model, x)


def exported(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,))


def to_onnx(model: nn.Module, x: Tensor) -> Any:
    return torch.onnx.export(model, (x,), dynamo=True, verbose=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("way", [scripted, traced, exported, to_onnx])
def test_what_torch_nn_has_no_layer_of_is_not_exported_as_another(name: str, way: Any) -> None:
    make, _, options = OWN[name]
    with pytest.raises(Exception, match=f"mode {name.upper()} that could be.*unroll"):
        way(Inside(make(4, 6, **options)).eval(), torch.randn(7, 5, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_the_refusal_names_instead_can_be_traced() -> None:
    layer = RNN(4, 6, nonlinearity="sigmoid")
    cell = RNNCell(4, 6, nonlinearity="sigmoid")
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(7, 5, 4)
    trace: Any = torch.jit.trace(Inside(Unrolled([cell])), x)
    x = torch.randn(7, 5, 4)
    torch.testing.assert_close(trace(x), layer(x)[0])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_trains_and_is_recorded(kind: Any) -> None:
    ours, _ = pair(kind, 4, 6)
    x = torch.randn(7, 5, 4)
    plain = outcome(ours, x)
    wrapped = nn.parallel.DistributedDataParallel(ours)
    with record(wrapped) as tape:
        parallel = outcome(wrapped, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, parallel, strict=True))
    assert tape["module.l0"].hidden_norm.shape == (7, 5)


def test_data_parallel_is_refused_by_record_but_trains(kind: Any) -> None:
    ours, _ = pair(kind, 4, 6)
    wrapped = nn.DataParallel(ours)
    assert torch.equal(wrapped(torch.ones(7, 5, 4))[0], ours(torch.ones(7, 5, 4))[0])
    wrapped.device_ids = [0, 1]
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        record(wrapped)


def test_functional_call_uses_the_given_weights(kind: Any) -> None:
    ours, theirs = pair(kind, 4, 6, dtype=torch.float64)
    doubled = {name: 2 * p for name, p in ours.state_dict().items()}
    x = torch.randn(7, 5, 4, dtype=torch.float64)
    a, b = (torch.func.functional_call(layer, doubled, (x,))[0] for layer in (ours, theirs))
    torch.testing.assert_close(a, b)


# --- convert


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(4, 6, 2, bidirectional=True)
        self.decoder = nn.Sequential(nn.GRU(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)[0])[0]  # type: ignore[no-any-return]


SEEN: list[str] = []


def hook(*_: Any) -> None:
    SEEN.append("hook")


def test_convert_changes_classes_and_nothing_else() -> None:
    model = Model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SEEN.clear()
    model.encoder.register_forward_hook(hook)
    x = torch.randn(7, 5, 4, dtype=torch.float64)
    parameters, before = list(model.parameters()), model(x)
    assert convert(model) is model
    assert type(model.encoder) is LSTM and type(model.decoder[0]) is GRU
    assert isinstance(model.encoder, nn.LSTM)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert SEEN == ["hook", "hook"]
    with record(model) as tape:
        copy.deepcopy(model)(x)  # not the model that is recorded
        model(x).sum().backward()
    assert list(tape) == [
        "encoder.l0",
        "encoder.l0_reverse",
        "encoder.l1",
        "encoder.l1_reverse",
        "decoder.0.l0",
    ]
    optimizer.step()
    assert type(convert(pickle.loads(pickle.dumps(model))).encoder) is LSTM  # noqa: S301


def test_convert_takes_the_model_itself_and_is_idempotent() -> None:
    layer = nn.RNN(2, 3)
    assert convert(convert(layer)) is layer and type(layer) is RNN


class Subclass(nn.LSTM):
    pass


def test_convert_refuses_subclasses_and_parametrised_layers_by_path_and_converts_nothing() -> None:
    model = nn.ModuleDict({"a": nn.GRU(2, 3), "b": nn.Sequential(Subclass(2, 3))})
    with pytest.raises(TypeError, match=r"b\.0 is a Subclass"):
        convert(model)
    assert type(model["a"]) is nn.GRU
    parametrised = nn.ModuleDict({"inner": nn.GRU(2, 3)})
    nn.utils.parametrizations.orthogonal(parametrised["inner"], "weight_hh_l0")
    with pytest.raises(TypeError, match="inner is a ParametrizedGRU"):
        convert(parametrised)
