"""Cells: the equations of one timestep, forward and backward."""

from .gru import GRUStep
from .lstm import LSTMStep
from .record import Cell, Draw, HiddenWeights, Parameter, Product, Scratch, Weights
from .rnn import RNNStep

# name -> hand-written cell; of the LSTM the one without a projection
CELLS = {cell.name: cell for cell in (RNNStep("tanh"), RNNStep("relu"), LSTMStep(), GRUStep(), GRUStep(False))}

__all__ = [
    "CELLS", "Cell", "Draw", "GRUStep", "HiddenWeights", "LSTMStep", "Parameter", "Product", "RNNStep", "Scratch", "Weights",
]  # fmt: skip
