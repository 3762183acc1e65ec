"""The layer RNN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import DTypeLike

from .. import cells
from .._typing import Backend
from ..cells.functions import check_activation
from .layer import Recurrent


class RNN(Recurrent):
    """Elman network (Elman 1990), equations and parameters of ``torch.nn.RNN``.

    h_t = act(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), with act = tanh or relu. With relu and ``init="identity"`` it is
    the IRNN (Le, Jaitly, Hinton 2015).

    Parameters
    ----------
    nonlinearity : str or function
        The activation act: "tanh", "relu", or another one of LSTM's ``activation``.
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional :
        As ``LSTM``.
    heads, mix_heads, masked_output, reset_to :
        As ``LSTM``.
    layer_norm, batch_norm, zoneout, gradient_clip, weight_dropout, residual :
        As ``LSTM``; the sum W_ih x + W_hh h is normalized, with ``gain_l0`` and ``bias_l0`` (H,).
    recurrent_dropout : float
        As ``LSTM`` for each sequence: an RNN writes nothing to its state but the state itself.
    reverse, learn_state, init, schedule, wavefront, memory, save, backend, dtype, precision, seed :
        As ``LSTM``.

    Raises
    ------
    TypeError, ValueError
        As ``LSTM``.

    Examples
    --------
    >>> rnn = gpurnn.RNN(10, 20, nonlinearity="relu", init="identity", backend="cpu")
    >>> output, h = rnn(np.zeros((5, 3, 10), "float32"))
    >>> output.shape, h.shape
    ((5, 3, 20), (1, 3, 20))
    """

    nonlinearity: str
    _elsewhere = dict.fromkeys(
        ("forget_bias", "unit_forget_bias", "chrono", "peephole", "coupled"), "It is of gates, and an RNN has none"
    ) | {
        "cell_clip": "LSTM has it; an RNN has no c",
        "proj_size": "LSTM has it; RNN has no projection",
        "recurrent_dropout_each": "An RNN has the form for each sequence alone: give recurrent_dropout",
        "variational_dropout": "Here it is called recurrent_dropout",
    }

    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        nonlinearity: str | Callable[..., Any] = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reverse: bool = False,
        learn_state: bool = False,
        init: str = "uniform",
        layer_norm: bool = False,
        batch_norm: bool | int = False,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        gradient_clip: float = 0.0,
        weight_dropout: float = 0.0,
        residual: bool = False,
        heads: int = 1,
        mix_heads: bool = True,
        masked_output: str = "zero",
        reset_to: str = "given",
        schedule: str = "auto",
        wavefront: int = 0,
        memory: str | int | None = None,
        save: str = "all",
        backend: str | Backend | None = "auto",
        dtype: DTypeLike = "float32",
        precision: str = "float32",
        seed: int | None = None,
    ) -> None:
        self.nonlinearity = nonlinearity if callable(nonlinearity) else check_activation("nonlinearity", nonlinearity)
        plain = cells.RNNStep(nonlinearity) if nonlinearity in ("tanh", "relu") else None
        cell = self._with_options(
            "rnn", plain, bias=bias, activation=nonlinearity, layer_norm=layer_norm, batch_norm=batch_norm,
            recurrent_dropout=recurrent_dropout, recurrent_dropout_each="sequence", zoneout=zoneout,
            gradient_clip=gradient_clip,
        )  # fmt: skip
        super().__init__(
            cell, input_size, hidden_size, num_layers=num_layers, bias=bias,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, reverse=reverse,
            learn_state=learn_state, init=init, weight_dropout=weight_dropout, residual=residual,
            heads=heads, mix_heads=mix_heads, masked_output=masked_output, reset_to=reset_to, schedule=schedule,
            wavefront=wavefront, memory=memory, save=save, backend=backend, dtype=dtype, precision=precision, seed=seed,
        )  # fmt: skip
