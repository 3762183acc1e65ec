"""A model of gpurnn as a chain of Keras's layers: their settings, and which arrays are where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ...layers import BatchNorm, Dropout, Embedding, LayerNorm, Linear, Pooling, Sequential, TiedLinear
from ...layers.common import feature_sizes
from ...layers.timesteps import axis_orders
from ...module import Module
from ...recurrent import GRU, LSTM, RNN, Recurrent
from ...recurrent.cell_options import OPTIONS
from ...recurrent.conversion import Division
from . import weights
from .files import Path_, place_names
from .layers import Activation, First, Masked, Merge
from .settings import ACTIVATIONS, POLICIES
from .weights import Arrays, Form

_KINDS: dict[type, str] = {RNN: "SimpleRNN", LSTM: "LSTM", GRU: "GRU"}
_NAMES = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "swish"} | {"softmax": "softmax"}
# What of a cell Keras has as well, or what acts in training alone.
_SERVED = {"activation", "recurrent_activation", "recurrent_dropout", "recurrent_dropout_each", "gradient_clip"}
_REFUSED = {name: default for name, default in OPTIONS.items() if name not in _SERVED}
_REFUSED |= {"proj_size": 0, "learn_state": False, "residual": False}
_OF_LOOPS = ("return_sequences", "go_backwards", "zero_output_for_mask")  # the other settings are those of a cell


class Part(NamedTuple):
    """Arrays of Keras at one place of a model. write: makes them. read: gpurnn's values of them, by name."""

    path: Path_
    write: Callable[[], list[np.ndarray]]
    read: Callable[[Arrays], dict[str, np.ndarray]]


class _Layer:
    """A layer of Keras in the making. loop: the settings of a time loop, which are those of the first direction of a
    Bidirectional. inner: the class that this is around, or "". cells: of an RNN, the layers that it has as cells, one
    above the other. parts: with places inside the layer."""

    def __init__(self, kind: str, config: dict[str, Any], loop: dict[str, Any] | None = None, inner: str = "") -> None:
        self.kind, self.config, self.loop, self.inner = kind, config, loop, inner
        self.cells: list[_Layer] = []
        self.parts: list[Part] = []

    @property
    def reverse(self) -> bool:
        """Whether it gives all outputs in reverse order, as Keras does without a Bidirectional."""
        return self.loop is not None and self.loop["go_backwards"] and self.loop["return_sequences"]


def _document(kind, config, module="keras.layers"):
    return {"module": module, "class_name": kind, "config": config, "registered_name": None}


def _stacked(layers, policy):
    """The description of cells, one above the other."""
    cells = [
        _document(f"{layer.kind}Cell", {"dtype": policy} | {k: v for k, v in layer.loop.items() if k not in _OF_LOOPS})
        for layer in layers
    ]
    return _document("StackedRNNCells", {"dtype": policy, "cells": cells})


