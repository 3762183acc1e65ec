"""The time loop of a layer in inference: what is the same in every call of one shape is found once."""

from operator import is_

import numpy as np

from ...dtypes import compute_dtype
from . import packing, sharing
from .native import NativeWeights, Pass, address

_LOOPS = 64  # most shapes that are remembered with the weights


class InferenceLoop:
    """The time loop of one layer for x (T, B, I) without lengths, marks and masks, in which nothing is saved.

    A call has memory of its own, so that threads may run one loop at once. ready: for each direction the
    ``NativeWeights``. The first remembers this loop, so the loop holds only the others: a cycle would hold the weights
    until Python looks for cycles.
    """

    def __init__(self, ops, cell, ready, shape, directions, dtype):
        self._ops, self._cell, self._shape, self._dtype, self._others = ops, cell, shape, dtype, ready[1:]
        (T, B, I), D = shape, len(directions)
        templates = [one.template(cell, T, B, dtype, back, False) for one, back in zip(ready, directions, strict=True)]
        self._passes = (Pass * D)(*templates)
        for job in self._passes:
            job.I, job.output_row = I, D * job.P
        self._work = sharing.multiplications(cell, T * B * job.H, job.P, I)

    def fits(self, ready):
        """Whether it was made of these, but for the first."""
        return all(map(is_, self._others, ready[1:]))

    def run(self, ready, x, states):
        """For each direction the final states; and the output (T, B, D*P).

        x: (T, B, I). states: for each direction those it begins with.
        """
        ops, cell, dtype, jobs = self._ops, self._cell, self._dtype, type(self._passes).from_buffer_copy(self._passes)
        (T, B, _), D = self._shape, len(jobs)
        output = ops.empty(T, B, D * jobs[0].P, dtype) if D > 1 else None
        x, alive, ends = np.ascontiguousarray(x), [], []
        for d, (job, one, state) in enumerate(zip(jobs, ready, states, strict=True)):
            H, P, first = job.H, job.P, T if job.reverse else 0
            gates, h = ops.empty(1, B, job.gates_row, dtype), ops.empty(T + 1, B, P, dtype)
            h[first] = state[0]
            others = ops._state_slots(cell, 2, B, H, compute_dtype(dtype))
            for slots, part in zip(others, state[1:], strict=True):
                slots[0] = part
            job.x, job.gates, job.h = address(x), address(gates), address(h)
            if others:  # one after another in one array
                job.others, job.state_stride = address(others[0]), others[0].size
            if D > 1:
                job.output = address(output) + d * P * dtype.itemsize
            packed = packing.packed_weights(ops, cell, one, job)
            if packed is not None:
                job.packed = packed.address
            alive.append((gates, packed))
            ends.append((h[T - first], [slots[T % 2] for slots in others]))
        ops._run_time_loop(cell, jobs, dtype, self._work, back=False)
        if D == 1:  # the output is every h but the initial one
            output = h[:-1] if first else h[1:]
        return [(last.copy(), *(part.copy() for part in rest)) for last, rest in ends], output


def run_inference(ops, cell, x, weights, states, options):
    """As ``Ops.layer_forward`` without lengths, with None for the ``SavedLayer``.

    Returns None where a call has something that such a loop has not.
    """
    if not x.size or options.save or options.masks is not None or options.marks is not None:
        return None
    ready = [w.ready or NativeWeights(w) for w in weights]
    first = ready[0]
    key = x.shape, options.directions, cell, x.dtype
    loop = first.loops.get(key)
    if loop is None or not loop.fits(ready):
        copied = any(w.ready is None for w in weights)  # for one call only
        if copied or any(w.own or w.reads is not None for w in weights) or not ops._compiled(cell, x.dtype):
            return None
        if len(first.loops) >= _LOOPS:
            first.loops.clear()
        loop = first.loops[key] = InferenceLoop(ops, cell, ready, x.shape, options.directions, x.dtype)
    return None, *loop.run(ready, x, states)
