"""rnngrad-check says right of what is right, and wrong of what is wrong."""

import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from rnngrad.bptt import Call
from rnngrad.cells import CELLS
from rnngrad.check import all_checks, compare_cell, compare_layer, is_right
from rnngrad.kernels.activations import ACTIVATIONS
from rnngrad.kernels.interface import Recording
from rnngrad.nn import LSTM, RNN


def test_the_command_finds_everything_right(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rnngrad.check"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and " 0 wrong" in done.stdout, done.stdout + done.stderr


def test_every_layer_and_registered_cell_is_checked_in_each_of_its_variants() -> None:
    names = [name for name, _ in all_checks()]
    for cell in CELLS.load():
        assert f"cell {cell}, unrolled" in names
        for key, hint in get_type_hints(CELLS[cell]).items():
            values = get_args(hint) if get_origin(hint) is Literal else ()
            values = ("true", "false") if hint is bool else values
            listed = [name for name in names if name.startswith(f"cell {cell} {key}=")]
            assert len(listed) == max(0, len(values) - 1), "all but the default"
    assert "cell lstm forget_gate=false, unrolled" in names
    assert "cell rnn nonlinearity=modrelu, unrolled" in names
    for layer in ("RNN", "LSTM", "GRU"):
        assert sum(name.startswith(f"rnngrad.nn.{layer}(") for name in names) >= 8
    for activation in ACTIVATIONS[1:]:
        assert sum(name.startswith(f"rnngrad.nn.RNN({activation}") for name in names) >= 8


@pytest.mark.parametrize(
    ("make", "quantity"), [(RNN, "hidden_norm"), (LSTM, "cell_norm"), (LSTM, "weight_norm")]
)
def test_a_wrong_record_is_called_wrong(
    make: type[RNN] | type[LSTM], quantity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = Call.fill

    def fill_slightly_wrong(call: Call, recording: Recording) -> None:
        fill(call, recording._replace(**{quantity: getattr(recording, quantity) * (1 + 1e-9)}))

    monkeypatch.setattr(Call, "fill", fill_slightly_wrong)
    errors = compare_layer(make(2, 3, dtype=torch.float64), torch.randn(4, 2, 2).double())
    assert not is_right(errors) and errors[quantity] == pytest.approx(1e-9, rel=0.1)


class WrongCell(torch.nn.RNNCell):
    """Its backward loses a factor on the way through time."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        h = input.new_zeros(len(input), self.hidden_size) if hx is None else hx
        return super().forward(input, Leak.apply(h))


class Leak(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, h: Tensor) -> Tensor:  # type: ignore[override]
        return h.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 0.99 * grad


class CoupledCell(torch.nn.RNNCell):
    """What a sequence becomes depends on the others of its batch, and on the time."""

    takes_time = True

    def forward(self, input: Tensor, hx: Tensor | None = None, t: int = 0) -> Tensor:
        h = input.new_zeros(len(input), self.hidden_size) if hx is None else hx
        return super().forward(input, h - h.mean(0) + 0.1 * t)


def test_a_cell_that_couples_its_rows_and_takes_the_time_is_compared_as_a_whole() -> None:
    torch.manual_seed(0)
    errors = compare_cell(CoupledCell(2, 3, dtype=torch.float64), torch.randn(4, 3, 2).double())
    assert is_right(errors) and "weight_norm" in errors


def test_finite_differences_see_a_backward_that_is_wrong_for_both() -> None:
    torch.manual_seed(0)
    errors = compare_cell(WrongCell(2, 3, dtype=torch.float64), torch.randn(4, 2, 2).double())
    assert errors["hidden_norm"] < 1e-12, "autograd agrees with itself"
    assert errors["hidden_diff"] > 1e-5 and not is_right(errors)
