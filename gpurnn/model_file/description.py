"""Models as documents: which layers there are, and with which arguments; and models of such documents.

    layer       {"layer": "LSTM", "arguments": {...}}, with "quantized": "int8" where its weights are in 8 bits, and
                then "activations": "int8" where what they multiply is, too; or
                {"layer": "Sequential", "layers": {name: layer, ...}, "arguments": {...}}, or
                {"same": name}: the layer that has this name in the model around it as well

Arguments are those of the constructor. A cell is {"cell": document} or {"built_in": name}; a function, which an
activation may be, is {"function": document} (see cells/stored.py); a tied embedding is its dotted place in the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..cells import CELLS, LSTMStep
from ..cells.stored import cell_document, cell_from, function_document, function_from
from ..errors import check_choice, check_size, described
from ..module import Module
from ..module.quantized import ACTIVATIONS, FORMATS
from .kinds import COMPOSITES, check_parts, class_of, restored

MOST_LAYERS, DEEPEST = 10_000, 50  # of a model; how deep chains may stand in one another
_LEFT_OUT = frozenset(  # who loads a file decides on it, or it decides on nothing but initial values
    ("self", "backend", "dtype", "seed", "save", "forget_bias", "chrono", "std")
)
_BUILT_IN = {cell.name: cell for cell in (*CELLS.values(), LSTMStep(True))}


# ---- documents of models


def describe(model: Module) -> dict[str, Any]:
    """The document of a model. Raises TypeError or ValueError where a file could not hold it; the message says why."""
    places = {id(module): name for name, module in model.modules()}
    _check_size(places.values())
    return _layer_document(model, "", places)


def _layer_document(layer, place, places):
    kind = type(layer).__name__
    shown = f"{place}: {kind}" if place else f"model: {kind}"
    if class_of(kind) is not type(layer):
        raise TypeError(
            f"{shown} is a class of your own, whose code no file holds. Save its weights by gpurnn.save_weights, and "
            "build it before gpurnn.load_weights; or make it of gpurnn's layers, in a gpurnn.Sequential"
        )
    document = {"layer": kind}
    if kind in COMPOSITES:
        if layer._own:
            raise ValueError(f"{shown} has a parameter of its own, {layer._own[0][0]!r}, which no file can describe")
        check_parts(kind, layer.children)
        document["layers"] = {name: child for name, child in _children(layer, place, places)}
        document["arguments"] = COMPOSITES[kind].arguments_of(layer)
    else:
        if "" in layer._counts[0]:
            raise ValueError(f"{shown} was given parameters or layers of its own, which no file can describe")
        document["arguments"] = {name: _plain(value, shown, name) for name, value in _arguments(layer, places)}
        if layer.quantized:
            document["quantized"] = layer.quantized
            document |= {"activations": layer._activations} if layer._activations != "int16" else {}
    return document


def _children(layer, place, places):
    names = {}
    for name, child in layer.children.items():
        if id(child) in names:
            yield name, {"same": names[id(child)]}
        else:
            names[id(child)] = name
            yield name, _layer_document(child, f"{place}.{name}" if place else name, places)


def _arguments(layer: Module, places: dict[int, str]) -> Iterator[tuple[str, Any]]:
    """(name, value) of the constructor's arguments that a layer was made with, or could have been."""
    for name in inspect.signature(type(layer).__init__).parameters:
        if name in _LEFT_OUT:
            continue
        if name == "embedding":
            if id(layer.embedding) not in places:
                raise ValueError(f"{type(layer).__name__}: its embedding is no part of the model: save both in one")
            yield name, places[id(layer.embedding)]
        elif name == "cell":
            yield name, _cell(layer._cell)
        elif name == "attention_size":
            applies = "attention" if hasattr(layer, "mode") else "additive"
            yield name, layer.attention_size if applies in (vars(layer).get("mode"), vars(layer).get("score")) else None
        else:
            yield name, getattr(layer, name)


def _cell(cell):
    built_in = _BUILT_IN.get(cell.name)
    if built_in == cell and type(built_in) is type(cell):  # not one of a class of the user's, which computes otherwise
        return {"built_in": cell.name}
    return {"cell": cell_document(cell)}


