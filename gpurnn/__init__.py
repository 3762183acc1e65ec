"""gpurnn: recurrent networks on NumPy and on CUDA kernels of their own."""

from .backend import backends, get_backend, use_backend
from .errors import BackendError, DtypeError, ShapeError
from .gradients import GradientFlow, record_gradient_flow
from .recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
