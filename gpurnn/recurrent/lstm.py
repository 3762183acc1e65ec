"""The layer LSTM, whose arguments the others share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import DTypeLike

from .. import cells
from .._typing import Backend
from .layer import Recurrent


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
    layer_norm : bool
        W_ih x and W_hh h are normalized over their units, before the biases, with gains ``gain_ih_l0`` and
        ``gain_hh_l0`` (4H,); so is c before the last tanh, with ``gain_c_l0`` and ``bias_c_l0`` (H,) (Ba, Kiros, Hinton
        2016).
    batch_norm : bool or int
        The same over the batch at each timestep, without bias_c's like (Cooijmans et al. 2017); in evaluation by
        running statistics of each of the first ``batch_norm`` timesteps (True: 100). Array code on every backend.
    recurrent_dropout : float
        Rate of dropout inside the loop, in training.
    recurrent_dropout_each : {"timestep", "sequence"}
        "timestep", the default: what is written to c is dropped, with masks for each timestep (Semeniuta,
        Severyn, Barth 2016).
        "sequence", Keras's: the h that W_hh multiplies is, with one mask for all timesteps (Gal & Ghahramani 2016).
    zoneout : float or (float, float)
        Rate at which units of h and of c keep their old value, in training; in evaluation both are mixed (Krueger
        2017).
    peephole : bool
        i and f read c and o reads c', by weights ``p_i_l0``, ``p_f_l0``, ``p_o_l0`` (H,) (Gers & Schmidhuber 2000).
    coupled : bool
        i = 1 - f: there are three gates, f g o (Greff et al. 2017).
    activation, recurrent_activation : str or function
        Of g and c', and of the gates: "tanh", "sigmoid", "hard_sigmoid" (PyTorch's and Keras 3's x / 6 + 1/2),
        "hard_sigmoid_2" (Keras 2's and ONNX's x / 5 + 1/2), "relu", "leaky_relu", "softsign", "softplus", "elu",
        "silu", "identity"; or a function of symbols, see ``gpurnn.cell``.
    cell_clip : float
        c' is clipped to [-cell_clip, cell_clip]; 0 for no limit.
    gradient_clip : float
        Limit of each number of the gradients with respect to h and c, at each timestep (Graves 2013); 0 for none.
    weight_dropout : float
        Rate at which weights of W_hh are dropped, in training, for a whole call (Merity, Keskar, Socher 2018).
    residual : bool
        From the second layer on, a layer's input is added to its output, where they have one size. Needs
        num_layers > 1.
    heads : int
        N parts of the hidden units, each with recurrent weights of its own, so that W_hh is block-diagonal. A parameter
        has one more axis in front, (N, ...), and behind it what a layer of H/N units has: ``weight_hh_l0`` is (N, 4H/N,
        H/N). Outputs and states have the heads side by side. Layer norm has means over the units of a head. See
        ``gpurnn.recurrent.with_heads``. Excludes proj_size.
    mix_heads : bool
        Whether each head reads all of x, so that W_ih mixes what the heads of the layer below have made. If not, head n
        reads the n-th of N equal parts of x alone, and ``weight_ih_l0`` is (N, 4H/N, I/N). No effect without heads.
    masked_output : {"zero", "repeat"}
        The output of a timestep that ``mask`` leaves out: zero, or h as it is (Keras calls these
        ``zero_output_for_mask=True`` and False).
    reset_to : {"given", "initial"}
        The state that ``reset`` gives: the one given to the call, as if the sequence began again; or the layer's own
        initial state, learned or zero, which is right where the state given is the end of the call before.
    forget_bias : float, optional
        Initial value of b_ih's forget block, while b_hh's is 0; 1 is customary. None leaves both to ``init``.
    chrono : int, optional
        T_max >= 2, the longest time, in timesteps, that should be remembered. b_f begins as log U(1, T_max - 1) and b_i
        as -b_f, so that units forget at all rates up to it (Tallec & Ollivier 2018). Excludes forget_bias.
    schedule : {"auto", "step", "block", "grid", "cluster", "fused"}
        How the backend "cuda" lays out the time loop; other backends ignore it. "step" takes any size; "fused" is the
        same in one launch instead of two for each timestep, on tensor cores, for float32 and 16 bits. "block" (small
        H), "cluster" (a larger one, in 16 bits or tf32) and "grid" (an H that the whole GPU can hold) run the whole
        sequence in one launch, and raise ValueError at the first call where they do not fit. ``plan`` says which
        schedule runs and why.
    wavefront : int
        Timesteps in a segment, after which the next layer begins on a stream of its own, so that the layers of a stack
        run at the same time (GPU only). 0 means no segments. It is faster where this many timesteps of a layer take
        longer than Python needs for a call, about 0.1 ms. Not with bidirectional. Results are the same, except for the
        order of sums over time.
    memory : str or int, optional
        None saves for backward all that it reads. "states": the states of all timesteps are saved, and backward
        rebuilds the gates from them, some thousand rows (timesteps times sequences) at once and not one timestep after
        another. "sqrt": segments of about sqrt(T) timesteps; only the states at their borders are saved, and backward
        runs each segment again. A number of bytes, or text such as "1GiB" or "200MB": what fits and does the least
        again. Gradients are the same to the bit on the backend "cpu" in float32 and float64; rebuilt gates may have
        other last bits elsewhere. Not with wavefront. ``plan`` tells ``peak_bytes``, ``recompute`` and ``steps_again``.
    save : {"all", "states"}
        "states" is another name for ``memory="states"``.
    backend : str or Ops, optional
        "numpy", "cpu", "cupy", "cuda", or "auto"; see ``get_backend``.
    dtype : str or dtype
        "float32", "float64", "float16" or "bfloat16"; see ``Module``.
    precision : {"float32", "fma", "tf32"}
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
        layer_norm: bool = False,
        batch_norm: bool | int = False,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_each: str = "timestep",
        zoneout: float | tuple[float, float] = 0.0,
        peephole: bool = False,
        coupled: bool = False,
        activation: str | Callable[..., Any] = "tanh",
        recurrent_activation: str | Callable[..., Any] = "sigmoid",
        cell_clip: float = 0.0,
        gradient_clip: float = 0.0,
        weight_dropout: float = 0.0,
        residual: bool = False,
        heads: int = 1,
        mix_heads: bool = True,
        masked_output: str = "zero",
        reset_to: str = "given",
        forget_bias: float | None = None,
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
        cell = self._with_options(
            "lstm", cells.LSTMStep(bool(proj_size)), bias=bias, layer_norm=layer_norm, batch_norm=batch_norm,
            recurrent_dropout=recurrent_dropout, recurrent_dropout_each=recurrent_dropout_each, zoneout=zoneout,
            peephole=peephole, coupled=coupled, activation=activation, recurrent_activation=recurrent_activation,
            cell_clip=cell_clip, gradient_clip=gradient_clip,
        )  # fmt: skip
        super().__init__(
            cell, input_size, hidden_size, num_layers=num_layers, bias=bias,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, proj_size=proj_size,
            reverse=reverse, learn_state=learn_state, init=init, weight_dropout=weight_dropout,
            residual=residual, heads=heads, mix_heads=mix_heads, masked_output=masked_output, reset_to=reset_to,
            forget_bias=forget_bias, chrono=chrono, schedule=schedule, wavefront=wavefront, memory=memory, save=save,
            backend=backend, dtype=dtype, precision=precision, seed=seed,
        )  # fmt: skip