def _plain(value, shown, name):
    """An argument as JSON has it."""
    if isinstance(value, dict) or value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(one, shown, name) for one in value]
    if callable(value):
        return {"function": function_document(value)}
    raise TypeError(f"{shown}: {name}: no file can hold {described(value)}")


# ---- models of documents


def build(document: dict[str, Any], arrays: int, numbers: int, **options: Any) -> Module:
    """The model of a document.

    arrays, numbers: how many its file has. options: backend and dtype. Raises ValueError, TypeError, LookupError or
    ArithmeticError for a wrong document.
    """
    return _Builder(document, arrays, numbers, options).layer("")


class _Builder:
    def __init__(self, document, arrays, numbers, options):
        self.options, self.limits = options, {"num_layers": arrays, "heads": numbers}
        self.documents = dict(_places(document, ""))
        _check_size(self.documents)
        self.made, self.begun = {}, set()

    def layer(self, place):
        """The layer at a dotted place, made once."""
        if place in self.made:
            return self.made[place]
        if place in self.begun:
            raise ValueError(f"{place}: it is a part of itself")
        self.begun.add(place)
        document = self.documents[place]
        kind, arguments = document["layer"], document["arguments"]
        if not isinstance(kind, str) or class_of(kind) is None:
            raise ValueError(f"{place or 'model'}: unknown layer {kind!r}")
        if not isinstance(arguments, dict):
            raise TypeError(f"{place or 'model'}: arguments should be values by name")
        if kind in COMPOSITES:
            made = self._composite(place, document["layers"], kind, arguments)
        else:
            made = self._single(place, kind, arguments)
            if "quantized" in document:
                check_choice("quantized", document["quantized"], FORMATS)
                activations = document.get("activations", "int16")
                made._quantize_own(place, check_choice("activations", activations, tuple(ACTIVATIONS)))
        self.made[place] = made
        return made

    def _composite(self, place, layers, kind, arguments):
        children = {}
        for name, document in layers.items():
            if "same" in document:
                children[name] = children[document["same"]]
            else:
                children[name] = self.layer(f"{place}.{name}" if place else name)
        return restored(kind, children, arguments, self.options)

    def _single(self, place, kind, arguments):
        cls = class_of(kind)
        takes = inspect.signature(cls.__init__).parameters
        known = [name for name in takes if name not in _LEFT_OUT]
        given = {}
        for name, value in arguments.items():
            if name not in known:
                raise ValueError(f"{place or 'model'}: {kind} has no argument {name!r}")
            given[name] = self._value(name, value)
        if kind == "TiedLinear":
            return cls(**given)
        if given.get("precision", "float32") != "float32" and self.options["dtype"] != np.float32:
            del given["precision"]
        seed = {"seed": 0} if "seed" in takes else {}  # its draws come from the file
        return cls(**given, **self.options, **seed)

    def _value(self, name, value):
        if name in self.limits and check_size(name, value) > self.limits[name]:
            raise ValueError(f"{name} is {value}, more than its arrays allow")
        if name == "embedding":
            return self.layer(value)
        if name == "cell":
            if "built_in" in value:
                return _BUILT_IN[check_choice("cell", value["built_in"], _BUILT_IN)]
            return cell_from(value["cell"])
        if isinstance(value, list):
            return tuple(value)
        return function_from(value["function"]) if isinstance(value, dict) else value


def _check_size(places):
    """Raise ValueError for more layers, or deeper ones, than a file holds."""
    deepest = 1 + max(place.count(".") for place in places)
    if len(places) > MOST_LAYERS or deepest > DEEPEST:
        raise ValueError(
            f"model: it has {len(places):,} layers, {deepest} deep: a file holds at most {MOST_LAYERS:,}, and "
            f"{DEEPEST} deep"
        )


def _places(document, place):
    """(dotted place, document) of each layer in a document."""
    if "same" in document:
        return
    yield place, document
    if "layers" in document:
        for name, inner in document["layers"].items():
            yield from _places(inner, f"{place}.{name}" if place else name)
