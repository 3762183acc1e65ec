"""A recurrent layer as a Scan: the equations of its cell as plain operators, timestep by timestep."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...cells.derivatives import below
from ...cells.options import traced_form
from ...recurrent import Recurrent
from .building import Builder
from .flow import Flow

_OPERATORS = {  # operations of symbols
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "neg": "Neg", "sigmoid": "Sigmoid", "tanh": "Tanh",
    "relu": "Relu", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "softplus": "Softplus", "fabs": "Abs",
    "smaller": "Min", "larger": "Max",
}  # fmt: skip


def write_scan(b: Builder, layer: Recurrent, given: tuple[str, list[str | None], int], flow: Flow, place: str) -> Any:
    """One layer: (T, B, D*P), and the final states (D, B, size). given: x, the initial states, the layer's number."""
    x, initial, k = given
    cell, (_, H, P) = _cell_of(layer, place), layer._sizes(k)
    heads, sizes = layer.heads, [P if n == 0 else H for n in range(len(layer.cell.states))]
    valid = None if flow.lengths is None else flow.valid(x)
    outputs, finals = [], []
    for d, reverse in enumerate(layer._directions):
        states = [_state_of(b, one, x, d, size) for one, size in zip(initial, sizes, strict=True)]
        parts = [b.split(state, -1, [size // heads] * heads) for state, size in zip(states, sizes, strict=True)]
        steps = [one if one is None or not reverse else b.turned(one) for one in (x, valid)]
        found = []
        for head in range(heads):
            weights = _Weights(b, layer, layer._suffix(k, d), head, f"{place}." if place else "")
            ax = _input_sums(b, cell, weights, steps[0], H // heads)
            found.append(_loop(b, cell, weights, ax, [part[head] for part in parts], steps[1]))
        *last, y = (b.joined(one, -1) for one in zip(*found, strict=True))
        outputs.append(b.turned(y) if reverse else y)
        finals.append([b.node("Unsqueeze", one, b.integers(0)) for one in last])
    return b.joined(outputs, 2), [b.joined(one, 0) for one in zip(*finals, strict=True)]


def _cell_of(layer, place):
    """The traced cell of a layer in evaluation. Raises ValueError for one that has no graph."""
    cell = traced_form(layer._cell)
    if cell is None:
        raise ValueError(
            f"{place or 'model'}: the cell {layer._cell.name} has no equations to export: trace it, see gpurnn.cell"
        )
    return cell


def _state_of(b, state, x, d, size):
    """The initial state (B, size) of a direction, from (D, B, size) or None for zeros."""
    if state is None:
        return b.node("Expand", b.constant(0), b.joined([b.size(x, 1), b.integers(size)], 0))
    return b.node("Gather", state, b.constant(d, np.int64), axis=0)


class _Weights:
    """The parameters of one head of one direction, by their names without the suffix."""

    def __init__(self, b, layer, suffix, head, place):
        self.b, self.layer, self.suffix, self.head, self.place = b, layer, suffix, head, place

    def __contains__(self, name):
        return name + self.suffix in self.layer.params

    def array(self, name):
        array = self.b.read(self.layer, name + self.suffix)
        return array if self.layer.heads == 1 else array[self.head]

    def put(self, name, array):
        return self.b.weight(f"{self.place}{name}{self.suffix}" + (f".head{self.head}" if self.head else ""), array)


def _input_sums(b, cell, weights, x, H):
    """ax for all timesteps, (T, B, G*H): W_ih x + b_ih, and b_hh of gates that have no product with it."""
    ax = b.node("MatMul", x, weights.put("weight_ih", weights.array("weight_ih").T))
    if cell.biases and "bias_ih" in weights:
        ax = b.node("Add", ax, weights.put("bias_ih", weights.array("bias_ih")))
        rows = len(cell.hidden) * H
        rest = weights.array("bias_hh")[rows:]
        if len(rest):
            parts = b.split(ax, -1, [rows, len(rest)]) if rows else [ax]
            parts[-1] = b.node("Add", parts[-1], weights.put("bias_hh_rest", rest))
            ax = b.joined(parts, -1)
    return ax


def _loop(b, cell, weights, ax, states, valid):
    """The Scan of one time loop: the final states, and the outputs (T, B, P)."""
    body = b.inside()
    old = [body.name(name) for name in cell.states]
    inputs = [body.name("ax"), *([] if valid is None else [body.name("valid")])]
    step = _Step(body, cell, weights, old, inputs[0])
    new = [step.value(node) for node in cell.new_states]
    if "weight_hr" in weights:
        new[0] = body.node("MatMul", new[0], weights.put("weight_hr", weights.array("weight_hr").T))
    shown = new[0]
    if valid is not None:
        shown = body.node("Where", inputs[1], new[0], body.constant(0))
        new = [body.node("Where", inputs[1], one, before) for one, before in zip(new, old, strict=True)]
    scanned = [ax, *([] if valid is None else [valid])]
    return b.scan(body, [*old, *inputs], [*new, shown], states, scanned, called=cell.name)


class _Step:
    """The operators of one timestep in the body of a Scan."""

    def __init__(self, body, cell, weights, old, ax):
        self.body, self.cell, self.weights, self.old = body, cell, weights, old
        self.H = H = len(weights.array("weight_ih")) // len(cell.gates)
        self.ax = body.split(ax, -1, [H] * len(cell.gates))
        self._ah, self._values, self._own = {}, {}, []
        for parameter in cell.parameters:
            rows = weights.array(parameter.name).reshape(-1, H)
            self._own += [weights.put(f"{parameter.name}.{n}", row) for n, row in enumerate(rows)]

    def value(self, node):
        """The name of a symbol's value; those below it come first, so that no recursion is deep."""
        for one in [*below([node], lambda _: False), node]:
            if one not in self._values:
                self._values[one] = self._made(one)
        return self._values[node]

    def _made(self, node):
        b, args = self.body, [self._values[arg] for arg in node.args]
        match node.op:
            case "ax":
                return self.ax[node.value]
            case "ah":
                return self._product(node)
            case "state":
                return self.old[node.value]
            case "own":
                return self._own[node.value]
            case "constant":
                return b.constant(node.value)
            case "clip_gradient" | "stop_gradient":
                return args[0]
            case "where_greater":
                return b.node("Where", b.node("Greater", *args[:2]), *args[2:])
            case "mean":
                return b.node("ReduceMean", args[0], axes=[-1], keepdims=1)
            case "expm1":
                return b.node("Sub", b.node("Exp", args[0]), b.constant(1))
            case "log1p":
                return b.node("Log", b.node("Add", args[0], b.constant(1)))
            case _:
                return b.node(_OPERATORS[node.op], *args)

    def _product(self, node):
        """W_hh h + b_hh of a gate, or of the vector that its second product multiplies."""
        inner = self.cell.graph.inner
        second = inner.products.get(node.value) is node
        if second not in self._ah:
            first = self.cell.first
            rows = range(first, len(self.cell.hidden)) if second else range(first)
            vector = self.value(inner.vector) if second else self.old[0]
            self._ah[second] = dict(zip(rows, self._rows(rows, vector), strict=True))
        return self._ah[second][node.value]

    def _rows(self, rows, vector):
        """The products of some gates with a vector, (B, H) each."""
        part = slice(rows[0] * self.H, (rows[-1] + 1) * self.H)
        name = "weight_hh" if not rows[0] else "weight_hh_inner"
        weight = self.weights.put(name, self.weights.array("weight_hh")[part].T)
        y = self.body.node("MatMul", vector, weight)
        if self.cell.biases and "bias_hh" in self.weights:
            y = self.body.node("Add", y, self.weights.put(name.replace("weight", "bias"),
                                                           self.weights.array("bias_hh")[part]))  # fmt: skip
        return self.body.split(y, -1, [self.H] * len(rows))
