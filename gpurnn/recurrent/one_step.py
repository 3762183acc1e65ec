"""torch's cells: one timestep of a layer, with parameters that carry no layer's number."""

from __future__ import annotations

from numpy.typing import DTypeLike

from .._typing import Array, Backend, Backward, State
from ..errors import ShapeError, answers_unknown
from ..masks import lift_step
from ..module import backward_of
from .cell_options import OPTIONS
from .forward import Given, run_forward
from .gru import GRU
from .lstm import LSTM
from .rnn import RNN
from .state import as_state, state_parts

_NO_STACK = dict.fromkeys(
    ("num_layers", "batch_first", "dropout", "bidirectional", "reverse"),
    "It is a single step; RNN, LSTM and GRU have stacks and directions",
) | dict.fromkeys((*OPTIONS, "weight_dropout"), "RNN, LSTM and GRU have options; their method step takes single steps")


class SingleStep:
    """Makes a layer torch's cell: one timestep, arrays (B, I) and (B, H), parameters without a layer's suffix."""

    _records_terms = True

    def _suffix(self, layer, direction):
        return ""

    def _check_steppable(self, what):
        if what == "stepper":
            whole = type(self).__name__.removesuffix("Cell")
            raise TypeError(f"stepper: a {type(self).__name__} is one timestep alone: give the layer, {whole}")

    @answers_unknown
    def __call__(
        self, x: Array, state: State = None, *, reset: Array | None = None, mask: Array | None = None
    ) -> State:
        """The new state. Nothing is saved for backward.

        Parameters
        ----------
        x : Array
            (B, I) or (I,), of the layer's dtype.
        state : Array or pair of Arrays, optional
            (B, H) or (H,), the LSTM's a pair (h (B, P), c (B, H)); None: the learned initial state, or zeros.
        reset : Array of bool, optional
            (B,), or a bool for one sequence: before the timestep the state becomes the learned initial state, or zeros.
        mask : Array of bool, optional
            Likewise: False for sequences whose state stays as it is.

        Returns
        -------
        state : Array or pair of Arrays
            Shaped as the old state.

        Raises
        ------
        ShapeError, DtypeError
            Before anything is computed.
        """
        x, given = self._lift(x, state, reset, mask)
        return self._lower(run_forward(self, x, given, False, save=False, reset_to="initial")[1])

    @answers_unknown
    def forward(
        self,
        x: Array,
        state: State = None,
        *,
        reset: Array | None = None,
        mask: Array | None = None,
        retain: bool = False,
    ) -> tuple[State, Backward]:
        """As calling the cell, for training: saves what backward needs.

        Parameters
        ----------
        x, state, reset, mask :
            As in a call of the cell.
        retain : bool
            Allow backward to run many times, as in a layer's ``forward``.

        Returns
        -------
        state :
            The new state.
        backward : function
            ``dx, dstate = backward(dnew_state)``: from the gradients of the loss with respect to the new state to those
            with respect to x and the old state. None means zeros, also for one of the LSTM's pair.

        Raises
        ------
        ShapeError, DtypeError
            Before anything is computed.
        """
        x, given = self._lift(x, state, reset, mask)
        _, new, inner = run_forward(self, x, given, False, save=True, retain=retain, reset_to="initial")

        @backward_of(self)
        def backward(dstate):
            dx, dold = inner(None, None if dstate is None else self._raise_state(dstate, "dstate"))
            return dx[0], self._lower(dold)

        return self._lower(new), backward

    @answers_unknown
    def step(
        self, x: Array, state: State = None, *, reset: Array | None = None, mask: Array | None = None
    ) -> tuple[Array, State]:
        """(output, state), as a layer's ``step`` returns them: the output is h."""
        state = self(x, state, reset=reset, mask=mask)
        return (state if len(self.cell.states) == 1 else state[0]), state

    def _lift(self, x, state, reset, mask):
        """x, and the rest as ``Given``, with an axis for the one timestep and the one layer."""
        x = self.ops.asfloat(x, self.dtype, "x")
        if x.ndim not in (1, 2):
            raise ShapeError(f"x: expected (B, {self.input_size}) or ({self.input_size},), got {x.shape}")
        state = None if state is None else self._raise_state(state, "state")
        marks = {"reset": reset, "mask": mask}
        marks = {name: lift_step(self, one, x.shape[:-1], None, name) for name, one in marks.items()}
        return x[None], Given(state, **marks)

    def _raise_state(self, state, name):
        """A state, or gradients with respect to one, with an axis for the one layer."""
        if len(self.cell.states) == 1:
            return as_state(self, state, self.cell.states[0], name)[None]

        def raised(part, kind):
            if part is None and name == "dstate":
                return None
            return as_state(self, part, kind, f"{name} {kind}")[None]

        parts = state_parts(self.cell, state, name)
        return tuple(raised(part, kind) for kind, part in zip(self.cell.states, parts, strict=True))

    def _lower(self, state):
        """A state without the axis of the one layer."""
        return state[0] if len(self.cell.states) == 1 else tuple(part[0] for part in state)


