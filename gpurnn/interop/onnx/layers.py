"""The layers without a time loop, chains of layers, and attention, in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...attention import Attention
from ...layers import BatchNorm, Dropout, Embedding, LayerNorm, Linear, Pooling, Sequential, TiedLinear
from ...layers.timesteps import takes
from ...module import Module
from ...recurrent import Recurrent
from .building import Builder
from .flow import Flow
from .recurrent_layers import write_recurrent


def write_layer(b: Builder, layer: Module, x: str, flow: Flow, place: str) -> tuple[str, Any]:
    """The output of any layer, and its final state: names as a call returns it, None where it has none.

    Raises ValueError that names a layer which has no form in ONNX.
    """
    for kind, write in _WRITERS.items():
        if isinstance(layer, kind) and _runs_as(layer, kind):
            return write(b, layer, x, flow, place)
    raise ValueError(
        f"{place or 'model'}: {type(layer).__name__} cannot be exported: expected one of "
        f"{', '.join(sorted(kind.__name__ for kind in _WRITERS))}, and no subclass that runs otherwise"
    )


def _runs_as(layer, kind):
    """Whether a layer has the methods of ``kind``, and does not override them."""
    return all(getattr(type(layer), name) is getattr(kind, name) for name in ("__call__", "forward"))


def first_of(model: Module) -> Module:
    """The layer that reads the input of a chain."""
    while isinstance(model, Sequential):
        model = model[0]
    return model


def _sequential(b, model, x, flow, place):
    states = []
    if not takes(model[0], "lengths") and not isinstance(first_of(model), Embedding):
        x = flow.zeroed(x, flow.batch_first)
    for name, layer in model.children.items():
        x, state = write_layer(b, layer, x, flow, f"{place}.{name}" if place else name)
        states += [state] if layer.stateful else []
    return x, tuple(states) if states and flow.with_states else None


def _embedding(b, layer, ids, flow, place):
    return b.node("Gather", table(b, layer, place), ids, axis=0), None


def table(b: Builder, layer: Embedding, place: str) -> str:
    """The table of an embedding, once in the file."""
    known = b.outer.tables
    if id(layer) not in known:
        known[id(layer)] = b.weight(f"{place}.weight" if place else "weight", b.read(layer, "weight"))
    return known[id(layer)]


def _linear(b, layer, x, flow, place):
    place = f"{place}." if place else ""
    if isinstance(layer, TiedLinear):
        weight = b.node("Transpose", table(b, layer.embedding, f"{place}tied"), perm=[1, 0])
    else:
        weight = b.weight(f"{place}weight", b.read(layer, "weight").T)
    return b.linear(x, weight, b.weight(f"{place}bias", b.read(layer, "bias")) if layer.bias else None), None


def _layer_norm(b, layer, x, flow, place):
    names = ["weight", "bias"] if layer.bias else ["weight"]
    weights = [b.weight(f"{place}.{name}" if place else name, b.read(layer, name)) for name in names]
    return b.node("LayerNormalization", x, *weights, axis=-1, epsilon=layer.eps), None


def _batch_norm(b, layer, x, flow, place):
    F, place = layer.features, f"{place}." if place else ""
    if layer.affine:
        weights = [b.weight(place + name, b.read(layer, name)) for name in ("weight", "bias")]
    else:
        weights = [b.constant(np.ones(F)), b.constant(np.zeros(F))]
    weights += [b.weight(place + name, b.read(layer, name)) for name in ("running_mean", "running_var")]
    y = b.node("BatchNormalization", b.reshape(x, -1, F), *weights, epsilon=layer.eps)
    return flow.zeroed(b.node("Reshape", y, b.node("Shape", x)), layer.batch_first), None


def _dropout(b, layer, x, flow, place):
    return x, None


# ---- pooling


def _pooling(b, layer, x, flow, place):
    x = b.node("Transpose", x, perm=[1, 0, 2]) if layer.batch_first else x
    steps, (first, valid, last) = flow.steps(x, False), (None, None, None)
    if flow.lengths is not None:
        rows, one = flow.rows(False), b.constant(1, np.int32)
        valid, last = flow.valid(x), b.node("Equal", steps, b.node("Sub", rows, one))
        first = b.node("And", valid, b.node("Equal", steps, b.constant(0, np.int32)))
    modes: dict[str, Callable[[], str]] = {
        "last": lambda: _ends(b, layer, x, first, last),
        "mean": lambda: _mean(b, x, valid, flow),
        "max": lambda: _max(b, x, valid),
        "attention": lambda: _attention(b, layer, x, valid, place),
    }
    flow.timed = False
    return modes[layer.mode](), None


def _sum(b, x):
    return b.node("ReduceSum", x, b.integers(0), keepdims=0)


def _chosen(b, x, where):
    return x if where is None else b.node("Where", where, x, b.constant(0))


def _ends(b, layer, x, first, last):
    """The last timestep, and of the second direction the first one."""
    parts = b.split(x, 2, [layer.features // layer.directions] * layer.directions)
    ends = []
    for part, where, place in zip(parts, (last, first), (-1, 0), strict=False):
        if where is None:
            ends.append(b.node("Gather", part, b.constant(place, np.int64), axis=0))
        else:
            ends.append(_sum(b, _chosen(b, part, where)))
    return b.joined(ends, 1)


def _mean(b, x, valid, flow):
    if valid is None:
        return b.node("ReduceMean", x, axes=[0], keepdims=0)
    count = b.node("Max", b.reshape(flow.lengths, -1, 1), b.constant(1, np.int32))
    to = b.onnx.helper.np_dtype_to_tensor_dtype(b.dtype)
    return b.node("Div", _sum(b, _chosen(b, x, valid)), b.node("Cast", count, to=to))


def _max(b, x, valid):
    if valid is None:
        return b.node("ReduceMax", x, axes=[0], keepdims=0)
    highest = b.node("ReduceMax", b.node("Where", valid, x, b.constant(-np.inf)), axes=[0], keepdims=0)
    some = b.node("Greater", highest, b.constant(-np.inf))  # a sequence of length 0 has none
    return b.node("Where", some, highest, b.constant(0))


def _attention(b, layer, x, valid, place):
    place = f"{place}." if place else ""
    weight = b.weight(f"{place}weight", b.read(layer, "weight").T)
    query = b.weight(f"{place}query", b.read(layer, "query")[:, None])
    x = _chosen(b, x, valid)
    u = b.node("Tanh", b.linear(x, weight, b.weight(f"{place}bias", b.read(layer, "bias"))))
    return _sum(b, b.node("Mul", _softmax(b, b.node("MatMul", u, query), valid, 0), x))


def _softmax(b, scores, valid, axis):
    """The softmax over valid places, zero elsewhere; a row without any has zeros."""
    if valid is None:
        return b.node("Softmax", scores, axis=axis)
    lowest = b.constant(np.finfo(b.dtype).min)  # not -inf, whose softmax alone is NaN
    weights = b.node("Softmax", b.node("Where", valid, scores, lowest), axis=axis)
    return b.node("Where", valid, weights, b.constant(0))


# ---- attention over a memory


def write_attention(
    b: Builder, layer: Attention, queries: str, memory: str, valid: str | None, place: str
) -> tuple[str, str]:
    """Context (U, B, E) and weights (U, B, T). valid: booleans (T, B, 1), or None."""
    place = f"{place}." if place else ""

    def by_sequence(array, perm=(1, 0, 2)):
        return b.node("Transpose", array, perm=list(perm))

    def times(x, name):
        return b.node("MatMul", x, b.weight(place + name, b.read(layer, name).T))

    memory = _chosen(b, memory, valid)
    if layer.score == "additive":
        q, m = times(by_sequence(queries), "weight_query"), times(by_sequence(memory), "weight_memory")
        both = b.node("Add", b.node("Unsqueeze", q, b.integers(2)), b.node("Unsqueeze", m, b.integers(1)))
        v = b.weight(f"{place}weight_score", b.read(layer, "weight_score")[:, None])
        scores = b.node("Squeeze", b.node("MatMul", b.node("Tanh", both), v), b.integers(3))
    else:
        keys = times(memory, "weight") if layer.score == "general" else memory
        scores = b.node("MatMul", by_sequence(queries), by_sequence(keys, (1, 2, 0)))
    if layer.scale != 1:
        scores = b.node("Mul", scores, b.constant(layer.scale))
    valid = None if valid is None else by_sequence(valid, (1, 2, 0))
    weights = _softmax(b, scores, valid, -1)
    context = b.node("MatMul", weights, by_sequence(memory))
    return by_sequence(context), by_sequence(weights)


_WRITERS: dict[type, Callable[..., tuple[str, Any]]] = {
    Sequential: _sequential, Embedding: _embedding, Recurrent: write_recurrent, TiedLinear: _linear, Linear: _linear,
    LayerNorm: _layer_norm, BatchNorm: _batch_norm, Dropout: _dropout, Pooling: _pooling,
}  # fmt: skip
