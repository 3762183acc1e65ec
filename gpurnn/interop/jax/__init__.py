"""Recurrent layers for JAX: functions of parameters and arrays that run gpurnn's time loops on the CPU.

    import gpurnn.interop.jax as gj
    params = gj.init_lstm(jax.random.key(0), 8, 16, num_layers=2)
    output, (h, c) = gj.lstm(params, x)

They work in ``jit``, ``grad``, ``vmap`` and ``scan``. Parameters come from Flax and equinox, and go there.
"""

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise ImportError('gpurnn.interop.jax needs jax. Run pip install "gpurnn[jax]"') from error

from .functions import gru, init_gru, init_lstm, init_recurrent, init_rnn, lstm, recurrent, rnn
from .weights import from_equinox, from_flax, to_equinox, to_flax

__all__ = [
    "from_equinox", "from_flax", "gru", "init_gru", "init_lstm", "init_recurrent", "init_rnn", "lstm", "recurrent",
    "rnn", "to_equinox", "to_flax",
]  # fmt: skip
