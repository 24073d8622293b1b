"""Cells: one step of a recurrence, written as its equation; and what the config knows of them.

A cell is called as torch.nn's are, ``cell(x [B, I], state)``, and returns ``h [B, H]`` or
``(h, c)``. ``rnngrad.nn.unroll`` runs it over time. Its attribute ``gates`` names the blocks of
rows that it hands to ``rnngrad.bptt_clip.preactivation`` in a step, in order. A new cell is one
file here, which registers its ``CellPart``, and one yaml in conf/cell.
"""

from rnngrad.cells.base import CELLS, CellPart
from rnngrad.cells.gru import GRUCell
from rnngrad.cells.indrnn import IndRNNCell
from rnngrad.cells.lstm import LSTMCell, NoForgetGateLSTMCell
from rnngrad.cells.normalized import NormalizedLSTMCell, NormalizedRNNCell
from rnngrad.cells.orthogonal import OrthogonalRNNCell
from rnngrad.cells.rnn import RNNCell

__all__ = [
    "CELLS",
    "CellPart",
    "GRUCell",
    "IndRNNCell",
    "LSTMCell",
    "NoForgetGateLSTMCell",
    "NormalizedLSTMCell",
    "NormalizedRNNCell",
    "OrthogonalRNNCell",
    "RNNCell",
]
