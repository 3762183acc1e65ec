"""Recurrent layers in a graph: as RNN, GRU and LSTM nodes where ONNX has their equations, else as a Scan."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...cells import GRUStep, LSTMStep, RNNStep
from ...cells import options as cell_options
from ...recurrent import Recurrent
from ...recurrent.conversion import Division
from .activations import ONNX_NAMES
from .building import Builder
from .flow import Flow
from .recurrent_nodes import BLOCKS
from .scan import write_scan

_ORDER = {kind: tuple(int(k) for k in np.argsort(blocks)) for kind, blocks in BLOCKS.items()}
_MIRRORED = ("sigmoid", "hard_sigmoid", "hard_sigmoid_2")  # 1 - f(x) = f(-x)


class Form(NamedTuple):
    """How a node of ONNX has the equations of a cell. activations: gpurnn's names."""

    kind: str
    activations: tuple[str, ...]
    peephole: bool = False
    coupled: bool = False
    reset_after: bool = False


def form_of(layer: Recurrent) -> Form | None:
    """The ``Form`` of a layer in evaluation, or None where ONNX has none for it."""
    cell = layer._cell
    if isinstance(cell, RNNStep):
        return Form("RNN", (cell.nonlinearity,))
    if isinstance(cell, GRUStep):
        return Form("GRU", ("sigmoid", "tanh"), reset_after=cell.reset_after)
    if isinstance(cell, LSTMStep):
        return None if cell.projects else Form("LSTM", ("sigmoid", "tanh", "tanh"))
    maker = getattr(cell, "maker", None)
    if not maker or maker[0] is not cell_options._built:
        return None
    kind, given = maker[1]
    acts = given.recurrent_activation, given.activation
    named = all(isinstance(name, str) and name in ONNX_NAMES for name in acts)
    if not named or given.normed or any(given.zoneout) or given.cell_clip:
        return None
    if given.coupled and acts[0] not in _MIRRORED:
        return None
    names = {"rnn": acts[1:], "gru": acts, "lstm": (*acts, acts[1])}[kind]
    return Form(kind.upper(), names, given.peephole, given.coupled, given.reset_after)


def write_recurrent(b: Builder, layer: Recurrent, x: str, flow: Flow, place: str) -> tuple[str, Any]:
    """The output of a layer (or None for its form) and the names of its final state, as a call returns it."""
    if layer.cell.over_batch:
        raise ValueError(f"{place or 'model'}: batch_norm inside the time loop has no form in ONNX")
    x = b.node("Transpose", x, perm=[1, 0, 2]) if layer.batch_first else x
    initial, finals = _initial(b, layer, x, flow, place), []
    form = form_of(layer)
    for k in range(layer.num_layers):
        below = x
        states = [parts[k] for parts in initial]
        if form is not None:
            x, last = _write_node(b, layer, form, (x, states, k), flow, place)
        else:
            x, last = write_scan(b, layer, (x, states, k), flow, place)
        I, H, P = layer._sizes(k)
        if layer.residual and k and len(layer._directions) * P == I:
            x = b.node("Add", x, below)
        finals.append(last)
    state = _final(b, layer, finals, flow, place) if flow.with_states else None
    return (b.node("Transpose", x, perm=[1, 0, 2]) if layer.batch_first else x), state


def _called(place, name):
    return f"{place}.{name}" if place else name


def _initial(b, layer, x, flow, place):
    """For each kind of state, for each layer the name of (D, B, size), or None for zeros."""
    D, found = len(layer._directions), []
    for kind, sizes, equal in layer._state_kinds:
        learned = [_learned(layer, b, kind, k) for k in range(layer.num_layers)] if layer.learn_state else None
        groups = [range(layer.num_layers)] if equal else [[k] for k in range(layer.num_layers)]
        parts = []
        for group in groups:
            name = _called(place, kind if equal else f"{kind}_l{group[0]}")
            weight = None
            if learned:
                weight = b.weight(f"{name}_initial", np.concatenate([learned[k] for k in group])[:, None])
            given = flow.state(name, (len(group) * D, "B", sizes[group[0]])) if flow.with_states else None
            if given is not None:
                flow.initial |= {given: weight} if weight else {}
                parts += b.split(given, 0, [D] * len(group))
            elif weight:
                shape = b.joined([b.integers(len(group) * D), b.size(x, 1), b.integers(sizes[group[0]])], 0)
                parts += b.split(b.node("Expand", weight, shape), 0, [D] * len(group))
            else:
                parts += [None] * len(group)
        found.append(parts)
    return found


