"""How fast the gradient decays on its way back before any training, by cell and initialisation.

``python -m rnngrad.initial`` measures what docs/initial_gradients.md shows, and writes the page and
its figure, in two minutes. It is a function of the seeds, so on the same machine it comes out the
same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from rnngrad import __version__
from rnngrad.bptt import record
from rnngrad.cells import CELLS, CellPart
from rnngrad.dynamics import TRANSIENT, decay, step_factor
from rnngrad.init import INITS, Init
from rnngrad.model import build_model
from rnngrad.norms import log10_mean, log10_rms
from rnngrad.report import initial_figure
from rnngrad.task import TASKS, training_generator

Floats = npt.NDArray[np.float64]

SEEDS = range(10)
ACTIVATIONS = ("tanh", "sigmoid", "relu", "leaky_relu", "prelu", "elu", "linear", "modrelu")
RECURRENT: Mapping[str, Mapping[str, Any]] = {
    "torch": {},
    "normal 0.1": {"recurrent": "normal"},
    "xavier_uniform": {"recurrent": "xavier_uniform"},
    "kaiming_uniform": {"recurrent": "kaiming_uniform"},
    "orthogonal": {"recurrent": "orthogonal"},
    "identity": {"recurrent": "identity"},
    "np": {"recurrent": "np"},
    "sparse 0.95": {"recurrent": "sparse"},
}
"""Schemes of the recurrent weights; input weights and biases stay torch's."""


def gaussian(steps: int = 400, batch: int = 16, inputs: int = 7, seed: int = 0) -> Tensor:
    """Normal input ``[T, B, I]``, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, batch, inputs, generator=generator, dtype=torch.float64)


def lag_profile(cell: CellPart, init: Init, x: Tensor, seed: int) -> Floats:
    """``log10`` of the root mean square over the batch of ``‖∂L/∂h_{T-k}‖``, by lag ``[T]``.

    In float64, with a loss on the last state alone, a sum of its units.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rnn = cell.layers(x.shape[-1])
        init(rnn)
        cell.adjust_(rnn)
    rnn.double()
    with record(rnn) as tape:
        hidden, _ = rnn(x)
        hidden[-1].sum().backward()
    *_, top = tape.values()
    return log10_rms(top.hidden_norm).flip(0).numpy()


def factor_on_adding(cell: CellPart, init: Init, seed: int, state: str = "hidden") -> float:
    """``(‖∂L/∂s_1‖ / ‖∂L/∂s_T‖)^(1/(T-1))`` on adding, T = 100, batch 20: what a step leaves.

    Norms as in Arjovsky, Shah & Bengio (2016): means over the batch, of the loss that is trained.

    Args:
        cell: A kind of cell.
        init: An initialisation.
        seed: Of weights and data.
        state: ``hidden``, or ``cell`` for ``c_t``.
    """
    task = TASKS.default("adding", length=100)
    model = build_model(cell, task, init, seed).double()
    inputs, targets = task.batch(20, training_generator(seed, 1))
    with record(model) as tape:
        task.loss(model(inputs.double()).outputs, targets.double()).backward()
    *_, top = tape.values()
    norm = top.hidden_norm if state == "hidden" else top.cell_norm
    assert norm is not None
    return step_factor(log10_mean(norm))


def gamma_profile(gamma: float, seed: int) -> Floats:
    """``log10 ‖∂L/∂h_t‖`` by lag of a batch-normalised tanh RNN on sequential digits, untrained.

    As in Cooijmans et al. (2017), figure 1 (a): 100 units, identity recurrence, batch of 100.
    """
    task = TASKS.default("digits")
    cell = CELLS.default("bn_rnn", hidden_size=100, gamma=gamma)
    model = build_model(cell, task, INITS.default("torch", recurrent="identity"), seed).double()
    inputs, targets, _ = task.training_batch(seed, 1, 100)
    with record(model) as tape:
        task.loss(model(inputs.double()).outputs, targets).backward()
    *_, top = tape.values()
    return log10_mean(top.hidden_norm).flip(0).numpy()


