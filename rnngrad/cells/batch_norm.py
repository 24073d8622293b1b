"""Batch normalisation inside the recurrence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from rnngrad.cells.base import CELLS, CellPart, set_forget_bias_
from rnngrad.cells.normalized import NormalizedLSTMCell, NormalizedRNNCell
from rnngrad.parts import COUNT, FLOAT32, POSITIVE, Interval


class BatchNormOverTime(nn.Module):
    """Batch normalisation with statistics of its own for every time step.

    In training a step is normalised by its batch; ``eval()`` takes the population's statistics,
    which are moving averages, as torch.nn.BatchNorm1d's: ``(1 - momentum) · old + momentum · new``;
    over the first ``1 / momentum`` batches, of each step by itself, plain means, so that a step
    which few sequences are long enough for has its own statistics at once.
    A step after the last one seen in training takes the last one's. Steps are counted from the
    start of each call of ``unroll``, also where that is given a state.

    Args:
        num_features: ``F``.
        shift: Whether to learn a bias too.
        gamma: Initial gain.
        max_steps: Steps with statistics of their own; later ones share the last's.
        momentum: Of the moving averages.

    Reference:
        Cooijmans et al., "Recurrent batch normalization", ICLR 2017, section 3; they take the mean
        over the training set in place of moving averages.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_features: int, shift: bool, *, gamma: float, max_steps: int, momentum: float
    ) -> None:
        super().__init__()
        self.num_features, self.max_steps = num_features, max_steps
        self.gamma, self.momentum, self.eps = gamma, momentum, 1e-5
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features)) if shift else None
        self.register_buffer("running_mean", torch.empty(max_steps, num_features))
        self.register_buffer("running_var", torch.empty(max_steps, num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain and bias as they start, and no statistics."""
        nn.init.constant_(self.weight, self.gamma)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked = [0] * self.max_steps

    def forward(self, a: Tensor, t: int = 0) -> Tensor:
        """Normalises ``a [B, F]`` of time step ``t``.

        Raises:
            ValueError: There is but one sequence to take statistics of, in training.
        """
        momentum = self.momentum
        if self.training:
            if a.dim() != 2 or len(a) < 2:
                raise ValueError(
                    "batch normalisation needs at least 2 sequences in training, got "
                    f"{tuple(a.shape)} for [B, F]; eval() takes any number"
                )
            index = min(t, self.max_steps - 1)
            self.num_batches_tracked[index] += 1
            momentum = max(momentum, 1 / self.num_batches_tracked[index])
        else:
            seen = self.max_steps - self.num_batches_tracked.count(0)
            index = min(t, max(seen, 1) - 1)
        return batch_norm(
            a,
            self.running_mean[index],
            self.running_var[index],
            self.weight,
            self.bias,
            self.training,
            momentum,
            self.eps,
        )

    # numbers of Python's, which torch.func's transforms let us count: as a tensor only when saved

    def get_extra_state(self) -> Tensor:
        """``num_batches_tracked``, for ``state_dict``."""
        return torch.tensor(self.num_batches_tracked)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes it back."""
        self.num_batches_tracked = state.tolist()

    def extra_repr(self) -> str:
        return f"{self.num_features}, max_steps={self.max_steps}, momentum={self.momentum}"


@dataclass(frozen=True)
class BatchNormPart(CellPart):
    """What both cells' normalisers take."""

    gamma: Annotated[float, POSITIVE, FLOAT32]
    max_steps: Annotated[int, COUNT]
    momentum: Annotated[float, Interval(low=0, high=1, without=(0,))]

    def normalization(self, num_features: int, shift: bool) -> BatchNormOverTime:
        """One normaliser."""
        return BatchNormOverTime(
            num_features,
            shift,
            gamma=self.gamma,
            max_steps=self.max_steps,
            momentum=self.momentum,
        )


@CELLS.register("bn_rnn")
@dataclass(frozen=True)
class BatchNormRNNPart(BatchNormPart):
    """Vanilla RNN with batch normalisation of its pre-activations, step by step.

    The sum of both products is normalised, as in the authors' code for their figure 1.

    Args:
        gamma: Initial gain. The smaller, the slower the gradient vanishes where the recurrence is
            the identity (``init.recurrent=identity``, as in the paper); what divides the sums is
            their deviation, so it depends on the input.
        max_steps: Time steps with statistics of their own; later ones share the last's.
        momentum: Share of the newest batch in the statistics for evaluation.
        nonlinearity: ``tanh`` or ``relu``.

    Reference:
        Cooijmans, Ballas, Laurent, Gülçehre & Courville, "Recurrent batch normalization", ICLR
        2017, section 4 and figure 1.
    """

    nonlinearity: Literal["tanh", "relu"]

    def cell(self, input_size: int) -> NormalizedRNNCell:
        return NormalizedRNNCell(
            input_size, self.hidden_size, self.normalization, self.nonlinearity
        )


@CELLS.register("bn_lstm")
@dataclass(frozen=True)
class BatchNormLSTMPart(BatchNormPart):
    """LSTM with batch normalisation of its gates and of what leaves its cell, step by step.

    Both products are normalised on their own and without shift, and ``c`` before its ``tanh``.

    Args:
        gamma: Initial gain of all three.
        max_steps: Time steps with statistics of their own; later ones share the last's.
        momentum: Share of the newest batch in the statistics for evaluation.
        forget_bias: Initial bias of the forget gate; ``null``: 0, as of the others.

    Reference:
        Cooijmans, Ballas, Laurent, Gülçehre & Courville, "Recurrent batch normalization", ICLR
        2017, section 3.
    """

    forget_bias: Annotated[float, FLOAT32] | None

    def cell(self, input_size: int) -> NormalizedLSTMCell:
        return NormalizedLSTMCell(input_size, self.hidden_size, self.normalization)

    def adjust_(self, module: torch.nn.Module) -> None:
        set_forget_bias_(module, self.hidden_size, self.forget_bias)
