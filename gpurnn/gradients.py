"""Seeing gradients: the norm of dL/dh and dL/dc at every timestep of any backward pass.

A vanishing gradient shows as a curve that falls towards t = 0, an exploding one as a curve that rises.

>>> output, state, backward = gpurnn.LSTM(3, 4).forward(np.ones((5, 2, 3), "float32"))
>>> with record_gradient_flow() as flow:
...     dx, dstate = backward(output)
>>> flow["l0"].dh.shape          # (T, B): Euclidean norm over the hidden units, per step and sequence
(5, 2)
"""

import contextlib
import contextvars
import os
import threading
from dataclasses import dataclass

_recorder = contextvars.ContextVar("gpurnn_gradient_flow", default=None)

# Many layers share a lock: one of its own could not be copied and saved with a layer.
_adding = [threading.RLock() for _ in range(64)]


def adding(grads):
    """A context in which one thread alone adds to these gradients: backward passes of one layer may run in several
    threads, and none of their sums is lost. On a GPU such threads must work on the same stream."""
    return _adding[id(grads) // 64 % len(_adding)]


def _forget_locks():
    """In the child of a fork: what other threads held stays held for ever there."""
    _adding[:] = [threading.RLock() for _ in _adding]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


@dataclass
class StepNorms:
    """Norms of one layer and direction: dh (T, B), and dc (T, B) or None where the cell has no c; NumPy, float64.

    ``dh[t]`` is the norm of the whole derivative of the loss by h_t: what arrives from the output at t and from t + 1.
    """

    dh: object
    dc: object = None


class GradientFlow(dict):
    """Name of layer and direction -> StepNorms, filled by every backward pass inside ``record_gradient_flow``.

    Names are ``l0``, ``l0_reverse``, ``l1`` ... behind the layer's name in its model (``rnn.l0``); a layer that runs
    several times keeps its last pass.
    """


@contextlib.contextmanager
def record_gradient_flow():
    """Record the gradient flow of the backward passes inside the ``with`` block; yields a ``GradientFlow``."""
    flow = GradientFlow()
    token = _recorder.set(flow)
    try:
        yield flow
    finally:
        _recorder.reset(token)


def active_flow():
    """The ``GradientFlow`` being recorded, or None."""
    return _recorder.get()