class Chain:
    """The layers of Keras that a model is. Raises ValueError that names what has no form there, and TypeError."""

    def __init__(self, model: Module) -> None:
        if not isinstance(model, Module):
            raise TypeError(f"model: expected a gpurnn layer or model, got {type(model).__name__}")
        self._model, self._seen, self._layers = model, set[int](), list[_Layer]()
        self._write(model, "")
        if any(layer.reverse for layer in self._layers):
            raise ValueError(
                "reverse: Keras gives these outputs in reverse order; one layer, or several with nothing but "
                "variational Dropout between them, have a form with First behind them"
            )

    # ---- what is asked for

    def document(self) -> dict[str, Any]:
        """The description of the model, as Keras reads it."""
        dtype = str(self._model.dtype)
        policy = _document("DTypePolicy", {"name": POLICIES[dtype]}, "keras")
        entry = {"batch_shape": self._input_shape(), "dtype": "int32" if self._reads_ids() else dtype}
        layers = [_document("InputLayer", entry | {"name": "input_layer"})]
        for layer, name in zip(self._layers, self._names(), strict=True):
            config, loop = {"name": name, "dtype": policy} | layer.config, layer.loop or {}
            if layer.inner:
                first, second = (
                    {"dtype": policy, "name": f"{which}_{name}"} | loop for which in ("forward", "backward")
                )
                config["layer"] = _document(layer.inner, first)
                config["backward_layer"] = _document(layer.inner, second | {"go_backwards": True})
            if layer.cells:
                config["cell"] = _stacked(layer.cells, policy)
            layers.append(_document(layer.kind, config if layer.inner else config | loop))
        return _document("Sequential", {"name": "sequential", "dtype": policy, "layers": layers}, "keras")

    def parts(self) -> list[Part]:
        """All places with arrays."""
        places = zip(self._layers, self._names(), strict=True)
        return [part._replace(path=("layers", name, *part.path)) for layer, name in places for part in layer.parts]

    def arrays(self) -> dict[Path_, list[np.ndarray]]:
        """The arrays of all places; the place of each layer is among them."""
        none: dict[Path_, list[np.ndarray]] = {("layers", name): [] for name in self._names()}
        return none | {part.path: part.write() for part in self.parts()}

    def _names(self):
        return place_names([layer.kind for layer in self._layers])

    def _reads_ids(self):
        return isinstance(next(_leaves(self._model)), Embedding)

    def _input_shape(self):
        if self._reads_ids():
            return [None, None]
        known = (feature_sizes(layer, None)[0] for layer in _leaves(self._model))
        features = next((size for size in known if size is not None), None)
        if features is None:
            raise ValueError("model: none of its layers says how many features it reads, and Keras has to know")
        timed = isinstance(self._model, Masked) or list(axis_orders(self._model))
        return [None, None, features] if timed else [None, features]

    # ---- layers

    def _write(self, module, place):
        write = _WRITERS.get(type(module))
        if write is None or (isinstance(module, Masked) and place):
            known = ", ".join(sorted(kind.__name__ for kind in _WRITERS))
            whole = ", as a whole model" if isinstance(module, Masked) else f": expected one of {known}"
            raise ValueError(f"{place or 'model'}: {type(module).__name__} has no form in Keras{whole}")
        if id(module) in self._seen:
            raise ValueError(f"{place}: the layer is in two places; in Keras's chains it can be in one")
        self._seen.add(id(module))
        write(self, module, place)

    def _add(self, kind, config, loop=None, inner=""):
        self._layers.append(_Layer(kind, config, loop, inner))
        return self._layers[-1]

    def sequential(self, model: Sequential, place: str) -> None:
        if isinstance(model, Masked) and model.mask_value is not None:
            self._add("Masking", {"mask_value": model.mask_value})
        for name, layer in model.children.items():
            self._write(layer, f"{place}.{name}" if place else name)
        if isinstance(model, Masked) and model.mask_value is None:
            if self._layers[0].kind != "Embedding":
                raise ValueError("model: a Masked without mask_value begins with an Embedding")
            self._layers[0].config["mask_zero"] = True

    def embedding(self, layer: Embedding, place: str) -> None:
        config = {"input_dim": layer.num_embeddings, "output_dim": layer.embedding_dim, "mask_zero": False}
        self._add("Embedding", config).parts = [
            Part(
                (), lambda: [_array(layer, "weight")], lambda arrays: _named(place, weights.embedding_to_gpurnn(arrays))
            )
        ]

    def linear(self, layer: Linear, place: str) -> None:
        def write():
            return [_array(layer._table(), "weight").T, *([_array(layer, "bias")] if layer.bias else [])]

        def read(arrays):
            if isinstance(layer, TiedLinear):
                raise ValueError("a Dense has weights of its own, and a TiedLinear those of an Embedding")
            return _named(place, weights.dense_to_gpurnn(layer.bias, arrays))

        config = {"units": layer.out_features, "use_bias": layer.bias, "activation": "linear"}
        self._add("Dense", config).parts = [Part((), write, read)]

    def activation(self, layer: Activation, place: str) -> None:
        name = _NAMES[layer.function]
        if self._layers and self._layers[-1].config.get("activation") == "linear" and self._layers[-1].kind == "Dense":
            self._layers[-1].config["activation"] = name
        else:
            self._add("Activation", {"activation": name})

    def dropout(self, layer: Dropout, place: str) -> None:
        self._add("SpatialDropout1D" if layer.variational else "Dropout", {"rate": layer.rate})

    def layer_norm(self, layer: LayerNorm, place: str) -> None:
        config = {"axis": -1, "epsilon": layer.eps, "center": layer.bias, "scale": True}
        self._norm(layer, place, "LayerNormalization", config, weights.norm_names(True, layer.bias, False))

    def batch_norm(self, layer: BatchNorm, place: str) -> None:
        if layer.momentum is None:
            raise ValueError(f"{place or 'model'}: momentum: Keras has no averages of all batches: set a number")
        config = {"axis": -1, "epsilon": layer.eps, "momentum": round(1 - layer.momentum, 12)}
        config |= {"center": layer.affine, "scale": layer.affine}
        names = weights.norm_names(layer.affine, layer.affine, True)
        self._norm(layer, place, "BatchNormalization", config, names)

    def _norm(self, layer, place, kind, config, names):
        self._add(kind, config).parts = [
            Part(
                (),
                lambda: [_array(layer, name) for name in names.values()],
                lambda arrays: _named(place, weights.norm_to_gpurnn(names, arrays)),
            )
        ]

    def pooling(self, layer: Pooling, place: str) -> None:
        if layer.mode == "attention":
            raise ValueError(f"{place or 'model'}: mode: Keras has no pooling by attention")
        if layer.mode == "last":
            self._ends(layer, place, False, layer.directions)
        elif layer.mode == "max" and isinstance(self._model, Masked):
            raise ValueError(f"{place}: mode: Keras takes the largest of masked timesteps, too")
        else:
            self._add("GlobalAveragePooling1D" if layer.mode == "mean" else "GlobalMaxPooling1D", {})

    def first(self, layer: First, place: str) -> None:
        self._ends(layer, place, True, 1)

    def _ends(self, layer, place, reverse, directions):
        """The layer before gives its last output alone."""
        before = self._layers[-1] if self._layers else None
        loop = None if before is None else before.loop
        fits = loop is not None and loop["return_sequences"] and loop["go_backwards"] == reverse
        if (
            not fits
            or directions != (2 if before.inner else 1)
            or before.config.get("merge_mode") not in (None, "concat")
        ):
            raise ValueError(
                f"{place or 'model'}: {type(layer).__name__} has a form in Keras behind a recurrent layer of its "
                f"directions alone: Pooling with as many directions, First with reverse=True"
            )
        if reverse:
            self._stack_reversed()
        self._layers[-1].loop |= {"return_sequences": False, "zero_output_for_mask": False}

    def _stack_reversed(self):
        """One time loop of all layers at the end that run in reverse, where there are several; with the dropout between
        them, whose mask is one for all timesteps."""
        several: list[_Layer] = []
        while self._layers and self._layers[-1].reverse:
            several.insert(0, self._layers.pop())
            between = self._layers[-2:]
            if len(between) == 2 and between[1].kind == "SpatialDropout1D" and between[0].reverse:
                several[0].loop["dropout"] = self._layers.pop().config["rate"]
        if len(several) == 1:
            self._layers += several
            return
        made = self._add("RNN", {}, {name: several[-1].loop[name] for name in _OF_LOOPS})
        made.cells = several
        for layer, name in zip(several, place_names([f"{layer.kind}Cell" for layer in several]), strict=True):
            made.parts += [part._replace(path=("cell", "cells", name)) for part in layer.parts]

    def merge(self, layer: Merge, place: str) -> None:
        if not self._layers or self._layers[-1].config.get("merge_mode") != "concat":
            raise ValueError(f"{place or 'model'}: Merge has a form in Keras behind a layer with two directions alone")
        self._layers[-1].config["merge_mode"] = layer.mode

    # ---- recurrent layers

    def recurrent(self, layer: Recurrent, place: str) -> None:
        kind, shown = _KINDS[type(layer)], place or "model"
        for name, default in _REFUSED.items():
            value = getattr(layer, name, default)
            if value not in (default, (0.0, 0.0)):
                raise ValueError(f"{shown}: {name}: Keras has no such option, got {value!r}")
        if layer.bidirectional and layer.masked_output == "repeat":
            raise ValueError(f"{shown}: masked_output: Keras gives zeros with two directions, got 'repeat'")
        form = Form(kind, layer.bias, kind == "GRU" and layer.reset_after)
        for k, H in enumerate(layer.hidden_sizes):
            if k and layer.dropout:
                self._add("Dropout", {"rate": layer.dropout})
            loop = {"units": H, "return_sequences": True, "go_backwards": layer.reverse, "use_bias": layer.bias}
            loop |= {"zero_output_for_mask": layer.masked_output == "zero"} | _cell_settings(layer, kind, shown)
            if layer.bidirectional:
                made, insides = (
                    self._add("Bidirectional", {"merge_mode": "concat"}, loop, kind),
                    ("forward", "backward"),
                )
            else:
                made, insides = self._add(kind, {}, loop), ("",)
            for d, inside in enumerate(insides):
                path = (f"{inside}_layer", "cell") if inside else ("cell",)
                made.parts.append(_recurrent_part(layer, form, (k, d), path, place))


