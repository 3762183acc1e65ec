"""Two directions where ``memory`` cuts time: layer by layer, and each direction segment by segment in its own order.

A layer needs the whole output of the one below before it can begin, so the inputs of all layers are saved whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from .._typing import Array
from ..backends.records import RunOptions
from .between import to_next, with_residual
from .checkpoints import without_unread
from .dropout import drop, dropped_weights, masks_within
from .marks import layer_marks
from .segments import in_order, lengths_within, steps_of, trimmed


@dataclass(slots=True)
class SavedInput:
    """What a layer saves: its input x (T, B, I), and for each strand the states of each segment, in the order of its
    time loop: those before it, or all."""

    x: Array
    borders: list[list[Any]]


def forward_by_direction(layer, x, initial, call):
    """The output (T, B, D*P) and the final states of a call; fills ``call.saved``."""
    y, finals = x, []
    for k in range(layer.num_layers):
        below, borders, silent = y, [], _silent(layer, k, call)
        y = None  # allocated with the first segment
        for d, reverse in enumerate(layer._strands):
            state, before = initial[len(finals)], []
            for segment in trimmed(layer, in_order(call.segments, reverse)):
                first = state
                saved, (state,), part = _run(layer, below, (k, d), segment, state, call)
                before.append(layer.ops.all_states(saved)[0] if call.all_states else first)
                y = _whole(layer, k, part, call.segments) if y is None else y
                P = part.shape[2]
                layer.ops.copy_steps(y[segment, :, d * P : (d + 1) * P], part)
                del saved, part  # before the next segment needs memory
            finals.append(state)
            borders.append(before)
        if call.save:
            call.saved.append(SavedInput(below, borders))
        y = to_next(layer, k, y, below, silent, call.masks[k])
    return y, finals


def backward_by_direction(layer, all_saved, doutput, arrived, call):
    """The gradient with respect to the input; uses up ``all_saved`` and moves ``arrived`` on."""
    dy = doutput
    for k in reversed(range(layer.num_layers)):
        saved = all_saved.pop()
        if call.masks[k] is not None and dy is not None:
            dy = drop(layer, dy, call.masks[k])
        T, B, I = saved.x.shape
        dx = (layer.ops.empty if k == 0 else layer.ops.empty_steps)(T, B, I, layer.dtype)
        for d, reverse in enumerate(layer._strands):
            states = saved.borders[d][::-1]
            for segment, state in zip(trimmed(layer, in_order(call.segments, not reverse)), states, strict=True):
                again = _run(layer, saved.x, (k, d), segment, state, call, again=True)[0]
                _back(layer, again, (k, d), (dy, dx), segment, arrived)
                del again  # before the next segment needs memory
        dy = with_residual(layer, k, dx, dy, _silent(layer, k, call))
    return dy


def _run(layer, x, place, segment, state, call, again=False):
    """One segment of one strand: ``SavedLayer``, final states, output. place: (layer, strand). again: whether it is for
    backward, from a border of ``SavedInput``."""
    k, d = place
    marks, masks = layer_marks(layer, call.bits, call.resets, k, segment), masks_within(call.cell_masks[k], segment)
    options = RunOptions(
        layer._strands[d : d + 1], again or call.all_states, k == layer.num_layers - 1 and not again, layer.schedule,
        masks=masks and masks[d : d + 1], marks=marks and marks[d : d + 1],
    )  # fmt: skip
    weights = dropped_weights(layer, k, call.weight_masks[k])[d : d + 1]
    lengths = lengths_within(call.lengths, segment)
    part = x[segment] if k else without_unread(layer, x, segment, call)
    run = layer.ops.layer_rebuild if again and call.all_states else layer.ops.layer_forward
    return run(layer.cell, part, weights, [state], lengths, options)


def _back(layer, saved, place, outer, segment, arrived):
    """One segment of one strand back. outer: the gradients with respect to the layer's output and to its input,
    which is written to."""
    (k, d), (dy, dx) = place, outer
    gradients, dstates, dresets = arrived.gradients[k], arrived.dstates[k], arrived.dresets[k]
    P = saved.passes[0].h.shape[2]
    saved.passes[0].dreset = dresets[d]
    part = None if dy is None else dy[segment, :, d * P : (d + 1) * P]
    record = None if gradients.record is None else lambda _, terms: gradients.record(d, terms)
    of_strand = gradients._replace(weights=gradients.weights[d : d + 1], record=record)
    into = dx[segment] if d else None
    dx_part, (dstates[d],), (dresets[d],) = layer.ops.layer_backward(
        saved, of_strand, part, dstates[d : d + 1], None, k == 0, into
    )
    if not d:
        layer.ops.copy_steps(dx[segment], dx_part)


def _whole(layer, k, part, segments):
    """An array for the output of layer ``k``, in the memory order that a call in one piece gives it."""
    _, B, P = part.shape
    T, F = steps_of(segments), P * len(layer._strands)
    if k < layer.num_layers - 1 and part.strides[2] > part.strides[1]:  # array code, whatever the backend
        return layer.xp.empty((F, T, B), part.dtype).transpose(1, 2, 0)
    return layer.ops.empty(T, B, F, part.dtype)


def _silent(layer, k, call):
    """A function that sets an array over all of time to zero where the output of layer ``k`` is zero."""
    marks = layer_marks(layer, call.bits, call.resets, k, slice(None))
    return partial(layer.ops.zero_silent, lengths=call.lengths, marks=marks and marks[0])
