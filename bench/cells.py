"""The cells of ``--cell``: RNN, GRU and LSTM, each alone and with one option, and those of ``gpurnn.cells``.

What a cell needs (weights, states, parameters of its own) is read off its record.
"""

import functools
from dataclasses import dataclass, field

import gpurnn
from gpurnn.cells import TracedCell, library
from gpurnn.recurrent import LAYERS

PLAIN = ("rnn", "gru", "lstm")

# Rates and limits of the papers' experiments on text: Semeniuta 2016, Gal & Ghahramani 2016, Krueger 2017, Merity 2018
_ALL = {
    "layer_norm": {"layer_norm": True},
    "batch_norm": {"batch_norm": 50},
    "variational_dropout": {"recurrent_dropout": 0.25, "recurrent_dropout_each": "sequence"},
    "weight_dropout": {"weight_dropout": 0.5},
    "gradient_clip": {"gradient_clip": 1.0},
}
_GATED = {
    "recurrent_dropout": {"recurrent_dropout": 0.25},
    "hard_sigmoid": {"recurrent_activation": "hard_sigmoid"},
}
_LSTM = {
    "zoneout": {"zoneout": (0.05, 0.5)},  # of h and of c
    "peephole": {"peephole": True},
    "coupled": {"coupled": True},
    "cell_clip": {"cell_clip": 3.0},
}
OPTIONS = {
    "rnn": {name: options for name, options in _ALL.items() if name != "variational_dropout"}
    | {"variational_dropout": {"recurrent_dropout": 0.25}, "zoneout": {"zoneout": 0.05}},
    "gru": _ALL | _GATED | {"zoneout": {"zoneout": 0.1}},
    "lstm": _ALL | _GATED | _LSTM,
}


@dataclass(frozen=True)
class Made:
    """How a layer is made. plain: the layer's cell without options, None where it has none. cell: for ``Recurrent``."""

    plain: str | None
    options: dict = field(default_factory=dict)
    cell: TracedCell | None = None

    def layer(self, I, H, L=1, **more):
        """The layer, I -> H."""
        if self.cell is not None:
            return gpurnn.Recurrent(self.cell, I, H, L, **more)
        return LAYERS[self.plain](I, H, L, **self.options, **more)


def _library():
    """Name -> the cell of ``gpurnn.cells``; those with settings have their defaults."""
    for name, value in vars(library).items():
        made_here = getattr(value, "__module__", None) == library.__name__ and not name.startswith("_")
        if isinstance(value, TracedCell):
            yield name, value
        elif made_here and callable(value):
            yield name, value()


CELLS = {name: Made(name) for name in PLAIN}
CELLS |= {f"{name}_{kind}": Made(kind, options) for kind in OPTIONS for name, options in OPTIONS[kind].items()}
CELLS |= {name: Made(None, cell=cell) for name, cell in _library()}


@functools.cache
def record(name):
    """The ``gpurnn.cells.Cell`` of a name, in training mode."""
    return CELLS[name].layer(1, 1, backend="numpy").cell
