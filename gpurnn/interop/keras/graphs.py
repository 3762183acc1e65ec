"""The layers of a model of Keras in their order, from its description: a Sequential, or a functional model that is a
chain. Models inside a model are chains in the chain.

The description of a functional model holds its masks, too: as operations ``NotEqual`` and ``Any`` on the input of a
Masking or an Embedding, whose result goes to the layers behind it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import one_line
from .files import Path_, place_names
from .settings import is_of_keras

_MOST, _DEEPEST = 10_000, 20  # layers of a model, and models inside one another
_MASKS = ("NotEqual", "Any")
_LAST = ([-1], -1)  # the axis of features, over which Any is taken
_Layers = list[tuple[Path_, Mapping[str, Any]]]


def chain(document: Any) -> _Layers:
    """(place, description) of each layer, in their order. Raises ValueError for what is no chain."""
    found: _Layers = []
    _add(document, (), found, 0)
    return found


def _add(document, path, found, depth):
    if depth > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} models inside one another")
    kind = document.get("class_name") if isinstance(document, Mapping) else None
    if kind not in ("Sequential", "Functional") or not is_of_keras(document):
        got = one_line(repr(kind), 60)
        raise ValueError(f"expected a Sequential or a functional model, got {got}: import its layers one by one")
    config = document.get("config")
    layers = config.get("layers") if isinstance(config, Mapping) else None
    if not isinstance(layers, list) or len(layers) > _MOST:
        raise ValueError(f"expected a list of at most {_MOST:,} layers")
    if not all(isinstance(layer, Mapping) and isinstance(layer.get("class_name"), str) for layer in layers):
        raise ValueError("expected layers that have a class_name each")
    places = place_names([layer["class_name"] for layer in layers])
    order = range(len(layers)) if kind == "Sequential" else _Graph(config, layers).order()
    for number in order:
        place = (*path, "layers", places[number])
        if layers[number]["class_name"] in ("Sequential", "Functional"):
            _add(layers[number], place, found, depth + 1)
        else:
            found.append((place, layers[number]))
    if len(found) > _MOST:
        raise ValueError(f"expected at most {_MOST:,} layers")


class _Graph:
    """The layers of a functional model, and what each of them reads."""

    def __init__(self, config: Mapping[str, Any], layers: list[Mapping[str, Any]]) -> None:
        self._layers = layers
        self._names = [layer.get("name") for layer in layers]
        if len(set(map(str, self._names))) != len(layers):
            raise ValueError("expected layers of different names")
        self._first = self._end(config, "input_layers")
        self._last = self._end(config, "output_layers")

    def _end(self, config, name):
        """The number of the one layer that a model begins or ends with."""
        ends = config.get(name)
        if isinstance(ends, list) and len(ends) == 1:
            ends = ends[0]
        if not isinstance(ends, list) or len(ends) != 3 or ends[0] not in self._names or ends[1:] != [0, 0]:
            raise ValueError(f"{name}: gpurnn has models with one input and one output, got {one_line(repr(ends), 80)}")
        return self._names.index(ends[0])

    def order(self) -> list[int]:
        """The numbers of the layers, first to last, without the operations that make masks. Raises ValueError."""
        readers: dict[int, list[int]] = {}
        for number in range(len(self._layers)):
            if number != self._first and not self._makes_mask(number):
                readers.setdefault(self._read_by(number), []).append(number)
        for number in range(len(self._layers)):
            if self._makes_mask(number):
                self._check_mask(number, readers)
        found = [self._first]
        while found[-1] in readers:
            several = readers.pop(found[-1])
            if len(several) > 1:
                shown = ", ".join(one_line(repr(self._names[number]), 40) for number in several[:4])
                raise ValueError(f"layers {shown} read one output: gpurnn has chains alone, without branches")
            found += several
        if found[-1] != self._last or readers:
            raise ValueError("output_layers: expected the end of one chain that all layers are in")
        return found

    def _makes_mask(self, number):
        return self._layers[number]["class_name"] in _MASKS

    def _check_mask(self, number, readers):
        """Raise ValueError for an operation that is no part of the mask of a Masking or an Embedding in the chain."""
        layer = self._layers[number]
        shown, nodes, config = self._shown(number), layer.get("inbound_nodes"), layer.get("config")
        arguments = nodes[0].get("args") if isinstance(nodes, list) and len(nodes) == 1 else None
        if not isinstance(arguments, list) or not arguments:
            raise ValueError(f"{shown}: expected one call of it in the model")
        source = self._source(arguments[0], shown)
        if layer["class_name"] == "Any":
            fits = self._layers[source]["class_name"] == "NotEqual" and len(arguments) == 1
            fits = fits and isinstance(config, Mapping) and config.get("axis", -1) in _LAST
        else:
            fits = any(self._masks(reader, arguments[1:]) for reader in readers.get(source, ()))
        if not fits:
            raise ValueError(f"{shown}: it is not the mask of a Masking or an Embedding, and gpurnn has no other")

    def _masks(self, number, values):
        """Whether a layer makes a mask of all that differs from one value."""
        layer = self._layers[number]
        config = layer.get("config") if isinstance(layer.get("config"), Mapping) else {}
        if layer["class_name"] == "Embedding":
            return config.get("mask_zero") is True and values == [0]
        return layer["class_name"] == "Masking" and values == [config.get("mask_value", 0.0)]

    def _shown(self, number):
        return f"layer {one_line(repr(self._names[number]), 60)} ({one_line(self._layers[number]['class_name'], 40)})"

    def _read_by(self, number):
        """The number of the layer whose output is all that another one reads, besides a mask. Raises ValueError."""
        layer = self._layers[number]
        shown, nodes = self._shown(number), layer.get("inbound_nodes")
        if not isinstance(nodes, list) or len(nodes) != 1 or not isinstance(nodes[0], Mapping):
            raise ValueError(f"{shown}: expected one call of it in the model")
        arguments = nodes[0].get("args")
        if not isinstance(arguments, list) or len(arguments) != 1:
            raise ValueError(f"{shown}: expected one input, got {len(arguments) if isinstance(arguments, list) else 0}")
        for name, value in dict(nodes[0].get("kwargs") or {}).items():
            mask = name == "mask" and value is not None and self._makes_mask(self._source(value, shown))
            if not mask and value is not None and not (name == "training" and value is False):
                text = one_line(repr(value), 60)
                raise ValueError(f"{shown}: {one_line(name, 40)}: gpurnn's chains have no such argument, got {text}")
        source = self._source(arguments[0], shown)
        if self._makes_mask(source):
            raise ValueError(f"{shown}: reads a mask as its input")
        return source

    def _source(self, tensor, shown):
        """The number of the layer that a tensor comes from. Raises ValueError."""
        config = tensor.get("config") if isinstance(tensor, Mapping) else None
        history = config.get("keras_history") if isinstance(config, Mapping) else None
        if not isinstance(history, list) or len(history) != 3 or history[0] not in self._names:
            raise ValueError(f"{shown}: expected one tensor of the model, got {one_line(repr(tensor), 60)}")
        if history[1:] != [0, 0]:
            raise ValueError(f"{shown}: reads another output than the first one of {one_line(repr(history[0]), 60)}")
        return self._names.index(history[0])
