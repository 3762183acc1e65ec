"""The reference time loop over NumPy or CuPy arrays, and its reverse-time twin."""

import numpy as np

from ..cells import HiddenWeights, Scratch
from ..dtypes import compute_dtype, upcast
from .batch_statistics import BatchStep
from .marks import after_reset, feature_major_state, step_marks
from .records import PassGradients, PassOptions, SavedPass

_PLAIN = PassOptions()
INCOMING = 1 << 18  # numbers of doutput that the backward pass reorders at once, about


def input_bias(cell, w):
    """The biases that may be added before the time loop: b_ih, and b_hh except where the cell holds it apart."""
    bias = w.bias_ih + w.bias_hh
    for rows in _apart(cell, len(bias)):
        bias[rows] = w.bias_ih[rows]
    return bias


def _apart(cell, rows):
    """The rows of each gate of ``Cell.apart`` in a bias of so many rows."""
    H = rows // len(cell.gates)
    return [slice(place * H, (place + 1) * H) for place in cell.apart]


def hidden_weights(cell, w, dtype):
    """``HiddenWeights`` of a direction's ``Weights``, rounded to ``dtype``."""
    apart = None
    if w.bias_hh is not None and cell.apart:
        apart = [w.bias_hh[rows] for rows in _apart(cell, len(w.bias_hh))]
        apart = (apart[0] if len(apart) == 1 else np.concatenate(apart))[:, None]
    H = len(w.ih) // len(cell.gates)
    own = tuple(vector[:, None] for array in w.own for vector in array.reshape(-1, H))
    hh, hr = (None if weight is None else _rounded(weight, dtype) for weight in (w.hh, w.hr))
    return HiddenWeights(hh, apart, hr, own)


def _rounded(weight, dtype):
    """A weight rounded to ``dtype``, in its compute dtype."""
    return upcast(weight.astype(dtype, copy=False))


def sequence_forward(ops, cell, ax, weights, state, lengths=None, options=_PLAIN):
    """Run the time loop of one cell.

    cell: a ``Cell``; weights: its ``HiddenWeights``.
    ax: from ``empty_steps``; (T, B, K*H) where ``save``, otherwise (T, B, G*H) is enough. On entry columns [0, G*H)
        hold the input pre-activations. Its memory becomes ``SavedPass.gates``.
    state: initial h (B, P) and the other states (B, H), arrays or numbers. lengths: integers (B,) or None; past its
        end a sequence's state does not change.
    options: ``PassOptions``, whose ``marks`` know the lengths, too.

    Returns a ``SavedPass`` and the final state. States other than h are saved in float32 for 16-bit layers, and only
    where ``save``.
    """
    xp, dtype, real = ops.xp, ax.dtype, compute_dtype(ax.dtype)
    reverse, save, masks, statistics, marks = options
    T, B, columns = ax.shape
    H = columns // (cell.saved_blocks if save else len(cell.gates))
    rows, P = len(cell.gates) * H, H if weights.hh is None else weights.hh.shape[1]
    start = T if reverse else 0
    h = ops.empty_steps(T + 1, B, P, dtype)
    h[start] = state[0]
    others = tuple(ops.empty_steps(T + 1 if save else 2, B, H, real) for _ in cell.states[1:])
    for steps, first in zip(others, state[1:], strict=True):
        steps[start if save else 0] = first
    scratch = Scratch(_step_buffer(ops, B, cell.saved_blocks * H, real), _step_buffer(ops, B, H, real))
    scratch.z[...] = 0  # blocks that the cell leaves empty are saved, too
    h_computed = None if real == dtype else _step_buffer(ops, B, P, real)  # 16-bit: h' before it is rounded
    gates = ax  # timestep by timestep what the cell saves takes the place of its pre-activations
    axT, gatesT, hT = _feature_major(ax), _feature_major(gates), _feature_major(h)
    othersT, saves = [_feature_major(steps) for steps in others], len(cell.saved) * H if save else 0
    (held, reset, _), firsts = step_marks(xp, marks, lengths, T), feature_major_state(marks)
    drawn = _step_masks(masks, T, real)
    with _quiet(held, over="ignore" if cell.saved else None):  # sigmoid_: a closed gate
        for count, t in enumerate(range(T - 1, -1, -1) if reverse else range(T)):
            old, new = (t + 1, t) if reverse else (t, t + 1)
            old_slot, new_slot = (old, new) if save else (count % 2, 1 - count % 2)
            before = after_reset(xp, reset[t], [hT[old], *(s[old_slot] for s in othersT)], firsts)
            after = [hT[new], *(s[new_slot] for s in othersT)]
            h_new = hT[new] if h_computed is None else h_computed
            states = (upcast(before[0]), *before[1:]), (h_new, *after[1:])
            batch = _batch_step(xp, statistics, count, held[t])
            step_scratch = scratch._replace(masks=drawn(t), batch=batch)
            cell.forward(xp, weights, upcast(axT[t, :rows]), *states, step_scratch)
            if batch is not None:
                statistics.add(xp, count, batch.found, B if held[t] is None else B - int(held[t].sum()))
            if h_computed is not None:
                hT[new] = h_computed
            if held[t] is not None:
                for new_state, old_state in zip(after, before, strict=True):
                    xp.copyto(new_state, old_state, where=held[t])
            if saves:
                gatesT[t, :saves] = scratch.z[:saves]
    end = 0 if reverse else T
    final = (h[end].copy(), *(steps[end if save else T % 2].copy() for steps in others))  # the caller may write to it
    return SavedPass(gates if save else None, h, others if save else (), reverse, masks, statistics, marks), final