def _cell_settings(layer, kind, shown):
    names = {"activation": layer.nonlinearity if kind == "SimpleRNN" else layer.activation}
    if kind != "SimpleRNN":
        names["recurrent_activation"] = layer.recurrent_activation
    for name, value in names.items():
        if not isinstance(value, str) or value not in _NAMES:
            known = ", ".join(name for name in _NAMES if name != "softmax")
            raise ValueError(f"{shown}: {name}: expected one that Keras has, {known}, got {value!r}")
    rate = layer.recurrent_dropout if kind == "SimpleRNN" or layer.recurrent_dropout_each == "sequence" else 0.0
    found: dict[str, Any] = {name: _NAMES[value] for name, value in names.items()} | {"recurrent_dropout": rate}
    return found | ({"reset_after": layer.reset_after} if kind == "GRU" else {})


def _recurrent_part(layer, form, number, path, place):
    """The arrays of one direction of one layer. number: (layer, direction)."""
    k, suffix = number[0], layer._suffix(*number)
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if form.bias else [])]
    division = Division(layer.heads, layer.mix_heads)

    def write():
        found = {name: division.whole(_array(layer, name + suffix), layer.hidden_sizes[k], name) for name in names}
        return weights.recurrent_to_keras(
            form, {name: array.reshape(-1, *array.shape[2:]) for name, array in found.items()}
        )

    def read(arrays):
        if layer.heads > 1:
            raise ValueError("heads: Keras's weights are dense: load them into a layer with heads=1")
        found = weights.recurrent_to_gpurnn(form, arrays)
        return _named(place, {name + suffix: array for name, array in found.items()})

    return Part(path, write, read)


def _array(module, name):
    """A parameter or buffer of a module."""
    return module.ops.to_numpy(module.params[name] if name in module.params else module.buffers[name])


def _named(place, values):
    return {f"{place}.{name}" if place else name: array for name, array in values.items()}


def _leaves(module: Module) -> Iterator[Module]:
    """The layers of a chain that are no chains, in their order."""
    if isinstance(module, Sequential):
        for layer in module:
            yield from _leaves(layer)
    else:
        yield module


_WRITERS: dict[type, Callable[[Chain, Any, str], None]] = {
    Sequential: Chain.sequential, Masked: Chain.sequential, Embedding: Chain.embedding, Linear: Chain.linear,
    TiedLinear: Chain.linear, Activation: Chain.activation, Dropout: Chain.dropout, LayerNorm: Chain.layer_norm,
    BatchNorm: Chain.batch_norm, Pooling: Chain.pooling, First: Chain.first, Merge: Chain.merge,
    RNN: Chain.recurrent, LSTM: Chain.recurrent, GRU: Chain.recurrent,
}  # fmt: skip
