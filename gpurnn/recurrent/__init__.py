"""The recurrent layers: RNN, LSTM, GRU and their single-step cells.

A layer is a stack of passes, one for each layer and direction. A pass multiplies the whole input by W_ih, then runs the
time loop, one for each head (``Ops.layer_forward`` with a cell of cells.py). Its backward pass runs the loop in reverse
and then multiplies once over all of time for each weight. Names, shapes and equations follow ``torch.nn``; weights load
unchanged.
"""

from .conversion import with_heads
from .gru import GRU
from .init import INITIALIZERS
from .kinds import LAYERS
from .layer import Recurrent
from .lstm import LSTM
from .one_step import GRUCell, LSTMCell, RNNCell
from .plan import Plan
from .population import set_population_statistics
from .rnn import RNN
from .steps import Steps

__all__ = [
    "GRU",
    "INITIALIZERS",
    "LAYERS",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "Plan",
    "RNNCell",
    "Recurrent",
    "Steps",
    "set_population_statistics",
    "with_heads",
]
