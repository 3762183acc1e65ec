"""The reference time loop over NumPy or CuPy arrays, and its reverse-time twin."""

from dataclasses import dataclass

import numpy as np

from ..cells import HiddenWeights
from ..dtypes import compute_dtype, upcast


@dataclass
class Saved:
    """What one layer and direction saves between forward and backward.

    x: the layer's input (T, B, I). gates: (T, B, K*H), None after inference; after forward the blocks that the cell
    saves, after backward the gradients with respect to its pre-activations. h (T+1, B, P) and c (T+1, B, H) or None:
    the states in slots. lease: an object that must live as long as these arrays are in use.
    """

    x: object
    gates: object
    h: object
    c: object
    lease: object = None

    def states(self, which, reverse):
        """``h`` or ``c`` by step: (T, B, F), the new states."""
        slots = getattr(self, which)
        return slots[:-1] if reverse else slots[1:]

    def old_h(self, reverse):
        """(T, B, P): the h that each step read."""
        return self.h[1:] if reverse else self.h[:-1]


def input_bias(cell, w):
    """The biases that may be added before the time loop: all but the GRU's b_hn, which r multiplies."""
    bias = w.bias_ih + w.bias_hh
    if "q" in cell.preactivations:
        n = slice(len(bias) // 3 * 2, None)
        bias[n] = w.bias_ih[n]
    return bias


def hidden_weights(cell, w, dtype):
    """``HiddenWeights`` of a direction's ``Weights``, rounded to ``dtype``."""
    bias_n = None
    if w.bias_hh is not None and "q" in cell.preactivations:
        bias_n = w.bias_hh[len(w.bias_hh) // 3 * 2 :, None]
    return HiddenWeights(_rounded(w.hh, dtype), bias_n, None if w.hr is None else _rounded(w.hr, dtype))


def _rounded(weight, dtype):
    """A weight rounded to ``dtype``, in its compute dtype."""
    return upcast(weight.astype(dtype, copy=False))


def sequence_forward(ops, cell, ax, weights, state, lengths=None, reverse=False, save=True):
    """Run the time loop of one cell.

    cell: a record of cells.py; weights: its ``HiddenWeights``.
    ax: from ``empty_steps``; (T, B, K*H) where ``save``, otherwise (T, B, G*H) is enough. On entry columns [0, G*H)
        hold the input pre-activations. On return, where ``save``, it holds what the cell saves for the backward pass.
    state: initial (h (B, P),) or (h, c (B, H)), arrays or numbers. lengths: integers (B,) or None; past its end a
        sequence's state does not change.
    reverse: run from T - 1 to 0.

    Returns h (T+1, B, P); c (T+1, B, H), or None where the cell has no c or not ``save``; and the final state. c is
    float32 for 16-bit layers.
    Slots: step t reads slot t and writes slot t + 1; where ``reverse``, it reads t + 1 and writes t. So the initial
    state is at the end where the loop begins.
    """
    xp, dtype, real = ops.xp, ax.dtype, compute_dtype(ax.dtype)
    T, B, _ = ax.shape
    rows, P = weights.hh.shape
    H = rows // cell.gates
    start = T if reverse else 0
    h = ops.empty_steps(T + 1, B, P, dtype)
    h[start] = state[0]
    c = None
    if cell.states == 2:
        c = ops.empty_steps(T + 1 if save else 2, B, H, real)
        c[start if save else 0] = state[1]
    z, tmp = _step_buffer(ops, B, cell.saved_blocks * H, real), _step_buffer(ops, B, H, real)
    h_computed = None if real == dtype else _step_buffer(ops, B, P, real)  # 16-bit: h' before it is rounded
    axT, hT, cT = _feature_major(ax), _feature_major(h), _feature_major(c)
    held = _ragged_steps(ops, lengths, T)
    c_old = c_new = None
    with np.errstate(over="ignore" if cell.names else None):  # sigmoid_: a closed gate
        for count, t in enumerate(range(T - 1, -1, -1) if reverse else range(T)):
            old, new = (t + 1, t) if reverse else (t, t + 1)
            if cT is not None:
                c_old, c_new = (cT[old], cT[new]) if save else (cT[count % 2], cT[1 - count % 2])
            h_new = hT[new] if h_computed is None else h_computed
            cell.forward(xp, weights, upcast(axT[t, :rows]), upcast(hT[old]), c_old, z, h_new, c_new, tmp)
            if h_computed is not None:
                hT[new] = h_computed
            if held[t] is not None:
                xp.copyto(hT[new], hT[old], where=held[t])
                if cT is not None:
                    xp.copyto(c_new, c_old, where=held[t])
            if save and cell.names:
                axT[t] = z
    end = 0 if reverse else T
    final = (h[end].copy(),)  # the caller may write to it
    if c is not None:
        final += (c[end if save else T % 2].copy(),)
    return h, c if save else None, final


def sequence_backward(ops, cell, gates, weights, h, c, doutput, dstate, lengths=None, reverse=False, hook=None):
    """The reverse-time twin of ``sequence_forward``: back-propagation through time.

    gates: (T, B, K*H). On entry it holds what forward saved; on return the gradients with respect to
        ``cell.preactivations``, zero past the end.
    h, c: the slots of forward. doutput: (T, B, P) or None, ignored past the end.
    dstate: gradients with respect to the final state, (dh (B, P),) or (dh, dc), or None for zeros.
    hook: None, or called as hook(t, dh (P, B), dc (H, B) or None) with the complete gradients with respect to h_t, c_t.

    Returns the gradients with respect to the initial state, shaped as ``state`` and float32 for 16-bit layers; and with
    a projection those with respect to every h_t (T, B, P), zero past the end, otherwise None.
    """
    xp, dtype, real = ops.xp, gates.dtype, compute_dtype(gates.dtype)
    T, B, _ = gates.shape
    P, H = h.shape[2], gates.shape[2] // cell.saved_blocks
    columns = len(cell.preactivations) * H
    z, d = _step_buffer(ops, B, cell.saved_blocks * H, real), _step_buffer(ops, B, columns, real)
    tmp, dh = _step_buffer(ops, B, H, real), _step_buffer(ops, B, P, real)
    dc = None if c is None else _step_buffer(ops, B, H, real)
    for gradient, initial in zip((dh, dc), dstate or (None, None), strict=False):
        if gradient is not None:
            gradient[...] = 0 if initial is None else initial.T
    gatesT, hT, cT = _feature_major(gates), _feature_major(h), _feature_major(c)
    block = max(1, min(T, (1 << 18) // max(1, B * P)))  # timesteps of doutput that are reordered at once
    incoming = None if doutput is None else ops.empty_steps(block, B, P, dtype)
    dh_all = None if weights.hr is None else ops.empty_steps(T, B, P, dtype)
    held = _ragged_steps(ops, lengths, T)
    c_old = c_new = None
    for count, t in enumerate(range(T) if reverse else range(T - 1, -1, -1)):
        old, new = (t + 1, t) if reverse else (t, t + 1)
        if cT is not None:
            c_old, c_new = cT[old], cT[new]
        if incoming is not None:
            if count % block == 0:
                first = t if reverse else max(0, t - block + 1)
                last = min(T, t + block) if reverse else t + 1
                ops.copy_steps(incoming[: last - first], doutput[first:last])
            if held[t] is None:
                xp.add(dh, upcast(incoming[t - first].T), out=dh)
            else:
                xp.add(dh, xp.where(held[t], 0, upcast(incoming[t - first].T)), out=dh)
        if held[t] is not None:
            dh_held, dc_held = dh.copy(), None if dc is None else dc.copy()
        if dh_all is not None:
            dh_all[t] = dh.T if held[t] is None else xp.where(held[t], 0, dh).T
        z[...] = gatesT[t]
        step_hook = _ignore if hook is None else _timestep_hook(xp, hook, t, held[t])
        cell.backward(xp, weights, z, upcast(hT[old]), c_old, upcast(hT[new]), c_new, dh, dc, d, tmp, step_hook)
        if held[t] is not None:  # the state did not change, so neither does its gradient
            xp.copyto(dh, dh_held, where=held[t])
            if dc is not None:
                xp.copyto(dc, dc_held, where=held[t])
            xp.copyto(d, 0, where=held[t])
        gatesT[t, :columns] = d
    return tuple(part.T for part in (dh, dc) if part is not None), dh_all


def _step_buffer(ops, B, F, dtype):
    """Scratch memory (F, B) of one timestep, in the memory order of ``empty_steps``."""
    return ops.empty_steps(1, B, F, dtype)[0].T


def _feature_major(steps):
    """(T, B, F) as (T, F, B), the order in which a cell reads a step; None stays None."""
    return None if steps is None else steps.transpose(0, 2, 1)


def _ragged_steps(ops, lengths, T):
    """For each step, the boolean (B,) of sequences that are past their end, or None where there are none."""
    if lengths is None:
        return [None] * T
    held = np.arange(T)[:, None] >= lengths
    on_device = ops.xp.asarray(held)
    return [on_device[t] if some else None for t, some in enumerate(held.any(axis=1))]


def _ignore(dh, dc):
    """The hook where there is none."""


def _timestep_hook(xp, hook, t, held):
    """A cell's ``hook(dh, dc)`` that adds the timestep, and zeros for sequences past their end."""

    def watched(dh, dc):
        if held is not None:
            dh, dc = xp.where(held, 0, dh), None if dc is None else xp.where(held, 0, dc)
        hook(t, dh, dc)

    return watched