def _learned(layer, b, kind, k):
    """The learned initial states of a layer, (D, size)."""
    names = [f"initial_{kind}{suffix}" for _, layer_number, _, suffix in layer._passes() if layer_number == k]
    return np.stack([b.read(layer, name) for name in names])


def _final(b, layer, finals, flow, place):
    """The outputs for the final states. finals: for each layer, for each kind of state (D, B, size)."""
    D, state = len(layer._directions), []
    for number, (kind, sizes, equal) in enumerate(layer._state_kinds):
        parts = [last[number] for last in finals]
        if equal:
            shape = (len(parts) * D, "B", sizes[0])
            state.append(flow.final(b.joined(parts, 0), _called(place, f"{kind}_n"), shape))
        else:
            names = [
                flow.final(part, _called(place, f"{kind}_n_l{k}"), (D, "B", sizes[k])) for k, part in enumerate(parts)
            ]
            state.append(tuple(names))
    return tuple(state) if len(state) > 1 else state[0]


# ---- nodes


def _write_node(b, layer, form, given, flow, place):
    """One layer as one node: (T, B, D*H), and the final states (D, B, H). given: x, states, the layer's number."""
    x, states, k = given
    D, H = len(layer._directions), layer.hidden_sizes[k]
    suffixes = [suffix for _, number, _, suffix in layer._passes() if number == k]
    weights = [_node_weights(b, layer, form, suffix, H) for suffix in suffixes]
    names = [b.weight(_called(place, f"{name}_l{k}"), np.stack(arrays)) if arrays[0] is not None else ""
             for name, arrays in zip("WRBP", zip(*weights, strict=True), strict=True)]  # fmt: skip
    W, R, B, P = names
    inputs = [x, W, R, B, flow.lengths or "", *(state or "" for state in states), P]
    while not inputs[-1]:
        inputs.pop()
    direction = "bidirectional" if D == 2 else "reverse" if layer.reverse else "forward"
    attributes = {"hidden_size": H, "direction": direction} | _activations(form, D)
    if form.kind == "GRU":
        attributes["linear_before_reset"] = int(form.reset_after)
    y, *finals = b.node(form.kind, *inputs, outputs=3 if form.kind == "LSTM" else 2, **attributes)
    if flow.lengths is not None:  # runtimes give zeros for the final state of a sequence of length 0
        some = b.node("Greater", flow.rows(False), b.constant(0, np.int32))
        finals = [last if first is None else b.node("Where", some, last, first)
                  for first, last in zip(states, finals, strict=True)]  # fmt: skip
    if D == 1:
        y = b.node("Squeeze", y, b.integers(1))
    else:
        y = b.reshape(b.node("Transpose", y, perm=[0, 2, 1, 3]), 0, 0, D * H)
    return y, finals


def _activations(form, D):
    """The attributes for activations; none where they are those of the operator itself."""
    usual = {"RNN": ("tanh",), "GRU": ("sigmoid", "tanh"), "LSTM": ("sigmoid", "tanh", "tanh")}
    if form.activations == usual[form.kind]:
        return {}
    chosen = [ONNX_NAMES[name] for name in form.activations] * D
    found = {"activations": [name for name, *_ in chosen]}
    for place, key in ((1, "activation_alpha"), (2, "activation_beta")):
        numbers = [one[place] for one in chosen if one[place] is not None]
        found |= {key: numbers} if numbers else {}
    return found


def _node_weights(b, layer, form, suffix, H):
    """W, R, B and P of one direction in ONNX's order; None for what there is not."""

    division = Division(layer.heads, layer.mix_heads)

    def blocks(name):
        if name + suffix not in layer.params:
            return None
        array = division.whole(b.read(layer, name + suffix), H, name)  # (gates, H, ...)
        if form.coupled:  # f g o: the gate i is 1 - f
            array = np.stack([-array[0], *array])
        return array[list(_ORDER[form.kind])].reshape(-1, *array.shape[2:])

    biases = [blocks("bias_ih"), blocks("bias_hh")]
    P = None
    if form.peephole:
        own = {name: division.whole(b.read(layer, f"p_{name}{suffix}"), H, name)[0]
               for name in ("f", "o", *(() if form.coupled else "i"))}  # fmt: skip
        P = np.concatenate([own["i"] if "i" in own else -own["f"], own["o"], own["f"]])
    bias = None if biases[0] is None else np.concatenate(biases)
    return blocks("weight_ih"), blocks("weight_hh"), bias, P
