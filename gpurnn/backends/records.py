"""What a layer and the time loop of a backend hand to each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .._typing import Array
from ..cells import Cell, Weights
from .batch_statistics import BatchStatistics
from .marks import Marks


class RunOptions(NamedTuple):
    """How ``Ops.layer_forward`` runs a layer.

    directions: for each, whether it runs backwards in time. save: whether ``layer_backward`` will follow. fresh_output:
    return a fresh C-contiguous output, zero past each sequence's end; otherwise it may be a view of the saved states.
    schedule: one of ``schedules.SCHEDULES``; array code has only one. concurrent: how many layers run at once on the
    device. masks: None for a cell without draws, else for each direction the booleans (T, B, M*H) of its M draws, or
    (1, B, M*H) where all are drawn once for a sequence. statistics: None, or for each direction the
    ``BatchStatistics`` of a cell that normalizes over the batch. marks: None, or for each direction its ``Marks``,
    which know the lengths, too. flat: whether the one timestep is several side by side, see
    rebuild.py. inference: whether this call has no backward, so that the weights may stay as they are.
    """

    directions: tuple[bool, ...]
    save: bool
    fresh_output: bool
    schedule: str = "auto"
    concurrent: int = 1
    masks: tuple[Array, ...] | None = None
    statistics: tuple[BatchStatistics, ...] | None = None
    marks: tuple[Marks, ...] | None = None
    flat: bool = False
    inference: bool = False


class PassOptions(NamedTuple):
    """How ``sequence_forward`` runs one direction: the entries of ``RunOptions`` for it."""

    reverse: bool = False
    save: bool = True
    masks: Array | None = None
    statistics: BatchStatistics | None = None
    marks: Marks | None = None


class Gradients(NamedTuple):
    """Where ``Ops.layer_backward`` adds the gradients of a layer's weights.

    weights: for each direction the ``cells.Weights`` to add to. lock: held while they are added to, as several threads
    may run backward passes of one layer. record: None, or a function that takes what would be added instead: the
    number of the direction, and the list that ``weight_terms`` makes.
    """

    weights: list[Weights]
    lock: threading.RLock
    record: Callable[..., None] | None = None


@dataclass(slots=True)
class SavedPass:
    """What one direction of a layer saves between forward and backward.

    gates: (T, B, K*H), the blocks that the cell saves; the backward pass overwrites them. None after inference. h (T+1,
    B, P) and others, each (T+1, B, H): the states in slots, h and the cell's other ones. reverse: whether the pass runs
    from T - 1 to 0. Timestep t reads slot t and writes slot t + 1; with reverse it reads t + 1 and writes t. So the
    initial state is at the end where the loop begins; but for a reset it reads the state of ``marks`` instead. masks,
    statistics, marks: those of ``RunOptions`` for this direction, or None. dreset: what ``PassGradients.dreset`` begins
    with, from later segments of the same call; None for zeros.
    """

    gates: Array | None
    h: Array
    others: tuple[Array, ...]
    reverse: bool
    masks: Array | None = None
    statistics: BatchStatistics | None = None
    marks: Marks | None = None
    dreset: tuple[Array, ...] | None = None

    @property
    def h_new(self) -> Array:
        """(T, B, P): the h that each timestep wrote."""
        return self.h[:-1] if self.reverse else self.h[1:]

    @property
    def h_old(self) -> Array:
        """(T, B, P): the h that each timestep read."""
        return self.h[1:] if self.reverse else self.h[:-1]

    @property
    def others_old(self) -> tuple[Array, ...]:
        """Each (T, B, H): the other states that each timestep read."""
        return tuple(state[1:] if self.reverse else state[:-1] for state in self.others)

    @property
    def others_new(self) -> tuple[Array, ...]:
        """Each (T, B, H): the other states that each timestep wrote."""
        return tuple(state[:-1] if self.reverse else state[1:] for state in self.others)


@dataclass(slots=True)
class SavedLayer:
    """What ``Ops.layer_forward`` saves for ``Ops.layer_backward``, as torch's saved tensors.

    cell, weights, x, lengths: as ``layer_forward`` got them. passes: a ``SavedPass`` for each direction. lease: an
    object that must live as long as these arrays are in use.
    """

    cell: Cell
    weights: list[Weights]
    x: Array
    lengths: np.ndarray | None
    passes: list[SavedPass]
    lease: object = None


class PassGradients(NamedTuple):
    """What the reverse-time loop of one direction makes.

    dgates: (T, B, K*H), the memory of ``SavedPass.gates``. It begins with the gradients with respect to the cell's
    pre-activations, zero past the end; blocks behind them are as saved. dstate: the gradients with respect to the
    initial state, dh (B, P) and one (B, H) for each other state, float32 for 16-bit layers. dh_steps: with a projection
    the gradients with respect to every h_t, (T, B, P), zero past the end; otherwise None. dreset: like dstate, with
    respect to the state that resets give, the sum over all of them; None where nothing is reset.
    """

    dgates: Array
    dstate: tuple[Array, ...]
    dh_steps: Array | None
    dreset: tuple[Array, ...] | None = None


def flat(steps):
    """(T, B, F) as (T*B, F): a view of C-contiguous arrays and of those of ``empty_steps``."""
    return steps.reshape(-1, steps.shape[-1]) if steps.size else steps.reshape(0, steps.shape[-1])