CELL_ROWS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("`cell=rnn`", "rnn", {}),
    ("`cell=gru`", "gru", {}),
    ("`cell=gru cell.update_bias=1`", "gru", {"update_bias": 1.0}),
    ("`cell=gru cell.chrono_length=400`", "gru", {"chrono_length": 400}),
    ("`cell=lstm cell.forget_bias=null`", "lstm", {"forget_bias": None}),
    ("`cell=lstm` (forget bias 1)", "lstm", {}),
    ("`cell=lstm cell.chrono_length=400`", "lstm", {"chrono_length": 400}),
    (
        "`cell=lstm cell.forget_gate=false cell.forget_bias=null`",
        "lstm",
        {"forget_gate": False, "forget_bias": None},
    ),
    ("`cell=ln_rnn`", "ln_rnn", {}),
    ("`cell=bn_rnn`", "bn_rnn", {}),
    ("`cell=ln_lstm`", "ln_lstm", {}),
    ("`cell=bn_lstm`", "bn_lstm", {}),
    ("`cell=indrnn`", "indrnn", {}),
    ("`cell=orthogonal` (modReLU)", "orthogonal", {}),
    ("`cell=orthogonal cell.nonlinearity=linear`", "orthogonal", {"nonlinearity": "linear"}),
)

GLOROT = {role: "xavier_uniform" for role in ("input", "recurrent", "output")}
UNITS_30 = {"hidden_size": 30}
FACTOR_ROWS: tuple[tuple[str, str, str, Mapping[str, Any], Mapping[str, Any]], ...] = (
    ("LSTM, Glorot, forget bias 0", "c", "lstm", {"forget_bias": 0.0}, GLOROT),
    ("LSTM, Glorot, forget bias 1", "c", "lstm", {"forget_bias": 1.0}, GLOROT),
    ("LSTM as torch.nn's", "c", "lstm", {"forget_bias": None}, {}),
    ("orthogonal, linear", "h", "orthogonal", {"nonlinearity": "linear"}, {}),
    ("orthogonal, modReLU", "h", "orthogonal", {"nonlinearity": "modrelu"}, {}),
    ("orthogonal, tanh, starting from rotations", "h", "orthogonal", {"nonlinearity": "tanh"}, {}),
    (
        "orthogonal, tanh, starting anywhere (`init.recurrent=orthogonal`)",
        "h",
        "orthogonal",
        {"nonlinearity": "tanh"},
        {"recurrent": "orthogonal"},
    ),
)

GAMMAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def measured_profiles() -> dict[str, dict[str, list[Floats]]]:
    """Profiles of a vanilla RNN by activation, recurrent scheme and seed."""
    found: dict[str, dict[str, list[Floats]]] = {}
    pairs = [(phi, scheme) for phi in ACTIVATIONS for scheme in RECURRENT]
    for phi, scheme in tqdm(pairs, desc="activation x initialisation", disable=None):
        cell = CELLS.default("rnn", hidden_size=64, nonlinearity=phi)
        init = INITS.default("torch", **RECURRENT[scheme])
        found.setdefault(phi, {})[scheme] = [
            lag_profile(cell, init, gaussian(seed=seed), seed) for seed in SEEDS
        ]
    return found


def page(profiles: Mapping[str, Mapping[str, Sequence[Floats]]]) -> str:
    """The page, in Markdown."""
    return "\n".join(_lines(profiles)) + "\n"


