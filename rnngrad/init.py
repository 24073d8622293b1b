"""How weights start: a scheme for each of the three kinds of weight, and what is a scheme.

A new scheme is one function here: it fills a weight ``[rows, columns]``, of one gate where there
are several, from a generator; a third parameter is the one number that can go with it.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

from rnngrad.parts import FLOAT32, POSITIVE, InputError, Part, Registry


@dataclass(frozen=True)
class Init(Part, ABC):
    """An initialisation."""

    @abstractmethod
    def __call__(self, model: nn.Module) -> None:
        """Draws all weights of ``model`` anew, from torch's global generator."""


INITS: Registry[Init] = Registry("init", "rnngrad.init")

ROLES = ("input", "recurrent", "output")
"""``weight_ih`` and ``weight_hh`` of the cells, and the weight of the read-out."""


@dataclass(frozen=True)
class Scheme:
    """How a weight is filled.

    Args:
        fill: Called ``(weight, generator)``, or with the number that goes with it third.
        roles: What kinds of weight it is for.
        dims: What it can fill: ``vector`` (the recurrent weight of an IndRNN), ``matrix``, or no
            matrix but a ``square`` one.
    """

    fill: Callable[..., None]
    roles: tuple[str, ...]
    dims: tuple[str, ...]

    @property
    def takes_scale(self) -> bool:
        """Whether a number goes with it."""
        return len(inspect.signature(self.fill).parameters) == 3


SCHEMES: dict[str, Scheme] = {}


