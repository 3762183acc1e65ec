"""Training calls in segments of time: what tests of ``memory`` share."""

import numpy as np
from helpers import host

import gpurnn

LAYERS = {"rnn": gpurnn.RNN, "lstm": gpurnn.LSTM, "gru": gpurnn.GRU}


def leaves(value):
    return [one for part in value for one in leaves(part)] if isinstance(value, tuple) else [value]


def shaped(layer, value, rng):
    """Random numbers of the shapes of a state."""
    if isinstance(value, tuple):
        return tuple(shaped(layer, part, rng) for part in value)
    return layer.xp.asarray(rng.standard_normal(value.shape).astype(value.dtype))


def all_results(layer, x, state=None, **marks):
    """Every array of one training call, the same draws each time."""
    layer.calls, rng = 0, np.random.default_rng(3)
    layer.zero_grad()
    output, state, backward = layer.forward(x, state, **marks)
    dx, dstate = backward(shaped(layer, output, rng), shaped(layer, state, rng))
    return [host(one) for one in (output, *leaves(state), dx, *leaves(dstate), layer.flat_grads.copy())]


def marks_of(layer, how, T, B, rng):
    if how == "full":
        return {}
    given = {"lengths": rng.integers(0, T + 1, B)}
    if how == "marks":
        reset, mask = rng.random((T, B)) < 0.3, rng.random((T, B)) < 0.8
        given |= {"reset": reset.T if layer.batch_first else reset, "mask": mask.T if layer.batch_first else mask}
    return given
