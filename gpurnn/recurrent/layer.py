"""What RNN, LSTM and GRU share: arguments, passes, weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from numpy.typing import DTypeLike

from .. import cells
from .._typing import Array, Backend
from ..backends.cuda.schedules import SCHEDULES
from ..backends.records import Gradients
from ..errors import (
    Settled,
    check_choice,
    check_flag,
    check_number,
    check_size,
    checked,
)
from ..gradients import adding
from ..module import Module
from .calls import Calls
from .cell_options import OPTIONS, CellOptions, check_cell, check_projection, check_residual, shown
from .heads import check_heads, check_parts, columns_of
from .init import INITIALIZERS, check_memory, initial_values, running_statistics
from .memory import check_memory_limit
from .state import state_kinds

_SHOWN = {  # attributes that ``repr`` shows where they differ from these
    "num_layers": 1, "nonlinearity": "tanh", "bias": True, "batch_first": False, "dropout": 0.0,
    "bidirectional": False, "proj_size": 0, "reset_after": True, "reverse": False, "learn_state": False,
    "init": "uniform", **OPTIONS, "weight_dropout": 0.0, "residual": False, "heads": 1, "mix_heads": True,
    "masked_output": "zero",
    "reset_to": "given", "schedule": "auto", "wavefront": 0, "memory": None,
    "precision": "float32",
}  # fmt: skip


class _Made(NamedTuple):
    """The ``Weights`` of each layer and direction, made of views by name; of gradients without those of ``frozen``."""

    views: dict[str, Array]
    frozen: frozenset[str]
    weights: list[list[cells.Weights]]


class Recurrent(Calls, CellOptions, Module):
    """A stack of any cell: what ``RNN``, ``LSTM`` and ``GRU`` are for theirs.

    Parameters are ``weight_ih_l0`` (G*H, I), ``weight_hh_l0`` (rows*H, H) with a block of rows for each gate that has a
    product with h, ``bias_ih_l0`` and ``bias_hh_l0`` (G*H,), and those that the cell declares: ``p_i_l0`` (H,), ...

    Parameters
    ----------
    cell : TracedCell
        From the decorator ``gpurnn.cell``, or one of ``gpurnn.cells``.
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, weight_dropout, residual :
        As ``LSTM``.
    heads, mix_heads, masked_output, reset_to :
        As ``LSTM``.
    reverse, learn_state, init, schedule, wavefront, memory, save, backend, dtype, precision, seed :
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
    heads: int
    mix_heads: bool
    init: str
    buffers: dict[str, Array]
    stateful = True
    takes_lengths = True
    once = True

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
        self._set_segments(wavefront, memory, save)
        self.weight_dropout, self.residual = weight_dropout, check_residual(residual, self.num_layers)
        self.masked_output, self.reset_to = masked_output, reset_to
        self.proj_size = check_projection(proj_size, self.hidden_sizes, cell)
        check_memory(forget_bias, chrono, bias)
        heads = check_heads(heads, self.hidden_sizes, self.proj_size)
        self.mix_heads = check_flag("mix_heads", mix_heads)
        self.init = check_choice("init", init, INITIALIZERS)
        self._directions = (False, True) if bidirectional else (self.reverse,)
        self._set_heads(heads)
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

    def _set_segments(self, wavefront, memory, save):
        if check_choice("save", save, ("all", "states")) == "states":
            if memory is not None:
                raise ValueError("save: memory says what is saved, too: leave out one of the two")
            memory = "states"
        self.__dict__.update(wavefront=0, memory=None)  # each is checked beside the other
        self.wavefront, self.memory = wavefront, memory

    def _set_heads(self, heads):
        """What sizes decide for every call: (I, H, P) of each layer, the passes, their strands, and how states look."""
        self.__dict__["heads"] = heads
        self._strands = tuple(reverse for reverse in self._directions for _ in range(heads))
        self._made = {}  # "params" and "grads" -> what ``_weights`` and ``_gradients`` have made of them
        D, P = len(self._directions), self.proj_size
        below = (self.input_size, *(D * (P or H) for H in self.hidden_sizes))
        self._layer_sizes = tuple((I, H, P or H) for I, H in zip(below, self.hidden_sizes, strict=False))
        self._all_passes = tuple(
            (k * D + d, k, reverse, self._suffix(k, d))
            for k in range(self.num_layers)
            for d, reverse in enumerate(self._directions)
        )
        self._state_kinds = state_kinds(self.cell, self._layer_sizes)
        check_parts(self)

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
        if value and self.memory is not None:
            raise ValueError("wavefront: memory has segments of its own: leave out one of the two")
        if value and self.bidirectional:
            raise ValueError(
                "wavefront: with two directions a layer needs the whole output of the one below before it can begin"
            )
        return value

    @property
    def save(self) -> str:
        """What forward saves for backward: "all", or "states", which is ``memory="states"``."""
        return "states" if self.memory == "states" else "all"

    @checked
    def memory(self, value: Any) -> str | int | None:
        return check_memory_limit(self, value)

    @checked
    def masked_output(self, value: Any) -> str:
        if check_choice("masked_output", value, ("zero", "repeat")) == "repeat" and self.residual:
            raise ValueError("masked_output: with residual an output is more than h, so that h cannot repeat it")
        return value

    @checked
    def reset_to(self, value: Any) -> str:
        return check_choice("reset_to", value, ("given", "initial"))

    # ---- passes and parameters

    def _matrix_names(self):
        kinds = ("weight_ih", "weight_hh", "weight_hr")
        matrices = {kind + suffix for _, _, _, suffix in self._passes() for kind in kinds}
        return [name for name, _ in self._own if name in matrices]  # a cell's own parameter may begin like these

    def _forget_floats(self):
        super()._forget_floats()
        self._made.clear()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_made": {}}

    def _passes(self):
        """(index in the state, layer, runs in reverse, name suffix) of every pass, in the order of the state.

        A pass has a strand through time for each head: ``_strands`` says of those of one layer which run in reverse.
        """
        return self._all_passes

    def _suffix(self, layer, direction):
        return f"_l{layer}" + ("_reverse" if direction else "")

    def _sizes(self, layer):
        """(input, hidden, output) sizes of a layer's passes: (I, H, P)."""
        return self._layer_sizes[layer]

    def _weights(self, layer):
        """The ``cells.Weights`` of a layer's strands: of each direction, of each head."""
        made, views = self._made.get("params"), self.params._arrays
        if made is None or made.views is not views:  # there are others after the layer has moved into a model
            # in one assignment, for other threads that call the layer now
            arrays = views
            if self.quantized:
                readable = self.ops.reads_int8(self._cell.evaluating, self.dtype)
                arrays = views | {name: self._read_matrix(name, readable) for name in self._int8_matrices()}
            made = self._made["params"] = _Made(views, frozenset(), self._by_layer(arrays))
        return made.weights[layer]

    def _gradients(self, layer):
        """Where the gradients of a layer's weights are added: the ``Gradients`` of its strands."""
        made, views, frozen = self._made.get("grads"), self.grads._arrays, self._frozen[0]
        if made is None or made.views is not views or made.frozen != frozen:
            left_out = frozenset(frozen)
            trained = {name: array for name, array in views.items() if name not in left_out}
            made = self._made["grads"] = _Made(views, left_out, self._by_layer(trained))
        return Gradients(made.weights[layer], adding(self.grads))

    def _by_layer(self, arrays):
        """Arrays by name -> for each layer, for each of its strands the ``Weights``."""
        names, own = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"), self._cell.parameters
        if not self._cell.biases:  # parameters of these names are the cell's own
            names = ("weight_ih", "weight_hh", "", "", "weight_hr")

        def weights(k, strand):
            d, head = divmod(strand, self.heads)
            suffix = self._suffix(k, d)

            def part(name):
                array = arrays.get(name + suffix)
                return array if self.heads == 1 or array is None else array[head]

            rest = tuple(part(parameter.name) for parameter in own)
            reads = columns_of(self, k, head)
            return cells.Weights(*(part(name) if name else None for name in names), rest, reads)

        return [[weights(k, strand) for strand in range(len(self._strands))] for k in range(self.num_layers)]

    def _sizes_text(self):
        words = [str(self.input_size), str(self.hidden_size)]
        if type(self) is Recurrent:
            words.insert(0, self._cell.name)
        for name, default in _SHOWN.items():
            value = getattr(self, name, default)
            if value != default:
                words.append(f"{name}={shown(value)}")
        return ", ".join(words)


for _name in (
    "input_size", "hidden_size", "hidden_sizes", "num_layers", "proj_size", "bias", "bidirectional", "reverse",
    "learn_state", "residual", "heads", "mix_heads", "init",
):  # fmt: skip
    setattr(Recurrent, _name, Settled(_name))
