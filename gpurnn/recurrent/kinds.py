"""The three layers by name."""

from .gru import GRU
from .lstm import LSTM
from .rnn import RNN

LAYERS = {"lstm": LSTM, "gru": GRU, "rnn": RNN}  # by the names that settings and command lines use
