"""States: from the caller's form to one tuple a strand, and back.

Inside, a state is a list with one entry for each strand (layer, direction, head), in the order of the state: a tuple of
arrays (B, size), one for each state of the cell. Gradients with respect to a state have the same form, and None stands
for zeros.
"""

from __future__ import annotations

from typing import NamedTuple

from ..arrays import refuse_function
from ..errors import ShapeError, check_shape
from .heads import join_states, split_states


class StateKind(NamedTuple):
    """One kind of state. name: "h", "c". sizes: in each layer. equal: whether these are equal."""

    name: str
    sizes: tuple[int, ...]
    equal: bool


def state_kinds(cell, layer_sizes):
    """The ``StateKind`` of every state of a cell; h is what a projection makes smaller. layer_sizes: (I, H, P) of each
    layer."""
    kinds = []
    for name in cell.states:
        sizes = tuple(P if name == cell.states[0] else H for _, H, P in layer_sizes)
        kinds.append(StateKind(name, sizes, len(set(sizes)) == 1))
    return tuple(kinds)


def state_dtype(layer, kind):
    """The dtype in which a state is stored, within a call and between calls: the output is rounded to the layer's dtype
    at every timestep, the others are sums over time."""
    return layer.dtype if kind == layer.cell.states[0] else layer.compute_dtype


def as_state(layer, array, kind, name):
    """``array`` as a state, or as a gradient with respect to one: in the dtype of the state or of the layer."""
    given = layer.ops.asarray(array, name)
    return given if given.dtype == state_dtype(layer, kind) else layer.ops.asfloat(array, layer.dtype, name)


def state_parts(cell, state, name):
    """``state``, a tuple with one part for each state of ``cell``. Raises ShapeError for another number of parts."""
    refuse_function(name, state)
    few = {2: "a pair", 3: "a triple"}
    wanted = f"{few.get(len(cell.states), f'{len(cell.states)} arrays')} ({', '.join(cell.states)})"
    if not isinstance(state, (tuple, list)):
        raise ShapeError(f"{name}: expected {wanted}, got {type(state).__name__}")
    if len(state) != len(cell.states):
        raise ShapeError(f"{name}: expected {wanted}, got a {type(state).__name__} of {len(state)}")
    return state


def initial_state(layer, state, B, single):
    """For each strand the initial state: the caller's, the learned one, or zeros."""
    return own_state(layer, B) if state is None else unpack_state(layer, state, B, single, "state")


def own_state(layer, B):
    """For each strand the initial state that the layer itself has: the learned one, or zeros."""
    if not layer.learn_state:
        return [(0.0,) * len(layer.cell.states)] * (layer.num_layers * len(layer._strands))
    initial = []
    for _, _, _, suffix in layer._passes():
        rows = [
            layer.params[f"initial_{kind}{suffix}"].astype(state_dtype(layer, kind), copy=False)
            for kind in layer.cell.states
        ]
        initial.append(tuple(layer.xp.broadcast_to(row, (B, row.size)) for row in rows))
    return split_states(initial, layer.heads)


