"""The reference time loop over NumPy or CuPy arrays, and its reverse-time twin."""

import numpy as np

from ..cells import HiddenWeights, Scratch, State
from ..dtypes import compute_dtype, upcast
from .records import PassGradients, SavedPass


def input_bias(cell, w):
    """The biases that may be added before the time loop: b_ih, and b_hh except where the cell holds it apart."""
    bias = w.bias_ih + w.bias_hh
    H = len(bias) // len(cell.gates)
    for place in cell.apart:
        rows = slice(place * H, (place + 1) * H)
        bias[rows] = w.bias_ih[rows]
    return bias


def hidden_weights(cell, w, dtype):
    """``HiddenWeights`` of a direction's ``Weights``, rounded to ``dtype``."""
    apart = None
    if w.bias_hh is not None and cell.apart:
        (place,), H = cell.apart, len(w.bias_hh) // len(cell.gates)
        apart = w.bias_hh[place * H : (place + 1) * H, None]
    return HiddenWeights(_rounded(w.hh, dtype), apart, None if w.hr is None else _rounded(w.hr, dtype))


def _rounded(weight, dtype):
    """A weight rounded to ``dtype``, in its compute dtype."""
    return upcast(weight.astype(dtype, copy=False))


def sequence_forward(ops, cell, ax, weights, state, lengths=None, reverse=False, save=True):
    """Run the time loop of one cell.

    cell: a ``Cell``; weights: its ``HiddenWeights``.
    ax: from ``empty_steps``; (T, B, K*H) where ``save``, otherwise (T, B, G*H) is enough. On entry columns [0, G*H)
        hold the input pre-activations. Its memory becomes ``SavedPass.gates``.
    state: initial (h (B, P),) or (h, c (B, H)), arrays or numbers. lengths: integers (B,) or None; past its end a
        sequence's state does not change.
    reverse: run from T - 1 to 0.

    Returns a ``SavedPass`` and the final state. c is saved in float32 for 16-bit layers, and only where ``save``.
    """
    xp, dtype, real = ops.xp, ax.dtype, compute_dtype(ax.dtype)
    T, B, _ = ax.shape
    rows, P = weights.hh.shape
    H = rows // len(cell.gates)
    start = T if reverse else 0
    h = ops.empty_steps(T + 1, B, P, dtype)
    h[start] = state[0]
    c = None
    if "c" in cell.states:
        c = ops.empty_steps(T + 1 if save else 2, B, H, real)
        c[start if save else 0] = state[1]
    scratch = Scratch(_step_buffer(ops, B, cell.saved_blocks * H, real), _step_buffer(ops, B, H, real))
    h_computed = None if real == dtype else _step_buffer(ops, B, P, real)  # 16-bit: h' before it is rounded
    gates = ax  # timestep by timestep what the cell saves takes the place of its pre-activations
    axT, gatesT, hT, cT = _feature_major(ax), _feature_major(gates), _feature_major(h), _feature_major(c)
    held = _ragged_steps(ops, lengths, T)
    c_old = c_new = None
    with np.errstate(over="ignore" if cell.saved else None):  # sigmoid_: a closed gate
        for count, t in enumerate(range(T - 1, -1, -1) if reverse else range(T)):
            old, new = (t + 1, t) if reverse else (t, t + 1)
            if cT is not None:
                c_old, c_new = (cT[old], cT[new]) if save else (cT[count % 2], cT[1 - count % 2])
            h_new = hT[new] if h_computed is None else h_computed
            states = State(upcast(hT[old]), c_old), State(h_new, c_new)
            cell.forward(xp, weights, upcast(axT[t, :rows]), *states, scratch)
            if h_computed is not None:
                hT[new] = h_computed
            if held[t] is not None:
                xp.copyto(hT[new], hT[old], where=held[t])
                if cT is not None:
                    xp.copyto(c_new, c_old, where=held[t])
            if save and cell.saved:
                gatesT[t] = scratch.z
    end = 0 if reverse else T
    final = (h[end].copy(),)  # the caller may write to it
    if c is not None:
        final += (c[end if save else T % 2].copy(),)
    return SavedPass(gates if save else None, h, c if save else None, reverse), final