def _lines(profiles: Mapping[str, Mapping[str, Sequence[Floats]]]) -> Iterator[str]:
    yield "# The gradient before training"
    yield ""
    yield "How much of the gradient a step back through time leaves, at initialisation, by cell and"
    yield f"scheme. `python -m rnngrad.initial` measures it (rnngrad {__version__}, float64, mean"
    yield f"and standard deviation over seeds {SEEDS[0]} to {SEEDS[-1]})."
    yield ""
    yield "## Activation x initialisation"
    yield ""
    yield "Slope of log10 ‖∂L/∂h_{T-k}‖ against the lag k, in decades a step: -0.3 halves the"
    yield "gradient at every step, 0 keeps it, more than 0 explodes. Vanilla RNN, 64 units, normal"
    yield "input of 7 values, 400 steps, batch 16, loss on the last step; input weights and biases"
    yield f"as torch.nn starts them, lags from {TRANSIENT} on."
    yield ""
    yield f"| `cell.nonlinearity` | {' | '.join(RECURRENT)} |"
    yield "|---" * (len(RECURRENT) + 1) + "|"
    for phi, by_scheme in profiles.items():
        cells = [_spread([decay(p).slope for p in found]) for found in by_scheme.values()]
        yield f"| {phi} | {' | '.join(cells)} |"
    yield ""
    yield "![Gradient against lag by activation and initialisation](initial_gradients.png)"
    yield ""
    yield "## Cells"
    yield ""
    yield "The same, of other cells, weights as they start by themselves (`init=torch`)."
    yield ""
    yield "| cell | slope of log10 ‖∂L/∂h‖, decades a step | R² |"
    yield "|---|---|---|"
    for title, name, changes in CELL_ROWS:
        cell = CELLS.default(name, hidden_size=64, **changes)
        init = INITS.default("torch")
        found = [decay(lag_profile(cell, init, gaussian(seed=seed), seed)) for seed in SEEDS]
        r2 = np.mean([line.r2 for line in found])
        yield f"| {title} | {_spread([line.slope for line in found])} | {r2:.3f} |"
    yield ""
    yield "## The adding problem, T = 100"
    yield ""
    yield "What a step leaves, (‖∂L/∂s_1‖ / ‖∂L/∂s_T‖)^(1/99), as Arjovsky, Shah & Bengio (2016,"
    yield "figure 4) look at it: 30 units, batch 20, the task's own loss; of the cell state c of an"
    yield "LSTM."
    yield ""
    yield "| model | state | a step leaves | least | most |"
    yield "|---|---|---|---|---|"
    for title, state, name, changes, scheme in FACTOR_ROWS:
        cell = CELLS.default(name, **UNITS_30, **changes)
        init = INITS.default("torch", **scheme)
        kind = "cell" if state == "c" else "hidden"
        factors = [factor_on_adding(cell, init, seed, kind) for seed in SEEDS]
        ends = f"{min(factors):.4f} | {max(factors):.4f}"
        yield f"| {title} | {state} | {_spread(factors)} | {ends} |"
    yield ""
    yield "The published value for the first row is 0.757 (one seed of Hyland & Rätsch's rerun of"
    yield "Arjovsky's experiment, ratschlab/uRNN, `adding` LSTM with 30 units before training)."
    yield ""
    yield "## Recurrent batch normalisation: the gain"
    yield ""
    yield "Sequential 8x8 digits (T = 64), tanh RNN of 100 units with batch normalisation, identity"
    yield "recurrence, batch of 100, before training: log10 of ‖∂L/∂h_t‖ (mean over the batch) at"
    yield "some lags, relative to lag 0. Cooijmans et al. (2017, figure 1 a), on MNIST: the larger"
    yield "the gain, the faster the gradient is lost. Towards the first pixels, which hardly differ"
    yield "from image to image, the small deviations that are divided by make it grow again, as it"
    yield "does in their figure at the first steps."
    yield ""
    lags = (5, 10, 20, 30, 40, 60)
    yield f"| gamma | {' | '.join(f'lag {lag}' for lag in lags)} |"
    yield "|---" * (len(lags) + 1) + "|"
    for gamma in GAMMAS:
        found = np.mean([gamma_profile(gamma, seed) for seed in SEEDS], axis=0)
        yield f"| {gamma} | {' | '.join(f'{found[lag] - found[0]:.2f}' for lag in lags)} |"


def _spread(values: Iterable[float]) -> str:
    numbers = np.array(list(values))
    return f"{numbers.mean():.4f} ± {numbers.std(ddof=1):.4f}"


def main() -> None:
    """Writes the page and its figure into the given folder, by default docs."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    profiles = measured_profiles()
    drawn = initial_figure(
        {phi: {s: found[0] for s, found in by.items()} for phi, by in profiles.items()}
    )
    drawn.savefig(folder / "initial_gradients.png", dpi=120)
    (folder / "initial_gradients.md").write_text(page(profiles), encoding="utf-8")


if __name__ == "__main__":
    main()
