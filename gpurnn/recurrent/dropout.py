"""Random masks: of the dropout between the layers of a stack, and of what cells draw."""

import contextlib
from dataclasses import replace

from .. import rng, shards
from ..per_sample.recording import recording_of
from .heads import split_masks


def dropout_masks(layer, T, B):
    """For each layer the mask of its outputs, None where nothing is dropped: after the last layer, and in evaluation
    mode."""
    if not (layer.training and layer.dropout > 0):
        return [None] * layer.num_layers
    layers = range(layer.num_layers - 1)
    return [draw_mask(layer, k, (T, B, layer._sizes(k + 1)[0]), layer.calls) for k in layers] + [None]


def draw_mask(layer, k, shape, call):
    """Which outputs of layer ``k`` reach the next one, in the memory order of these outputs."""
    key = rng.name_key(f"{layer.name}.between{k}")
    mask = shards.dropout_mask(layer.ops, shape, layer.dropout, layer.seed, key, call, axis=1)
    placed = layer.ops.empty_steps(*shape, mask.dtype)
    if placed.strides == mask.strides:
        return mask
    layer.ops.copy_steps(placed, mask)
    return placed


def drop(layer, x, mask):
    """x / (1 - rate) where the mask is set, else zero: outputs and their gradients alike."""
    scale = 0.0 if layer.dropout == 1 else 1 / (1 - layer.dropout)
    out = layer.ops.empty_steps(*x.shape, layer.dtype)
    layer.xp.multiply(x, mask, out=out)
    layer.xp.multiply(out, layer.dtype.type(scale), out=out)
    return out


def cell_masks(layer, T, B):
    """For each layer the ``masks`` of ``RunOptions``: for each strand those of the cell's draws. None without."""
    draws = layer.cell.draws
    if not draws:
        return [None] * layer.num_layers
    steps = T if any(draw.each == "timestep" for draw in draws) else min(T, 1)
    masks = [[] for _ in range(layer.num_layers)]
    for _, k, _, suffix in layer._passes():
        H = layer._sizes(k)[1]
        whole = layer.xp.empty((steps, B, len(draws) * H), bool)
        for n, draw in enumerate(draws):
            shape = (steps if draw.each == "timestep" else min(T, 1), B, H)
            key = rng.name_key(f"{layer.name}.{draw.name}{suffix}")
            mask = shards.dropout_mask(layer.ops, shape, draw.rate, layer.seed, key, layer.calls, axis=1)
            whole[:, :, n * H : (n + 1) * H] = mask
        masks[k] += split_masks(whole, len(draws), layer.heads)
    return [tuple(directions) for directions in masks]


def masks_within(masks, segment):
    """The ``masks`` of a segment of time."""
    return None if masks is None else tuple(mask if len(mask) == 1 else mask[segment] for mask in masks)


# ---- of the recurrent weights (Merity, Keskar, Socher 2018)


def weight_masks(layer):
    """For each layer, for each strand which of W_hh's weights are there in this call; None where all are."""
    if not (layer.training and layer.weight_dropout):
        return [None] * layer.num_layers
    masks = [[] for _ in range(layer.num_layers)]
    for _, k, _, suffix in layer._passes():
        name = "weight_hh" + suffix
        if name in layer.params:
            key = rng.name_key(f"{layer.name}.{name}.dropped")
            shape = layer.params[name].shape
            mask = layer.ops.dropout_mask(shape, layer.weight_dropout, layer.seed, key, layer.calls)
            masks[k] += [mask] if layer.heads == 1 else list(mask)
    return [directions or None for directions in masks]


def dropped_weights(layer, k, masks):
    """The ``Weights`` of layer ``k`` in this call."""
    weights = layer._weights(k)
    if masks is None:
        return weights
    return [replace(w, hh=_masked(layer, w.hh, mask), ready=None) for w, mask in zip(weights, masks, strict=True)]


@contextlib.contextmanager
def all_gradients(layer, masks):
    """The ``Gradients`` of all layers, for a backward pass from its beginning to its end. masks: from ``weight_masks``.

    Dropped weights are left out at the end alone, so that a gradient is one sum over time whatever its segments are.
    """
    with contextlib.ExitStack() as stack:
        into = dropped_gradients if recording_of(layer) is None else recorded_gradients
        yield [stack.enter_context(into(layer, k, one)) for k, one in enumerate(masks)]


@contextlib.contextmanager
def dropped_gradients(layer, k, masks):
    """The ``Gradients`` of layer ``k``: those of dropped weights are zero."""
    gradients = layer._gradients(k)
    if masks is None:
        yield gradients
        return
    # W_hh of a direction may be frozen, and then has no gradient
    whole = [g if g.hh is None else replace(g, hh=layer.xp.zeros(g.hh.shape, g.hh.dtype)) for g in gradients.weights]
    yield gradients._replace(weights=whole)
    with gradients.lock:
        for g, part, mask in zip(gradients.weights, whole, masks, strict=True):
            if g.hh is not None:
                g.hh += _masked(layer, part.hh, mask)


@contextlib.contextmanager
def recorded_gradients(layer, k, masks):
    """``Gradients`` of layer ``k`` that are recorded for each sequence instead of added."""
    recording = recording_of(layer)

    def record(strand, terms):
        d, head = divmod(strand, layer.heads)
        for name, gradient, read, start in terms:
            mask, rows, name = None, slice(start, start + gradient.shape[2]), name + layer._suffix(k, d)
            if name.startswith("weight_hh") and masks is not None:
                mask = _scaled_mask(layer, masks[strand])[rows]
            if layer.heads > 1:
                start += recording.one_of_heads(layer, name, head)
            recording.add(layer, name, gradient, read, start, mask)

    yield layer._gradients(k)._replace(record=record)


def _masked(layer, weight, mask):
    return weight * _scaled_mask(layer, mask)


def _scaled_mask(layer, mask):
    """What weights and their gradients are multiplied by: 0, or 1 / (1 - rate)."""
    scale = 0.0 if layer.weight_dropout == 1 else 1 / (1 - layer.weight_dropout)
    return mask * layer.compute_dtype.type(scale)
