"""The layer GRU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import DTypeLike

from .. import cells
from .._typing import Backend
from ..errors import check_flag
from .layer import Recurrent


class GRU(Recurrent):
    """Gated recurrent unit (Cho 2014), gates in the order r z n; ``torch.nn.GRU`` with ``reset_after=True``.

        r, z = sigmoid(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)
        n = tanh(ax_n + r (W_hn h_(t-1) + b_hn)), where ax_n = W_in x_t + b_in
        h_t = n + z (h_(t-1) - n)

    Accuracy: h' = n + z (h - n) carries an absolute error of one rounding of its terms. So an h that is tiny because z
    is within 2^-24 of 1 is exact in absolute, not in relative terms; torch and cuDNN do the same. The derivatives
    s (1 - s) of the sigmoid gates are computed from the activated s, and are zero for pre-activations from +17 on in
    float32 (+37 in float64). Storing 1 - s as well would cost more instructions in each gate than it is worth.

    Parameters
    ----------
    reset_after : bool
        True: n as above, cuDNN's form. False: the original form, n = tanh(ax_n + W_hn (r h_(t-1)) + b_hn), which needs
        two products a timestep.
    chrono : int, optional
        As ``LSTM``; it sets b_z, because z is the gate that preserves the old state here.
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional :
        As ``LSTM``.
    heads, mix_heads, masked_output, reset_to :
        As ``LSTM``.
    layer_norm, batch_norm, recurrent_dropout, recurrent_dropout_each, gradient_clip, weight_dropout, residual :
        As ``LSTM``. Dropped is n; normalizations and dropout for each sequence need reset_after.
    zoneout : float
        As ``LSTM``, of h.
    activation, recurrent_activation :
        As ``LSTM``; of n, and of r and z.
    reverse, learn_state, init, schedule, wavefront, memory, save, backend, dtype, precision, seed :
        As ``LSTM``.

    Raises
    ------
    TypeError, ValueError
        As ``LSTM``.

    Examples
    --------
    >>> gru = gpurnn.GRU(10, 20, batch_first=True, backend="cpu")
    >>> output, h = gru(np.zeros((3, 5, 10), "float32"))
    >>> output.shape, h.shape
    ((3, 5, 20), (1, 3, 20))
    """

    reset_after: bool
    _elsewhere = dict.fromkeys(
        ("forget_bias", "unit_forget_bias"),
        "A GRU has no forget gate; chrono sets the bias of z, which preserves the old state",
    ) | {
        "cell_clip": "LSTM has it; a GRU has no c",
        "coupled": "LSTM has it; a GRU always writes 1 - z",
        "peephole": "LSTM has it; a GRU has no c",
        "proj_size": "LSTM has it; GRU has no projection",
    }

    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reset_after: bool = True,
        reverse: bool = False,
        learn_state: bool = False,
        init: str = "uniform",
        layer_norm: bool = False,
        batch_norm: bool | int = False,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_each: str = "timestep",
        zoneout: float = 0.0,
        activation: str | Callable[..., Any] = "tanh",
        recurrent_activation: str | Callable[..., Any] = "sigmoid",
        gradient_clip: float = 0.0,
        weight_dropout: float = 0.0,
        residual: bool = False,
        heads: int = 1,
        mix_heads: bool = True,
        masked_output: str = "zero",
        reset_to: str = "given",
        chrono: int | None = None,
        schedule: str = "auto",
        wavefront: int = 0,
        memory: str | int | None = None,
        save: str = "all",
        backend: str | Backend | None = "auto",
        dtype: DTypeLike = "float32",
        precision: str = "float32",
        seed: int | None = None,
    ) -> None:
        self.reset_after = check_flag("reset_after", reset_after)
        cell = self._with_options(
            "gru", cells.GRUStep(self.reset_after), bias=bias, reset_after=reset_after, layer_norm=layer_norm,
            batch_norm=batch_norm, recurrent_dropout=recurrent_dropout, recurrent_dropout_each=recurrent_dropout_each,
            zoneout=zoneout, activation=activation, recurrent_activation=recurrent_activation,
            gradient_clip=gradient_clip,
        )  # fmt: skip
        super().__init__(
            cell, input_size, hidden_size, num_layers=num_layers, bias=bias,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, reverse=reverse,
            learn_state=learn_state, init=init, weight_dropout=weight_dropout, residual=residual,
            heads=heads, mix_heads=mix_heads, masked_output=masked_output, reset_to=reset_to, chrono=chrono,
            schedule=schedule, wavefront=wavefront, memory=memory, save=save, backend=backend, dtype=dtype,
            precision=precision, seed=seed,
        )  # fmt: skip