def own_arrays(layer, B):
    """``own_state`` with an array (B, size) for each state."""
    found = []
    for number, own in enumerate(own_state(layer, B)):
        _, H, P = layer._sizes(number // len(layer._strands))
        sizes = (P // layer.heads, *[H // layer.heads] * (len(own) - 1))
        dtypes = [state_dtype(layer, kind) for kind in layer.cell.states]
        parts = zip(own, dtypes, sizes, strict=True)
        found.append(
            tuple(layer.xp.broadcast_to(layer.xp.asarray(one, dtype), (B, size)) for one, dtype, size in parts)
        )
    return found


def zero_unused(layer, states, lengths):
    """The initial states, zero for the sequences of length 0.

    No timestep reads those; but a NaN there, times the zero gradient of a timestep that is not computed, would reach
    the weights' gradient. The same holds for the gradients with respect to the final states of these sequences.
    """
    if lengths.all():
        return states
    unused = layer.xp.asarray(lengths == 0)[:, None]
    zeroed = [tuple(None if part is None else part.copy() for part in parts) for parts in states]
    for part in (part for parts in zeroed for part in parts if part is not None):
        layer.xp.copyto(part, 0, where=unused)
    return zeroed


def restore_unused(layer, final, given, lengths):
    """The final states, with those of the sequences of length 0 as the caller gave them. Of gradients: those with
    respect to the initial states, with those of the final states in the same places."""
    unused = layer.xp.asarray(lengths == 0)[:, None]
    final = [tuple(part.copy() for part in parts) for parts in final]  # backward still reads the zeros
    for parts, firsts in zip(final, given, strict=True):
        for part, first in zip(parts, firsts, strict=True):
            layer.xp.copyto(part, 0 if first is None else first, where=unused)
    return final


def unpack_state(layer, state, B, single, name):
    """The caller's state -> for each strand a tuple of (B, size) arrays. ``name`` begins with "dstate" for gradients,
    where a part may be None. Raises ShapeError."""
    kinds, D = layer._state_kinds, len(layer._directions)
    paired = len(kinds) > 1
    parts = state_parts(layer.cell, state, name) if paired else (state,)
    columns = []
    for (kind, sizes, equal), part in zip(kinds, parts, strict=True):
        what = f"{name} {kind}" if paired else name
        if part is None and name.startswith("dstate"):
            columns.append([None] * (len(sizes) * D))
        elif equal:
            shape = (len(sizes) * D, B, sizes[0])
            if not paired:
                _refuse_pair(layer, part, len(shape[::2] if single else shape), what)
            columns.append(_checked_state(layer, part, kind, what, shape, single))
        else:
            columns.append(_unpack_unequal(layer, part, kind, sizes, B, single, what))
    return split_states(list(zip(*columns, strict=True)), layer.heads)


def _refuse_pair(layer, state, rank, name):
    """Raise ShapeError for a pair of arrays that have the ``rank`` of the whole state: the (h, c) of an LSTM."""
    if isinstance(state, (tuple, list)) and len(state) == 2 and getattr(state[0], "ndim", 0) == rank:
        raise ShapeError(f"{name}: expected h alone, got a pair: only an LSTM has c, this is a {type(layer).__name__}")


def _unpack_unequal(layer, part, kind, sizes, B, single, name):
    """One kind of state, given as one array for each layer because layers differ in size -> one array for each pass."""
    refuse_function(name, part)
    if not isinstance(part, (tuple, list)) or len(part) != layer.num_layers:
        raise ShapeError(f"{name}: expected one array for each of {layer.num_layers} layers of unequal size")
    D, rows = len(layer._directions), []
    for k, array in enumerate(part):
        if array is None and name.startswith("dstate"):
            rows += [None] * D
        else:
            rows += _checked_state(layer, array, kind, f"{name}[{k}]", (D, B, sizes[k]), single)
    return rows


def pack_state(layer, parts, single):
    """For each strand a tuple of (B, size) arrays -> the caller's state."""
    parts, packed = join_states(layer.xp, parts, layer.heads), []
    for k, (kind, _, equal) in enumerate(layer._state_kinds):
        dtype = state_dtype(layer, kind)
        rows = [part[k][0] if single else part[k] for part in parts]
        rows = [row if row.dtype == dtype else row.astype(dtype) for row in rows]
        if len(rows) == 1:
            packed.append(rows[0][None])
        elif equal:
            packed.append(layer.xp.stack(rows))
        else:
            D = len(layer._directions)
            packed.append(tuple(layer.xp.stack(rows[n * D : (n + 1) * D]) for n in range(layer.num_layers)))
    return tuple(packed) if len(packed) > 1 else packed[0]


def _checked_state(layer, array, kind, name, shape, single):
    """The rows (B, size) of a state of this ``shape``; ShapeError for another."""
    array, expected = as_state(layer, array, kind, name), shape[::2] if single else shape
    if array.shape != expected:
        check_shape(name, array, expected)
    return list(array[:, None] if single else array)