def scheme(
    *roles: str, dims: tuple[str, ...] = ("matrix", "square")
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: registers a function under its name; for all roles if none is given."""

    def add(fill: Callable[..., None]) -> Callable[..., None]:
        SCHEMES[fill.__name__] = Scheme(fill, roles or ROLES, dims)
        return fill

    return add


@scheme(dims=("vector", "matrix", "square"))
def normal(weight: Tensor, generator: Generator, std: float = 0.1) -> None:
    """``N(0, std²)``.

    Reference:
        0.1: Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks",
        ICML 2013, "basic tanh".
    """
    nn.init.normal_(weight, 0, std, generator)


@scheme(dims=("vector", "matrix", "square"))
def uniform(weight: Tensor, generator: Generator, half_width: float = 0.1) -> None:
    """``U(-half_width, half_width)``.

    Reference:
        0.1: Hochreiter & Schmidhuber, "Long short-term memory", Neural Computation 1997, section 5.
    """
    nn.init.uniform_(weight, -half_width, half_width, generator)


@scheme()
def xavier_uniform(weight: Tensor, generator: Generator, gain: float = 1.0) -> None:
    """``U(-a, a)``, ``a = gain · √(6 / (columns + rows))``.

    Reference:
        Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural
        networks", AISTATS 2010, eq. 16.
    """
    nn.init.xavier_uniform_(weight, gain, generator)


@scheme()
def xavier_normal(weight: Tensor, generator: Generator, gain: float = 1.0) -> None:
    """``N(0, 2 · gain² / (columns + rows))``.

    Reference:
        Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural
        networks", AISTATS 2010, eq. 12.
    """
    nn.init.xavier_normal_(weight, gain, generator)


@scheme()
def kaiming_uniform(weight: Tensor, generator: Generator, gain: float = math.sqrt(2)) -> None:
    """``U(-a, a)``, ``a = gain · √(3 / columns)``; the gain √2 is that of ReLU.

    Reference:
        He, Zhang, Ren & Sun, "Delving deep into rectifiers", ICCV 2015, eq. 10, as in torch.nn.
    """
    half_width = gain * math.sqrt(3 / weight.shape[1])
    nn.init.uniform_(weight, -half_width, half_width, generator)


@scheme()
def kaiming_normal(weight: Tensor, generator: Generator, gain: float = math.sqrt(2)) -> None:
    """``N(0, gain² / columns)``; the gain √2 is that of ReLU.

    Reference:
        He, Zhang, Ren & Sun, "Delving deep into rectifiers", ICCV 2015, eq. 10.
    """
    nn.init.normal_(weight, 0, gain / math.sqrt(weight.shape[1]), generator)


@scheme()
def orthogonal(weight: Tensor, generator: Generator, gain: float = 1.0) -> None:
    """``gain`` times a uniformly drawn matrix with orthonormal rows or columns.

    Reference:
        Saxe, McClelland & Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep
        linear neural networks", ICLR 2014.
    """
    nn.init.orthogonal_(weight, gain, generator)


@scheme("recurrent", dims=("square",))
def identity(weight: Tensor, generator: Generator, factor: float = 1.0) -> None:
    """``factor`` times the identity matrix.

    Reference:
        Le, Jaitly & Hinton, "A simple way to initialize recurrent networks of rectified linear
        units", arXiv 1504.00941 (2015).
    """
    weight.copy_(factor * torch.eye(len(weight), dtype=weight.dtype))


@scheme("recurrent", dims=("square",))
def np(weight: Tensor, generator: Generator) -> None:
    """Positive definite, largest eigenvalue 1: ``(I + RᵀR / H) / λ_max`` with ``R`` normal.

    Reference:
        Talathi & Vartak, "Improving performance of recurrent neural network with relu
        nonlinearity", arXiv 1511.03771 (2015), "np-RNN".
    """
    r = torch.empty_like(weight).normal_(generator=generator)
    matrix = torch.eye(len(r), dtype=r.dtype) + r.T @ r / len(r)
    weight.copy_(matrix / torch.linalg.eigvalsh(matrix)[-1])


@scheme("input")
def np_input(weight: Tensor, generator: Generator) -> None:
    """``N(0, α² / H)``, ``α = √2 exp(1.2 / (max(H, 6) - 2.4))``: the input weights beside ``np``.

    Reference:
        Talathi & Vartak, "Improving performance of recurrent neural network with relu
        nonlinearity", arXiv 1511.03771 (2015).
    """
    units = len(weight)
    alpha = math.sqrt(2) * math.exp(1.2 / (max(units, 6) - 2.4))
    nn.init.normal_(weight, 0, alpha / math.sqrt(units), generator)


@scheme("recurrent", dims=("square",))
def sparse(weight: Tensor, generator: Generator, radius: float = 0.95) -> None:
    """15 normal weights out of each unit, the others 0, scaled to the spectral radius ``radius``.

    Reference:
        Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", ICML
        2013, "smart tanh", as in their code (github.com/pascanur/trainingRNNs).
    """
    draws = torch.empty_like(weight).normal_(generator=generator)
    order = torch.empty_like(weight).uniform_(generator=generator).argsort(0)
    draws.scatter_(0, order[15:], 0)
    weight.copy_(radius * draws / torch.linalg.eigvals(draws.double()).abs().max())


@INITS.register("schemes")
@dataclass(frozen=True)
class SchemesInit(Init):
    """A scheme for each kind of weight, gate by gate.

    The schemes, with the number that ``null`` stands for: ``torch`` as the module itself starts
    (``U(-1/√H, 1/√H)`` in torch.nn's recurrent layers), ``normal`` (standard deviation, 0.1),
    ``uniform`` (half-width, 0.1), ``xavier_uniform``, ``xavier_normal``, ``orthogonal`` (gain, 1),
    ``kaiming_uniform``, ``kaiming_normal`` (gain, √2); of recurrent weights ``identity`` (factor,
    1), ``sparse`` (spectral radius, 0.95) and ``np``; of input weights ``np_input``. What a role
    draws does not depend on the others' schemes.

    Args:
        input: Scheme of the weights from input to hidden, ``weight_ih``.
        recurrent: Scheme of the weights from hidden to hidden, ``weight_hh``.
        output: Scheme of the read-out's weight.
        input_scale: The number that goes with the scheme; ``null`` for its default.
        recurrent_scale: Likewise.
        output_scale: Likewise.
        bias: ``torch`` as each module itself starts, ``zero``, or a number for every bias, of which
            a recurrent layer has two that are added; a cell's own ``forget_bias`` and the like come
            after.

    Reference:
        In ``rnngrad.init``, a scheme at a time.
    """

    input: str
    recurrent: str
    output: str
    input_scale: Annotated[float, POSITIVE] | None
    recurrent_scale: Annotated[float, POSITIVE] | None
    output_scale: Annotated[float, POSITIVE] | None
    bias: Literal["torch", "zero"] | Annotated[float, FLOAT32]

    def __post_init__(self) -> None:
        super().__post_init__()
        for role in ROLES:
            name, scale = getattr(self, role), getattr(self, f"{role}_scale")
            if name not in _allowed(role):
                raise InputError(role, name, f"must be one of {', '.join(_allowed(role))}")
            if scale is not None and (name == "torch" or not SCHEMES[name].takes_scale):
                raise InputError(
                    f"{role}_scale", scale, f"must be null, as no number goes with {role}={name}"
                )

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        for module in model.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        # a stream for each role, whatever the others draw
        seeds = torch.randint(2**62, (len(ROLES),)).tolist()
        for role, seed in zip(ROLES, seeds, strict=True):
            if getattr(self, role) != "torch":
                self._fill(model, role, Generator().manual_seed(seed))
        if self.bias != "torch":
            value = self.bias if isinstance(self.bias, float) else 0.0
            for path, module in model.named_modules():
                for name, bias in module.named_parameters(recurse=False):
                    if _is_bias(path, name):
                        bias.fill_(value)

    def _fill(self, model: nn.Module, role: str, generator: Generator) -> None:
        """Fills all weights of one role.

        Raises:
            InputError: The scheme cannot fill one of them, or there is none.
        """
        name, scale = getattr(self, role), getattr(self, f"{role}_scale")
        used = SCHEMES[name]
        number = [] if scale is None else [scale]
        weights = list(_weights(model, role))
        if not weights and role == "output":
            return  # of a task that reads the hidden units themselves
        if not weights:
            raise InputError(
                f"init.{role}", name, f"must be torch, as the cell has no {role} weight"
            )
        for module, key in weights:
            weight = getattr(module, key)
            kind = f"{key} of {type(module).__name__}"
            filled = torch.empty_like(weight)
            for block in filled.split(getattr(module, "hidden_size", len(filled))):
                if _dims(block) not in used.dims:
                    able = ", ".join(_allowed(role, _dims(block)))
                    raise InputError(f"init.{role}", name, f"must be one of {able}, for {kind}")
                used.fill(block, generator, *number)
            if not parametrize.is_parametrized(module, key):
                weight.copy_(filled)
                continue
            setattr(module, key, filled)
            if not torch.allclose(getattr(module, key), filled, atol=1e-4):
                throughout = f"as {kind} is orthogonal throughout"
                if name in ("orthogonal", "identity"):
                    raise InputError(
                        f"init.{role}_scale", scale, f"must be null or 1, {throughout}"
                    )
                raise InputError(
                    f"init.{role}", name, f"must be torch, orthogonal or identity, {throughout}"
                )


def _dims(block: Tensor) -> str:
    if block.dim() == 1:
        return "vector"
    return "square" if block.shape[0] == block.shape[1] else "matrix"


def _allowed(role: str, dims: str | None = None) -> list[str]:
    able = (n for n, s in SCHEMES.items() if role in s.roles and (dims is None or dims in s.dims))
    return ["torch", *able]


def _weights(model: nn.Module, role: str) -> Iterator[tuple[nn.Module, str]]:
    """The modules with a weight of one role, and its name there; parametrised ones too."""
    for path, module in model.named_modules():
        computed = module.parametrizations if parametrize.is_parametrized(module) else ()
        for name in [*dict(module.named_parameters(recurse=False)), *computed]:
            if role == _role(path, name):
                yield module, name


def _role(path: str, name: str) -> str | None:
    if name.startswith("weight_ih"):
        return "input"
    if name.startswith("weight_hh"):
        return "recurrent"
    return "output" if (path, name) == ("readout", "weight") else None


def _is_bias(path: str, name: str) -> bool:
    return name.startswith(("bias_ih", "bias_hh")) or (path, name) == ("readout", "bias")
