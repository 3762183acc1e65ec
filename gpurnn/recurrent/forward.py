"""The forward pass: the stack's time loops, segment by segment and layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import shards
from .._typing import Array
from ..backends.batch_statistics import BatchStatistics
from ..backends.records import RunOptions
from ..backends.streams import ONE_STREAM
from ..errors import check_flag
from ..gradients import active_flow
from ..masks import check_lengths, check_steps
from ..module import refuse_quantized
from .axes import check_input, outward
from .backward import make_backward
from .between import to_next
from .checkpoints import Border, Whole, without_unread
from .directions import forward_by_direction
from .dropout import cell_masks, dropout_masks, dropped_weights, masks_within, weight_masks
from .heads import split
from .marks import direction_bits, layer_marks
from .segments import concurrent_layers, layer_problems, lengths_within, time_segments, trimmed
from .state import initial_state, own_state, pack_state, restore_unused, zero_unused
from .steps import copied_steps, outward_steps


class Given(NamedTuple):
    """What a call was given besides x."""

    state: Any = None
    lengths: Any = None
    reset: Any = None
    mask: Any = None


@dataclass(slots=True)
class Call:
    """One call of a layer, as its forward and backward passes share it.

    segments: slices of time in the order of the time loop. all_states: as ``Segments.states``. masks: for each layer
    the dropout mask of its outputs, or None. cell_masks: for each layer, for each strand the masks of the cell's draws,
    or None; weight_masks: of W_hh. lengths: (B,), None where all sequences have T timesteps. masked: whether there is a
    mask. bits: for each direction those of its ``Marks``, or None; resets: for each pass the state that a reset gives,
    or None. single: whether x came as one sequence. state_given: whether the caller gave the initial state;
    reset_to_given: whether resets give it again, too. save: whether a backward will follow. return_all: whether the
    caller wants all ``Steps``. saved: for each segment, for each layer, its ``SavedLayer``, or the ``Border`` from
    which that is made again; with two directions, where ``memory`` cuts time, for each layer its ``SavedInput``.
    """

    segments: list[slice]
    all_states: bool
    masks: list[Array | None]
    cell_masks: list[tuple[Array, ...] | None]
    weight_masks: list[list[Array] | None]
    lengths: Array | None
    masked: bool
    bits: list[Array] | None
    resets: list[tuple[Any, ...]] | None
    single: bool
    state_given: bool
    reset_to_given: bool
    save: bool
    return_all: bool
    saved: list[Any] | None = field(default_factory=list)


def run_forward(layer, x, given, return_all, *, save, retain=False, reset_to=None):
    """A call of ``layer``: (output, state), then ``backward`` with ``save``, then the steps with ``return_all``.

    given: ``Given``. reset_to: instead of the layer's.
    """
    return_all, retain = check_flag("return_all", return_all), check_flag("retain", retain)
    if save:
        refuse_quantized(layer, "forward")
    x, single = check_input(layer, x)
    T, B, _ = x.shape
    layer.ops.refuse_sizes(T, B, lambda: [(one, save, layer.schedule) for one in layer_problems(layer, T, B, save)])
    if layer.cell.over_batch and layer.training and shards.sequences(B) == 1:
        raise ValueError("batch_norm: one sequence has no statistics to train with: give more, or call eval() first")
    if not (save or return_all) and _is_plain(layer, given):
        y, final = _run_plain(layer, x, initial_state(layer, given.state, B, single))
        return outward(layer, y, single), pack_state(layer, final, single)
    call = _new_call(layer, x.shape, given, single, save, return_all)
    initial = before = initial_state(layer, given.state, B, single)
    if save and given.state is not None and (call.bits is not None or layer.memory is not None):
        # backward reads it again, and the caller may write the new state into it
        initial = before = [tuple(part.copy() for part in parts) for parts in before]
    if call.lengths is not None and given.state is not None:
        initial = zero_unused(layer, before, call.lengths)
    if given.reset is not None:
        call.reset_to_given = given.state is None or (reset_to or layer.reset_to) == "given"
        call.resets = initial if call.reset_to_given else own_state(layer, B)
    y, final, steps = _time_loop(layer, x, initial, call)
    if any(one[0] is not None for one in (call.masks, call.cell_masks, call.weight_masks)):
        layer.calls += 1
    if initial is not before:
        final = restore_unused(layer, final, before, call.lengths)
    returned = [outward(layer, y, single), pack_state(layer, final, single)]
    if save:
        returned.append(make_backward(layer, call, y.shape, retain))
    if return_all:
        returned.append([outward_steps(layer, one, single) for one in steps])
    return tuple(returned)


def _is_plain(layer, given):
    """Whether a call without backward is its layers one after another, and nothing else."""
    if layer.training and (layer.dropout or layer.weight_dropout or layer.cell.draws):
        return False
    nothing = given.lengths is given.reset is given.mask is None
    return nothing and not (layer.memory or layer.wavefront or layer.cell.over_batch)


def _run_plain(layer, x, initial):
    """The output (T, B, D*P) and the final states of such a call, without what others need to be shared and saved."""
    D, y, final = len(layer._strands), x, []
    for k in range(layer.num_layers):
        below, last = y, k == layer.num_layers - 1
        options = RunOptions(layer._strands, False, last, layer.schedule, inference=True)
        states = initial[k * D : (k + 1) * D]
        _, states, y = layer.ops.layer_forward(layer.cell, below, layer._weights(k), states, None, options)
        final += states
        y = to_next(layer, k, y, below, silent=lambda steps: steps, mask=None)
    return y, final


def _new_call(layer, shape, given, single, save, return_all):
    """The ``Call`` for x of this shape (T, B, I), checked; without ``resets``."""
    T, B, _ = shape
    lengths = _checked_lengths(given.lengths, T, B, single, layer.batch_first)
    reset, mask = (check_steps(layer, getattr(given, name), T, B, single, name) for name in ("reset", "mask"))
    marked = any(one is not None for one in (lengths, reset, mask))
    if reset is not None and layer.cell.over_batch:
        raise ValueError("reset: batch_norm has statistics of each timestep from the beginning of a call")
    segments = time_segments(layer, T, B, return_all or active_flow() is not None, marked, save)
    return Call(
        segments=segments.slices,
        all_states=segments.states,
        masks=dropout_masks(layer, T, B),
        cell_masks=cell_masks(layer, T, B),
        weight_masks=weight_masks(layer),
        lengths=lengths,
        masked=mask is not None,
        bits=direction_bits(layer, reset, mask, lengths, (T, B)),
        resets=None,
        single=single,
        state_given=given.state is not None,
        reset_to_given=True,
        save=save,
        return_all=return_all,
    )


def _checked_lengths(lengths, T, B, single, batch_first):
    """The lengths as (B,), None where every sequence has T timesteps."""
    if lengths is None:
        return None
    lengths = [lengths] if single and np.ndim(lengths) == 0 else lengths
    lengths = check_lengths(lengths, T, B, batch_first=batch_first)
    return None if bool((lengths == T).all()) else lengths


def _time_loop(layer, x, initial, call):
    """The output (T, B, D*P), the final states, and the ``Steps`` of every pass; fills ``call.saved``."""
    D, cut = len(layer._strands), layer.memory is not None and len(call.segments) > 1
    if cut and len(set(layer._directions)) > 1:
        return *forward_by_direction(layer, x, initial, call), []
    states = [initial[k * D : (k + 1) * D] for k in range(layer.num_layers)]  # where each layer has arrived
    output, steps = Whole(layer, call.segments, len(x)), []
    with layer.ops.streams(concurrent_layers(layer, call.segments)) as streams:
        for segment in trimmed(layer, call.segments):
            # backward begins with the last segment, so its gates are saved
            again = cut and segment is not call.segments[-1]
            border = Border(x, [list(one) for one in states], _saved_again) if again else None
            y, saved, part_steps = _stack(layer, x, states, segment, call, streams, not again or call.all_states)
            if again and call.all_states:
                border.states = [layer.ops.all_states(one) for one in saved]
            output.add(segment, y)
            call.saved.append(border or saved)
            steps += part_steps
            del y, saved  # before the next segment needs memory
    return output.array, [state for layer_states in states for state in layer_states], steps


def _saved_again(layer, border, segment, call):
    """The ``SavedLayer`` of every layer in a segment, from its ``Border``."""
    states = [list(one) for one in border.states]
    return _stack(layer, border.x, states, segment, call, ONE_STREAM, save=True, again=True)[1]


def _stack(layer, x, states, segment, call, streams, save, again=False):
    """One segment through all layers: output, the ``SavedLayer`` of each, and the ``Steps``; moves ``states`` on.

    save: whether to return what the layers save. again: whether it is for backward, from the states of a ``Border``.
    """
    y = without_unread(layer, x, segment, call)
    lengths = lengths_within(call.lengths, segment)
    all_saved, steps, save = [], [], save and (call.save or call.return_all)
    run = layer.ops.layer_rebuild if again and call.all_states else layer.ops.layer_forward
    for k in range(layer.num_layers):
        last = k == layer.num_layers - 1
        cell_masks = masks_within(call.cell_masks[k], segment)
        statistics = batch_statistics(layer, k, update=call.save)
        marks = layer_marks(layer, call.bits, call.resets, k, segment)
        options = RunOptions(
            layer._strands, save, last and not again, layer.schedule, streams.count, cell_masks, statistics, marks,
            inference=not call.save,
        )  # fmt: skip
        with streams.on(k, after=k - 1):
            weights, below = dropped_weights(layer, k, call.weight_masks[k]), y
            saved, states[k], y = run(layer.cell, y, weights, states[k], lengths, options)
            if call.return_all:
                steps += copied_steps(layer, saved.passes, lengths)
            silent = partial(layer.ops.zero_silent, lengths=lengths, marks=marks and marks[0])
            mask = None if call.masks[k] is None else call.masks[k][segment]
            y = to_next(layer, k, y, below, silent, mask)
        if save or streams.count > 1:  # a stream may still read what another has written
            all_saved.append(saved)
    return y, all_saved, steps


def batch_statistics(layer, k, update):
    """For each strand of a layer its ``BatchStatistics``; None for a cell that does not normalize over the batch."""
    if not layer.cell.over_batch:
        return None
    found = []
    for d in range(len(layer._directions)):
        both = [layer.buffers[name + layer._suffix(k, d)] for name in ("running_mean", "running_var")]
        if update and not layer.training:  # backward reads them, too, and training may move them until then
            both = [array.copy() for array in both]
        for parts in zip(*(split(array, layer.heads) for array in both), strict=True):
            found.append(BatchStatistics(*parts, update and layer.training))
    return tuple(found)
