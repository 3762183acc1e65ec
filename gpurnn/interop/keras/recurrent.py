"""Recurrent layers of Keras, from their settings to gpurnn's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...recurrent import GRU, LSTM, RNN, Recurrent
from .files import Path_, place_names
from .settings import Settings
from .weights import Arrays, Form, recurrent_sizes, recurrent_to_gpurnn

_CELLS = {"SimpleRNNCell": "SimpleRNN", "LSTMCell": "LSTM", "GRUCell": "GRU"}
_LAYERS = {"SimpleRNN": RNN, "LSTM": LSTM, "GRU": GRU}


class Cell(NamedTuple):
    """One cell of Keras. options: gpurnn's arguments. paths: where its arrays are, of each direction."""

    form: Form
    units: int
    options: dict[str, Any]
    dropout: float
    paths: tuple[Path_, ...] = ()


class Loop(NamedTuple):
    """A time loop of Keras: its cells, one above the other, and what it gives."""

    cells: tuple[Cell, ...]
    sequences: bool
    zero: bool
    reverse: bool
    bidirectional: bool = False


def read_recurrent(settings: Settings, path: Path_) -> Loop:
    """What a SimpleRNN, LSTM, GRU, RNN or Bidirectional is. Raises ValueError and TypeError."""
    if settings.kind != "Bidirectional":
        loop = _loop(settings, path)
        if loop.reverse and loop.sequences:
            raise ValueError(
                "go_backwards with return_sequences: its outputs are in reverse order, which gpurnn has in a "
                "Bidirectional alone"
            )
        if loop.zero and not loop.sequences:
            raise ValueError(
                "zero_output_for_mask without return_sequences: the result would be zero after a masked timestep; "
                "gpurnn gives the last one that counts"
            )
        return loop
    both = []
    for name, reverse in (("layer", False), ("backward_layer", True)):
        inner = Settings(settings.value(name) or {} if name == "layer" else _backward(settings))
        place = "forward_layer" if name == "layer" else name
        if inner.custom or inner.kind not in (*_LAYERS, "RNN"):
            raise ValueError(f"{place}: expected one of {', '.join((*_LAYERS, 'RNN'))}, got {inner.shown}")
        loop = _loop(inner, (*path, place))
        inner.finish()
        inner.check_dtype(settings)
        if loop.reverse != reverse:
            raise ValueError(f"{place}: go_backwards: expected {reverse}, got {loop.reverse}")
        both.append(loop)
    forward, backward = both
    if max(len(forward.cells), len(backward.cells)) > 1:
        raise ValueError("layer: cells on top of each other in each direction are no bidirectional stack of gpurnn")
    plain = [(loop.cells[0]._replace(paths=()), loop.sequences) for loop in both]
    if plain[0] != plain[1]:
        raise ValueError("backward_layer: expected the settings of the forward layer, in reverse")
    paths = forward.cells[0].paths + backward.cells[0].paths
    cell = forward.cells[0]._replace(paths=paths)
    return Loop((cell,), forward.sequences, True, False, True)  # whatever zero_output_for_mask says: Keras sets it


def _backward(settings):
    """The description of the second direction; without one it is the first one in reverse."""
    given = settings.value("backward_layer")
    if given is not None:
        return given
    layer = settings.config.get("layer")
    if not isinstance(layer, Mapping) or not isinstance(layer.get("config"), Mapping):
        return {}
    return {**layer, "config": {**layer["config"], "go_backwards": True}}


def _loop(settings, path):
    sequences, reverse = settings.flag("return_sequences"), settings.flag("go_backwards")
    zero = settings.flag("zero_output_for_mask")
    settings.only("time_major", (False,))
    if settings.kind != "RNN":
        return Loop((_cell(settings, settings.kind, (*path, "cell")),), sequences, zero, reverse)
    outer = Settings(settings.value("cell") or {})
    if outer.kind == "StackedRNNCells" and not outer.custom:
        several = outer.value("cells")
        if not isinstance(several, list) or not several:
            raise ValueError("cells: expected a list of cells")
        inner = [Settings(one) for one in several]
        places = [(*path, "cell", "cells", name) for name in place_names([one.kind for one in inner])]
        outer.finish()
        outer.check_dtype(settings)
    else:
        inner, places = [outer], [(*path, "cell")]
    cells = []
    for one, place in zip(inner, places, strict=True):
        if one.custom or one.kind not in _CELLS:
            raise ValueError(f"cell: expected one of {', '.join((*_CELLS, 'StackedRNNCells'))}, got {one.shown}")
        cells.append(_cell(one, _CELLS[one.kind], place))
        one.finish()
        one.check_dtype(settings)
    return Loop(tuple(cells), sequences, zero, reverse)


def _cell(settings, kind, path):
    form = Form(kind, settings.flag("use_bias", True), kind == "GRU" and settings.flag("reset_after", True))
    rate = settings.rate("recurrent_dropout")
    options: dict[str, Any] = {"recurrent_dropout": rate}
    activation = settings.activation("activation", "tanh")
    if kind == "SimpleRNN":
        options["nonlinearity"] = activation
    else:
        options |= {"activation": activation} | ({"recurrent_dropout_each": "sequence"} if rate else {})
        options["recurrent_activation"] = settings.activation("recurrent_activation", "sigmoid")
    if kind == "GRU":
        options["reset_after"] = form.reset_after
    return Cell(form, settings.size("units"), options, settings.rate("dropout"), (path,))


def recurrent_layer(
    cell: Cell, arrays: Sequence[Arrays], loop: Loop, options: Mapping[str, Any]
) -> tuple[Recurrent, dict[str, np.ndarray]]:
    """A layer, and the values of its parameters. arrays: of each direction. Raises ValueError."""
    sizes = [recurrent_sizes(cell.form, one) for one in arrays]
    if len(set(sizes)) > 1:
        raise ValueError(f"backward_layer: its weights are of other sizes, {sizes[1]}, than {sizes[0]}")
    inputs, H = sizes[0]
    if cell.units != H:
        raise ValueError(f"units: its weights are of size {H}, got {cell.units}")
    layer = _LAYERS[cell.form.kind](
        inputs, H, bias=cell.form.bias, bidirectional=loop.bidirectional, reverse=loop.reverse,
        masked_output="zero" if loop.zero else "repeat", **cell.options, **options,
    )  # fmt: skip
    values = {}
    for one, suffix in zip(arrays, ("_l0", "_l0_reverse"), strict=False):
        values |= {name + suffix: array for name, array in recurrent_to_gpurnn(cell.form, one).items()}
    return layer, values
