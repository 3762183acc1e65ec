"""What a call saves where ``memory`` cuts time into segments, and the arrays over all of time that segments fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .._typing import Array
from ..backends.marks import HELD, Marks
from ..backends.records import Gradients
from .segments import lengths_within


@dataclass(slots=True)
class Border:
    """The states of a segment, from which backward computes again what it reads.

    x: (T, B, I), the input of the call. states: for each layer those of its directions, before the segment, or all of
    them, as ``Ops.all_states`` returns them. run: makes the segment's ``SavedLayer`` of every layer, as ``run(layer,
    border, segment, call)``.
    """

    x: Array
    states: list[Any]
    run: Callable[..., list[Any]]

    def rebuild(self, layer, segment, call):
        """The ``SavedLayer`` of every layer."""
        return self.run(layer, self, segment, call)


def without_unread(layer, x, segment, call):
    """A segment of the input x (T, B, I) of a call, zero where no timestep reads it: padding may hold anything, even
    NaN, and must not reach the weights' gradient."""
    y = x if len(call.segments) == 1 else x[segment]
    lengths = lengths_within(call.lengths, segment)
    if call.masked:
        return layer.ops.zero_silent(y.copy(), None, Marks(call.bits[0][segment] & np.uint8(HELD)))
    return y if lengths is None else layer.ops.zero_past_end(y.copy(), lengths)


class Arrived(NamedTuple):
    """Where a backward pass has arrived, for each layer.

    gradients: where those of the weights are added. dstates: for each direction the gradients with respect to its
    state. dresets: likewise to the state that resets give, summed over the timesteps so far, or None.
    """

    gradients: list[Gradients]
    dstates: list[Any]
    dresets: list[Any]


class Whole:
    """An array over all of T timesteps, from those of the segments.

    Layers of a wavefront may still be writing to theirs, so these are copied at the end.
    """

    def __init__(self, layer, segments, T):
        self._layer, self._count, self._T = layer, len(segments), T
        self._late = layer.memory is None
        self._parts, self._array = [], None

    def add(self, segment, part):
        """Take the array (t, B, F) of a segment."""
        if self._count == 1:
            self._array = part
        elif self._late:
            self._parts.append((segment, part))
        else:
            self._copy(segment, part)

    def _copy(self, segment, part):
        if self._array is None:
            self._array = self._layer.ops.empty(self._T, *part.shape[1:], part.dtype)
        self._layer.ops.copy_steps(self._array[segment], part)

    @property
    def array(self):
        """(T, B, F)."""
        for segment, part in self._parts:
            self._copy(segment, part)
        self._parts.clear()
        return self._array
