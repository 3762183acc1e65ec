"""Resets and masks: from the caller's booleans to the ``Marks`` of each direction."""

from __future__ import annotations

import numpy as np

from ..backends.marks import HELD, RESET, SHOWN, Marks
from ..errors import DtypeError, ShapeError, described


def check_steps(layer, given, T, B, single, name):
    """``reset`` or ``mask`` as booleans (T, B) of the layer's backend; None for None. Raises ShapeError, DtypeError."""
    if given is None:
        return None
    steps = layer.ops.asarray(given, name)
    if steps.dtype.kind != "b":
        hint = f": {name} = {name}.astype(bool)" if hasattr(given, "astype") else ""
        raise DtypeError(f"{name}: expected booleans, got {getattr(given, 'dtype', None) or described(given)}{hint}")
    axes, shape = ("(T,)", (T,)) if single else ("(B, T)", (B, T)) if layer.batch_first else ("(T, B)", (T, B))
    if steps.shape != shape:
        raise ShapeError(f"{name}: expected one boolean for each timestep, {axes} = {shape}, got {steps.shape}")
    if single:
        return steps[:, None]
    return steps.T if layer.batch_first else steps


def direction_bits(layer, reset, mask, lengths, shape):
    """For each direction the ``bits`` of its ``Marks``, but SHOWN; None where nothing is reset or held.

    A reset is a border between two timesteps, which each direction crosses from its own side.
    """
    if reset is None and mask is None:
        return None
    xp, T = layer.xp, shape[0]
    held = xp.zeros(shape, bool) if mask is None else ~mask
    if lengths is not None:
        inside = xp.asarray(np.arange(T)[:, None] < lengths)
        held = held | ~inside
        reset = None if reset is None else reset & inside
    found = []
    for backwards in layer._directions:
        bits = held * np.uint8(HELD)
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
    shown = layer.masked_output == "repeat" and k == layer.num_layers - 1
    parts = [one[segment] | np.uint8(SHOWN) if shown else one[segment] for one in bits]
    strands = len(layer._strands)
    own = [None] * strands if states is None else states[k * strands : (k + 1) * strands]
    return tuple(Marks(parts[strand // layer.heads], state) for strand, state in enumerate(own))
