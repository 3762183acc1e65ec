"""LoopMarks: the masks and resets of a time loop, as its kernels read them."""

import numpy as np

from ..marks import RESET


class LoopMarks:
    """The ``Marks`` of a ``Loop``, all directions in each array.

    given: for each direction its ``Marks``. bits: (D, T, B) uint8. read: what kernels read of them: bits, and what
    resets give, h (D, B, P) and the other states (D, S-1, B, H) or None. sums: the gradients with respect to that,
    which the backward pass adds up.
    """

    def __init__(self, loop):
        xp, plan, shape = loop.ops.xp, loop.plan, loop.plan.shape
        self.xp, self.directions, self.T = xp, shape.directions, shape.T
        self.given = self.bits = self.sums = None
        self.sizes = [(plan.D, shape.B, shape.P), None]
        if plan.others_shape is not None:
            self.sizes[1] = (plan.D, plan.others_shape[1], shape.B, shape.H)
        self.h, self.others = self._empty(plan.dtype, plan.real)
        self.real = plan.real

    def _empty(self, *dtypes):
        return [size and self.xp.empty(size, dtype) for size, dtype in zip(self.sizes, dtypes, strict=True)]

    @property
    def read(self):
        return self.bits, self.h, self.others

    def load(self, marks, recorded):
        """Take the ``Marks`` of each direction. recorded: whether the arrays must stay where they are."""
        self.given = marks
        if len(marks) == 1 and not recorded and marks[0].bits.size:
            self.bits = self.xp.ascontiguousarray(marks[0].bits)[None]
        else:
            if self.bits is None:
                self.bits = self.xp.empty((len(marks), *marks[0].bits.shape), marks[0].bits.dtype)
            for copy, one in zip(self.bits, marks, strict=True):
                copy[...] = one.bits
        for d, one in enumerate(marks):
            if one.state is not None:
                for place, part in zip(self._states(self.h, self.others, d), one.state, strict=True):
                    place[...] = part

    @staticmethod
    def _states(h, others, d):
        """The parts of one direction: h, and each other state."""
        return h[d], *(() if others is None else others[d])

    def reset_first(self, h_now):
        """Of schedule ``step``: make ``h_now`` (D, B, P) what the first timestep reads."""
        for d, where in self._first():
            self.xp.copyto(h_now[d], self.h[d], where=where)

    def _first(self):
        """For each direction, where something is reset: itself, and (B, 1) booleans: whether its first timestep is."""
        for d, (reverse, one) in enumerate(zip(self.directions, self.given, strict=True)):
            if self.T and one.state is not None:
                yield d, (self.bits[d, -1 if reverse else 0, :, None] & np.uint8(RESET)) != 0

    def start_backward(self, recorded, later):
        """Set the sums to those of later segments, ``SavedPass.dreset`` of each direction, or zero. A loop that is not
        recorded gets new ones, as the caller takes them."""
        if self.sums is None or not recorded:
            self.sums = self._empty(self.real, self.real)
        for d, parts in enumerate(later):
            totals = self._states(*self.sums, d)
            for total, part in zip(totals, parts or (0,) * len(totals), strict=True):
                total[...] = part

    def reset_last(self, dh, dothers):
        """Of schedule ``step``: after its last launch, what a timestep before it would have done with a reset."""
        for d, where in self._first():
            for total, gradient in zip(self._states(*self.sums, d), self._states(dh, dothers, d), strict=True):
                total += self.xp.where(where, gradient, 0)
                self.xp.copyto(gradient, 0, where=where)

    def gradients(self, d, recorded):
        """As ``PassGradients.dreset``, for one direction."""
        if self.given[d].state is None:
            return None
        return tuple(part.copy() if recorded else part for part in self._states(*self.sums, d))


class _NoMarks:
    """The marks of a loop whose calls have none."""

    given, read, sums = None, (None, None, None), (None, None)

    def reset_first(self, h_now):
        """Nothing is reset."""

    def start_backward(self, recorded, later):
        """There are no sums."""

    def reset_last(self, dh, dothers):
        """Nothing is reset."""

    def gradients(self, d, recorded):
        """None."""


NO_MARKS = _NoMarks()
