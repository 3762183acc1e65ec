"""Cells: the equations of one timestep, forward and backward."""

from difflib import get_close_matches
from typing import TYPE_CHECKING

from .functions import (
    ACTIVATIONS,
    batch_normalized,
    clip,
    dropout,
    elu,
    hard_sigmoid,
    hard_sigmoid_2,
    identity,
    leaky_relu,
    log_sigmoid,
    normalized,
    normalized_together,
    silu,
    softsign,
    zoneout,
)
from .gru import GRUStep
from .haste import weights_from_haste
from .library import (
    cifg,
    cornn,
    elman,
    indrnn,
    ligru,
    mgu,
    mingru,
    minlstm,
    mut1,
    peephole,
    slstm,
    slstm_exp,
    ugrnn,
)
from .lstm import LSTMStep
from .record import Cell, Draw, HiddenWeights, Parameter, Product, Scratch, Weights
from .rnn import RNNStep
from .symbols import (
    clip_gradient,
    exp,
    expm1,
    fabs,
    log,
    log1p,
    maximum,
    mean,
    minimum,
    relu,
    sigmoid,
    softplus,
    sqrt,
    stop_gradient,
    tanh,
    where,
)
from .traced import TracedCell, cell

if not TYPE_CHECKING:  # which would take any name for a part of this module

    def __getattr__(name):
        if name.startswith("__"):  # what Python asks for
            raise AttributeError(name)
        known = {one.casefold(): one for one in __all__}
        near = get_close_matches(name.casefold().replace("_", ""), known, 1, 0.8)
        made = [one for one, value in globals().items() if isinstance(value, TracedCell)] + ["cornn()", "elman()"]
        hint = f"did you mean {known[near[0]]}?" if near else f"cells in it: {', '.join(sorted(made))}"
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; {hint}")


# name -> hand-written cell; of the LSTM the one without a projection
CELLS = {cell.name: cell for cell in (RNNStep("tanh"), RNNStep("relu"), LSTMStep(), GRUStep(), GRUStep(False))}

__all__ = [
    "ACTIVATIONS",
    "CELLS",
    "Cell",
    "Draw",
    "GRUStep",
    "HiddenWeights",
    "LSTMStep",
    "Parameter",
    "Product",
    "RNNStep",
    "Scratch",
    "TracedCell",
    "Weights",
    "cell",
    "batch_normalized",
    "clip",
    "clip_gradient",
    "dropout",
    "elu",
    "exp",
    "expm1",
    "fabs",
    "hard_sigmoid",
    "hard_sigmoid_2",
    "identity",
    "leaky_relu",
    "log",
    "log1p",
    "log_sigmoid",
    "maximum",
    "mean",
    "minimum",
    "normalized",
    "normalized_together",
    "relu",
    "sigmoid",
    "silu",
    "softplus",
    "softsign",
    "sqrt",
    "stop_gradient",
    "tanh",
    "weights_from_haste",
    "where",
    "zoneout",
    # cells from the literature
    "cifg", "cornn", "elman", "indrnn", "ligru", "mgu", "mingru", "minlstm", "mut1", "peephole", "slstm", "slstm_exp",
    "ugrnn",
]  # fmt: skip