def sequence_backward(ops, cell, saved, weights, doutput, dstate, lengths=None, hook=None):
    """The reverse-time twin of ``sequence_forward``: back-propagation through time.

    saved: the ``SavedPass`` of forward, whose ``gates`` are overwritten. doutput: (T, B, P) or None, ignored past the
        end.
    dstate: gradients with respect to the final state, (dh (B, P),) or (dh, dc), or None for zeros.
    hook: None, or called as hook(t, dh (P, B), dc (H, B) or None) with the complete gradients with respect to h_t, c_t.

    Returns ``PassGradients``.
    """
    xp, gates, reverse = ops.xp, saved.gates, saved.reverse
    dtype, real = gates.dtype, compute_dtype(gates.dtype)
    T, B, _ = gates.shape
    P, H = saved.h.shape[2], gates.shape[2] // cell.saved_blocks
    columns = len(cell.preactivations) * H
    z, d = _step_buffer(ops, B, cell.saved_blocks * H, real), _step_buffer(ops, B, columns, real)
    scratch, dh = Scratch(z, _step_buffer(ops, B, H, real), d), _step_buffer(ops, B, P, real)
    dc = None if saved.c is None else _step_buffer(ops, B, H, real)
    running = State(dh, dc)  # the gradients with respect to the state where the loop has arrived
    for gradient, final in zip(running, dstate or (None, None), strict=False):
        if gradient is not None:
            gradient[...] = 0 if final is None else final.T
    dgates = gates  # timestep by timestep the gradients take the place of what was saved
    gatesT, dgatesT, hT, cT = (_feature_major(steps) for steps in (gates, dgates, saved.h, saved.c))
    incoming = _Incoming(ops, doutput, saved)
    dh_steps = None if weights.hr is None else ops.empty_steps(T, B, P, dtype)
    held = _ragged_steps(ops, lengths, T)
    c_old = c_new = None
    for t in range(T) if reverse else range(T - 1, -1, -1):
        old, new = (t + 1, t) if reverse else (t, t + 1)
        if cT is not None:
            c_old, c_new = cT[old], cT[new]
        if doutput is not None:
            arrived = upcast(incoming.at(t))
            xp.add(dh, arrived if held[t] is None else xp.where(held[t], 0, arrived), out=dh)
        if held[t] is not None:
            dh_held, dc_held = dh.copy(), None if dc is None else dc.copy()
        if dh_steps is not None:
            dh_steps[t] = dh.T if held[t] is None else xp.where(held[t], 0, dh).T
        z[...] = gatesT[t]
        states = State(upcast(hT[old]), c_old), State(upcast(hT[new]), c_new)
        cell.backward(xp, weights, *states, running, scratch, _timestep_hook(xp, hook, t, held[t]))
        if held[t] is not None:  # the state did not change, so neither does its gradient
            xp.copyto(dh, dh_held, where=held[t])
            if dc is not None:
                xp.copyto(dc, dc_held, where=held[t])
            xp.copyto(d, 0, where=held[t])
        dgatesT[t, :columns] = d
    return PassGradients(dgates, tuple(part.T for part in running if part is not None), dh_steps)


class _Incoming:
    """The gradients with respect to the output, reordered a block of timesteps at once, as the loop arrives there."""

    def __init__(self, ops, doutput, saved):
        T, B, P = saved.h_new.shape
        self.ops, self.doutput, self.reverse = ops, doutput, saved.reverse
        self.count = max(1, min(T, (1 << 18) // max(1, B * P)))  # timesteps of a block
        self.block = None if doutput is None else ops.empty_steps(self.count, B, P, saved.gates.dtype)
        self.first = self.last = 0  # the timesteps that the block holds

    def at(self, t):
        """(P, B), of timestep t."""
        if not self.first <= t < self.last:
            self.first = t if self.reverse else max(0, t - self.count + 1)
            self.last = min(len(self.doutput), self.first + self.count) if self.reverse else t + 1
            self.ops.copy_steps(self.block[: self.last - self.first], self.doutput[self.first : self.last])
        return self.block[t - self.first].T


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
    if hook is None:
        return _ignore

    def watched(dh, dc):
        if held is not None:
            dh, dc = xp.where(held, 0, dh), None if dc is None else xp.where(held, 0, dc)
        hook(t, dh, dc)

    return watched
