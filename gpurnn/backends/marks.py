"""What masks, resets and lengths make of each timestep, in the words of a time loop."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._typing import Array

HELD, RESET, SHOWN = 1, 2, 4


class Marks(NamedTuple):
    """The marks of every timestep, for one direction of a layer.

    bits: (T, B) uint8, C-contiguous, a sum of

    - RESET: before this timestep, in the order of this direction's loop, the state of the sequence becomes ``state``.
    - HELD: this timestep does not happen. The state stays as it is, after a reset too; the output is zero. So it is
      past the end of a sequence.
    - SHOWN, beside HELD: the output is h all the same.

    state: what a reset gives, h (B, P) and the other states (B, H), arrays or numbers; None where nothing is reset.
    """

    bits: Array
    state: tuple[Any, ...] | None = None

    def within(self, segment: slice) -> Marks:
        """Those of a segment of time."""
        return self._replace(bits=self.bits[segment])

    def where(self, bit: int) -> Array:
        """(T, B) booleans: which timesteps have a mark."""
        return (self.bits & np.uint8(bit)) != 0

    def silent(self) -> Array:
        """(T, B) booleans: where the output is zero."""
        return (self.bits & np.uint8(HELD | SHOWN)) == HELD


class StepMarks(NamedTuple):
    """For each timestep the booleans (B,) of the sequences that are held, reset, without output; None for none."""

    held: list[Array | None]
    reset: list[Array | None]
    silent: list[Array | None]


def step_marks(xp, marks: Marks | None, lengths: np.ndarray | None, T: int) -> StepMarks:
    """The ``StepMarks`` of a pass. lengths: (B,) or None; ``marks`` know them already."""
    nothing = [None] * T
    if marks is None:
        held = nothing if lengths is None else _by_step(xp, np.arange(T)[:, None] >= lengths)
        return StepMarks(held, nothing, held)
    reset = nothing if marks.state is None else _by_step(xp, marks.where(RESET))
    return StepMarks(_by_step(xp, marks.where(HELD)), reset, _by_step(xp, marks.silent()))


def _by_step(xp, where):
    """(T, B) as a list of (B,), None where none is set. What is on a GPU is not looked at."""
    on_device = xp.asarray(where)
    if not isinstance(where, np.ndarray):
        return list(on_device)
    return [on_device[t] if some else None for t, some in enumerate(where.any(axis=1))]


def after_reset(xp, where, states, firsts):
    """The states (F, B) that a timestep reads: those of sequences that are reset replaced by ``firsts``.

    where: (B,) or None. firsts: (F, B) arrays or numbers.
    """
    if where is None:
        return states
    copies = [part.copy(order="K") for part in states]
    for part, first in zip(copies, firsts, strict=True):
        xp.copyto(part, first, where=where)
    return copies


def feature_major_state(marks):
    """What a reset gives, as (F, B) arrays or numbers; None where nothing is reset."""
    if marks is None or marks.state is None:
        return None
    return [part.T if hasattr(part, "T") else part for part in marks.state]


def read_states(xp, saved):
    """The states (T, B, F) that the timesteps of a ``SavedPass`` read, h and the others."""
    states = [saved.h_old, *saved.others_old]
    if saved.marks is None or saved.marks.state is None:
        return states
    states = [part.copy(order="K") for part in states]
    for part, first in zip(states, saved.marks.state, strict=True):
        _put(xp, part, saved.marks.where(RESET), first)
    return states


def settle_reads(xp, saved, inner):
    """Make h_old of a ``SavedPass`` what each timestep has read, for the products with it over all of time.

    Where a timestep is held nothing is read; what stands there may be NaN. inner: views (T, B, H) of blocks that
    products read, too.
    """
    if saved.marks is None:
        return
    held = saved.marks.where(HELD)
    for steps in (saved.h_old, *inner):
        _put(xp, steps, held, 0)
    if saved.marks.state is not None:
        _put(xp, saved.h_old, saved.marks.where(RESET) & ~held, saved.marks.state[0])


def _put(xp, steps, where, value):
    """``steps[where] = value`` for steps (T, B, F) and a value (B, F) or a number."""
    if isinstance(where, np.ndarray):
        t, b = where.nonzero()  # few, mostly
        steps[t, b] = value[b] if hasattr(value, "shape") else value
    else:
        xp.copyto(steps, value, where=where[:, :, None])
