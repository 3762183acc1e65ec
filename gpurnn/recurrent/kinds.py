"""The three layers: RNN, LSTM and GRU."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.typing import DTypeLike

from .. import cells
from .._typing import Backend
from ..errors import check_choice, check_flag
from .layer import Recurrent

_NO_GATES = "It has no gates and no projection, as LSTM has"
_NO_PROJECTION = "LSTM has it; GRU has chrono, and no projection"


class RNN(Recurrent):
    """Elman network (Elman 1990), equations and parameters of ``torch.nn.RNN``.

    h_t = act(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), with act = tanh or relu. With relu and ``init="identity"`` it is
    the IRNN (Le, Jaitly, Hinton 2015).

    Parameters
    ----------
    nonlinearity : {"tanh", "relu"}
        The activation act.
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional :
        As ``LSTM``.
    reverse, learn_state, init, schedule, wavefront, backend, dtype, precision, seed :
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
    _elsewhere = dict.fromkeys(("proj_size", "forget_bias", "chrono"), _NO_GATES)

    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reverse: bool = False,
        learn_state: bool = False,
        init: str = "uniform",
        schedule: str = "auto",
        wavefront: int = 0,
        backend: str | Backend | None = "auto",
        dtype: DTypeLike = "float32",
        precision: str = "float32",
        seed: int | None = None,
    ) -> None:
        self.nonlinearity = check_choice("nonlinearity", nonlinearity, ("tanh", "relu"))
        super().__init__(
            cells.RNNStep(nonlinearity), input_size, hidden_size, num_layers=num_layers, bias=bias,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, reverse=reverse,
            learn_state=learn_state, init=init, schedule=schedule, wavefront=wavefront, backend=backend, dtype=dtype,
            precision=precision, seed=seed,
        )  # fmt: skip


class LSTM(Recurrent):
    """Long short-term memory, equations and parameters of ``torch.nn.LSTM``, gates in the order i f g o.

    Hochreiter & Schmidhuber 1997, with the forget gate of Gers 2000:

        i, f, o = sigmoid(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), g = tanh(the same)
        c_t = f c_(t-1) + i g
        h_t = o tanh(c_t), or W_hr o tanh(c_t) with a projection

    Parameters are ``weight_ih_l0`` (4H, I), ``weight_hh_l0`` (4H, P), ``bias_ih_l0``, ``bias_hh_l0`` (4H,) and
    ``weight_hr_l0`` (P, H); the names of the second direction end in ``_reverse``.

    Parameters
    ----------
    input_size : int
        I, the features of x.
    hidden_size : int or sequence of int
        H, the hidden units; or one size for each layer.
    num_layers : int
        L, layers of the stack.
    bias : bool
        Two bias vectors, b_ih and b_hh, as cuDNN has.
    batch_first : bool
        x and output are (B, T, ...) instead of (T, B, ...); states never are.
    dropout : float
        Rate, 0 to 1, of the dropout between layers. It acts in training mode, where every call draws new masks, as
        the layer ``Dropout`` does. Needs num_layers > 1.
    bidirectional : bool
        Two directions, D = 2.
    proj_size : int
        P > 0 projects h to P < H units (Sak 2014); 0 means no projection, P = H.
    reverse : bool
        One direction, from each sequence's end to its start; outputs stay at their timesteps. Excludes bidirectional.
    learn_state : bool
        The initial state is learned: parameters ``initial_h_l0`` (P,), ``initial_c_l0`` (H,), ..., zero at first.
    init : {"uniform", "xavier", "orthogonal", "identity"}
        "uniform" is torch's U(-1/sqrt(H), 1/sqrt(H)). The others have zero biases, and for each gate: "xavier" Glorot
        (Glorot & Bengio 2010); "orthogonal" orthogonal W_hh and W_hr (Saxe 2014), Glorot W_ih; "identity" ones on the
        diagonals of W_hh and W_hr, W_ih from N(0, 0.001^2) (Le, Jaitly, Hinton 2015).
    forget_bias : float, optional
        Initial value of b_ih's forget block, while b_hh's is 0; 1 is customary. None leaves both to ``init``.
    chrono : int, optional
        T_max >= 2, the longest time, in timesteps, that should be remembered. b_f begins as log U(1, T_max - 1) and b_i
        as -b_f, so that units forget at all rates up to it (Tallec & Ollivier 2018). Excludes forget_bias.
    schedule : {"auto", "step", "block", "grid"}
        How the backend "cuda" lays out the time loop; other backends ignore it. "step" takes any size. "block" (small
        H) and "grid" (an H that the whole GPU can hold) run the whole sequence in one launch, and raise ValueError at
        the first call where they do not fit. ``plan`` says which schedule runs and why.
    wavefront : int
        Timesteps in a segment, after which the next layer begins on a stream of its own, so that the layers of a stack
        run at the same time (GPU only). 0 means no segments. It is faster where this many timesteps of a layer take
        longer than Python needs for a call, about 0.1 ms. Not with bidirectional. Results are the same, except for the
        order of sums over time.
    backend : str or Ops, optional
        "numpy", "cpu", "cupy", "cuda", or "auto"; see ``get_backend``.
    dtype : str or dtype
        "float32", "float64", "float16" or "bfloat16"; see ``Module``.
    precision : {"float32", "tf32"}
        See ``Module``.
    seed : int, optional
        Of initial values and dropout masks; None draws one.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value, or an unknown one.
    BackendError
        Where the backend cannot work.

    Examples
    --------
    >>> lstm = gpurnn.LSTM(10, 20, num_layers=2, bidirectional=True, backend="cpu")
    >>> lstm
    LSTM(10, 20, num_layers=2, bidirectional=True; 15040 parameters, cpu, float32)
    >>> output, (h, c) = lstm(np.zeros((5, 3, 10), "float32"), lengths=[5, 0, 2])
    >>> output.shape, h.shape
    ((5, 3, 40), (4, 3, 20))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        reverse: bool = False,
        learn_state: bool = False,
        init: str = "uniform",
        forget_bias: float | None = None,
        chrono: int | None = None,
        schedule: str = "auto",
        wavefront: int = 0,
        backend: str | Backend | None = "auto",
        dtype: DTypeLike = "float32",
        precision: str = "float32",
        seed: int | None = None,
    ) -> None:
        super().__init__(
            cells.LSTMStep(bool(proj_size)), input_size, hidden_size, num_layers=num_layers, bias=bias,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, proj_size=proj_size,
            reverse=reverse, learn_state=learn_state, init=init, forget_bias=forget_bias, chrono=chrono,
            schedule=schedule, wavefront=wavefront, backend=backend, dtype=dtype, precision=precision, seed=seed,
        )  # fmt: skip


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
    reverse, learn_state, init, schedule, wavefront, backend, dtype, precision, seed :
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
    _elsewhere = dict.fromkeys(("proj_size", "forget_bias"), _NO_PROJECTION)

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
        chrono: int | None = None,
        schedule: str = "auto",
        wavefront: int = 0,
        backend: str | Backend | None = "auto",
        dtype: DTypeLike = "float32",
        precision: str = "float32",
        seed: int | None = None,
    ) -> None:
        self.reset_after = check_flag("reset_after", reset_after)
        super().__init__(
            cells.GRUStep(self.reset_after), input_size, hidden_size, num_layers=num_layers, bias=bias,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, reverse=reverse,
            learn_state=learn_state, init=init, chrono=chrono, schedule=schedule, wavefront=wavefront,
            backend=backend, dtype=dtype, precision=precision, seed=seed,
        )  # fmt: skip
