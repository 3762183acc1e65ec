"""Layers for torch: ``nn.Module``s that run gpurnn's time loops inside torch's autograd.

    import gpurnn.interop.torch as gt
    lstm = gt.LSTM(8, 16, num_layers=2)

Constructors, parameters and results are those of ``torch.nn``; all options of gpurnn's layers come on top.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError('gpurnn.interop.torch needs torch. Run pip install "gpurnn[torch]"') from error

from .cells import GRUCell, LSTMCell, RNNCell
from .convert import convert
from .kinds import GRU, LSTM, RNN, Recurrent

__all__ = ["GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "RNNCell", "Recurrent", "convert"]
