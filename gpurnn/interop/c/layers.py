"""The layers without a time loop, and chains, in a step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...layers import BatchNorm, Dropout, Embedding, LayerNorm, Linear, Pooling, Sequential, TiedLinear
from ...module import Module
from ...recurrent import Recurrent
from ...tasks.series.models import Direct
from .building import Builder, Value, at
from .matrices import look_up, product, put_matrix
from .recurrent_layers import write_recurrent


def write_layer(b: Builder, layer: Module, x: Value, place: str) -> Value:
    """Write a timestep of any layer and return its output. Raises ValueError that names a layer without a form in C."""
    for kind, write in _WRITERS.items():
        if isinstance(layer, kind) and _runs_as(layer, kind):
            if not layer.children:
                b.line(f"// {place}: {shown(layer)}" if _is_plain(place) else f"// {shown(layer)}")
            return write(b, layer, x, place)
    names = sorted(kind.__name__ for kind in _WRITERS)
    raise ValueError(
        f"{place or 'model'}: {type(layer).__name__} cannot be exported to C: expected one of "
        f"{', '.join(names)}, and no subclass that runs otherwise"
    )


def shown(layer: Module) -> str:
    """The name of a layer's class, for a comment."""
    name = type(layer).__name__
    return name if name.isascii() else "layer"


def _is_plain(place):
    """Whether a comment may hold it: a line of C that ends with a backslash goes on in the next one."""
    return place.replace(".", "").replace("_", "").isalnum() and place.isascii()


def _runs_as(layer, kind):
    """Whether a layer has the methods of ``kind``, and does not override them."""
    return all(getattr(type(layer), name) is getattr(kind, name) for name in ("__call__", "forward"))


def first_of(model: Module) -> Module:
    """The layer that reads the input of a chain."""
    while isinstance(model, (Sequential, Direct)):
        model = next(iter(model.children.values()))
    return model


def _chain(b, model, x, place):
    for name, layer in model.children.items():
        x = write_layer(b, layer, x, f"{place}.{name}" if place else name)
    return x


def _numbers(layer, name):
    arrays = layer.params if name in layer.params else layer.buffers
    return np.asarray(layer.ops.to_numpy(arrays[name]), np.float64)


def _floats(b, layer, place, name):
    return b.floats(f"{place} {name}", _numbers(layer, name))


def _embedding(b, layer, x, place):
    if x.text != "id":
        raise ValueError(f"{place}: an Embedding reads class numbers, so that it has to be the first layer")
    y = b.output(layer.embedding_dim)
    look_up(b, _table(b, layer, place), "(size_t)id", y)
    return y


def _table(b, layer, place):
    """The table of an embedding, once in the file."""
    if id(layer) not in b.tables:
        weight = np.asarray(layer.ops.to_numpy(layer.params["weight"])).astype(layer.dtype)
        b.tables[id(layer)] = put_matrix(b, f"{place} weight", weight, looked_up=True, multiplied=id(layer) in b.tied)
    return b.tables[id(layer)]


def _linear(b, layer, x, place):
    y = b.output(layer.out_features, x)
    if isinstance(layer, TiedLinear):
        matrix = _table(b, layer.embedding, f"{place} tied")
    else:
        matrix = put_matrix(b, f"{place} weight", np.asarray(layer.ops.to_numpy(layer._weight())))
    product(b, matrix, _floats(b, layer, place, "bias") if layer.bias else None, x.text, y.text)
    return y


def _layer_norm(b, layer, x, place):
    F, y = layer.features, b.output(layer.features, x)
    weight = _floats(b, layer, place, "weight")
    bias = f" + {at(_floats(b, layer, place, 'bias'))}" if layer.bias else ""
    centered, squares = b.scratch(0, F), b.scratch(F, F)
    with b.block():
        b.line(f"const float mean = {b.call('mean', x.text, F)};")
        with b.each(F):
            b.line(f"{at(centered)} = {at(x.text)} - mean;")
            b.line(f"{at(squares)} = {at(centered)} * {at(centered)};")
        variance = f"{b.call('mean', squares, F)} + {b.number(layer.eps)}"
        b.line(f"const float scale = 1.0f / {b.call('sqrt', variance)};")
        with b.each(F):
            b.line(f"{at(y.text)} = {at(centered)} * scale * {at(weight)}{bias};")
    return y


def _batch_norm(b, layer, x, place):
    """With its running statistics: (x - mean) scale + bias."""
    F, y = layer.features, b.output(layer.features, x)
    scale = 1 / np.sqrt(_numbers(layer, "running_var") + layer.eps)
    bias = ""
    if layer.affine:
        scale *= _numbers(layer, "weight")
        bias = f" + {at(_floats(b, layer, place, 'bias'))}"
    mean, scale = _floats(b, layer, place, "running_mean"), b.floats(f"{place} scale", scale)
    with b.each(F):
        b.line(f"{at(y.text)} = ({at(x.text)} - {at(mean)}) * {at(scale)}{bias};")
    return y


def _dropout(b, layer, x, place):
    return x


def _pooling(b, layer, x, place):
    """The pooling of all timesteps so far."""
    if layer.mode == "last" and layer.directions == 1:
        return x
    if layer.mode not in ("mean", "max"):
        what = f"Pooling({layer.mode!r})" if layer.directions == 1 else "Pooling of two directions"
        raise ValueError(
            f"{place or 'model'}: {what} needs all timesteps at once, and a C file has one at a time: "
            "expected 'last' of one direction, 'mean' or 'max'"
        )
    F = layer.features
    y, count = b.member(f"{place} {layer.mode}", F), b.counter(f"{place} count")
    b.line(f"if ({count} < 0xffffffffu) ++{count};")
    with b.each(F):
        if layer.mode == "mean":
            b.line(f"{at(y)} += ({at(x.text)} - {at(y)}) / (float){count};")
        else:
            larger = b.call("larger", at(x.text), at(y))
            b.line(f"{at(y)} = {count} == 1 ? {at(x.text)} : {larger};")
    return Value(y, F)


_WRITERS: dict[type, Callable[..., Value]] = {
    Sequential: _chain, Direct: _chain, Embedding: _embedding, Recurrent: write_recurrent, TiedLinear: _linear,
    Linear: _linear, LayerNorm: _layer_norm, BatchNorm: _batch_norm, Dropout: _dropout, Pooling: _pooling,
}  # fmt: skip
