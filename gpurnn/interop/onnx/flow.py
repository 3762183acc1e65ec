"""What goes through the layers of a graph beside x: lengths and states."""

from __future__ import annotations

from typing import Any

import numpy as np

from .building import Builder


class Flow:
    """Lengths and states of a graph.

    lengths: the name of the lengths (B,) of int32, or None. with_states: whether states are inputs and outputs; else
    recurrent layers begin with their own initial states. timed: whether x has an axis of time, still.

    Attributes
    ----------
    inputs, outputs : list of (name, sizes)
        The states.
    initial : dict of str to str
        State -> the weights that are its learned initial value.
    """

    def __init__(
        self, builder: Builder, lengths: str | None = None, with_states: bool = False, batch_first: bool = False
    ) -> None:
        self.builder, self.lengths, self.with_states = builder, lengths, with_states
        self.batch_first = batch_first
        self.inputs: list[tuple[str, Any]] = []
        self.outputs: list[tuple[str, Any]] = []
        self.initial: dict[str, str] = {}
        self.timed = True
        self._valid: dict[str, str] = {}

    @property
    def time(self) -> int:
        """The axis of time."""
        return 1 if self.batch_first else 0

    def state(self, name: str, sizes: Any) -> str | None:
        """A new input for a state."""
        name = self.builder.name(name)
        self.inputs.append((name, sizes))
        return name

    def final(self, value: str, name: str, sizes: Any) -> str:
        """A new output for a state, with this value."""
        name = self.builder.name(name)
        self.builder.nodes.append(self.builder.onnx.helper.make_node("Identity", [value], [name], name=f"final:{name}"))
        self.outputs.append((name, sizes))
        return name

    def steps(self, x: str, batch_first: bool) -> str:
        """The numbers of the timesteps of x, (T, 1, 1) or (1, T, 1), int32."""
        b, time = self.builder, 1 if batch_first else 0
        T = b.node("Squeeze", b.size(x, time), b.integers(0))
        zero, one = b.constant(0, np.int64), b.constant(1, np.int64)
        steps = b.node("Cast", b.node("Range", zero, T, one), to=b.onnx.TensorProto.INT32)
        return b.reshape(steps, *((1, -1, 1) if batch_first else (-1, 1, 1)))

    def rows(self, batch_first: bool) -> str:
        """The lengths as (1, B, 1) or (B, 1, 1)."""
        return self.builder.reshape(self.lengths, *((-1, 1, 1) if batch_first else (1, -1, 1)))

    def valid(self, x: str, batch_first: bool = False) -> str:
        """Which timesteps of x (T, B, F), or (B, T, F), are there: booleans (T, B, 1) or (B, T, 1)."""
        key = f"{x}{batch_first}"
        if key not in self._valid:
            self._valid[key] = self.builder.node("Less", self.steps(x, batch_first), self.rows(batch_first))
        return self._valid[key]

    def zeroed(self, x: str, batch_first: bool = False) -> str:
        """x, zero past the ends of sequences."""
        if self.lengths is None or not self.timed:
            return x
        return self.builder.node("Where", self.valid(x, batch_first), x, self.builder.constant(0))


class Inner(Flow):
    """Of a recurrent layer inside a model: its states are values of the graph.

    given: the initial states in their order, or None for zeros.
    """

    def __init__(self, builder: Builder, lengths: str | None, given: list[str] | None) -> None:
        super().__init__(builder, lengths, True)
        self._given = None if given is None else iter(given)

    def state(self, name: str, sizes: Any) -> str | None:
        """The next one of those given."""
        return None if self._given is None else next(self._given)

    def final(self, value: str, name: str, sizes: Any) -> str:
        """The value itself."""
        return value