class RNNCell(SingleStep, RNN):
    """One timestep of ``RNN`` (``torch.nn.RNNCell``), with parameters weight_ih, weight_hh, bias_ih, bias_hh.

    Parameters
    ----------
    input_size, hidden_size, bias, nonlinearity :
        As ``RNN``.
    learn_state, init, schedule, wavefront, backend, dtype, precision, seed :
        As ``LSTM``; wavefront has no effect.

    Examples
    --------
    >>> cell = gpurnn.RNNCell(10, 20, backend="cpu")
    >>> h = cell(np.zeros((3, 10), "float32"))
    >>> h.shape
    (3, 20)
    """

    _elsewhere = RNN._elsewhere | _NO_STACK

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        *,
        learn_state: bool = False,
        init: str = "uniform",
        schedule: str = "auto",
        wavefront: int = 0,
        backend: str | Backend | None = "auto",
        dtype: DTypeLike = "float32",
        precision: str = "float32",
        seed: int | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, bias=bias, nonlinearity=nonlinearity, learn_state=learn_state, init=init,
            schedule=schedule, wavefront=wavefront, backend=backend, dtype=dtype, precision=precision, seed=seed,
        )  # fmt: skip


class LSTMCell(SingleStep, LSTM):
    """One timestep of ``LSTM`` (``torch.nn.LSTMCell``), with state (h, c).

    Parameters
    ----------
    input_size, hidden_size, bias, proj_size, learn_state, init, forget_bias, chrono :
        As ``LSTM``; the parameters are called weight_ih, weight_hh, bias_ih, bias_hh and weight_hr.
    schedule, wavefront, backend, dtype, precision, seed :
        As ``LSTM``; wavefront has no effect.

    Examples
    --------
    >>> cell = gpurnn.LSTMCell(10, 20, backend="cpu")
    >>> h, c = cell(np.zeros((3, 10), "float32"))
    >>> h.shape, c.shape
    ((3, 20), (3, 20))
    """

    _elsewhere = _NO_STACK

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        proj_size: int = 0,
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
            input_size, hidden_size, bias=bias, proj_size=proj_size, learn_state=learn_state, init=init,
            forget_bias=forget_bias, chrono=chrono, schedule=schedule, wavefront=wavefront, backend=backend,
            dtype=dtype, precision=precision, seed=seed,
        )  # fmt: skip


class GRUCell(SingleStep, GRU):
    """One timestep of ``GRU`` (``torch.nn.GRUCell``), with parameters weight_ih, weight_hh, bias_ih, bias_hh.

    Parameters
    ----------
    input_size, hidden_size, bias, reset_after, chrono :
        As ``GRU``.
    learn_state, init, schedule, wavefront, backend, dtype, precision, seed :
        As ``LSTM``; wavefront has no effect.

    Examples
    --------
    >>> cell = gpurnn.GRUCell(10, 20, backend="cpu")
    >>> h, backward = cell.forward(np.zeros((3, 10), "float32"))
    >>> dx, dh = backward(np.ones_like(h))
    >>> dx.shape, dh.shape
    ((3, 10), (3, 20))
    """

    _elsewhere = GRU._elsewhere | _NO_STACK

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        reset_after: bool = True,
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
        super().__init__(
            input_size, hidden_size, bias=bias, reset_after=reset_after, learn_state=learn_state, init=init,
            chrono=chrono, schedule=schedule, wavefront=wavefront, backend=backend, dtype=dtype,
            precision=precision, seed=seed,
        )  # fmt: skip
