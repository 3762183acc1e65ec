"""Resets and masks: from the caller's booleans to the ``Marks`` of each direction."""

from __future__ import annotations

import numpy as np

from ..backends.marks import HELD, RESET, SHOWN, Marks


def direction_bits(layer, reset, mask, lengths, shape):
    """For each direction the ``bits`` of its ``Marks``; None where nothing is reset or held.

    A reset is a border between two timesteps, which each direction crosses from its own side.
    """
    if reset is None and mask is None:
        return None
    xp, T = layer.xp, shape[0]
    masked = HELD | SHOWN if layer.masked_output == "repeat" else HELD
    plain = xp.zeros(shape, np.uint8) if mask is None else ~mask * np.uint8(masked)
    if lengths is not None:
        inside = xp.asarray(np.arange(T)[:, None] < lengths)
        plain = xp.where(inside, plain, np.uint8(HELD))
        reset = None if reset is None else reset & inside
    found = []
    for backwards in layer._directions:
        bits = plain.copy()
        if reset is not None and backwards:
            bits[:-1] |= reset[1:] * np.uint8(RESET)
        elif reset is not None:
            bits |= reset * np.uint8(RESET)
        found.append(xp.ascontiguousarray(bits))
    return found


def layer_marks(layer, bits, states, k, segment):
    """The ``Marks`` of each strand of layer ``k`` in a segment of time, or None.

    bits: from ``direction_bits``. states: for each strand the state that a reset gives, or None without resets.
    """
    if bits is None:
        return None
    parts = [one[segment] for one in bits]
    if layer.masked_output == "repeat" and k < layer.num_layers - 1:  # nothing of a stack reads what is shown
        parts = [one & np.uint8(HELD | RESET) for one in parts]
    strands = len(layer._strands)
    own = [None] * strands if states is None else states[k * strands : (k + 1) * strands]
    return tuple(Marks(parts[strand // layer.heads], state) for strand, state in enumerate(own))
