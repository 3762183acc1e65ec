"""States and their gradients as compiled code reads them."""

import numpy as np


def state_arrays(state, B, P, H, dtype, real):
    """h (B, P) of ``dtype``, and the other states in one array (S-1, B, H) of ``real``."""
    h, others = np.empty((B, P), dtype), np.empty((len(state) - 1, B, H), real)
    for to, part in zip((h, *others), state, strict=True):
        to[...] = part
    return h, others


def own_gradient(final, shape, dtype):
    """The gradient with respect to a final state, as an array of its own; zeros for None."""
    return np.zeros(shape, dtype) if final is None else np.array(final, dtype, order="C")
