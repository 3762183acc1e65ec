"""What RNN, LSTM and GRU share: arguments, passes, weights, calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from numpy.typing import DTypeLike

from .. import cells
from .._typing import Array, Backend, Lengths, State
from ..backends.cuda.schedules import SCHEDULES
from ..backends.records import Gradients
from ..errors import (
    ShapeError,
    answers_unknown,
    check_choice,
    check_flag,
    check_number,
    check_size,
    checked,
)
from ..gradients import adding
from ..module import Module
from .cell_options import OPTIONS, CellOptions, check_cell, check_projection, check_residual, shown
from .forward import run_forward
from .init import INITIALIZERS, check_memory, initial_values, running_statistics
from .plan import Plan, make_plan
from .state import state_kinds

_SHOWN = {  # attributes that ``repr`` shows where they differ from these
    "num_layers": 1, "nonlinearity": "tanh", "bias": True, "batch_first": False, "dropout": 0.0,
    "bidirectional": False, "proj_size": 0, "reset_after": True, "reverse": False, "learn_state": False,
    "init": "uniform", **OPTIONS, "weight_dropout": 0.0, "residual": False, "schedule": "auto", "wavefront": 0,
    "precision": "float32",
}  # fmt: skip


class _Made(NamedTuple):
    """The ``Weights`` of each layer and direction, made of views by name; of gradients without those of ``frozen``."""

    views: dict[str, Array]
    frozen: frozenset[str]
    weights: list[list[cells.Weights]]


class Recurrent(CellOptions, Module):
    """A stack of any cell: what ``RNN``, ``LSTM`` and ``GRU`` are for theirs.

    Parameters are ``weight_ih_l0`` (G*H, I), ``weight_hh_l0`` (rows*H, H) with a block of rows for each gate that has a
    product with h, ``bias_ih_l0`` and ``bias_hh_l0`` (G*H,), and those that the cell declares: ``p_i_l0`` (H,), ...

    Parameters
    ----------
    cell : TracedCell
        From the decorator ``gpurnn.cell``, or one of ``gpurnn.cells``.
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, weight_dropout, residual :
        As ``LSTM``.
    reverse, learn_state, init, schedule, wavefront, backend, dtype, precision, seed :
        As ``LSTM``.
    forget_bias, chrono :
        As ``LSTM``, for a cell that says which gate ``remembers``.

    Raises
    ------
    TypeError, ValueError
        As ``LSTM``.

    Examples
    --------
    >>> from gpurnn.cells import tanh
    >>> @gpurnn.cell(gates="z", parameters="leak")
    ... def leaky(ax, ah, s, p):
    ...     return s.h + p.leak * (tanh(ax.z + ah.z) - s.h)
    >>> layer = gpurnn.Recurrent(leaky, 4, 8, num_layers=2, bidirectional=True, backend="numpy")
    >>> layer
    Recurrent(leaky, 4, 8, num_layers=2, bidirectional=True; 672 parameters, numpy, float32)
    >>> output, h = layer(np.zeros((5, 3, 4), "float32"), lengths=[5, 0, 2])
    >>> output.shape, h.shape
    ((5, 3, 16), (4, 3, 8))
    """

    input_size: int
    hidden_size: int | Sequence[int]
    hidden_sizes: tuple[int, ...]
    num_layers: int
    proj_size: int
    bias: bool
    bidirectional: bool
    reverse: bool
    learn_state: bool
    residual: bool
    init: str
    buffers: dict[str, Array]
    stateful = True
    takes_lengths = True
    once = True
    _records_terms = True

    def __init__(
        self,
        cell: cells.Cell,
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
        weight_dropout: float = 0.0,
        residual: bool = False,
        forget_bias: float | None = None,
        chrono: int | None = None,
        schedule: str = "auto",
        wavefront: int = 0,
        backend: str | Backend | None = "auto",
        dtype: DTypeLike = "float32",
        precision: str = "float32",
        seed: int | None = None,
    ) -> None:
        super().__init__(backend, dtype, seed, precision)
        self.bias, self.batch_first = check_flag("bias", bias), batch_first
        self.bidirectional, self.reverse = check_flag("bidirectional", bidirectional), check_flag("reverse", reverse)
        self.learn_state = check_flag("learn_state", learn_state)
        self._cell = check_cell(cell)
        self.schedule = schedule
        self._set_sizes(input_size, hidden_size, num_layers)
        self.dropout = dropout
        if bidirectional and reverse:
            raise ValueError("reverse means one direction, backwards in time: it excludes bidirectional")
        self.wavefront = wavefront
        self.weight_dropout, self.residual = weight_dropout, check_residual(residual, self.num_layers)
        self.proj_size = check_projection(proj_size, self.hidden_sizes, cell)
        check_memory(forget_bias, chrono, bias)
        self.init = check_choice("init", init, INITIALIZERS)
        self._directions = (False, True) if bidirectional else (self.reverse,)
        self._made = {}  # "params" and "grads" -> what ``_weights`` and ``_gradients`` have made of them
        self._settle_passes()
        self._declare(initial_values(self, forget_bias, chrono))
        self.buffers = running_statistics(self)

    def _set_sizes(self, input_size, hidden_size, num_layers):
        self.input_size = check_size("input_size", input_size)
        self.num_layers = check_size("num_layers", num_layers)
        if isinstance(hidden_size, (list, tuple)):
            if len(hidden_size) != self.num_layers:
                more = f"got {hidden_size}: num_layers={len(hidden_size)} goes with them"
                raise ValueError(f"hidden_size: expected one size for each of {num_layers} layers, {more}")
            self.hidden_sizes = tuple(check_size("hidden_size", size) for size in hidden_size)
        else:
            self.hidden_sizes = (check_size("hidden_size", hidden_size),) * self.num_layers
        self.hidden_size = hidden_size

    def _settle_passes(self):
        """What sizes decide for every call: (I, H, P) of each layer, the passes, and how states look."""
        D, P = len(self._directions), self.proj_size
        below = (self.input_size, *(D * (P or H) for H in self.hidden_sizes))
        self._layer_sizes = tuple((I, H, P or H) for I, H in zip(below, self.hidden_sizes, strict=False))
        self._all_passes = tuple(
            (k * D + d, k, reverse, self._suffix(k, d))
            for k in range(self.num_layers)
            for d, reverse in enumerate(self._directions)
        )
        self._state_kinds = state_kinds(self.cell, self._layer_sizes)

    @property
    def cell(self) -> cells.Cell:
        """The ``Cell`` that a call runs; in evaluation mode one without random masks."""
        return self._cell if self.training else self._cell.evaluating

    # ---- what may be set later

    @checked
    def batch_first(self, value):
        return check_flag("batch_first", value)

    @checked
    def schedule(self, value: Any) -> str:
        return check_choice("schedule", value, SCHEDULES)

    @checked
    def dropout(self, value):
        value = check_number("dropout", value, 0, 1)
        if value and self.num_layers == 1:
            raise ValueError(
                "dropout acts between recurrent layers: it needs num_layers > 1; put a Dropout layer after this one"
            )
        return value

    @checked
    def weight_dropout(self, value):
        return check_number("weight_dropout", value, 0, 1)

    @checked
    def wavefront(self, value):
        value = check_size("wavefront", value, minimum=0)
        if value and self._cell.over_batch:
            raise ValueError("wavefront: batch_norm counts timesteps from the beginning of a call, not of a segment")
        if value and self.bidirectional:
            raise ValueError(
                "wavefront: with two directions a layer needs the whole output of the one below before it can begin"
            )
        return value

    # ---- passes and parameters

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_made": {}}

    def _passes(self):
        """(index in the state, layer, runs in reverse, name suffix) of every pass, in the order of the state."""
        return self._all_passes

    def _suffix(self, layer, direction):
        return f"_l{layer}" + ("_reverse" if direction else "")

    def _sizes(self, layer):
        """(input, hidden, output) sizes of a layer's passes: (I, H, P)."""
        return self._layer_sizes[layer]

    def _weights(self, layer):
        """The ``cells.Weights`` of a layer's directions."""
        made, views = self._made.get("params"), self.params._arrays
        if made is None or made.views is not views:  # there are others after the layer has moved into a model
            # in one assignment, for other threads that call the layer now
            made = self._made["params"] = _Made(views, frozenset(), self._by_layer(views))
        return made.weights[layer]

    def _gradients(self, layer):
        """Where the gradients of a layer's weights are added: the ``Gradients`` of its directions."""
        made, views, frozen = self._made.get("grads"), self.grads._arrays, self._frozen[0]
        if made is None or made.views is not views or made.frozen != frozen:
            left_out = frozenset(frozen)
            trained = {name: array for name, array in views.items() if name not in left_out}
            made = self._made["grads"] = _Made(views, left_out, self._by_layer(trained))
        return Gradients(made.weights[layer], adding(self.grads))

    def _by_layer(self, arrays):
        """Arrays by name -> for each layer, for each direction its ``Weights``."""
        names, own = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"), self._cell.parameters
        if not self._cell.biases:  # parameters of these names are the cell's own
            names = ("weight_ih", "weight_hh", "", "", "weight_hr")

        def weights(suffix):
            rest = tuple(arrays.get(parameter.name + suffix) for parameter in own)
            return cells.Weights(*(arrays.get(name + suffix) if name else None for name in names), rest)

        directions = range(len(self._directions))
        return [[weights(self._suffix(k, d)) for d in directions] for k in range(self.num_layers)]

    def _sizes_text(self):
        words = [str(self.input_size), str(self.hidden_size)]
        if type(self) is Recurrent:
            words.insert(0, self._cell.name)
        for name, default in _SHOWN.items():
            value = getattr(self, name, default)
            if value != default:
                words.append(f"{name}={shown(value)}")
        return ", ".join(words)

    # ---- calling

    @answers_unknown
    def __call__(
        self, x: Array, state: State = None, lengths: Lengths = None, *, return_all: bool = False
    ) -> tuple[Any, ...]:
        """Output and final state. Nothing is saved for backward.

        Parameters
        ----------
        x : Array
            (T, B, I), or (B, T, I) with ``batch_first``, or (T, I) for one sequence; of the layer's dtype. What it
            holds past the end of a sequence is not read.
        state : Array or pair of Arrays, optional
            Initial state: (L*D, B, P), the LSTM's a pair (h (L*D, B, P), c (L*D, B, H)); without the B axis for one
            sequence. Where layers differ in size, a tuple of (D, B, P) arrays, one for each layer (the LSTM: a pair of
            such tuples). None: the learned initial state, or zeros. c of a 16-bit layer, and the gradient with respect
            to it, are returned as float32, so that a sequence in pieces is what it is in one call; they are also taken
            in the layer's dtype.
        lengths : sequence of int, optional
            (B,), each 0..T in any order, on the host or the device. None: all sequences have T timesteps.
        return_all : bool
            Return every h, c and gate, too.

        Returns
        -------
        output : Array
            (T, B, D*P), with the axes of x; zero past the end of a sequence (TensorFlow repeats the last output).
        state : Array or pair of Arrays
            The state at each sequence's end, where the reverse direction begins; shaped as the initial state. Of a
            sequence of length 0 it is the initial state (ONNX Runtime returns zeros).
        steps : list of Steps
            Only with ``return_all``: one ``Steps`` for each layer and direction.

        Raises
        ------
        ShapeError, DtypeError, BackendError
            Before anything is computed.
        """
        return run_forward(self, x, state, lengths, return_all, save=False)

    @answers_unknown
    def forward(
        self, x: Array, state: State = None, lengths: Lengths = None, *, return_all: bool = False, retain: bool = False
    ) -> tuple[Any, ...]:
        """As calling the layer, for training: saves what backward needs.

        ``dx, dstate = backward(doutput=None, dstate=None)`` takes the gradients of the loss with respect to output and
        final state, and returns those with respect to x and initial state, shaped alike. None means zeros, also for one
        of the LSTM's pair. Gradients of parameters are added to ``grads``; with ``state=None`` and ``learn_state`` also
        those of the initial state.

        ``backward`` works inside what forward saved, so it may run once; the layer itself may run many times before.
        Threads that call one ``backward`` take turns. x is saved by reference: do not change it until then.

        Parameters
        ----------
        x, state, lengths, return_all :
            As in a call of the layer.
        retain : bool
            Allow backward to run many times. It then copies what it overwrites while it runs, ``Plan.cache_bytes`` at
            most.

        Returns
        -------
        output, state :
            As from a call of the layer.
        backward : function
            See above.
        steps : list of Steps
            Only with ``return_all``.

        Raises
        ------
        ShapeError, DtypeError, BackendError
            Before anything is computed.
        RuntimeError
            From backward: where it ran already, or a parameter was changed since forward.
        """
        return run_forward(self, x, state, lengths, return_all, save=True, retain=retain)

    @answers_unknown
    def step(self, x: Array, state: State = None) -> tuple[Array, State]:
        """One timestep, for streaming: what a call with a sequence of this one timestep returns.

        In training mode each step draws dropout masks, as each call does.

        Parameters
        ----------
        x : Array
            (B, I) or (I,), of the layer's dtype.
        state :
            As in a call of the layer.

        Returns
        -------
        output : Array
            (B, P), or (P,).
        state :
            For the next step.

        Raises
        ------
        ValueError
            For layers that need the future (``bidirectional``, ``reverse``).
        ShapeError, DtypeError
            As a call of the layer.
        """
        if True in self._directions:
            raise ValueError("step: a layer that runs backwards in time needs the whole sequence")
        if self._cell.over_batch:
            raise ValueError(
                "step: batch_norm has statistics of each timestep of a call, and a step alone is the first"
            )
        x = self.ops.asfloat(x, self.dtype, "x")
        if x.ndim not in (1, 2):
            raise ShapeError(f"x: expected one step, (B, {self.input_size}) or ({self.input_size},), got {x.shape}")
        if self.batch_first and x.ndim == 2:
            output, state = self(x[:, None], state)
            return output[:, 0], state
        output, state = self(x[None], state)
        return output[0], state

    def plan(self, T: int, B: int) -> Plan:
        """The ``Plan`` of a training call with x (T, B, I): its schedule and the memory it needs.

        Raises ShapeError for sizes that the call refuses.

        >>> plan = gpurnn.LSTM(10, 20, backend="cpu").plan(T=100, B=16)
        >>> plan.output_bytes          # 100 * 16 * 20 numbers of 4 bytes
        128000
        """
        return make_plan(self, T, B)
