"""Recurrent layers in a step: their products, and the equations of their cells."""

from __future__ import annotations

import numpy as np

from ...cells.options import traced_form
from ...recurrent import Recurrent
from .building import Builder, Value, at, behind
from .equations import Leaves, write_equations
from .matrices import product, put_matrix


def write_recurrent(b: Builder, layer: Recurrent, x: Value, place: str) -> Value:
    """Write a timestep of a layer and return its output. Raises ValueError where it cannot run step by step."""
    if layer.bidirectional or layer.reverse:
        raise ValueError(
            f"{place or 'model'}: a C file runs timestep by timestep, and a layer that runs backwards in time needs "
            "the whole sequence: export a model of one direction, or use export_onnx"
        )
    cell = traced_form(layer._cell)
    if cell is None:
        raise ValueError(
            f"{place or 'model'}: the cell {layer._cell.name} has no equations to export: trace it, see gpurnn.cell"
        )
    for k in range(layer.num_layers):
        below, (I, _, P) = x, layer._sizes(k)
        x = _Level(b, layer, cell, k, place).write(x)
        if layer.residual and k and P == I:
            y = b.output(P, x, below)
            with b.each(P):
                b.line(f"{at(y.text)} = {at(x.text)} + {at(below.text)};")
            x = y
    return x


class _Level:
    """One layer of a stack, ``k``: its states, and a timestep of each of its heads."""

    def __init__(self, b, layer, cell, k, place):
        self.b, self.layer, self.cell, self.k, self.place = b, layer, cell, k, place
        self.suffix = layer._suffix(k, 0)
        self.states = []
        for kind, sizes, _ in layer._state_kinds:
            initial = self._numbers(layer.params[f"initial_{kind}{self.suffix}"]) if layer.learn_state else None
            self.states.append(b.member(f"{place} {kind}{self.suffix}", sizes[k], initial))

    def write(self, x):
        """Write the timestep for the input x; returns the output."""
        counter = self.b.counter(f"{self.place} timestep{self.suffix}") if self.cell.over_batch else None
        for head, weights in enumerate(self.layer._weights(self.k)):
            self._head(head, weights, x, counter)
        if self.cell.timesteps > 1:  # otherwise all have the statistics of one
            self.b.line(f"if ({counter} < {self.cell.timesteps - 1}u) ++{counter};")
        return Value(self.states[0], self.layer._sizes(self.k)[2])

    def _head(self, head, weights, x, counter):
        """The timestep of one head."""
        b, cell, heads = self.b, self.cell, self.layer.heads
        H, P = (size // heads for size in self.layer._sizes(self.k)[1:])
        G, rows, first = len(cell.gates) * H, len(cell.hidden) * H, cell.first * H
        called = f"{self.place} {{}}{self.suffix}" + (f" head{head}" if heads > 1 else "")
        states = [behind(state, head * (H if n else P)) for n, state in enumerate(self.states)]
        ax, ah, free = b.scratch(0, G), b.scratch(G, rows), G + rows
        bias, bias_hh = (
            None if one is None else self._numbers(one).copy() for one in (weights.bias_ih, weights.bias_hh)
        )
        if bias is not None:
            bias[rows:] += bias_hh[rows:]  # those of gates without a product

        def multiply(name, weight, bias, x, y):
            matrix = put_matrix(b, called.format(f"weight_{name}"), self._rounded(weight))
            product(b, matrix, None if bias is None else b.floats(called.format(f"bias_{name}"), bias), x, y)

        leaves = Leaves(ax, ah, states, *self._vectors(head, weights, H, called, counter))
        multiply("ih", weights.ih, bias, behind(x.text, weights.reads.start if weights.reads else 0), ax)
        if first:
            multiply("hh", weights.hh[:first], None if bias is None else bias_hh[:first], states[0], ah)
        if rows > first:
            inner, free = b.scratch(free, H), free + H
            write_equations(b, H, leaves, [cell.inner_node], [inner], free)
            part = None if bias is None else bias_hh[first:rows]
            multiply("hh_inner", weights.hh[first:], part, inner, behind(ah, first))
        if weights.hr is None:
            write_equations(b, H, leaves, cell.new_states, states, free)
            return
        whole, free = b.scratch(free, H), free + H
        write_equations(b, H, leaves, cell.new_states, [whole, *states[1:]], free)
        multiply("hr", weights.hr, None, whole, states[0])

    def _vectors(self, head, weights, H, called, counter):
        """Where a cell's own parameters are, and the running statistics of normalizations: functions of a number."""
        own = []
        for parameter, array in zip(self.cell.parameters, weights.own, strict=True):
            name = self.b.floats(called.format(parameter.name), self._numbers(array))
            own += [behind(name, n * H) for n in range(parameter.vectors)]
        if not counter:
            return own.__getitem__, None
        buffers = [self._numbers(self.layer.buffers[f"running_{what}{self.suffix}"]) for what in ("mean", "var")]
        table = np.stack(buffers, axis=1)[..., head * H : (head + 1) * H]  # (normalizations, 2, timesteps, H)
        vectors = [self.b.floats(called.format("running"), one) for one in table.reshape(-1, *table.shape[2:])]
        return own.__getitem__, lambda n: f"{vectors[n]} + {counter} * {H}"

    def _numbers(self, array):
        return np.asarray(self.layer.ops.to_numpy(array), np.float64)

    def _rounded(self, weight):
        """Weights as the products of the layer have them, in its dtype."""
        return np.asarray(self.layer.ops.to_numpy(weight)).astype(self.layer.dtype)