def sequence_backward(ops, cell, saved, weights, doutput, dstate, lengths=None, hook=None):
    """The reverse-time twin of ``sequence_forward``: back-propagation through time.

    saved: the ``SavedPass`` of forward, whose ``gates`` are overwritten. doutput: (T, B, P) or None, ignored past the
        end.
    dstate: gradients with respect to the final state, dh (B, P) and those of the others, or None for zeros.
    hook: None, or called as hook(t, dh (P, B), ...) with the complete gradients with respect to all states after t.

    Returns ``PassGradients``.
    """
    xp, gates, reverse = ops.xp, saved.gates, saved.reverse
    dtype, real = gates.dtype, compute_dtype(gates.dtype)
    T, B, _ = gates.shape
    P, H = saved.h.shape[2], gates.shape[2] // cell.saved_blocks
    columns, saves = len(cell.preactivations) * H, len(cell.saved) * H
    z, d = _step_buffer(ops, B, cell.saved_blocks * H, real), _step_buffer(ops, B, columns, real)
    scratch = Scratch(z, _step_buffer(ops, B, H, real), d)
    # the gradients with respect to the state where the loop has arrived
    running = (_step_buffer(ops, B, P, real), *(_step_buffer(ops, B, H, real) for _ in saved.others))
    for gradient, final in zip(running, dstate or (None,) * len(running), strict=True):
        gradient[...] = 0 if final is None else final.T
    dh = running[0]
    dgates = gates  # timestep by timestep the gradients take the place of what was saved
    gatesT, dgatesT, hT = (_feature_major(steps) for steps in (gates, dgates, saved.h))
    othersT = [_feature_major(steps) for steps in saved.others]
    incoming = _Incoming(ops, doutput, saved)
    dh_steps = None if weights.hr is None else ops.empty_steps(T, B, P, dtype)
    (held, reset, silent), firsts = step_marks(xp, saved.marks, lengths, T), feature_major_state(saved.marks)
    drawn, dreset = _step_masks(saved.masks, T, real), None if firsts is None else [d.copy() for d in running]
    for total, later in zip(dreset or (), saved.dreset or (None,) * len(running), strict=False):
        total[...] = 0 if later is None else later.T
    for t in range(T) if reverse else range(T - 1, -1, -1):
        old, new = (t + 1, t) if reverse else (t, t + 1)
        if doutput is not None:
            arrived = upcast(incoming.at(t))
            xp.add(dh, arrived if silent[t] is None else xp.where(silent[t], 0, arrived), out=dh)
        if held[t] is not None:
            arriving = [gradient.copy() for gradient in running]
        if dh_steps is not None:
            dh_steps[t] = dh.T if held[t] is None else xp.where(held[t], 0, dh).T
        z[:saves] = gatesT[t, :saves]  # nothing was written to the rest, and Arm's NumPy warns of such bits
        before, after = ([hT[slot], *(steps[slot] for steps in othersT)] for slot in (old, new))
        before = after_reset(xp, reset[t], before, firsts)
        states = ((upcast(parts[0]), *parts[1:]) for parts in (before, after))
        batch = _batch_step(xp, saved.statistics, T - 1 - t if reverse else t, held[t])
        step_scratch = scratch._replace(masks=drawn(t), batch=batch)
        with _quiet(held):
            cell.backward(xp, weights, *states, running, step_scratch, _timestep_hook(xp, hook, t, held[t]))
        if held[t] is not None:  # the state did not change, so neither does its gradient
            for gradient, unchanged in zip(running, arriving, strict=True):
                xp.copyto(gradient, unchanged, where=held[t])
            xp.copyto(d, 0, where=held[t])
        dgatesT[t, :columns] = d
        if reset[t] is not None:  # the state of the timestep before has no part in what comes after
            for total, gradient in zip(dreset, running, strict=True):
                total += xp.where(reset[t], gradient, 0)
                xp.copyto(gradient, 0, where=reset[t])
    dreset = None if dreset is None else tuple(part.T for part in dreset)
    return PassGradients(dgates, tuple(part.T for part in running), dh_steps, dreset)


class _Incoming:
    """The gradients with respect to the output, reordered a block of timesteps at once, as the loop arrives there."""

    def __init__(self, ops, doutput, saved):
        T, B, P = saved.h_new.shape
        self.ops, self.doutput, self.reverse = ops, doutput, saved.reverse
        self.count = max(1, min(T, INCOMING // max(1, B * P)))  # timesteps of a block
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
    """(T, B, F) as (T, F, B), the order in which a cell reads a step."""
    return steps.transpose(0, 2, 1)


def _batch_step(xp, statistics, count, held):
    """The ``BatchStep`` of the count-th timestep; None for a cell that does not normalize over the batch."""
    if statistics is None:
        return None
    return BatchStep(None if held is None else xp.logical_not(held), statistics.at(count))


def _quiet(held, **more):
    """NumPy's warnings, silenced for what is computed where a sequence is held: it is not used."""
    some = any(step is not None for step in held)
    return np.errstate(**dict.fromkeys(("over", "divide", "invalid"), "ignore") if some else more)


def _step_masks(masks, T, real):
    """A function of t: the masks of that timestep as numbers (M*H, B), or None without draws."""
    if masks is None:
        return lambda t: None
    if len(masks) == 1 < T:
        same = masks[0].T.astype(real)
        return lambda t: same
    return lambda t: masks[t].T.astype(real)


def _ignore(*dstate):
    """The hook where there is none."""


def _timestep_hook(xp, hook, t, held):
    """A cell's ``hook(*dstate)`` that adds the timestep, and zeros for sequences past their end."""
    if hook is None:
        return _ignore

    def watched(*dstate):
        hook(t, *(dstate if held is None else [xp.where(held, 0, part) for part in dstate]))

    return watched
