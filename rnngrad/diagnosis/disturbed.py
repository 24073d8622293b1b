"""Faults that no setting of the menu makes, for the calibration: a plugin of tasks and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from rnngrad.init import INITS, Init
from rnngrad.parts import COUNT, Interval
from rnngrad.task import TASKS, Batch, Task

BROKEN_FROM = 100
"""Step at which ``fault=broken`` begins."""
FAINT = 1e-42
"""What ``fault=faint`` multiplies the loss by: under float32's least normal number, 1.2e-38."""


@TASKS.register("disturbed")
@dataclass(frozen=True)
class Disturbed(Task):
    """The adding problem with a fault.

    Args:
        length: ``T``.
        fault: ``broken``: from step 100 on one input of each batch is NaN; ``faint``: the loss, and
            so every gradient, is at the end of float32's range; ``uneven``: every other sequence is
            100 times too loud.
    """

    input_size: ClassVar[int] = 2
    output_size: ClassVar[int] = 1
    last_step_only: ClassVar[bool] = True

    length: Annotated[int, COUNT]
    fault: Literal["broken", "faint", "uneven"]

    @property
    def adding(self) -> Task:
        """The task without the fault."""
        return TASKS.default("adding", length=self.length)

    @property
    def _unit(self) -> float:
        return FAINT if self.fault == "faint" else 1.0

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs, targets = self.adding.batch(batch_size, generator)
        if self.fault == "uneven":
            inputs = inputs.clone()
            inputs[:, 1::2] = inputs[:, 1::2] * 200 - 100
        return inputs, targets

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        batch = super().training_batch(seed, step, batch_size)
        if self.fault == "broken" and step >= BROKEN_FROM:
            batch.inputs[0, 0, 0] = torch.nan
        return batch

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.adding.loss(outputs, targets) * self._unit

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.adding.accuracy(outputs, targets)

    @property
    def chance_loss(self) -> float:
        return self.adding.chance_loss * self._unit

    def solved(self, loss: float, accuracy: float) -> bool:
        return self.adding.solved(loss / self._unit, accuracy)


@INITS.register("biased")
@dataclass(frozen=True)
class Biased(Init):
    """As torch.nn starts, but for the biases of one block of ``bias_ih``.

    Args:
        bias: Their value.
        block: ``i, f, g, o`` are 0 to 3 in an LSTM; a vanilla RNN has one block.
    """

    bias: Annotated[float, Interval()]
    block: Annotated[int, Interval(low=0, high=3)]

    def __call__(self, model: nn.Module) -> None:
        INITS.default("torch")(model)
        for name, parameter in model.named_parameters():
            if ".bias_ih" in name:
                size = dict(model.named_parameters())[name.replace("bias_ih", "weight_hh")].shape[1]
                with torch.no_grad():
                    parameter[self.block * size : (self.block + 1) * size] = self.bias
