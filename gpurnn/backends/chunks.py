"""Chunks of timesteps: products over all of time are made chunk by chunk.

A sum over T*B rows depends in its last bits on the order of addition, and a product of BLAS on how many rows it gets.
So every such product is cut at the same timesteps, whether a call runs in one piece or in segments that are whole
chunks: the gradients are equal to the bit.
"""

import numpy as np

from .records import flat

ROWS, ROWS_OF_GPU = 1 << 12, 1 << 15  # of a chunk; fewer cost time, more cost memory
_TILE_FEATURES, _TILE_ROWS = 128, 16  # tile of a transposing copy, to rows and from rows: it halves the time


def chunk_steps(rows, B):
    """Timesteps of a chunk of about so many rows. A timestep alone runs by other code, so there are at least two."""
    return max(2, -(-rows // max(B, 1)))


def time_chunks(T, steps, reverse=False):
    """Slices of T timesteps, at multiples of ``steps``, in the order in which a backward pass reaches them. A timestep
    that would be left alone joins the chunk before it."""
    starts = list(range(0, max(T, 1), steps))
    if len(starts) > 1 and T - starts[-1] == 1:
        starts.pop()
    chunks = [slice(start, stop) for start, stop in zip(starts, [*starts[1:], T], strict=True)]
    return chunks if reverse else chunks[::-1]


class InChunks:
    """The part of ``Ops`` that cuts time into chunks."""

    def trim(self):
        """Return the memory of segments of another length to the system: those that follow cannot use it."""

    @property
    def chunk_rows(self):
        """Rows of a product over time that are multiplied at once."""
        return ROWS if self.xp is np else ROWS_OF_GPU

    def time_chunks(self, T, B, reverse=False):
        """The chunks of T timesteps of B sequences, as the function ``time_chunks`` lists them."""
        return time_chunks(T, chunk_steps(self.chunk_rows, B), reverse)

    def multiply_inputs(self, x, weight_ih, ax):
        """``ax = W_ih x`` for all timesteps. x: (T, B, I). ax: (T, B, G*H)."""
        weight = weight_ih.astype(x.dtype, copy=False).T
        for chunk in self.time_chunks(*x.shape[:2]):
            self.product(flat(x[chunk]), weight, flat(ax[chunk]))

    def copy_steps(self, out, steps):
        """``out[...] = steps`` for two (T, B, F) arrays of any memory order, in tiles where the orders differ."""
        T, B, F = out.shape
        to_rows, from_rows = (array.strides[2] <= array.strides[1] for array in (out, steps))
        if self.xp is not np or to_rows == from_rows:
            out[...] = steps
        elif to_rows:
            for f in range(0, F, _TILE_FEATURES):
                out[:, :, f : f + _TILE_FEATURES] = steps[:, :, f : f + _TILE_FEATURES]
        else:
            for t in range(T):
                for b in range(0, B, _TILE_ROWS):
                    out[t, b : b + _TILE_ROWS] = steps[t, b : b + _TILE_ROWS]
