"""The gradient flow: the norms of dL/dh and dL/dc at every timestep of a backward pass.

A vanishing gradient shows as a curve that falls towards t = 0, an exploding one as a curve that rises.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

_recorder = contextvars.ContextVar("gpurnn_gradient_flow", default=None)

# Layers share these locks, because a lock in a layer could be neither copied nor pickled with it.
_adding = [threading.RLock() for _ in range(64)]


def adding(grads):
    """A context in which only one thread adds to these gradients, so that no sum is lost when backward passes of one
    layer run in several threads. On a GPU such threads must work on the same stream."""
    return _adding[id(grads) // 64 % len(_adding)]


def _forget_locks():
    """Make new locks in the child of a fork, where those that other threads held would never be released."""
    _adding[:] = [threading.RLock() for _ in _adding]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


@dataclass
class StepNorms:
    """The norms of one layer and direction.

    Attributes
    ----------
    dh : np.ndarray
        (T, B), float64: the Euclidean norm, over the hidden units, of the complete gradient of the loss with respect to
        h_t: what arrives from the output at t, plus what arrives from timestep t + 1.
    others : dict
        Name of each other state -> (T, B), the same with respect to it.
    """

    dh: np.ndarray
    others: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def dc(self) -> np.ndarray | None:
        """(T, B), the norms with respect to the c of an LSTM; None where the cell has no c."""
        return self.others.get("c")


class GradientFlow(dict[str, "StepNorms"]):
    """Name of layer and direction -> ``StepNorms``, filled by every backward pass inside ``record_gradient_flow``.

    Names are ``l0``, ``l0_reverse``, ``l1`` ..., after the layer's name in its model (``rnn.l0``). Of a layer that runs
    several times the last backward pass is recorded.
    """


@contextlib.contextmanager
def record_gradient_flow() -> Iterator[GradientFlow]:
    """Record the gradient flow of the backward passes inside the ``with`` block.

    A forward pass that ran as a wavefront must be inside the block, too: its backward raises RuntimeError otherwise.

    Yields
    ------
    flow : GradientFlow
        Filled when a backward pass ends.

    Examples
    --------
    >>> output, state, backward = gpurnn.LSTM(3, 4).forward(np.ones((5, 2, 3), "float32"))
    >>> with gpurnn.record_gradient_flow() as flow:
    ...     dx, dstate = backward(output)
    >>> flow["l0"].dh.shape          # (T, B)
    (5, 2)
    """
    flow = GradientFlow()
    token = _recorder.set(flow)
    try:
        yield flow
    finally:
        _recorder.reset(token)


def active_flow() -> GradientFlow | None:
    """The ``GradientFlow`` that is being recorded, or None."""
    return _recorder.get()
